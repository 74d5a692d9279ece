"""Threads that are none: what `execute` hands to its pools is done one by one, in a drawn order.

Thousands of lives are lived in the time that starting threads would take, and each of them goes
the same way every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar
from unittest import mock

T = TypeVar("T")


class Job(Generic[T]):
    """What one call came to, or will."""

    def __init__(self, pool: OneByOne, work: Callable[[], T]) -> None:
        self.pool, self.work = pool, work
        self.value: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value.append(self.work())
        except BaseException as error:  # a Crash too: every thread of the process meets it
            self.error = error

    def result(self) -> T:
        """Raises what the call raised."""
        self.pool.catch_up()
        if self.error:
            raise self.error
        return self.value[0]


class OneByOne:
    """In the place of a ThreadPoolExecutor. Nothing runs before somebody waits for it."""

    def __init__(self, order: random.Random) -> None:
        self.order = order
        self.waiting: list[Job[Any]] = []

    def submit(self, work: Callable[..., T], *args: Any) -> Job[T]:
        job = Job(self, lambda: work(*args))
        self.waiting.append(job)
        return job

    def catch_up(self) -> None:
        """Do what was submitted; which goes first is anybody's guess, as with threads."""
        jobs, self.waiting = self.waiting, []
        self.order.shuffle(jobs)
        for job in jobs:
            job.run()

    def __enter__(self) -> OneByOne:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.catch_up()


@contextmanager
def one_by_one(seed: int = 0) -> Iterator[None]:
    """Within it, `execute` uses one thread: ours."""
    order = random.Random(seed)
    with mock.patch("concurrent.futures.ThreadPoolExecutor", lambda *_: OneByOne(order)):
        yield
