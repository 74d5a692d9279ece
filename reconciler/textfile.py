"""How an apply went, for node_exporter's textfile collector: for who runs no daemon."""

from __future__ import annotations

import os
import tempfile
from collections import Counter as Tally
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from reconciler.core.errors import Exit, HostError
from reconciler.core.units import Seconds
from reconciler.execute import Step

VERDICTS: Final = (Exit.OK, Exit.PARTIAL, Exit.HELD, Exit.UNKNOWN, Exit.ERROR)
"""How a VM can come out of an apply."""
_SUCCESS: Final = "reconciler_apply_last_success_timestamp_seconds"


def write(
    path: Path,
    hub: str,
    code: int,
    verdicts: Mapping[str, Exit],
    steps: Collection[Step],
    now: Seconds,
) -> None:
    """Write how an apply went, whole or not at all. Raises HostError.

    Counts and times only. When the last success was is kept from the file as it is, if this is
    none.
    """
    registry = CollectorRegistry()

    def gauge(name: str, text: str, *more: str) -> Gauge:
        return Gauge(name, text, ("hub", *more), registry=registry)

    gauge("reconciler_apply_last_run_timestamp_seconds", "When the last apply ended").labels(
        hub
    ).set(now)
    gauge("reconciler_apply_exit_code", "Its exit code").labels(hub).set(code)
    success = now if code == Exit.OK else _last_success(path, hub)
    if success:
        gauge(_SUCCESS, "When an apply ended with exit code 0").labels(hub).set(success)
    vms = gauge("reconciler_apply_vms", "VMs in its scope, by how they came out", "verdict")
    tally = Tally(verdicts.values())
    for verdict in VERDICTS:
        vms.labels(hub, verdict.name.lower()).set(tally[verdict])
    done = gauge("reconciler_apply_steps", "Steps that it made", "action", "ok")
    for (kind, ok), count in sorted(Tally((s.action.kind, s.ok) for s in steps).items()):
        done.labels(hub, kind, str(ok).lower()).set(count)
    _replace(path, generate_latest(registry))


def _last_success(path: Path, hub: str) -> Seconds:
    """By the file as it is; 0: it does not say."""
    with suppress(OSError, ValueError):
        for family in text_string_to_metric_families(path.read_text("utf-8")):
            for sample in family.samples:
                if sample.name == _SUCCESS and sample.labels.get("hub") == hub:
                    return float(sample.value)
    return 0.0


def _replace(path: Path, data: bytes) -> None:
    """In one step. The collector reads *.prom, so not what is being written."""
    draft = ""
    try:
        fd, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)  # who reads it is another user
        os.replace(draft, path)
    except OSError as error:
        if draft:
            with suppress(OSError):
                os.unlink(draft)
        raise HostError(
            f"cannot write {path}: {error.strerror}; --textfile names a file, *.prom, in the "
            "directory of node_exporter's textfile collector, where this user may write"
        ) from error
