"""What a tunnel costs: its rate beside direct loopback, per cipher, split or not, and its start.

    python -m bench.tunnel [--rounds N] [--size MIB] [--json FILE]

Two hosts of its own (tests/lab.py), a real sshd, real ssh processes dialled by `reconciler apply`.
All that is compared is measured in turns within one run; figures are medians, with the least and
the most. Needs root, openssh-server, iproute2, qemu-utils and libnbd-bin.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.e2e.site import Site, until
from tests.e2e.zygote import end as end_zygote
from tests.lab import Lab, laboratory, missing

CIPHERS: Final = (
    "",
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
)
"""Empty: what the two ends choose by themselves."""
PORT: Final = 10100
ASKED: Final = """
import http.client, sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    began = time.monotonic()
    line = http.client.HTTPConnection("127.0.0.1", 8082, timeout=30)
    line.request("GET", "/healthz"); line.getresponse().read(); line.close()
    print(time.monotonic() - began)
    time.sleep(0.02)
"""
"""One question after the other at the hub's API, as a client's telemetry; seconds of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="MiB of a copy")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if why := missing():
        sys.exit(f"cannot measure: {why}")
    with tempfile.TemporaryDirectory(prefix="bench-tunnel-") as folder:
        found = measured(Path(folder), given.rounds, given.size)
    end_zygote()
    print(table(found, given.size))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def measured(folder: Path, rounds: int, size: int) -> dict[str, Any]:
    """Every figure, as lists of what each round gave."""
    with laboratory(folder / "lab") as lab:
        lab.answering()
        sna = lab.sna(folder / "sna")
        source, image = folder / "source.raw", folder / "image.raw"
        with source.open("wb") as file:
            for number in range(size):
                file.write(number.to_bytes(4) * (1 << 18))
        subprocess.run(["truncate", "-s", f"{size}M", str(image)], check=True)
        serve = ["qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--cache=writeback"]
        lab.run_in(lab.hub_ns, [*serve, "--bind=127.0.0.1", f"--port={PORT}", str(image)])
        until(lambda: lab.connects(lab.hub_ns, PORT), "the server")
        copies: dict[str, list[float]] = {"direct": []}
        ups: list[float] = []
        for _ in range(rounds):
            copies["direct"].append(copied(lab, lab.hub_ns, source))
            for cipher in CIPHERS:
                ups.append(dialled(lab, sna, cipher, split=False))
                rates = copies.setdefault(cipher or "default", [])
                rates.append(copied(lab, lab.sna_ns, source))
        asked: dict[str, list[float]] = {}
        for _ in range(rounds):
            for split in (False, True):
                dialled(lab, sna, "", split=split)
                name = "split" if split else "whole"
                asked.setdefault(f"{name} idle", []).extend(questions(lab, 1.0))
                with copying(lab, source) as rates:
                    asked.setdefault(f"{name} busy", []).extend(questions(lab, 3.0))
                copies.setdefault(f"{name} with questions", []).extend(rates)
        sna.run("stop", "-y", "tunnel/hub-a", code=None)
    return {"MiB": size, "seconds": copies, "up": ups, "question": asked}


def dialled(lab: Lab, sna: Site, cipher: str, *, split: bool) -> float:
    """Seconds from `apply` to all forwards up, with what this needs of them."""
    sna.run("stop", "-y", "tunnel/hub-a", code=None)
    ciphers = {"ciphers": [cipher]} if cipher else {}
    lab.tunnel(sna, split=split, **ciphers)
    began = time.monotonic()
    sna.apply()
    return time.monotonic() - began


def copied(lab: Lab, namespace: str, source: Path) -> float:
    """Seconds that one copy takes, flushed at its end."""
    began = time.monotonic()
    said = lab.output(namespace, *copy_of(source))
    assert not said.strip(), said
    return time.monotonic() - began


def copy_of(source: Path) -> Sequence[str]:
    return ["nbdcopy", "--flush", str(source), f"nbd://127.0.0.1:{PORT}"]


@contextmanager
def copying(lab: Lab, source: Path) -> Iterator[list[float]]:
    """Copies, one after the other, until the block ends."""
    rates: list[float] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            rates.append(copied(lab, lab.sna_ns, source))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        time.sleep(0.2)
        yield rates
    finally:
        over.set()
        thread.join()


def questions(lab: Lab, seconds: float) -> list[float]:
    said = lab.output(lab.sna_ns, sys.executable, "-c", ASKED, str(seconds))
    return [float(line) for line in said.split()]


def table(found: dict[str, Any], size: int) -> str:
    """For people."""

    def of(values: Sequence[float], scale: Callable[[float], float], unit: str) -> str:
        some = sorted(map(scale, values))
        return f"{statistics.median(some):8.1f} {unit}  ({some[0]:.1f} to {some[-1]:.1f})"

    direct = statistics.median(found["seconds"]["direct"])
    lines = [f"copy of {size} MiB by nbdcopy, {len(found['seconds']['direct'])} rounds in turns"]
    for name, seconds in found["seconds"].items():
        ratio = direct / statistics.median(seconds)
        lines.append(
            f"  {name:32} {of(seconds, lambda s: size / s, 'MiB/s')}  {ratio:5.2f} of direct"
        )
    lines.append("question at the hub's API through the tunnel, ms")
    for name, seconds in found["question"].items():
        some = sorted(1000 * one for one in seconds)
        p99 = some[min(len(some) - 1, round(0.99 * len(some)))]
        lines.append(
            f"  {name:32} p50 {statistics.median(some):7.1f}   p99 {p99:7.1f}   "
            f"most {some[-1]:7.1f}"
        )
    up = of(found["up"], lambda s: 1000 * s, "ms")
    lines.append(f"apply until 102 forwards and the reverse port are up: {up}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
