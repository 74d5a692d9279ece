"""What lies around specs, on a real file system: found, kept inside, asked again when it moved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.limits import TemplateError
from reconciler.core.settings import SpecRules
from reconciler.host import files
from reconciler.host.files import Text
from reconciler.library import Beside, Library
from tests.core.builders import known, says


class Place:
    """A directory of specs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.library = Library(SpecRules(env=("SITE_*",)), {"SITE_A": "a", "HOME": "/root"})

    def write(self, **texts: str) -> None:
        for name, text in texts.items():
            path = self.root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".yaml").write_text(text)

    def beside(self, name: str = "specs/a.yaml", root: str = "specs") -> Beside:
        return self.library.around(Text(str(self.root / name), root=str(self.root / root)))

    def values(self, beside: Beside, kind: str, name: str) -> list[object]:
        sides = beside.group_vars(name) if kind == "group" else beside.host_vars(name)
        return [side.document.value if side.document else side.wrong for side in sides]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "specs").mkdir()
    yield Place(tmp_path)


def test_variables_are_found_from_the_root_down_to_the_file(place: Place) -> None:
    place.write(
        group_vars__all="x: above",
        specs__group_vars__all="x: 1",
        specs__site__group_vars__all="x: 2",
        specs__site__group_vars__gold__b="x: 4",
        specs__site__group_vars__gold__a="x: 3",
        specs__other__group_vars__all="x: 5",
        specs__host_vars__ctx_1="y: 1",
    )
    deep = place.beside("specs/site/db/a.yaml")
    assert place.values(deep, "group", "all") == [{"x": 1}, {"x": 2}]
    assert place.values(deep, "group", "gold") == [{"x": 3}, {"x": 4}]
    assert place.values(deep, "host", "ctx_1") == [{"y": 1}]
    assert place.values(place.beside(), "group", "all") == [{"x": 1}]
    alone = place.beside("specs/site/a.yaml", root="specs/site")
    assert place.values(alone, "group", "all") == [{"x": 2}]


def test_folders_of_what_specs_name_are_not_read_by_themselves(place: Place) -> None:
    names = ["group_vars/all", "host_vars/x", "vars/x", "includes/deep/x", "site/vars/x"]
    for name in names:
        place.write(**{f"specs/{name}": "x: 1"})
    place.write(specs__a="vms: []", specs__site__b="vms: []")
    listing = files.listing(str(place.root / "specs"))
    assert [Path(path).name for path in listing.files] == ["a.yaml", "b.yaml"]
    assert len(listing.beside) == len(names)
    assert [Path(text.file).name for text in files.texts([str(place.root / "specs")])] == [
        "a.yaml",
        "b.yaml",
    ]


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hostname", "link", "folder/../../secret", "vars/away/x"]
)
def test_nothing_outside_of_the_root_is_read(place: Place, path: str) -> None:
    (place.root / "secret").write_text("x: 1")
    (place.root / "specs" / "link").symlink_to("../secret")
    (place.root / "specs" / "vars").mkdir()
    (place.root / "specs" / "vars" / "away").symlink_to(place.root)
    beside = place.beside()
    for ask in (
        lambda: beside.file(path, beside.file_name),
        lambda: beside.text(path, beside.file_name),
    ):
        with pytest.raises(TemplateError) as error:
            ask()
        says(str(error.value), "outside of", "specs: {root: DIRECTORY}")
    assert beside.asked == {}


def test_a_root_in_the_config_lets_specs_share_files(place: Place) -> None:
    place.library = Library(SpecRules(root=str(place.root)), {})
    place.write(common="x: 1", group_vars__all="y: 1")
    beside = place.beside()
    side = beside.file("../common.yaml", beside.file_name)
    assert side.document
    assert side.document.value == {"x": 1}
    assert place.values(beside, "group", "all") == [{"y": 1}]
    with pytest.raises(TemplateError, match="outside of"):
        beside.text("../../x", beside.file_name)


def test_a_file_that_is_read_by_itself_is_not_included(place: Place) -> None:
    place.write(specs__b="vms: []", specs__includes__c="vms: []")
    place.library.specs = [str(place.root / "specs" / "b.yaml")]
    beside = place.beside()
    with pytest.raises(TemplateError, match="move it to a folder that is called `includes`"):
        beside.file("b.yaml", beside.file_name, spec=True)
    assert beside.file("includes/c.yaml", beside.file_name, spec=True).document


def test_only_variables_that_the_config_names_are_read(place: Place) -> None:
    beside = place.beside()
    assert (beside.variable("SITE_A"), beside.variable("SITE_B")) == ("a", None)
    with pytest.raises(TemplateError, match=r"`specs: \{env: \[HOME\]\}`"):
        beside.variable("HOME")


def test_text_is_read_without_its_last_newline_and_not_beyond_all_sense(place: Place) -> None:
    beside = place.beside()
    (place.root / "specs" / "motd").write_text("one\ntwo\n")
    assert beside.text("motd", beside.file_name) == "one\ntwo"
    assert beside.text("none", beside.file_name) is None
    (place.root / "specs" / "big").write_text("x" * 70_000)
    with pytest.raises(TemplateError, match="more than 65,536 characters"):
        beside.text("big", beside.file_name)
    os.mkfifo(place.root / "specs" / "pipe")
    assert beside.text("pipe", beside.file_name) is None  # and nobody waits for a writer


CHANGES = {
    "another text": lambda root: (root / "specs/vars/x.yaml").write_text("x: 2"),
    "a file that is gone": lambda root: (root / "specs/vars/x.yaml").unlink(),
    "a new group": lambda root: (root / "specs/group_vars/gold.yaml").write_text("x: 2"),
    "a new host": lambda root: (root / "specs/host_vars/ctx-2.yaml").write_text("x: 2"),
    "a look-up that was empty": lambda root: (root / "specs/none").write_text("x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_answer_that_would_be_another_one_is_noticed(place: Place, change: object) -> None:
    place.write(specs__vars__x="x: 1", specs__group_vars__all="x: 1", specs__host_vars__a="x: 1")
    beside = place.beside()
    beside.file("vars/x.yaml", beside.file_name)
    beside.group_vars("all")
    beside.host_vars("ctx-1")
    beside.text("none", beside.file_name)
    beside.groups_of("ctx-1")
    for _ in range(2):
        place.library.refresh()
        assert beside.holds()
    change(place.root)  # type: ignore[operator]
    place.library.refresh()
    assert not beside.holds()


def test_another_inventory_is_noticed_where_it_was_asked(place: Place) -> None:
    text = "groups: {g: [a]}\nvms: {a: {disks: []}, b: {disks: []}}"
    place.library.inventory = known(text)
    grouped, looped, other = place.beside(), place.beside(), place.beside()
    assert grouped.groups_of("a") == ["g"]
    assert set(looped.inventory() or {}) == {"a", "b"}
    place.library.inventory = known(text.replace("b:", "c:"))
    assert [one.holds() for one in (grouped, looped, other)] == [True, False, True]
    place.library.inventory = known(text.replace("[a]", "[b]"))
    assert [one.holds() for one in (grouped, looped, other)] == [False, False, True]


def test_all_that_was_given_answers_the_same_elsewhere(place: Place) -> None:
    place.write(specs__vars__x="x: 1", specs__group_vars__all="y: 1")
    place.library.extra_texts = (Text("-e a", "a: 1"),)
    first = place.beside()

    def answers(beside: Beside) -> list[object]:
        side = beside.file("vars/x.yaml", beside.file_name)
        return [
            side.document.value if side.document else None,
            place.values(beside, "group", "all"),
            place.values(beside, "host", "a"),
            beside.variable("SITE_A"),
            beside.text("none", beside.file_name),
            [one.document.value for one in beside.extra if one.document],
        ]

    here = answers(first)
    given = place.library.given
    for path in (place.root / "specs").rglob("*.yaml"):
        path.unlink()
    there = Library(SpecRules(), {}, given=given)
    text = Text(str(place.root / "specs/a.yaml"), root=str(place.root / "specs"))
    assert answers(there.around(text)) == here
