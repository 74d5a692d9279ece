"""What was read is not worked out again, where and only where nothing moved."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import msgpack

from reconciler import inventories, loop, readings
from reconciler.core import spec_files
from reconciler.core.desired import Desired, build
from reconciler.core.errors import ConfigError
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Settings
from reconciler.host.files import Text

CONFIG = """\
hub: hub-a
state: state
repositories: {local: {root: repository, min_free: 1MiB}, far: {root: /far}}
ports: {range: 10100-10200}
qemu_nbd: {shared: 4, start_timeout: 3s, cache: writethrough}
snas: {site-a: {url: "http://127.0.0.1:9081", token: {env: SNA}, max_running: 3}}
vcenters: {vc1: {host: vc, user: u, password: {file: password}}}
inventory: {file: inventory.yaml}
api: {listen: "127.0.0.1:8083"}
loop: {resync: 10s, max_delete: 10%}
specs: {env: [NIGHT]}
"""
EVERYTHING = """\
hub: hub-a
state: state
repositories: {local: {root: repository, min_free: 1MiB, digest: none}}
ports: {range: 10100-10200, bind: 127.0.0.1, advertise: 10.0.0.1}
qemu_nbd: {binary: qemu-nbd, shared: 4, start_timeout: 3s, stop_grace: 4s, cache: none,
  aio: native, discard: unmap, detect_zeroes: unmap, parallel: 3}
snas: {site-a: {url: "https://[::1]:9081/x", token: {env: SNA}, max_running: 3, poll: 7s,
  connect_timeout: 1s, timeout: 9s, remembers_jobs: true, reports_end: true}}
vcenters: {vc1: {host: vc, user: u, password: {credential: vc1}}}
inventory: {sql: {url: "mysql://u@db/sha", password: {file: sql}, timeout: 3s}, required: true}
api: {listen: "127.0.0.1:8083", socket: false, token: {file: t},
  limits: {connections: 9}, tls: {cert: c.pem, key: k.pem}}
loop: {resync: 10s, stale_after: 2m, prune: true, max_delete: 3, healthy_after: 5s}
git: {key: {file: key}, interval: 1m}
specs: {env: [NIGHT], root: specs}
notify: {url: "https://alerts.example/x", secret: {file: hook}}
tunnel: {user: tunnel}
"""
INVENTORY = """\
groups: {gold: [ctx-1]}
vms:
  ctx-1: {vm: {path: /DC/a, vcenter: vc1}, disks: [{key: 2000, size: 1MiB}]}
  ctx-2: {vm: {path: /DC/b}, disks: [{key: 2000, size: 1MiB}, {key: 2001, size: 2MiB}]}
"""
SPEC = """\
vars: {night: "{{ lookup('env', 'NIGHT', default='') or 'monday' }}"}
defaults: {disks: inventory, repository: local, backup: {run: "{{ night }}", type: full}}
vms:
  - {name: ctx-1, labels: {tier: "{{ tier | default('silver') }}"}, keep: {full: 2, days: 3}}
  - {name: ctx-2, disks: [{key: 2000, size: 1MiB}, {key: 2001}]}
runs:
  - {vm: ctx-1, run: extra, by: ann, tags: {a: b}}
"""


class Place:
    """A hub's files, and how often what was worked out."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.worked: list[str] = []
        for name, text in (
            ("reconciler.yaml", CONFIG),
            ("inventory.yaml", INVENTORY),
            ("specs/a.yaml", SPEC),
            ("specs/b.yaml", "vms: [{name: ctx-3, state: absent}]\n"),
            ("password", "x\n"),
        ):
            self.write(name, text)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.delenv("NIGHT", raising=False)
        read = spec_files.read_file

        def read_file(document: object, *others: object, **named: object) -> object:
            self.worked.append(document.file)  # type: ignore[attr-defined]
            return read(document, *others, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(spec_files, "read_file", read_file)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def settings(self) -> Settings:
        return loop.load_settings(None, os.environ)

    def read(self, *, extra: tuple[Text, ...] = ()) -> Desired:
        """What is desired; `worked` says what was read for that."""
        self.worked.clear()
        inventories.forget()  # as in another process
        settings = self.settings()
        source = loop.load_source((), settings, extra=extra)
        empty = Ledger(hub=settings.hub, state_id="")
        return build(source.specs, source.inventory, settings, empty)

    @property
    def kept(self) -> list[Path]:
        return sorted((self.folder / "cache" / readings.FOLDER).glob("*"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_the_second_reading_works_nothing_out_and_says_the_same(place: Place) -> None:
    first = place.read()
    assert place.worked == ["specs/a.yaml", "specs/b.yaml"]
    second = place.read()
    assert place.worked == []
    assert second == first
    assert len(place.kept) == 2


def test_settings_are_the_same_and_worked_out_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place.settings()

    def never(*_args: object, **_named: object) -> Settings:
        raise AssertionError

    monkeypatch.setattr("reconciler.core.config.settings", never)
    assert place.settings() == first
    monkeypatch.setenv("RECONCILER_HUB", "hub-b")
    with pytest.raises(AssertionError):
        place.settings()


@pytest.mark.parametrize("name", ["HOME", "STATE_DIRECTORY", "XDG_STATE_HOME"])
def test_settings_are_worked_out_anew_where_the_state_may_move(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    place.write("reconciler.yaml", "hub: hub-a\n")
    monkeypatch.delenv("RECONCILER_STATE", raising=False)
    for at in ("one", "two"):
        monkeypatch.setenv(name, str(tmp_path / at))
        settings = place.settings()
        if name == "STATE_DIRECTORY" or os.geteuid() != 0:
            assert settings.state.startswith(str(tmp_path / at))


def moved_spec(place: Place) -> None:
    place.write("specs/a.yaml", SPEC.replace("monday", "tuesday"))


def moved_inventory(place: Place) -> None:
    place.write("inventory.yaml", INVENTORY.replace("2MiB", "3MiB"))


def moved_groups(place: Place) -> None:
    place.write("specs/group_vars/gold.yaml", "tier: gold\n")


def moved_host(place: Place) -> None:
    place.write("specs/host_vars/ctx-1.yaml", "tier: bronze\n")


def moved_environment(_place: Place) -> None:
    os.environ["NIGHT"] = "friday"


@pytest.mark.parametrize(
    ("move", "worked"),
    [
        (moved_spec, ["specs/a.yaml"]),
        (moved_inventory, []),  # no expression looks into it: what is declared is the same
        (moved_groups, ["specs/a.yaml", "specs/b.yaml"]),
        (moved_host, ["specs/a.yaml", "specs/b.yaml"]),
        (moved_environment, ["specs/a.yaml"]),
    ],
)
def test_what_moved_is_worked_out_and_nothing_else(
    place: Place, move: Callable[[Place], None], worked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHT", "")  # so that it is as it was after the test
    before = place.read()
    move(place)
    after = place.read()
    assert place.worked == worked
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.folder / "another"))
    assert after == place.read() != before
    assert place.worked == ["specs/a.yaml", "specs/b.yaml"]


def test_extra_variables_are_another_reading(place: Place) -> None:
    place.read()
    desired = place.read(extra=(Text("-e", "night: wednesday\n"),))
    assert place.worked == ["specs/a.yaml", "specs/b.yaml"]
    assert desired.vms["ctx-2"].run == "wednesday"
    assert place.read().vms["ctx-2"].run == "monday"


def test_another_program_is_another_reading(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.read()
    monkeypatch.setattr(readings, "program", lambda: "another")
    place.read()
    assert place.worked == ["specs/a.yaml", "specs/b.yaml"]


def test_what_has_a_finding_is_never_kept(place: Place) -> None:
    place.write("specs/b.yaml", "vms: [{name: ctx-3, stat: absent}]\n")
    for _ in range(3):
        desired = place.read()
        assert any("did you mean 'state'" in str(one) for one in desired.diagnostics)
    assert place.worked == ["specs/b.yaml"]


def test_a_finding_about_what_was_kept_still_has_its_place(place: Place) -> None:
    place.read()
    place.write("inventory.yaml", INVENTORY.replace("ctx-2: {vm", "ctx-9: {vm"))
    place.write("specs/a.yaml", SPEC.replace("disks: [{key: 2000, size: 1MiB}, {key: 2001}]", ""))
    place.read()
    desired = place.read()
    assert place.worked == []
    (wrong,) = desired.diagnostics
    assert str(wrong.place) == "specs/a.yaml:5:12"


def test_a_file_that_cannot_be_read_any_more_is_said(place: Place) -> None:
    place.read()
    (place.folder / "specs/b.yaml").unlink()
    (place.folder / "specs/b.yaml").symlink_to("nowhere.yaml")
    (wrong,) = place.read().diagnostics
    assert "b.yaml" in str(wrong)


def test_a_config_with_every_kind_of_key_is_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write("reconciler.yaml", EVERYTHING)
    first = place.settings()

    def never(*_args: object, **_named: object) -> Settings:
        raise AssertionError

    monkeypatch.setattr("reconciler.core.config.settings", never)
    assert place.settings() == first


def test_a_config_with_an_error_is_said_each_time(place: Place) -> None:
    place.write("reconciler.yaml", "hub: hub-a\nprots: {}\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="did you mean 'ports'"):
            place.settings()
    assert place.kept == []


def test_what_is_encrypted_is_not_kept(place: Place) -> None:
    sealed = "-----BEGIN AGE ENCRYPTED FILE-----\\nYWdl\\n-----END AGE ENCRYPTED FILE-----\\n"
    text = CONFIG.replace("{file: password}", f'{{age: "{sealed}"}}')
    place.write("reconciler.yaml", f"{text}secrets: {{age_identity: {{file: key}}}}\n")
    assert any(ref.sealed for ref in place.settings().secrets)
    assert place.kept == []


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def of_another_form(path: Path) -> None:
    path.write_bytes(msgpack.encode({"key": 1}))


def open_to_others(path: Path) -> None:
    path.chmod(0o622)


def a_link(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    path.symlink_to(other)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


HARMS = [damaged, of_another_form, open_to_others, a_link, a_folder, a_pipe]


@pytest.mark.parametrize("harm", HARMS)
def test_what_cannot_be_trusted_is_none(place: Place, harm: Callable[[Path], None]) -> None:
    first = place.read()
    for path in place.kept:
        harm(path)
    assert place.read() == first
    assert place.worked == ["specs/a.yaml", "specs/b.yaml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_another_user_wrote_is_none(place: Place) -> None:
    first = place.read()
    for path in place.kept:
        os.chown(path, 12345, 12345)
    assert place.read() == first
    assert place.worked == ["specs/a.yaml", "specs/b.yaml"]
    os.chown(place.folder / "cache" / readings.FOLDER, 12345, 12345)
    for path in place.kept:
        path.unlink()
    place.read()
    assert place.kept == []  # nor is anything written into another's home


def test_a_home_that_is_not_there_is_not_made(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(place.folder / "nowhere"))
    place.read()
    assert not (place.folder / "nowhere").exists()
    monkeypatch.setenv("HOME", str(place.folder))
    place.read()
    assert (place.folder / ".cache" / readings.FOLDER).is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_nothing_is_written_into_the_home_of_another(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    home = place.folder / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    monkeypatch.setenv("HOME", str(home))
    place.read()
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("above", ["", "relative", "/dev/null/no"])
def test_without_a_cache_all_is_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch, above: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", above)
    monkeypatch.setenv("HOME", "")
    first = place.read()
    assert place.read() == first
    assert place.worked == ["specs/a.yaml", "specs/b.yaml"]


def test_there_are_never_many_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "FILES", 4)
    for number in range(6):
        place.write(f"{number}.yaml", "vms: []\n")
        loop.load_source((f"{number}.yaml",), place.settings())
    assert len(place.kept) == 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in place.kept)


def test_no_secret_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNA", "swordfish")
    place.write("password", "hunter2\n")
    place.read()
    for path in place.kept:
        assert not {b"swordfish", b"hunter2"} & {
            word for word in (b"swordfish", b"hunter2") if word in path.read_bytes()
        }


def test_a_saved_plan_names_what_was_looked_up_also_where_it_was_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHT", "friday")
    place.write("specs/group_vars/gold.yaml", "tier: gold\n")

    def told() -> str:
        inventories.forget()
        source = loop.load_source((), place.settings())
        return json.dumps({name: one.text for name, one in source.readings().items()})

    first = told()
    assert "$NIGHT" in first
    assert "group_vars/gold.yaml" in first
    assert told() == first
