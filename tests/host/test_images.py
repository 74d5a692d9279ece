"""Images are made whole or not at all, and never over anything."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from reconciler.core.errors import HostError
from reconciler.host import images
from tests.mounts import Mounts

MIB = 1 << 20


def qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.DEVNULL)


def test_a_new_image_is_pristine_and_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "vm" / "2000" / "r1.qcow2"
    images.create(str(path), 3 * MIB, str(tmp_path))
    found = images.look(str(path), str(tmp_path))
    assert (found.exists, found.format, found.size, found.pristine) == (
        True,
        "qcow2",
        3 * MIB,
        True,
    )
    assert found.backing is None
    assert [one.name for one in path.parent.iterdir()] == ["r1.qcow2"]


@pytest.mark.parametrize("size", [512, 64 * MIB, 1 << 40, 3 << 40])
def test_pristine_ends_with_the_first_write_whatever_the_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.qcow2"
    images.create(str(path), size, str(tmp_path))
    assert images.look(str(path), str(tmp_path)).pristine
    line = ["qemu-io", "-f", "qcow2", "-c", f"write {max(0, size - 512)} 512", str(path)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    assert not images.look(str(path), str(tmp_path)).pristine


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"precious")
    with pytest.raises(HostError, match="something is there"):
        images.create(str(path), MIB, str(tmp_path))
    assert path.read_bytes() == b"precious"
    assert [one.name for one in tmp_path.iterdir()] == ["a.qcow2"]


def test_what_a_crash_left_at_our_temporary_name_is_swept(tmp_path: Path) -> None:
    (tmp_path / f"{images.TEMPORARY}a.qcow2").write_bytes(b"half")
    images.create(str(tmp_path / "a.qcow2"), MIB, str(tmp_path))
    assert [one.name for one in tmp_path.iterdir()] == ["a.qcow2"]


def test_an_overlay_names_its_parent_relatively(tmp_path: Path) -> None:
    images.create(str(tmp_path / "base" / "b.qcow2"), MIB, str(tmp_path))
    overlay = tmp_path / "inc" / "o.qcow2"
    images.create(str(overlay), MIB, str(tmp_path), str(tmp_path / "base" / "b.qcow2"))
    found = images.look(str(overlay), str(tmp_path))
    assert found.backing == str(tmp_path / "base" / "b.qcow2")
    assert found.pristine
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    qemu_img("info", "--backing-chain", str(moved / "inc" / "o.qcow2"))


def test_a_directory_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "vm").symlink_to(outside)
    path = str(root / "vm" / "a.qcow2")
    assert images.look(path, str(root)).outside == str(outside / "a.qcow2")
    with pytest.raises(HostError, match="leads out of"):
        images.create(path, MIB, str(root))
    assert list(outside.iterdir()) == []


def test_a_repository_that_is_itself_a_symlink_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    images.create(str(tmp_path / "root" / "a.qcow2"), MIB, str(tmp_path / "root"))
    assert images.look(str(tmp_path / "root" / "a.qcow2"), str(tmp_path / "root")).outside is None


@pytest.mark.parametrize(
    ("content", "format_", "error"),
    [
        (b"", "", ""),
        (b"hello", "raw", ""),
        (b"QFI\xfb", "", "torn"),
        (b"QFI\xfb" + b"\xff" * 200, "", "header is damaged"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, format_: str, error: str) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(content)
    found = images.look(str(path), str(tmp_path))
    assert found.exists
    assert found.format == format_
    assert error in found.error


def test_odd_things_at_the_path(tmp_path: Path) -> None:
    (tmp_path / "dir.qcow2").mkdir()
    assert images.look(str(tmp_path / "dir.qcow2"), str(tmp_path)).error == "Is a directory"
    (tmp_path / "link.qcow2").symlink_to(tmp_path / "gone")
    assert "symlink to nothing" in images.look(str(tmp_path / "link.qcow2"), str(tmp_path)).error
    assert not images.look(str(tmp_path / "none.qcow2"), str(tmp_path)).exists


def test_what_would_block_is_not_waited_for(tmp_path: Path) -> None:
    fifo, device = tmp_path / "fifo.qcow2", tmp_path / "device.qcow2"
    os.mkfifo(fifo)
    device.symlink_to("/dev/zero")
    found = images.look(str(fifo), str(tmp_path))
    assert (found.exists, found.error) == (True, "it is a FIFO, not a file")
    assert images.look(str(device), "/").error == "it is a device, not a file"


def test_an_image_tells_its_space_and_one_that_is_not_there_where_it_would_take_it(
    mounts: Mounts, tmp_path: Path
) -> None:
    small = mounts.small(tmp_path / "small", 8)
    path = str(small.at / "vm" / "2000" / "r1.qcow2")
    device = small.at.stat().st_dev
    for found in (images.look(path, str(small.at)), images.space(path)):
        assert (found.exists, found.device, found.allocated) == (False, device, 0)
    images.create(path, 64 * MIB, str(small.at))
    line = ["qemu-io", "-f", "qcow2", "-c", "write 0 1M", path]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    for found in (images.look(path, str(small.at)), images.space(path)):
        assert (found.exists, found.device) == (True, device)
        assert MIB < found.allocated < 2 * MIB
    system = images.file_system(path)
    assert system is not None
    assert (system.mount, system.read_only) == (str(small.at), False)
    assert 6 * MIB < system.free < 7 * MIB
    small.read_only()
    system = images.file_system(str(small.at / "not" / "there"))
    assert system is not None
    assert system.read_only


def test_a_file_system_without_a_count_of_blocks_is_not_full() -> None:
    assert images.file_system("/proc/self") is None


def test_qemu_img_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get install qemu-utils"):
        images.create(str(tmp_path / "a.qcow2"), MIB, str(tmp_path))


A, B = images.Owner("aaaa", "/var/lib/a"), images.Owner("bbbb", "/var/lib/b")


def test_a_claim_is_made_once_and_belongs_to_one(tmp_path: Path) -> None:
    assert images.claimed_by(str(tmp_path), "ctx-1", "r1") is None
    images.claim(str(tmp_path), "ctx-1", "r1", A)
    images.claim(str(tmp_path), "ctx-1", "r1", A)
    assert images.claimed_by(str(tmp_path), "ctx-1", "r1") == "aaaa"
    with pytest.raises(HostError, match="belongs to state directory aaaa /var/lib/a"):
        images.claim(str(tmp_path), "ctx-1", "r1", B)
    assert os.listdir(tmp_path / "ctx-1") == [".claim-r1"]


def test_a_claim_says_where_its_owner_was_and_one_of_one_line_is_valid(tmp_path: Path) -> None:
    assert images.owner_of(str(tmp_path), "ctx-1", "r1") is None
    images.claim(str(tmp_path), "ctx-1", "r1", A)
    assert (tmp_path / "ctx-1" / ".claim-r1").read_text() == "aaaa\n/var/lib/a\n"
    assert images.owner_of(str(tmp_path), "ctx-1", "r1") == A
    images.claim(str(tmp_path), "ctx-1", "r1", B, take_over=True)
    assert images.owner_of(str(tmp_path), "ctx-1", "r1") == B
    (tmp_path / "ctx-1" / ".claim-r2").write_text("cccc\n")
    assert images.owner_of(str(tmp_path), "ctx-1", "r2") == images.Owner("cccc")
    images.claim(str(tmp_path), "ctx-1", "r2", images.Owner("cccc", "/moved"))
    (tmp_path / "ctx-1" / ".claim-r3").write_text("")
    assert images.claimed_by(str(tmp_path), "ctx-1", "r3") == "nobody: the claim is empty"


def test_a_claim_that_cannot_be_read_is_an_error_and_not_a_no(tmp_path: Path) -> None:
    (tmp_path / "ctx-1").write_text("a file where a directory should be")
    with pytest.raises(HostError, match="cannot read the claim"):
        images.claimed_by(str(tmp_path), "ctx-1", "r1")


def test_an_intent_is_taken_back_unless_nobody_waits_for_that_any_more(tmp_path: Path) -> None:
    root = str(tmp_path)
    images.unintend(root, "ctx-1", "r1", 1)  # there is not even a directory
    images.claim(root, "ctx-1", "r1", A)
    images.intend(root, "ctx-1", "r1", 1, "job")
    images.unintend(root, "ctx-1", "r1", 1, given_up=lambda: True)
    assert images.intended(root, "ctx-1", "r1", 1)
    for _ in range(2):
        images.unintend(root, "ctx-1", "r1", 1)
        assert not images.intended(root, "ctx-1", "r1", 1)


def test_what_a_crash_left_beside_an_image_is_swept(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    images.sweep(str(image))
    images.create(str(image), 1 << 20, str(tmp_path))
    os.link(image, tmp_path / ".creating-disk.qcow2")  # it ended between the two steps
    images.sweep(str(image))
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_a_look_knows_where_paths_lead_as_the_system_does(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing/x")
    (tmp_path / "a" / "abs").symlink_to(tmp_path / "a" / "b")
    names = ["a/b/x", "a/file", "link", "link/b", "link/up/a/up/link/file", "loop", "loop/x"]
    names += [
        "nowhere/y",
        "a/abs/z",
        "missing/q/r",
        "a/../link/b",
        "./a//b",
        "a/b/..",
        "/".join("d" * 150),
    ]
    paths = images.Paths()
    for name in names * 2:
        path = f"{tmp_path}/{name}"
        assert paths.real(path) == os.path.realpath(path), name
    assert paths.real("/") == "/"
    assert paths.device(f"{tmp_path}/not/yet/made") == os.stat(tmp_path).st_dev
    assert paths.device(f"{tmp_path}/" + "/".join("d" * 150)) == os.stat(tmp_path).st_dev


def test_a_digest_is_of_the_bytes_whatever_of_them_is_a_hole(tmp_path: Path) -> None:
    sparse, dense, empty = tmp_path / "sparse", tmp_path / "dense", tmp_path / "empty"
    with sparse.open("wb") as file:
        file.seek(3 << 20)
        file.write(b"x" * 70_000)
        file.seek(9 << 20)
        file.write(b"y")
        file.truncate((12 << 20) + 5)
    dense.write_bytes(sparse.read_bytes())
    empty.write_bytes(b"")
    assert sparse.stat().st_blocks < dense.stat().st_blocks
    for path in (sparse, dense, empty):
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert images.digest(str(path)) == f"sha256:{expected}"
    with pytest.raises(HostError, match="No such file"):
        images.digest(str(tmp_path / "none"))


CLUSTER = 1 << 16
DAMAGES = {
    "the first-level table": (3 * CLUSTER, CLUSTER, "ERROR found L1 entry"),
    "a second-level table": (4 * CLUSTER, CLUSTER, "ERROR found l2 entry"),
    "the table of the refcounts": (CLUSTER, CLUSTER, "ERROR refcount table entry"),
    "the refcounts": (2 * CLUSTER, CLUSTER, "ERROR OFLAG_COPIED"),
    "everything but the header": (CLUSTER, 5 * CLUSTER, "ERROR found L1 entry"),
    "the header": (0, CLUSTER, "it cannot be opened: Image is not in qcow2 format"),
    "where the table is": (40, 8, "it cannot be opened: Active L1 table offset invalid"),
}
"""What garbage is written over: where, how much, and what is said of it."""


def written(path: Path) -> Path:
    """An image with 8 MiB in it."""
    images.create(str(path), 64 * MIB, str(path.parent))
    line = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 8M", str(path)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_told_and_is_no_failure_to_check(tmp_path: Path, what: str) -> None:
    path = written(tmp_path / "a.qcow2")
    assert images.check(str(path)) == ""
    offset, length, said = DAMAGES[what]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * length)
    assert said in images.check(str(path))
    images.look(str(path), str(tmp_path))  # it does not raise


@pytest.mark.parametrize(
    ("size", "said"), [(3 * CLUSTER + 100, "exceeding the end of the file"), (50, "too short")]
)
def test_an_image_that_was_cut_off_is_damaged(tmp_path: Path, size: int, said: str) -> None:
    path = written(tmp_path / "a.qcow2")
    os.truncate(path, size)
    assert said in images.check(str(path))


def test_an_image_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot check .* No such file or directory"):
        images.check(str(tmp_path / "none.qcow2"))


def test_no_garbage_in_a_header_ends_a_look(tmp_path: Path) -> None:
    path = written(tmp_path / "a.qcow2")
    whole = path.read_bytes()
    for offset in range(4, 104):
        path.write_bytes(whole[:offset] + b"\xff" * 8 + whole[offset + 8 :])
        images.look(str(path), str(tmp_path))
