"""What a bench's results become: pictures and tables that are theirs, and a verdict on ratios."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench import bench, guard, plots
from bench.figures import (
    FLOOR,
    TOOL,
    Curve,
    Figure,
    Measured,
    Rounds,
    Series,
    document,
    number,
    read,
    span,
    table,
    targets,
    write,
)
from bench.svg import DARK, LETTER, LIGHT, WIDTH, Scale, Theme
from bench.workplace import BenchError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def some() -> Measured:
    found = Rounds("100 disks")
    for value in (0.5, 0.4, 0.6):
        found.add("cold, to the last call", TOOL, value, 0.4)
        found.add("cold, to the last call", FLOOR, 0.4)
        found.add("no-op, CPU", TOOL, value / 5, unit="CPU s")
        found.add("no-op, CPU", "pyinfra", 0.3, unit="CPU s")
        found.add("no-op, CPU", "ansible, tuned", 0.9, unit="CPU s")
    found.absent("cold, to the last call", "systemd-run", "not here: <no systemd> & co")
    line = Series("plan", [(100, 0.1), (1000, 1.0), (10_000, 10.0)])
    return found.measured() + Measured([], [Curve("plan", "A plan", "VMs", "CPU s", [line])])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "r.json", {"cores": 2}, 3, some())
    value, found = read(tmp_path / "r.json")
    assert found == some()
    assert (value["runs"], value["machine"]) == (3, {"cores": 2})
    (tmp_path / "r.json").write_text('{"format_version": "1.0"}')
    with pytest.raises(ValueError, match=r"its format is '1\.0'"):
        read(tmp_path / "r.json")


def test_targets_are_judged_within_one_run() -> None:
    met = {one.said: (round(one.found, 3), one.met) for one in targets(some())}
    assert met == {
        "cold, to the last call, by the floor": (1.25, True),
        "no-op, CPU by the best Ansible's": (0.111, True),
        "no-op, CPU by pyinfra's": (0.333, True),
    }
    assert [one["met"] for one in document({}, 3, some())["targets"]] == [True] * 3


def test_a_curve_knows_its_power() -> None:
    (curve,) = some().curves
    assert curve.series[0].exponent == pytest.approx(1.0)
    assert Series("one", [(1, 2)]).exponent is None


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (12.34, "12.3"), (1234, "1234")],
)
def test_three_digits_count(value: float, said: str) -> None:
    assert number(value) == said


def test_a_span_is_median_least_and_greatest() -> None:
    assert span([0.5, 0.4, 0.6]) == "0.500 (0.400–0.600)"
    assert span([0.5]) == "0.500"


def test_who_is_not_here_has_a_line() -> None:
    assert "not here: <no systemd> & co" in table(some())


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_pictures_are_xml_with_a_title_and_a_description(theme: Theme) -> None:
    pictures = plots.drawn(some(), theme)
    assert {"cold", "no-op", "plan"} <= pictures.keys()
    for picture in pictures.values():
        root = ET.fromstring(picture)
        titles = [one.text for one in root if one.tag.endswith(("title", "desc"))]
        assert len(titles) == 2
        assert all(titles)
    assert pictures == plots.drawn(some(), theme)


def test_what_is_said_of_a_figure_is_its_unit() -> None:
    heal = Figure("daemon", "heal", TOOL, "ms", [6.4, 6.0])
    found = Measured([heal])
    assert "| milliseconds |" in plots.sections({"runs": 1, "machine": {}}, found)["daemon-heal"]
    assert ">milliseconds<" in plots.drawn(found, LIGHT)["daemon-heal"]
    heal_s = Figure("daemon", "heal", FLOOR, "s", [0.005])
    with pytest.raises(ValueError, match="measured in ms, s, not in one"):
        plots.drawn(Measured([heal, heal_s]), LIGHT)


def test_a_picture_holds_what_is_written_in_it() -> None:
    values = [0.00578, 0.00569, 0.00591]
    found = Measured([Figure("100 disks", "heal", "ansible, tuned, mitogen", values=values)])
    (picture,) = plots.drawn(found, LIGHT).values()
    written = [one for one in ET.fromstring(picture) if one.tag.endswith("text")]
    for one in written:
        width = LETTER * len(one.text or "") * int(one.attrib["font-size"]) / 14
        share = {"start": 0, "middle": 0.5, "end": 1}[one.attrib["text-anchor"]]
        begin = float(one.attrib["x"]) - share * width
        assert begin >= 0 <= WIDTH - begin - width, one.text
    assert len(Scale.around([5.2, 6.4], 0, 100).ticks()) >= 3


def test_the_page_and_its_pictures_are_of_the_results_beside_them(tmp_path: Path) -> None:
    """Whoever changes the results, the page's tables or how they are drawn, draws them anew:
    python -m bench.plots --json docs/performance/results.json"""
    shutil.copy(DOCS / "performance.md", tmp_path)
    kept = DOCS / plots.FOLDER / "results.json"
    assert plots.main(["--json", str(kept), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "performance.md").read_text() == (DOCS / "performance.md").read_text()
    ours = {path.name: path.read_text() for path in (tmp_path / plots.FOLDER).iterdir()}
    assert ours == {path.name: path.read_text() for path in kept.parent.iterdir()}


def test_results_of_another_form_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text("{")
    assert plots.main(["--json", str(tmp_path / "r.json"), "--docs", str(tmp_path)]) == 1
    assert "run: make bench" in capsys.readouterr().err


def test_what_became_dearer_is_an_error_and_named() -> None:
    before = {"plan": 2.0, "status": 2.0, "apply": 2.0, "gone": 1.0}
    now = {"plan": [2.6, 2.6, 0.1], "status": [2.4], "apply": [1.5, 9.0, 1.5], "new": [1.0]}
    rows, dearer, cheaper = guard.judged(before, now)
    assert dearer == ["gone", "new", "plan"]
    assert cheaper == ["apply"]
    assert ("plan", "2.00", "2.60", "1.30") in rows


def test_the_baseline_is_of_what_is_measured(tmp_path: Path) -> None:
    baseline = guard.read(guard.BASELINE)
    commands = {f"{one}, nothing applied" for one in bench.COMMANDS}
    commands |= {f"{one}, applied" for one in bench.APPLIED}
    assert commands < baseline.keys()
    guard.write(tmp_path / "b.json", {name: [ratio] for name, ratio in baseline.items()})
    assert guard.read(tmp_path / "b.json") == baseline
    (tmp_path / "b.json").write_text(json.dumps({"format_version": "9"}))
    with pytest.raises(BenchError, match="its format is '9'"):
        guard.read(tmp_path / "b.json")


def test_a_figure_without_values_has_no_ratio() -> None:
    assert Figure("g", "n", "w").ratio is None
