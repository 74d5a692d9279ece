"""Short answers for who watches over the process."""

from __future__ import annotations

from typing import Protocol

from fastapi.responses import PlainTextResponse, Response


class Vital(Protocol):
    """What a process says of itself, to who watches over it."""

    def alive(self) -> str:
        """Why it should be ended; empty: it moves."""
        ...

    def ready(self) -> str:
        """Why it is not ready; empty: it is."""
        ...

    def exposition(self) -> tuple[bytes, str]:
        """Its figures, and their media type."""
        ...


class Probes:
    """What a process says of itself, on one path each."""

    def __init__(self, vital: Vital) -> None:
        self.vital = vital

    def alive(self) -> Response:
        """200 as long as the loop moves."""
        return _probed(self.vital.alive())

    def ready(self) -> Response:
        """200 when every VM was looked at once, and the store can be read."""
        return _probed(self.vital.alive() or self.vital.ready())

    def metrics(self) -> Response:
        """Prometheus' text format."""
        body, kind = self.vital.exposition()
        return Response(body, media_type=None, headers={"Content-Type": kind})


def _probed(trouble: str) -> Response:
    return PlainTextResponse(f"{trouble or 'ok'}\n", 503 if trouble else 200)
