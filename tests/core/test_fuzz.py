"""Whatever is written, the loader ends with findings or with VMs: no traceback, no hang."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import fuzzing

ROOT = Path(__file__).resolve().parents[2]
words = st.sampled_from([*fuzzing.WORDS, "\n", "\n  ", "\n  - ", " ", "a", "1", "{{ a }}", "é"])
pieces = st.lists(st.one_of(words, words, st.text(max_size=4)), max_size=60).map("".join)
names = st.sampled_from(["a", "b", "run", "item", "vm_name", "nothing", "inventory"])
expressions = st.builds(
    "{{{{ {}{} }}}}".format,
    st.one_of(names, st.integers().map(str), st.just("[1, 'a', [2]]"), st.just("{'a': {'b': 1}}")),
    st.lists(st.sampled_from(fuzzing.WORDS).map(lambda word: f" | {word.rstrip('(')}"), max_size=2)
    .map("".join),
)  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), expressions),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(fuzzing.WORDS).map(lambda word: word.rstrip(":")), inner)
    ),
    max_leaves=12,
)
vms = st.dictionaries(
    st.sampled_from(
        "name state for repository sna vm backup release protect labels disks of loop loop_var "
        "when vars groups".split()
    ),
    values,
)


def as_yaml(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


files = st.fixed_dictionaries(
    {"vms": st.lists(vms, max_size=3)},
    optional={
        "vars": st.dictionaries(names, values, max_size=4),
        "defaults": vms,
        "runs": st.lists(vms, max_size=2),
        "include": values,
        "vars_files": values,
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(pieces, min_size=1, max_size=5))
def test_text_that_is_hardly_yaml(texts: list[str]) -> None:
    fuzzing.load(fuzzing.BETWEEN.join(texts))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    files, st.dictionaries(names, values, max_size=3), st.dictionaries(names, values, max_size=3)
)
def test_specs_with_values_where_nobody_means_them(
    spec: dict[str, object], group: dict[str, object], host: dict[str, object]
) -> None:
    texts = map(as_yaml, (spec, group, host, {"vms": [{"name": "b"}]}, {"vms": {}}))
    fuzzing.load(fuzzing.BETWEEN.join(texts))


def test_every_seed_of_the_fuzzer_is_read() -> None:
    assert any(fuzzing.load(text) for text in fuzzing.seeds(ROOT))


@pytest.mark.soak
def test_ten_minutes_of_what_a_fuzzer_makes_up(tmp_path: Path) -> None:
    """FUZZ_SECONDS says how long, where that is not ten minutes."""
    pytest.importorskip("atheris", reason="make soak installs it")
    seconds = int(os.environ.get("FUZZ_SECONDS", "600"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(fuzzing.seeds(ROOT)):
        (corpus / f"{number}").write_text(text)
    dictionary = tmp_path / "words"
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"') for word in fuzzing.WORDS)
    dictionary.write_text("".join(f'"{word}"\n' for word in escaped))
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.fuzzing", str(corpus),
            f"-max_total_time={seconds}", f"-timeout={fuzzing.SECONDS}",
            f"-rss_limit_mb={fuzzing.MEMORY}", f"-dict={dictionary}", "-max_len=4096",
            f"-artifact_prefix={tmp_path}/", "-print_final_stats=1",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=seconds + 300,
    )  # fmt: skip
    failed = [path.read_text(errors="backslashreplace") for path in tmp_path.glob("[clot]*-*")]
    assert done.returncode == 0, f"{done.stdout[-3_000:]}{done.stderr[-3_000:]}\n{failed}"
    ran = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert ran
    print(f"{ran.group(1)} executions")
    assert int(ran.group(1)) > seconds  # it did its work, at whatever pace
