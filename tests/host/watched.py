"""A watched directory and a real store, with the daemon's part of the work done by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reconciler.core.desired import Vm
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Loop, Settings
from reconciler.host.store import Store
from reconciler.look import Observer
from reconciler.source import Reading, Source
from tests.core.builders import HUB, NOW, a_settings


def vm(name: str, run: str = "r1", **more: str) -> str:
    """One VM as it is written, on one line."""
    extra = "".join(f", {key}: {value}" for key, value in more.items())
    return (
        f"  - {{name: {name}, vm: {{path: /DC1/vm/{more.get('path', name)}}}, "
        f"backup: {{run: {run}}}, disks: [{{key: 2000, size: 1GiB}}]"
        f"{extra if 'path' not in more else ''}}}\n"
    )


def spec(*names: str, run: str = "r1") -> str:
    """A file that declares some VMs."""
    return "vms:\n" + "".join(vm(name, run) for name in names) if names else "vms: []\n"


class Site:
    """A state directory, a directory of specs, and a clock that only moves when it is told to."""

    def __init__(self, tmp_path: Path, **loop: Any) -> None:
        self.state = tmp_path / "state"
        self.state.mkdir()
        self.specs = tmp_path / "specs"
        self.specs.mkdir()
        self.settings: Settings = a_settings(
            state=str(self.state), loop=Loop(**loop), repositories={"local": str(tmp_path)}
        )
        self.store = Store(self.state, HUB)
        self.eyes = Observer(self.settings, {})
        self.now = NOW
        self.source = self.watch()
        self.reading: Reading | None = None

    def watch(self, **options: Any) -> Source:
        """As a daemon does when it starts."""
        self.source = Source(str(self.specs), self.settings, describe=lambda _: None, **options)
        return self.source

    def close(self) -> None:
        self.store.close()

    def ledger(self) -> Ledger:
        return self.store.ledger()

    def write(self, files: Mapping[str, str | bytes | None]) -> None:
        for name, text in files.items():
            path = self.specs / name
            path.parent.mkdir(exist_ok=True, parents=True)
            if text is None:
                path.unlink()
            elif isinstance(text, bytes):
                path.write_bytes(text)
            else:
                path.write_text(text)

    def read(self, later: float = 10.0) -> Reading:
        """Read, and write down what was read."""
        self.now += later
        self.reading = self.source.read(self.ledger(), self.now)
        self.reading.note(self.store, "test", self.now)
        return self.reading

    def apply(self, later: float = 10.0) -> Mapping[str, Vm]:
        """Read, and note as applied whatever is desired; what is desired."""
        reading = self.read(later)
        ledger = self.ledger()
        desired = reading.desired(ledger)
        for name in reading.vms:
            alone = reading.vm(name, ledger).vms
            assert alone == {n: v for n, v in desired.vms.items() if n == name}, name
        vms = {name: one.to_json() for name, one in desired.vms.items()}
        self.store.apply(self.settings.to_json(), vms, self.now)
        return desired.vms

    def exported(self, later: float = 10.0) -> set[str]:
        """What should be exported now."""
        return {name for name, one in self.apply(later).items() if one.exported}

    def held(self) -> dict[str, str]:
        """VM → why it is held, as `status` finds it."""
        return {name: why[0] for name, why in self.ledger().source["held"].items()}

    def message(self, name: str) -> str:
        return str(self.ledger().source["held"][name][1])
