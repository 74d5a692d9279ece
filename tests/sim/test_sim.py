"""Lives drawn from seeds, and scripts that once broke something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sim.__main__ import main
from tests.sim.engine import (
    UNEXPECTED,
    broken,
    demand,
    run,
    script_from,
    script_of,
)
from tests.sim.events import EVENTS
from tests.sim.planted import the_post_is_sent_again_on_a_time_out

SEEDS, CASES = 240, 8
SOAK, CHUNK = 10_000, 500
REGRESSIONS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "regressions.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS // CASES))
def test_a_life_keeps_the_promises(first: int, count: Callable[[str, int], None]) -> None:
    total = demand(range(first, first + SEEDS // CASES))
    assert total.counts["steps"] > total.seeds
    count("simulated lives", total.seeds)
    count("simulated steps", total.counts["steps"])


@pytest.mark.parametrize("case", REGRESSIONS, ids=lambda case: case["why"])
def test_what_once_went_wrong_does_not(case: dict[str, Any]) -> None:
    run(script_from(case["script"]))


def test_a_seed_is_one_life() -> None:
    for seed in range(5):
        assert script_of(seed) == script_of(seed)
        assert run(script_of(seed)) == run(script_of(seed))


def test_a_script_is_the_same_when_it_was_written_down() -> None:
    script = script_of(7)
    assert script_from(json.loads(script.to_json())) == script


def test_everything_that_can_happen_happens_in_the_seeds_of_a_test() -> None:
    happened = {event[0] for seed in range(SEEDS) for event in script_of(seed).events}
    assert happened == EVENTS.keys()


def test_what_raises_breaks_something_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sim.life.plan", lambda *_: 1 / 0)
    found = broken(script_of(0))
    assert found is not None
    assert found.invariant == UNEXPECTED
    assert "ZeroDivisionError" in found.what


def test_the_command_shows_the_script_of_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--seeds", "3"]) == 0
    assert "3 seeds, " in capsys.readouterr().out
    the_post_is_sent_again_on_a_time_out(monkeypatch)
    assert main(["--seeds", "1500"]) == 1
    shown = capsys.readouterr().out
    assert "breaks: a run is started once" in shown
    file = tmp_path / "script.json"
    file.write_text(shown[shown.index("\n{") :])
    assert main(["--script", str(file)]) == 1
    monkeypatch.undo()
    assert main(["--script", str(file)]) == 0


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, SOAK, CHUNK))
def test_many_lives_keep_the_promises(first: int, count: Callable[[str, int], None]) -> None:
    total = demand(range(first, first + CHUNK))
    count("simulated lives", total.seeds)
    for what in ("events", "applies", "passes", "steps", "crashes"):
        count(f"simulated {what}", total.counts[what])
    count("calls accepted in simulated lives", total.counts["calls"])
