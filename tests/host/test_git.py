"""A real git, real bare repositories, real signatures; no network."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.errors import HostError
from reconciler.core.settings import GitSource, Secret, SecretRef
from reconciler.host.git import TOKEN, Git, Mirror, describe
from reconciler.host.store import events
from reconciler.host.watching import Watch
from reconciler.source import Fetcher, Source, mirror_of
from tests.core.builders import a_settings, says
from tests.host.watched import Site, spec
from tests.ports import Dealer

IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Jane Doe"), ("EMAIL", "jane@example.org"))
}


@pytest.fixture(scope="session")
def dealer() -> Dealer:
    return Dealer()


class Remote:
    """A bare repository, and somebody's clone of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.bare, self.clone = tmp_path / "specs.git", tmp_path / "clone"
        self.git("init", "-q", "--bare", "-b", "main", str(self.bare), at=tmp_path)
        self.git("clone", "-q", str(self.bare), str(self.clone), at=tmp_path)
        self.git("checkout", "-q", "-b", "main")

    def git(self, *arguments: str, at: Path | None = None) -> str:
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            **IDENTITY,
        }
        done = subprocess.run(
            ["git", *arguments],
            cwd=at or self.clone,
            env=environment,
            check=True,
            capture_output=True,
        )
        return done.stdout.decode().strip()

    def push(self, *commit: str, subject: str = "a change", **files: str | None) -> str:
        """Commit and push some files, `a` being `a.yaml`; the commit."""
        for name, text in files.items():
            path = self.clone / f"{name}.yaml"
            if text is None:
                path.unlink()
            else:
                path.write_text(text)
        self.git("add", "-A")
        self.git(*(commit or ("commit",)), "-q", "--allow-empty", "-m", subject)
        self.git("push", "-q", "--force", "origin", "main")
        return self.git("rev-parse", "HEAD")

    def mirror(self, into: Path, **options: object) -> Mirror:
        return Mirror(url=str(self.bare), branch="main", into=str(into), **options)  # type: ignore[arg-type]


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path)


def text(mirror: Mirror, name: str = "a.yaml") -> str:
    return (Path(mirror.current) / name).read_text()


def test_a_work_tree_is_described(remote: Remote, tmp_path: Path) -> None:
    commit = remote.push(a=spec("ctx-1"), subject="first")
    found = describe(str(remote.clone))
    assert found is not None
    assert (found.commit, found.author, found.subject) == (commit, "Jane Doe", "first")
    assert not found.dirty
    (remote.clone / "b.yaml").write_text("vms: []\n")
    found = describe(str(remote.clone))
    assert found is not None
    assert found.dirty
    assert describe(str(tmp_path)) is None
    assert describe(str(tmp_path / "missing")) is None


def test_a_commit_that_is_pushed_is_checked_out(remote: Remote, tmp_path: Path) -> None:
    mirror = remote.mirror(tmp_path / "source")
    first = remote.push(a="one\n")
    fetched = mirror.fetch()
    assert (fetched.path, fetched.commit, fetched.author) == (mirror.current, first, "Jane Doe")
    assert text(mirror) == "one\n"
    second = remote.push(a=None, b="two\n", subject="second")
    assert mirror.fetch().commit == second
    assert os.listdir(mirror.current) == ["b.yaml"]
    found = mirror.describe(mirror.current)
    assert found is not None
    assert (found.commit, found.subject, found.dirty) == (second, "second", False)
    assert mirror.describe(str(tmp_path)) is None


def test_history_that_is_rewritten_is_followed(remote: Remote, tmp_path: Path) -> None:
    mirror = remote.mirror(tmp_path / "source")
    remote.push(a="one\n")
    remote.push(a="two\n")
    mirror.fetch()
    commit = remote.push("commit", "--amend", a="three\n")
    assert mirror.fetch().commit == commit
    assert text(mirror) == "three\n"


def test_two_checkouts_are_kept(remote: Remote, tmp_path: Path) -> None:
    mirror = remote.mirror(tmp_path / "source")
    commits = []
    for number in range(4):
        commits.append(remote.push(a=f"{number}\n"))
        mirror.fetch()
    left = {one.name for one in (tmp_path / "source").iterdir()}
    assert left == {"current", "mirror.git", *commits[-2:]}
    os.symlink("/", tmp_path / "source" / ".current-1")  # what a crash left
    (tmp_path / "source" / ".new-1" / "x").mkdir(parents=True)
    (tmp_path / "source" / ".index-1").touch()
    mirror.fetch()
    assert {one.name for one in (tmp_path / "source").iterdir()} == left


def test_a_checkout_that_is_not_whole_is_made_again(remote: Remote, tmp_path: Path) -> None:
    """A power cut can leave a file empty; the next process compares."""
    commit = remote.push(a="one\n")
    mirror = remote.mirror(tmp_path / "source")
    mirror.fetch()
    (tmp_path / "source" / commit / "a.yaml").write_text("")
    again = remote.mirror(tmp_path / "source")
    again.fetch()
    assert text(again) == "one\n"


@pytest.mark.parametrize("damage", ["a ref", "everything", "a lock"])
def test_a_mirror_in_pieces_is_made_again(remote: Remote, tmp_path: Path, damage: str) -> None:
    remote.push(a="one\n")
    mirror = remote.mirror(tmp_path / "source")
    mirror.fetch()
    bare = tmp_path / "source" / "mirror.git"
    if damage == "a ref":
        (bare / "refs" / "heads" / "fetched").write_text("")
    elif damage == "everything":
        (bare / "HEAD").write_text("")
    else:
        (bare / "refs" / "heads" / "fetched.lock").touch()
    remote.push(a="two\n")
    mirror.fetch()
    assert text(mirror) == "two\n"


def test_what_cannot_be_reached_keeps_what_is_there(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = remote.push(a=spec("ctx-1"))
    kicks: list[int] = []
    mirror = remote.mirror(tmp_path / "source")
    fetcher = Fetcher(mirror, 30.0, lambda: kicks.append(1))
    now = [1_000.0]
    monkeypatch.setattr("reconciler.source.time.time", lambda: now[0])
    assert fetcher.fetch()
    assert (fetcher.last_success, fetcher.error, fetcher.since) == (1_000.0, "", 0.0)
    assert not fetcher.fetch()  # nothing is new
    remote.bare.rename(tmp_path / "away")
    now[0] = 2_000.0
    assert fetcher.fetch()
    says(fetcher.error, f"cannot fetch {remote.bare}", "does not appear to be a git repository")
    now[0] = 3_000.0
    assert not fetcher.fetch()
    assert (fetcher.last_success, fetcher.since) == (1_000.0, 2_000.0)
    assert text(mirror) == spec("ctx-1")
    site = Site(tmp_path)
    site.source = Source(mirror.current, site.settings, describe=mirror.describe, fetcher=fetcher)
    assert site.exported() == {"ctx-1"}
    assert site.ledger().source["revision"]["commit"] == commit
    fetch = site.ledger().source["fetch"]
    assert (fetch["fetch_since"], fetch["fetch_error"]) == (2_000.0, fetcher.error)
    (tmp_path / "away").rename(remote.bare)
    assert fetcher.fetch()
    assert site.exported() == {"ctx-1"}
    assert site.ledger().source["fetch"]["fetch_error"] == ""
    site.close()


def test_a_fetcher_kicks_when_something_is_new(remote: Remote, tmp_path: Path) -> None:
    remote.push(a="one\n")
    kicked = threading.Event()
    fetcher = Fetcher(remote.mirror(tmp_path / "source"), 600.0, kicked.set)
    fetcher.start()
    assert kicked.wait(30)
    kicked.clear()
    remote.push(a="two\n")
    fetcher.now()
    assert kicked.wait(30)
    assert text(fetcher.mirror) == "two\n"
    assert fetcher.alive
    fetcher.stop()
    assert not fetcher.alive


def test_a_pushed_commit_wakes_who_watches(remote: Remote, tmp_path: Path) -> None:
    """From the push to what is desired, with nothing but the watch to tell."""
    site = Site(tmp_path)
    remote.push(a=spec("ctx-1"))
    mirror = remote.mirror(tmp_path / "source")
    mirror.fetch()
    site.source = Source(mirror.current, site.settings, describe=mirror.describe)
    watch = Watch()
    watch.arm(site.source.watched())
    assert {one.run for one in site.apply().values()} == {"r1"}
    watch.drain()
    commit = remote.push(a=spec("ctx-1", run="r2"), subject="the second run")
    fetcher = Fetcher(mirror, 600.0, lambda: None)
    fetcher.start()
    while select.select([watch], [], [], 30)[0] and not watch.drain():
        pass
    fetcher.stop()
    assert {one.run for one in site.apply().values()} == {"r2"}
    assert site.reading is not None
    assert site.reading.revision.name == commit[:12]
    assert [one.message for one in events(site.state, "", 1)] == [
        f"revision {commit[:12]} by Jane Doe: the second run"
    ]
    watch.close()
    site.close()


def test_a_fetch_that_hangs_is_ended(tmp_path: Path, dealer: Dealer) -> None:
    """A server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", dealer.deal(1)[0])) as server:
        host, port = server.getsockname()
        mirror = Mirror(url=f"git://{host}:{port}/x", branch="main", into=str(tmp_path / "s"))
        fetcher = Fetcher(mirror, 600.0, lambda: None)
        fetcher.start()
        server.settimeout(30)
        connection, _ = server.accept()
        fetcher.stop()
        assert not fetcher.alive
        with connection:
            connection.settimeout(30)
            while connection.recv(1_000):
                pass  # it ends, as nobody holds it open any more


def test_git_has_a_deadline(tmp_path: Path, dealer: Dealer) -> None:
    with socket.create_server(("127.0.0.1", dealer.deal(1)[0])) as server:
        host, port = server.getsockname()
        with pytest.raises(HostError, match=r"did not end within 0.3 s"):
            Git().run(["ls-remote", f"git://{host}:{port}/x"], 0.3)


def test_a_branch_that_is_not_there_is_said(remote: Remote, tmp_path: Path) -> None:
    remote.push(a="one\n")
    mirror = Mirror(url=str(remote.bare), branch="other", into=str(tmp_path / "source"))
    with pytest.raises(HostError, match="refs/heads/other"):
        mirror.fetch()


def test_a_link_in_a_repository_leads_nowhere(remote: Remote, tmp_path: Path) -> None:
    """Else whoever may push could read every file of the hub in an error message."""
    (remote.clone / "a.yaml").symlink_to("/etc/passwd")
    remote.push()
    mirror = remote.mirror(tmp_path / "source")
    mirror.fetch()
    assert text(mirror) == "/etc/passwd"


# -- who is let in, and what is believed


def key(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)]
    subprocess.run(command, check=True)
    return path


def signed(path: Path) -> tuple[str, ...]:
    return ("-c", "gpg.format=ssh", "-c", f"user.signingkey={path}", "commit", "-S")


def test_only_what_an_allowed_signer_signed_is_used(remote: Remote, tmp_path: Path) -> None:
    ours, strange = key(tmp_path, "ours"), key(tmp_path, "strange")
    signers = tmp_path / "signers"
    signers.write_text(f"jane@example.org {ours.with_suffix('.pub').read_text()}")
    mirror = remote.mirror(tmp_path / "source", signers=str(signers))
    good = remote.push(*signed(ours), a="one\n")
    assert mirror.fetch().commit == good
    for commit in (("commit",), signed(strange)):
        bad = remote.push(*commit, a="evil\n")
        with pytest.raises(HostError) as refusal:
            mirror.fetch()
        says(str(refusal.value), bad[:12], "Jane Doe", str(signers), "sign it")
        assert text(mirror) == "one\n"
    good = remote.push(*signed(ours), a="two\n")
    assert mirror.fetch().commit == good


GPG = """#!/bin/sh
case "$*" in
*--verify*) cat >/dev/null; echo "[GNUPG:] NEWSIG"; echo "[GNUPG:] GOODSIG 0123456789ABCDEF Mallory"
  echo "[GNUPG:] TRUST_ULTIMATE 0 pgp";;
*) cat >/dev/null; echo "[GNUPG:] SIG_CREATED D" >&2
  printf -- "-----BEGIN PGP SIGNATURE-----\\n\\nx\\n-----END PGP SIGNATURE-----\\n";;
esac
"""
"""A gpg that finds every signature good, as one does whose keyring has the key."""


def test_a_key_that_this_machine_trusts_for_something_else_does_not_count(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gpg").write_text(GPG)
    (programs / "gpg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "signers").touch()
    commit = remote.push("-c", "user.signingkey=x", "commit", "-S", a="evil\n")
    believed = subprocess.run(
        ["git", "verify-commit", commit], cwd=remote.clone, check=False, capture_output=True
    )
    assert believed.returncode == 0
    with pytest.raises(HostError, match="nobody in"):
        remote.mirror(tmp_path / "source", signers=str(tmp_path / "signers")).fetch()


@pytest.mark.parametrize(
    "url",
    [
        "https://jane:hunter2@example.org/x.git",
        "ext::sh -c true",
        "--upload-pack=x",
        "",
    ],
)
def test_a_url_that_may_not_be_used_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(HostError) as refusal:
        Mirror(url=url, branch="main", into=str(tmp_path))
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("branch", ["-x", "", "a b"])
def test_a_branch_is_a_name(tmp_path: Path, branch: str) -> None:
    with pytest.raises(HostError, match="is no branch"):
        Mirror(url="/x", branch=branch, into=str(tmp_path))


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In the place of git: a program that writes down how it was started, and fails."""
    programs, found = tmp_path / "bin", tmp_path / "recorded"
    programs.mkdir()
    fake = programs / "git"
    fake.write_text(
        f'#!/bin/sh\n{{ echo "argv $*"; env; }} >> {found}\necho "fatal: no" >&2; exit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    yield found


def test_a_token_is_in_the_environment_of_git_alone(tmp_path: Path, recorded: Path) -> None:
    mirror = Mirror(
        url="https://example.org/x.git",
        branch="main",
        into=str(tmp_path / "source"),
        token=lambda: Secret("hunter2"),
    )
    with pytest.raises(HostError) as refusal:
        mirror.fetch()
    assert "hunter2" not in str(refusal.value) + repr(mirror)
    lines = recorded.read_text().splitlines()
    assert [one for one in lines if "hunter2" in one] == [f"{TOKEN}=hunter2"]
    assert "GIT_CONFIG_KEY_0=credential.https://example.org.helper" in lines
    assert "GIT_TERMINAL_PROMPT=0" in lines


def test_the_helper_gives_the_token_to_its_host_alone(tmp_path: Path) -> None:
    mirror = Mirror(
        url="https://example.org/x.git",
        branch="main",
        into=str(tmp_path),
        token=lambda: Secret("hunter2"),
    )
    environment = {**Git().environment, **mirror._access(), "GIT_ASKPASS": "true"}
    for host, word in (("example.org", "hunter2"), ("evil.example", "")):
        done = subprocess.run(
            ["git", "credential", "fill"],
            input=f"protocol=https\nhost={host}\n\n".encode(),
            env=environment,
            capture_output=True,
            check=False,
        )
        found = dict(line.split("=", 1) for line in done.stdout.decode().splitlines() if line)
        assert found.get("password", "") == word


def test_a_deploy_key_is_named_to_ssh(tmp_path: Path, recorded: Path) -> None:
    mirror = Mirror(
        url="git@example.org:x.git",
        branch="main",
        into=str(tmp_path / "source"),
        key="/run/keys/the key",
    )
    with pytest.raises(HostError):
        mirror.fetch()
    says(
        recorded.read_text(),
        "GIT_SSH_COMMAND=ssh -i '/run/keys/the key' -o IdentitiesOnly=yes -o BatchMode=yes",
    )


def test_git_is_not_led_elsewhere(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    assert describe(str(tmp_path)) is None
    assert "GIT_DIR" not in recorded.read_text()


def test_a_machine_without_git_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="there is no program git"):
        Mirror(url="/x", branch="main", into=str(tmp_path / "s")).fetch()
    assert describe(str(tmp_path)) is None


def test_the_mirror_is_what_the_config_and_the_flags_say(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2\n")
    own = GitSource(
        url="https://example.org/x.git",
        branch="prod",
        key=SecretRef("credential", "deploy"),
        token=SecretRef("file", str(tmp_path / "token")),
        allowed_signers="/etc/signers",
    )
    settings = replace(a_settings(), git=own)
    environment = {"CREDENTIALS_DIRECTORY": "/run/credentials/r"}
    assert mirror_of(a_settings(), {}) is None
    found = mirror_of(settings, environment)
    assert found is not None
    assert (found.url, found.branch, found.into) == (own.url, "prod", "/state/source")
    assert (found.key, found.signers) == ("/run/credentials/r/deploy", "/etc/signers")
    assert found.token is not None
    assert found.token().reveal() == "hunter2"
    with pytest.raises(HostError, match="https"):
        mirror_of(settings, environment, url="/srv/x.git", branch="other")
    with pytest.raises(HostError, match="LoadCredential"):
        mirror_of(settings, {})
    given = mirror_of(a_settings(), {}, url="/srv/x.git", branch="other")
    assert given is not None
    assert (given.url, given.branch) == ("/srv/x.git", "other")
