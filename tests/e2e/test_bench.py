"""The bench's quick form works, and writes what it says it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.bench import COMMANDS
from bench.figures import FLOOR, FORMAT_VERSION, TOOL, read
from bench.workplace import children, servers, timed

ROOT = Path(__file__).resolve().parents[2]


def test_the_quick_form_measures_the_tool_beside_the_floor(tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    line = [sys.executable, "-m", "bench.bench", "--quick", "--parts", "none"]
    timed([*line, "--json", str(written)], ROOT)
    value, found = read(written)
    assert value["format_version"] == FORMAT_VERSION == "2.0"
    assert value["runs"] == 2
    assert value["machine"]["peers"] == {}
    assert {"format_version", "machine", "runs", "figures", "curves"} <= value.keys()
    for one in value["figures"]:
        assert {"group", "name", "who", "unit", "values", "ratios"} <= one.keys()
        assert all(number >= 0 for number in one["values"] + one["ratios"])
    for name in ("cold, to the last call", "no-op", "heal", "stop"):
        for who in (FLOOR, TOOL):
            figure = found.find("10 disks", name, who)
            assert figure, (name, who)
            assert len(figure.values) == 2, (name, who)
        ours = found.find("10 disks", name, TOOL)
        assert ours and len(ours.ratios) == 2
    for name in ("cold, to its exit", "no-op, CPU", "no-op plan"):
        assert found.find("10 disks", name, TOOL), name
    for command in COMMANDS:
        assert found.find("start-up", command, TOOL), command


@pytest.mark.parametrize("path", ["qemu-nbd", "/usr/bin/qemu-nbd"])
def test_a_server_is_one_by_whatever_path_it_was_started(tmp_path: Path, path: str) -> None:
    """pm2 starts it by its path; overlooked, it would answer in place of the next peer's."""
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(512))
    socket = tmp_path / "s"
    line = [path, "--format", "raw", "--persistent", "--socket", str(socket), str(image)]
    process = subprocess.Popen(line)
    try:
        while not socket.exists():
            assert process.poll() is None
        assert process.pid in servers()
        assert process.pid in children()
    finally:
        process.kill()
        process.wait()
    assert process.pid not in servers()
