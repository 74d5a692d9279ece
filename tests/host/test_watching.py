"""What a watch tells of, on a real file system with the real inotify."""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reconciler.host.files import listing
from reconciler.host.watching import Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    found = Watch()
    yield found
    found.close()


def kicked(watch: Watch, paths: list[str], act: Callable[[], object]) -> bool:
    """Whether an act on watched paths is told."""
    watch.arm(paths)
    watch.drain()
    act()
    return watch.drain()


def folder(tmp_path: Path) -> Path:
    """A directory with a spec, below a directory of its own."""
    found = tmp_path / "srv" / "specs"
    (found / "sub").mkdir(parents=True)
    (found / "a.yaml").write_text("vms: []\n")
    return found


def paths(directory: Path) -> list[str]:
    found = listing(str(directory))
    return [*found.folders, *found.links]


def saved_by_rename(directory: Path) -> None:
    temporary = directory / ".a.yaml.x7"
    temporary.write_text("vms: []\n")
    os.replace(temporary, directory / "a.yaml")


def linked(directory: Path) -> None:
    (directory / ".whole").write_text("vms: []\n")
    os.link(directory / ".whole", directory / "c.yaml")


TOLD: dict[str, Callable[[Path], object]] = {
    "written": lambda d: (d / "a.yaml").write_text("vms: [] # more\n"),
    "new": lambda d: (d / "b.yml").write_text("vms: []\n"),
    "renamed onto": saved_by_rename,
    "renamed away": lambda d: os.rename(d / "a.yaml", d / "a.yaml.bak"),
    "deleted": lambda d: (d / "a.yaml").unlink(),
    "hard link": linked,
    "symlink": lambda d: (d / "c.yaml").symlink_to("/elsewhere/c.yaml"),
    "folder made": lambda d: (d / "more").mkdir(),
    "folder removed": lambda d: (d / "sub").rmdir(),
    "in a folder": lambda d: (d / "sub" / "b.yaml").write_text("vms: []\n"),
    "itself moved": lambda d: os.rename(d, d.parent / "aside"),
    "itself removed": lambda d: shutil.rmtree(d),
}


@pytest.mark.parametrize("act", TOLD.values(), ids=TOLD.keys())
def test_what_may_change_the_specs_is_told(
    watch: Watch, tmp_path: Path, act: Callable[[Path], object]
) -> None:
    directory = folder(tmp_path)
    assert kicked(watch, paths(directory), lambda: act(directory))


SILENT: dict[str, Callable[[Path], object]] = {
    "read": lambda d: (d / "a.yaml").read_text(),
    "listed": lambda d: os.listdir(d),
    "a swap file": lambda d: (d / ".a.yaml.swp").write_text("x"),
    "vim asks for rights": lambda d: (d / "4913").write_text(""),
    "a backup": lambda d: (d / "a.yaml~").write_text("vms: []\n"),
    "a hidden spec": lambda d: (d / ".a.yaml").write_text("vms: []\n"),
    "a hidden folder": lambda d: (d / ".git").mkdir(),
    "something else": lambda d: (d / "README.md").write_text("hello"),
    "beside it": lambda d: (d.parent / "other").mkdir(),
}


@pytest.mark.parametrize("act", SILENT.values(), ids=SILENT.keys())
def test_what_cannot_be_a_spec_is_not_told(
    watch: Watch, tmp_path: Path, act: Callable[[Path], object]
) -> None:
    directory = folder(tmp_path)
    assert not kicked(watch, paths(directory), lambda: act(directory))


def test_a_new_file_counts_when_it_is_closed(watch: Watch, tmp_path: Path) -> None:
    directory = folder(tmp_path)
    watch.arm(paths(directory))
    with open(directory / "b.yaml", "w") as file:
        file.write("vms: []\n")
        file.flush()
        assert not watch.drain()
    assert watch.drain()


def test_a_swapped_symlink_is_told(watch: Watch, tmp_path: Path) -> None:
    """As git-sync does it: `current` is renamed over, and a folder of it is what is watched."""
    for revision in ("rev-1", "rev-2"):
        (tmp_path / revision / "specs").mkdir(parents=True)
    (tmp_path / "current").symlink_to("rev-1")

    def swap() -> None:
        (tmp_path / "next").symlink_to("rev-2")
        os.replace(tmp_path / "next", tmp_path / "current")

    directory = tmp_path / "current" / "specs"
    assert kicked(watch, [str(directory)], swap)
    new = tmp_path / "rev-2" / "specs" / "a.yaml"
    assert kicked(watch, [str(directory)], lambda: new.write_text("vms: []\n"))


def test_a_file_behind_a_hidden_symlink_is_told(watch: Watch, tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap: a.yaml → ..data/a.yaml, ..data → ..2026."""
    for revision in ("..2026", "..2027"):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "a.yaml").write_text("vms: []\n")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")

    def swap() -> None:
        (tmp_path / "..tmp").symlink_to("..2027")
        os.replace(tmp_path / "..tmp", tmp_path / "..data")

    assert kicked(watch, paths(tmp_path), swap)


def test_a_missing_directory_is_told_when_it_comes(watch: Watch, tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    assert kicked(watch, [str(directory)], (tmp_path / "a").mkdir)
    assert kicked(watch, [str(directory)], directory.mkdir)
    assert kicked(watch, [str(directory)], lambda: (directory / "a.yaml").write_text(""))
    shutil.rmtree(tmp_path / "a")
    assert watch.drain()
    assert kicked(watch, [str(directory)], lambda: directory.mkdir(parents=True))
    assert kicked(watch, [str(directory)], lambda: (directory / "b.yaml").write_text(""))


def test_one_file_can_be_watched(watch: Watch, tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.txt"
    inventory.write_text("vms: {}\n")
    assert kicked(watch, [str(inventory)], lambda: inventory.write_text("vms: {a: }\n"))
    assert kicked(watch, [str(inventory)], inventory.unlink)
    assert kicked(watch, [str(inventory)], lambda: inventory.write_text("vms: {}\n"))
    assert not kicked(watch, [str(inventory)], lambda: (tmp_path / "x.yaml").write_text("vms: []"))


def test_the_directory_of_a_file_may_be_moved(watch: Watch, tmp_path: Path) -> None:
    inventory = tmp_path / "etc" / "inventory.yaml"
    inventory.parent.mkdir()
    inventory.write_text("vms: {}\n")
    away = tmp_path / "away"
    assert kicked(watch, [str(inventory)], lambda: os.rename(inventory.parent, away))


def test_what_is_not_named_any_more_is_dropped(watch: Watch, tmp_path: Path) -> None:
    """Nobody is woken for it."""
    directory = folder(tmp_path)
    watch.arm(paths(directory))
    watch.arm([])
    watch.drain()
    (directory / "a.yaml").write_text("vms: []\n")
    assert select.select([watch], [], [], 0)[0] == []


def test_it_can_be_waited_for(watch: Watch, tmp_path: Path) -> None:
    directory = folder(tmp_path)
    watch.arm(paths(directory))
    poll = select.epoll()
    poll.register(watch.fileno(), select.EPOLLIN)
    assert poll.poll(0) == []
    (directory / "a.yaml").write_text("vms: []\n")
    assert poll.poll(10)
    assert watch.drain()
    assert poll.poll(0) == []
    poll.close()


def test_more_than_is_kept_is_told(watch: Watch, tmp_path: Path) -> None:
    """The queue of events overflows: whatever was lost may have mattered."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 20_000:
        pytest.skip(f"the queue holds {most} events")
    directory = folder(tmp_path)
    watch.arm(paths(directory))
    one, other = directory / "one", directory / "other"
    one.touch()
    for _ in range(most // 2 + 2):  # two events each, of names that cannot be specs
        os.rename(one, other)
        one, other = other, one
    assert watch.drain()
