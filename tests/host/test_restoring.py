"""Reading a run back, on real images: what is found and told, and that nothing stays behind."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.call import Call, CallState
from reconciler.core.contents import DiskRead, RestoreTest, Volume, lines
from reconciler.core.errors import HostError, UsageError
from reconciler.core.ledger import Archived, Kept, Ledger, Shelf
from reconciler.core.settings import Settings
from reconciler.host import nbd, proc, qemu_nbd, reading
from reconciler.host.reading import Entry, Grub
from reconciler.restoring import FIRST_FILE, Order, first, listed, named, restore_test, run_of
from tests import fake_guestfish
from tests.core.builders import NOW, a_call, a_vm, an_export, remembered, says
from tests.e2e.site import until
from tests.partitioned import holding, lvm

MIB = 1 << 20
ANY = Order()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of temporary files; short, as a socket's path must be. Nothing is left."""
    with tempfile.TemporaryDirectory(prefix="rt-") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)
        assert os.listdir(short) == []


class Bench:
    """A repository with the images of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "repository"
        (self.root / "ctx-1").mkdir(parents=True)
        (folder / "state").mkdir()
        self.settings = Settings(
            hub="h", state=str(folder / "state"), repositories={"local": str(self.root)}
        )
        self.call = a_call(a_vm(), CallState.COMPLETED)

    def ext4(self, files: Mapping[str, bytes], *, label: str = "root", mib: int = 8) -> bytes:
        """A file system with files."""
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            source = Path(made) / "source"
            source.mkdir()
            for name, data in files.items():
                path = source / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            image = Path(made) / "image"
            image.write_bytes(bytes(mib * MIB))
            tool = reading.find("mke2fs") or "mke2fs"
            subprocess.run(
                [tool, "-q", "-F", "-t", "ext4", "-L", label, "-d", source, image], check=True
            )
            return image.read_bytes()

    def image(self, name: str, data: bytes) -> Path:
        raw, path = self.folder / "raw", self.root / "ctx-1" / name
        raw.write_bytes(data)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
        return path

    def overlay(self, name: str, base: str, data: bytes) -> Path:
        """An image that holds what differs from another, in clusters."""
        path = self.root / "ctx-1" / name
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", str(path))
        new = self.folder / "new"
        new.write_bytes(data)
        write = f"write -q -s {new} 0 {len(data)}"
        run("qemu-io", "-f", "qcow2", "-c", write, str(path))
        return path

    def of(self, *images: Path, backing: Path | None = None) -> Call:
        """The run that has these images as its disks 2000, 2001 …"""
        exports = tuple(
            an_export(
                key=2000 + number,
                position=number,
                image=str(path),
                size=None,
                backing=str(backing) if backing else None,
            )
            for number, path in enumerate(images)
        )
        self.call = a_call(a_vm(exports=exports), CallState.COMPLETED)
        return self.call

    def read(self, call: Call, order: Order = ANY) -> RestoreTest:
        found = restore_test(self.settings, call, order)
        assert readers() == []
        return found

    def disk(self, call: Call, order: Order = ANY) -> DiskRead:
        (found,) = self.read(call, order).disks
        return found


def run(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def readers() -> list[int]:
    """Servers and views that read for a restore test which this process has begun."""
    here = tempfile.gettempdir()
    return [
        one.identity.pid
        for one in proc.processes()
        if any(word.startswith(f"{here}/") or f"={here}/" in word for word in one.argv)
    ]


@pytest.fixture
def bench(tmp_path: Path, temporary: Path) -> Bench:
    return Bench(tmp_path)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_bare_file_system_with_its_first_file(bench: Bench) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    disk = bench.disk(bench.of(bench.image("a", bench.ext4({"empty": b"", "etc/name": data}))))
    assert (disk.table, disk.layers, disk.size, disk.problem) == ("none", 1, 8 * MIB, "")
    (volume,) = disk.volumes
    assert (volume.where, volume.type, volume.label) == ("disk", "ext4", "root")
    assert (volume.size, volume.problem, volume.note) == (8 * MIB, "", "")
    assert volume.used is not None and 3 * MIB < volume.used < 8 * MIB
    assert len(volume.uuid) == 36
    assert {"empty", "etc"} < set(volume.names)
    assert volume.file is not None
    assert (volume.file.path, volume.file.size) == ("/etc/name", 3 * MIB)
    assert volume.file.sha256 == digest(data)


def test_partitions_each_with_what_is_in_it(bench: Bench) -> None:
    luks = (b"LUKS\xba\xbe\0\1" + b"aes".ljust(32, b"\0")).ljust(MIB, b"\0")
    contents = [
        ("boot", bench.ext4({"kernel": b"k" * 5000}, label="boot", mib=4)),
        ("räka", bench.ext4({"db/table": b"t" * 7000}, label="data", mib=4)),
        ("secret", luks),
        ("nothing", bytes(MIB)),
        ("noise", random.Random(3).randbytes(MIB)),
    ]
    found = bench.read(bench.of(bench.image("a", bytes(holding(contents)))))
    (disk,) = found.disks
    assert (disk.table, found.ok) == ("gpt", True)
    one, two, three, four, five = disk.volumes
    assert (one.where, one.label, two.where) == ("partition 1 (boot)", "boot", "partition 2 (räka)")
    assert one.file and (one.file.path, one.file.sha256) == ("/kernel", digest(b"k" * 5000))
    assert two.file and (two.file.path, two.file.sha256) == ("/db/table", digest(b"t" * 7000))
    assert three.type == "crypto_LUKS"
    says(three.note, "encrypted")
    says(four.note, "nothing in it")
    assert (five.type, five.problem) == ("", "")
    says(found.summary, "1 disk, 2 file systems (ext4, ext4), 2 files read back")
    text = "\n".join(lines(found))
    says(text, "GPT", "partition 3 (secret)   crypto_LUKS", "/db/table   7000 bytes")


needs_grub = pytest.mark.skipif(Grub.tool() is None, reason="grub-fstest is not installed")


@needs_grub
def test_logical_volumes(bench: Bench) -> None:
    inside = bench.ext4({"etc/name": b"n" * 9000, "more": b""}, label="root", mib=8)
    found = bench.read(bench.of(bench.image("a", bytes(holding([("pv", lvm(inside))])))))
    physical, logical = found.disks[0].volumes
    assert (physical.type, physical.problem) == ("LVM2_member", "")
    says(physical.note, "a physical volume of LVM")
    assert (logical.where, logical.type, logical.label) == ("lvm/vg0-root", "ext", "root")
    assert {"etc", "more"} < set(logical.names)
    assert logical.file and logical.file.sha256 == digest(b"n" * 9000)
    named = bench.read(bench.call, Order(file="/etc/name"))
    assert [one.path for one in named.files] == ["/etc/name"]
    says(found.summary, "1 file system (ext)")


@needs_grub
def test_what_grub_cannot_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = bytearray(bench.ext4({"file": b"x" * 9000}))
    inside[4096 : 4 * MIB] = bytes(4 * MIB - 4096)
    without("debugfs", monkeypatch)
    found = bench.read(bench.of(bench.image("a", bytes(inside))))
    assert not found.ok
    says(found.summary, "disk 2000: disk: its root directory is empty")


def test_what_libguestfs_reads(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'#!/bin/sh\nexec {sys.executable} {fake_guestfish.__file__} "$@"\n'
    tool_of_ours(tmp_path, monkeypatch, "guestfish", text)
    found = bench.read(bench.of(bench.image("a", bytes(MIB))), Order(guestfish=True))
    one, swap, damaged, unknown = found.disks[0].volumes
    assert (one.where, one.type, one.label, one.how) == ("/dev/sda1", "ext4", "rootfs", "guestfish")
    names = ("bin", "disk", "etc", 'with a "name"')
    assert (one.size, one.used, one.names) == (102400, 61440, names)
    assert one.file and (one.file.path, one.file.sha256) == ('/with a "name"', "af49")
    says(swap.note, "swap space")
    assert damaged.problem == "guestfish: mount_ro: bad superblock"
    assert (unknown.type, unknown.problem) == ("", "")
    says(found.summary, "disk 2000: /dev/sda3: guestfish: mount_ro: bad superblock")


def test_libguestfs_that_is_not_there_or_does_not_boot(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = bench.of(bench.image("a", bytes(MIB)))
    tool_of_ours(tmp_path, monkeypatch, "guestfish", "#!/bin/sh\necho no kernel >&2\nexit 1\n")
    says(bench.disk(call, Order(guestfish=True)).problem, "guestfish ended", "no kernel")
    without("guestfish", monkeypatch)
    says(bench.disk(call, Order(guestfish=True)).problem, "apt-get install guestfs-tools")


def test_one_file_that_is_named(bench: Bench) -> None:
    data = b"the quick brown fox"
    call = bench.of(
        bench.image("a", bench.ext4({"other": b"x"})),
        bench.image("b", bench.ext4({"etc/fox": data})),
    )
    found = bench.read(call, Order(file="/etc/fox"))
    assert found.ok
    assert [(one.path, one.sha256) for one in found.files] == [("/etc/fox", digest(data))]
    for missing in ("/etc/wolf", "/etc", "/etc/fox/tail"):
        found = bench.read(call, Order(file=missing))
        assert (found.ok, found.files) == (False, [])
        says(found.summary, f"no file {missing} is on what could be read")
    assert bench.disk(call, Order(disk=2001)).key == 2001
    with pytest.raises(UsageError, match=r"has no disk 7 .there: 2000, 2001"):
        bench.read(call, Order(disk=7))


def test_names_that_only_look_like_commands(bench: Bench) -> None:
    odd = 'a "b" <7> ?x=1'
    found = bench.disk(bench.of(bench.image("a", bench.ext4({odd: b"odd"}))), Order(file=f"/{odd}"))
    assert found.volumes[0].file and found.volumes[0].file.sha256 == digest(b"odd")


def chained(bench: Bench) -> tuple[Call, Path, Path]:
    base = bench.image("base", bench.ext4({"file": b"old"}))
    top = bench.overlay("top", "base", bench.ext4({"file": b"new!"}))
    return bench.of(top, backing=base), top, base


def test_a_chain_is_read_as_its_newest_image_has_it(bench: Bench) -> None:
    call, _, base = chained(bench)
    before = base.read_bytes()
    disk = bench.disk(call)
    assert disk.layers == 2
    assert disk.volumes[0].file and disk.volumes[0].file.sha256 == digest(b"new!")
    assert base.read_bytes() == before


def test_a_chain_with_a_link_that_is_gone_damaged_or_another(bench: Bench) -> None:
    call, top, base = chained(bench)
    elsewhere = base.rename(base.with_name("moved"))
    says(bench.disk(call).problem, f"{top} builds on {base}, which is missing", "put it back")
    base.write_bytes(b"QFI\xfb" + bytes(200))
    says(bench.disk(call).problem, "which cannot be read", "damaged")
    base.write_bytes(elsewhere.read_bytes()[:300000])
    says(bench.disk(call).problem, f"{base} is damaged")
    elsewhere.rename(base)
    run("qemu-img", "rebase", "-u", "-b", "other", "-F", "qcow2", str(top))
    base.rename(base.with_name("other"))
    says(bench.disk(call).problem, "builds on", "other, the run recorded", "base")
    top.unlink()
    says(bench.disk(call).problem, f"its image {top} is missing")


def test_a_file_system_that_is_damaged(bench: Bench) -> None:
    data = bytearray(bench.ext4({"file": b"x" * 9000}))
    whole = bytes(data)
    # All of its inodes and directories; the superblock stays.
    data[4096 : 4 * MIB] = bytes(4 * MIB - 4096)
    found = bench.read(bench.of(bench.image("a", bytes(data))))
    assert not found.ok
    says(found.summary, "disk 2000: disk: debugfs")
    assert bench.read(bench.of(bench.image("b", whole))).ok


def test_a_file_system_that_was_mounted_is_read_and_told(bench: Bench) -> None:
    raw = bench.folder / "mounted"
    raw.write_bytes(bench.ext4({"file": b"x" * 9000}))
    tool = reading.find("debugfs") or "debugfs"
    subprocess.run([tool, "-w", "-R", "feature needs_recovery", raw], check=True)
    found = bench.read(bench.of(bench.image("a", raw.read_bytes())))
    (volume,) = found.disks[0].volumes
    assert volume.file and volume.file.sha256 == digest(b"x" * 9000)
    says(volume.note, "its journal was not replayed")


def test_an_image_whose_data_is_gone(bench: Bench) -> None:
    """What is behind the end of the file, qemu reads as zeros; no tool would notice."""
    path = bench.image("a", bench.ext4({"file": random.Random(5).randbytes(3 * MIB)}))
    os.truncate(path, path.stat().st_size // 3)
    found = bench.read(bench.of(path))
    says(found.summary, f"disk 2000: {path} is damaged")


def test_a_size_that_is_not_the_runs(bench: Bench) -> None:
    path = bench.image("a", bench.ext4({"file": b"x"}))
    export = an_export(image=str(path), size=16 * MIB)
    call = a_call(a_vm(exports=(export,)), CallState.COMPLETED)
    says(bench.disk(call).problem, "8 MiB", "16 MiB")


def without(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = reading.find
    monkeypatch.setattr(reading, "find", lambda name: None if name == tool else real(name))


def test_a_copy_where_there_is_no_fuse(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    without("nbdfuse", monkeypatch)
    data = random.Random(2).randbytes(MIB)
    call = bench.of(bench.image("a", bench.ext4({"file": data})))
    disk = bench.disk(call)
    assert disk.view == "copy"
    assert disk.volumes[0].file and disk.volumes[0].file.sha256 == digest(data)
    found = bench.read(call, Order(copy_limit=MIB))
    (volume,) = found.disks[0].volumes
    assert (volume.type, volume.how, found.ok) == ("ext4", "", True)
    says(volume.note, "files were not read", "nbdfuse", "--copy-limit (1 MiB)")
    says(found.summary, "no file was read back")


def test_tools_that_are_missing_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    call = bench.of(bench.image("a", bench.ext4({"file": b"x"})))
    for tool in ("debugfs", "grub-fstest", "grub2-fstest"):
        without(tool, monkeypatch)
    says(bench.disk(call).volumes[0].note, "needs debugfs (e2fsprogs)")
    without("blkid", monkeypatch)
    says(bench.disk(call).volumes[0].note, "blkid is not installed")


def test_everything_has_a_deadline(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging(tmp_path, monkeypatch)
    call = bench.of(bench.image("a", bench.ext4({"file": b"x"})))
    found = bench.read(call, Order(timeout=1.0))
    says(found.summary, "not done within 1 s", "--timeout")


def hanging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A debugfs that never ends."""
    tool_of_ours(folder, monkeypatch, "debugfs", "#!/bin/sh\nexec sleep 600\n")


def tool_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """A program that is found before those that are installed."""
    tool = folder / "bin" / name
    tool.parent.mkdir()
    tool.write_text(text)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


READ = """
import sys, tempfile
from tests.host.test_restoring import Bench, ANY, restore_test
from pathlib import Path
tempfile.tempdir = sys.argv[1]
bench = Bench.__new__(Bench)
root = Path(sys.argv[2])
from reconciler.core.settings import Settings
settings = Settings(hub="h", state=str(root), repositories={"local": str(root)})
restore_test(settings, Bench.of(bench, root / "ctx-1" / "a"), ANY)
"""


def test_a_killed_one_leaves_nothing_behind(
    bench: Bench, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging(tmp_path, monkeypatch)
    call = bench.of(bench.image("a", bench.ext4({"file": b"x"})))
    words = [sys.executable, "-c", READ, str(temporary), str(bench.root)]
    with subprocess.Popen(words) as process:
        try:
            until(lambda: any("sleep" in name for name in tools(process.pid)), "a tool at work")
            assert len(readers()) >= 1
        finally:
            process.send_signal(signal.SIGKILL)
    until(lambda: not readers(), "the end of what it had begun")
    assert len(os.listdir(temporary)) == 1
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert bench.read(call).ok
    assert os.listdir(temporary) == []


def tools(parent: int) -> list[str]:
    """The names of the children of a process."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    found = []
    for pid in path.read_text().split():
        try:
            found.append(Path(f"/proc/{pid}/comm").read_text())
        except OSError:
            continue
    return found


def test_a_directory_that_is_lived_in_is_not_swept(temporary: Path) -> None:
    with reading.scratch() as mine, reading.scratch() as other:
        assert mine.is_dir() and other.is_dir()
    link = temporary / f"{reading.PREFIX}link"
    link.symlink_to("/tmp")
    reading.sweep()
    assert link.is_symlink() and Path("/tmp").is_dir()
    link.unlink()


def ledger(*states: CallState) -> Ledger:
    calls = [
        a_call(a_vm(run=f"r{number}"), state, created=number, changed=number)
        for number, state in enumerate(states)
    ]
    return remembered(calls=calls)


def test_which_run_is_read() -> None:
    known = ledger(CallState.COMPLETED, CallState.COMPLETED, CallState.FAILED, CallState.ACCEPTED)
    assert run_of(known, "ctx-1", None).run == "r1"
    assert run_of(known, "ctx-1", "r0").run == "r0"
    with pytest.raises(HostError, match="it is FAILED, so it is not a backup; completed: r0, r1"):
        run_of(known, "ctx-1", "r2")
    with pytest.raises(UsageError, match=r"no run 'r7'.*completed: r0, r1"):
        run_of(known, "ctx-1", "r7")
    with pytest.raises(UsageError, match="no run of a VM 'ctx-2'; did you mean 'ctx-1'"):
        run_of(known, "ctx-2", None)
    gone = Archived(job_id="", position=0, size=1, allocated=1, digest="", at=1, removed=NOW)
    removed = replace(known, shelf=Shelf(lambda jobs: {job: Kept({0: gone}) for job in jobs}))
    with pytest.raises(HostError, match="its images were removed at "):
        run_of(removed, "ctx-1", "r0")
    with pytest.raises(HostError, match="no run of it is completed"):
        run_of(ledger(CallState.FAILED), "ctx-1", None)


class Drawer:
    """Files as a tool would tell of them."""

    how = "shelf"

    def __init__(self, read: bytes) -> None:
        self.data = read

    def entries(self, path: str) -> list[Entry]:
        inside = {
            "/": [Entry("$MFT", "file", 9), Entry("big", "file", FIRST_FILE + 1)],
            "/sub": [Entry("link", "other"), Entry("empty", "file"), Entry("file", "file", 4)],
        }
        return [*inside.get(path, []), *([Entry("sub", "directory")] if path == "/" else [])]

    def digest(self, path: str) -> tuple[int, str]:
        return len(self.data), digest(self.data)

    def about(self) -> reading.About:
        return reading.About()


def test_the_first_file_is_small_where_there_is_one() -> None:
    shelf = Drawer(b"four")
    assert first(shelf, shelf.entries("/")) == ("/sub/file", 4)
    assert first(shelf, [Entry("big", "file", FIRST_FILE + 1)]) == ("/big", FIRST_FILE + 1)
    assert first(shelf, [Entry("empty", "file")]) is None
    assert named(shelf, "/sub/file") == ("/sub/file", 4)
    with pytest.raises(HostError, match="/sub/link is a link or a device"):
        named(shelf, "/sub/link/more")


def test_a_file_that_is_shorter_than_its_directory_says() -> None:
    volume = Volume(where="disk", type="ext4")
    assert listed(volume, Drawer(b"four"), "").file is not None
    says(listed(volume, Drawer(b"fo"), "").problem, "/sub/file ends after 2 bytes", "should have 4")


def test_ranges_are_read_over_one_connection(bench: Bench, temporary: Path) -> None:
    data = random.Random(9).randbytes(3 * MIB)
    path = bench.image("a", data)
    with (
        reading.scratch() as folder,
        reading.served(qemu_nbd.find("qemu-nbd"), str(path), "of a test", folder) as (
            child,
            socket,
        ),
    ):
        reader = until(lambda: connected(socket, child), "the server")
        assert reader.size == 3 * MIB
        assert reader.read(MIB - 7, nbd.MAX_READ + 20) == data[MIB - 7 : MIB - 7 + MIB + 20]
        with pytest.raises(HostError, match="cannot read 2 bytes at byte 3145727 of the disk"):
            reader.read(3 * MIB - 1, 2)
        with pytest.raises(HostError, match="cannot read other: it has no export of that name"):
            nbd.Reader(socket, "other", 20)
        child.end()
        with pytest.raises(HostError, match="at byte 0 of the disk"):
            reader.read(0, 2)
        reader.close()


def connected(socket: Path, child: reading.Child) -> nbd.Reader | None:
    assert not child.ended
    try:
        return nbd.Reader(socket, reading.EXPORT, 20)
    except HostError:
        return None
