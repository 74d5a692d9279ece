"""watch, reload: the daemon that keeps a directory true."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import options
from reconciler.cli.hearing import Ears
from reconciler.cli.serving import alone, opened
from reconciler.core.errors import Exit, HostError
from reconciler.core.units import Seconds
from reconciler.host import lock
from reconciler.host.files import SPECS, secret
from reconciler.loop import load_settings

if TYPE_CHECKING:
    from reconciler.core.settings import Secret, Settings


@click.command()
@click.argument("directory", default=None, required=False, metavar="[DIR]")
@click.option("--git", "url", metavar="URL", help="Watch a branch of this repository instead.")
@click.option("--branch", metavar="B", help="With --git: which. [default: the config's, or main]")
@click.option(
    "--interval", type=options.Duration(), help="With --git: between two fetches. [default: 30s]"
)
@click.option("--allow-empty", is_flag=True, help="An empty directory is meant, this once.")
@options.extra_vars
@options.lock_timeout
@click.pass_obj
def watch(
    config: str | None,
    directory: str | None,
    url: str | None,
    branch: str | None,
    interval: Seconds | None,
    allow_empty: bool,
    extra: tuple[str, ...],
    lock_timeout: Seconds,
) -> int:
    """Keep a directory of specs true, until it is stopped. [default: specs/]

    Heals servers that end, acts on files that are saved, takes callbacks, and carries out what
    other commands ask for. SIGHUP reads the config again. SIGTERM or Ctrl-C end it; the servers
    stay, and the next start takes them over.
    """
    from reconciler.cli.activation import handed_over
    from reconciler.cli.observing import Told
    from reconciler.daemon import Daemon
    from reconciler.desk import DaemonDesk
    from reconciler.host import systemd
    from reconciler.host.git import describe
    from reconciler.host.watching import Watch
    from reconciler.meters import CONTENT_TYPE
    from reconciler.notifier import Notifier
    from reconciler.reception import Reception
    from reconciler.source import Fetcher, Source, mirror_of

    if directory and url:
        raise click.UsageError("watch a directory or --git URL: one of the two")
    settings = load_settings(config, os.environ)
    mirror = None if directory else mirror_of(settings, os.environ, url or "", branch or "")
    if mirror is None and (branch or interval):
        raise click.UsageError("--branch and --interval go with --git URL, or `git:` in the config")
    command = options.who("reconciler watch")
    given = handed_over(settings.listen)
    told = Told()

    class Site(Daemon):
        """The loop, with its callbacks and its commands."""

        ears: Ears | None = None

        def signing(self) -> Secret | None:
            """What messages are signed with. Raises HostError."""
            ref = self.settings.notify.secret
            return secret(ref, self.environment) if ref else None

        def alive(self) -> str:
            failure = told.notifier.failure if told.notifier else None
            if failure:
                return f"the notifier ended: {failure}"
            if fetching.is_set() and fetcher and not fetcher.alive:
                return "the fetcher ended"
            return super().alive()

        def _take_config(self) -> None:
            super()._take_config()
            if self.ears:
                self.ears.renew(self.settings)

        @contextmanager
        def attached(self) -> Iterator[None]:
            with ExitStack() as stack:
                reception = Reception(self)
                stack.callback(reception.close)
                stack.enter_context(alone(self.settings, command))
                ears = Ears(
                    self.settings,
                    command,
                    kick=self.kick,
                    ended=lambda: self.fail(HostError("callbacks are not taken any more")),
                    vital=Vitals(self),
                    given=given,
                    say=told.said,
                    desk=lambda: DaemonDesk(self),
                )
                stack.callback(ears.close)
                opened(ears)
                self.ears = ears
                if ears.said:
                    told.said(ears.said)
                told.notifier = notifier = Notifier(
                    self.store, lambda: self.settings.notify, self.signing, told.said
                )
                notifier.start()
                stack.callback(notifier.close)
                if fetcher:
                    fetcher.kick = self.reread
                    fetcher.start()
                    fetching.set()
                    stack.callback(fetcher.stop)
                yield

    class Vitals:
        """What the daemon says of itself."""

        def __init__(self, daemon: Daemon) -> None:
            self.daemon = daemon

        def alive(self) -> str:
            return self.daemon.alive()

        def ready(self) -> str:
            if not self.daemon.ready:
                return "not every VM was looked at yet"
            try:
                self.daemon.store.ledger()
            except HostError as error:
                return str(error)
            return ""

        def exposition(self) -> tuple[bytes, str]:
            return told.meters.exposition(), CONTENT_TYPE

    fetching = threading.Event()
    fetcher = None
    if mirror:
        fetcher = Fetcher(mirror, interval or settings.git.interval, lambda: None)
    watched = str(mirror.current) if mirror else directory or SPECS

    def source(now: Settings) -> Source:
        return Source(
            watched,
            now,
            describe=mirror.describe if mirror else describe,
            fetcher=fetcher,
            allow_empty=allow_empty,
            environment=os.environ,
            extra=options.extra_texts(extra),
        )

    daemon = Site(
        settings,
        os.environ,
        source=source,
        watch=Watch,
        reload=partial(load_settings, config, os.environ),
        observers=told,
        command=command,
        lock_timeout=lock_timeout,
    )
    told.trouble = daemon.alive
    if asked := systemd.watchdog():
        daemon.beat_every = min(daemon.beat_every, asked / 2)
    return daemon.run()


@click.command()
@options.quiet
@click.pass_obj
def reload(config: str | None) -> int:
    """Have the daemon read its config again; a bad one is refused, and it keeps the old."""
    settings = load_settings(config, os.environ)
    holder = lock.holder(Path(settings.state) / "lock")
    if holder is None or "watch" not in holder.command:
        raise HostError(f"no daemon watches for hub {settings.hub} ({settings.state})")
    os.kill(holder.pid, signal.SIGHUP)
    options.say(f"asked {holder} to read its config again; see its log, or reconciler events")
    return Exit.OK
