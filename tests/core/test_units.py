"""Sizes, durations, port ranges and names, as people write and read them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reconciler.core.units import (
    Endpoint,
    PortRange,
    format_duration,
    format_size,
    natural,
    parse_duration,
    parse_moment,
    parse_size,
    whole_sectors,
)
from tests.core.builders import says

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GiB", 40 * GIB),
        ("40 GiB", 40 * GIB),
        ("40G", 40 * GIB),
        ("40g", 40 * GIB),
        (" 40gib ", 40 * GIB),
        ("512M", 512 * MIB),
        ("1.5T", 3 * TIB // 2),
        ("0.5KiB", 512),
        ("1P", 1 << 50),
        ("1048576", MIB),
        ("1048576B", MIB),
        ("0", 0),
        (512, 512),
        (0, 0),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("40GB", ["powers of 1000 or of 1024", "40GiB"]),
        ("512mb", ["powers of 1000 or of 1024", "512MiB"]),
        ("40 TB ", ["powers of 1000 or of 1024", "40TiB"]),
        ("1.5", ["bytes come whole"]),
        ("forty", ["cannot read size 'forty'", "40GiB"]),
        ("", ["cannot read size ''"]),
        ("-1G", ["cannot read size '-1G'"]),
        ("1e9", ["cannot read size '1e9'"]),
        ("40 GiB 1", ["cannot read size"]),
        (-1, ["negative"]),
        (True, ["cannot read size True"]),
    ],
)
def test_a_size_that_could_mean_two_things_is_refused(text: str | int, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_size(text)
    says(str(refusal.value), *words)


@given(st.integers(1, 1 << 60))
def test_a_size_is_shown_so_that_it_can_be_typed_in_again(count: int) -> None:
    size = count * KIB
    shown = format_size(size)
    if "." not in shown:
        assert parse_size(shown) == size
    else:
        assert abs(parse_size(shown) - size) <= size * 0.06


@given(st.text(max_size=20) | st.from_regex(r"\d+(\.\d+)?\s?\w{0,3}", fullmatch=True))
@example("1\u212a")  # the Kelvin sign is a K to a regular expression that ignores case
@example("9" * 5000)
def test_no_text_makes_reading_a_size_fail_but_with_a_sentence(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1024, "1 KiB"),
        (1536, "1536 bytes"),
        (MIB, "1 MiB"),
        (3 * MIB // 2, "1.5 MiB"),
        (40 * GIB, "40 GiB"),
        (140 * GIB, "140 GiB"),
        (TIB, "1 TiB"),
        (1 << 50, "1 PiB"),
    ],
)
def test_a_size_is_shown_in_the_unit_that_suits_it(size: int, shown: str) -> None:
    assert format_size(size) == shown


@given(st.integers(0, 1 << 62))
def test_a_disk_is_served_in_whole_sectors(size: int) -> None:
    whole = whole_sectors(size)
    assert whole % 512 == 0
    assert 0 <= whole - size < 512


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        ("1.5h", 5400.0),
        ("1d", 86400.0),
        (" 5M ", 300.0),
        ("0s", 0.0),
        (2, 2.0),
        (0.5, 0.5),
    ],
)
def test_a_duration_is_read(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["10", "", "s", "1h 30", "h1", "-5s", "1w", "1,5s", -1, float("inf"), True]
)
def test_a_duration_without_a_unit_or_an_end_is_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"cannot (read|use) duration"):
        parse_duration(text)


@given(st.text(max_size=20) | st.integers() | st.floats())
@example(10**400)
@example(float("nan"))
def test_no_value_makes_reading_a_duration_fail_but_with_a_sentence(value: str | float) -> None:
    with contextlib.suppress(ValueError):
        assert parse_duration(value) >= 0


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1.0, "0 ms"),
        (0.0, "0 ms"),
        (0.34, "340 ms"),
        (1.0, "1 s"),
        (12.4, "12 s"),
        (59.7, "1 min"),
        (200.0, "3 min 20 s"),
        (3600.0, "1 h"),
        (7500.0, "2 h 5 min"),
        (4 * 86400.0, "4 d"),
        (4 * 86400.0 + 3600, "4 d 1 h"),
    ],
)
def test_a_duration_is_shown_in_two_units_at_most(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_a_port_range_holds_both_of_its_ends() -> None:
    ports = PortRange.parse(" 10100-10102 ")
    assert list(ports) == [10100, 10101, 10102]
    assert len(ports) == 3
    assert str(ports) == "10100-10102"
    assert 10100 in ports
    assert 10102 in ports
    assert 10103 not in ports
    assert "10100" not in ports


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10100", "write it like 10100-10200"),
        ("a-b", "write it like 10100-10200"),
        ("10100-", "write it like"),
        ("10200-10100", "must rise"),
        ("0-5", "1-65535"),
        ("60000-70000", "1-65535"),
    ],
)
def test_a_port_range_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        PortRange.parse(text)
    says(str(refusal.value), words, repr(text))


@given(st.integers(1, 65535), st.integers(0, 999))
def test_a_port_range_is_written_as_it_is_read(first: int, more: int) -> None:
    ports = PortRange(first, min(65535, first + more))
    assert PortRange.parse(str(ports)) == ports


def test_names_are_in_the_order_that_people_count_in() -> None:
    names = ["ctx-10", "ctx-2", "ctx-1", "ctx", "a2", "a10", "10", "9"]
    assert sorted(names, key=natural) == ["9", "10", "a2", "a10", "ctx", "ctx-1", "ctx-2", "ctx-10"]


@given(st.lists(st.text(max_size=8), max_size=6))
@example(["²"])  # a digit to isdigit, not to int
@example(["9" * 5000])
def test_whatever_stands_in_a_strangers_argv_can_be_sorted(names: list[str]) -> None:
    keys = sorted(natural(name) for name in names)
    assert keys == [natural(name) for name in sorted(names, key=natural)]


@pytest.mark.parametrize("text", ["127.0.0.1:8082", "localhost:1", "127.1.2.3:65535", "[::1]:8082"])
def test_a_loopback_endpoint_is_read_and_written_the_same(text: str) -> None:
    found = Endpoint.parse(text)
    assert (str(found), found.loopback) == (text, True)


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "128.0.0.1:1", "127.a.example:1", "a:1"])
def test_an_endpoint_that_others_can_reach_is_not_loopback(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert not Endpoint.parse(text).loopback


@pytest.mark.parametrize(
    "text",
    ["", "8082", ":8082", "127.0.0.1", "127.0.0.1:", "a:0", "a:65536", "127.1:80", "256.0.0.1:80",
     "::1:80", "[]:80", "a b:80", "a:８０"],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot"):
        Endpoint.parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("1970-01-02T00:00Z", 86400 - 1000),
        ("1970-01-02T01:00+01:00", 86400 - 1000),
        (" 1970-01-02T00:00:30Z ", 86430 - 1000),
    ],
)
def test_a_moment_is_a_span_from_now_or_a_date(text: str, seconds: float) -> None:
    assert parse_moment(text, 1000.0) == 1000.0 + seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "0s", "1970-01-01T00:00Z", "2026-13-01", "99999999999d", "-1h"]
)
def test_no_moment_or_one_that_is_over_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot (read|use)"):
        parse_moment(text, 1000.0)


def test_a_bare_number_is_no_duration_and_the_units_are_named() -> None:
    with pytest.raises(ValueError, match="'90' without a unit: write it like 90s, 90m or 90h"):
        parse_duration("90")
    with pytest.raises(ValueError, match="'x': write it like 10s"):
        parse_duration("x")
