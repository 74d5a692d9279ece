"""Git by its own command: what a work tree stands at, and a remote branch as a directory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.core.errors import HostError, shortened
from reconciler.core.settings import Secret
from reconciler.core.units import Seconds

LOOK_TIMEOUT: Final[Seconds] = 10.0
"""For what is asked of a repository on this machine."""
FETCH_TIMEOUT: Final[Seconds] = 120.0
"""For a fetch. A first one of a large repository over a slow line takes a minute."""
PASSED_ON: Final = (
    "PATH",
    "HOME",
    "SSH_AUTH_SOCK",
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
    "GIT_SSL_CAINFO",
)
"""Of our environment. No GIT_DIR or the like of whoever started us may lead elsewhere."""
TOKEN: Final = "RECONCILER_GIT_TOKEN"  # noqa: S105 the variable's name
"""The variable in which git's child finds the token; it is in nobody's argv."""
KEPT: Final = 2
"""Checkouts that stay: the one in use, and the one before, which may be in the act of being read."""
_COMMIT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_FORMAT: Final = "--format=%H%x00%an%x00%s"
_DAMAGED: Final = re.compile(r"corrupt|bad object|bad ref|broken|loose object|not a git repository")
"""What git says of a mirror that a power cut left in pieces."""


class Commit(Struct, frozen=True, kw_only=True):
    """What Git knows of the content of a directory."""

    commit: str
    author: str
    subject: str
    dirty: bool = False
    """The files are not as the commit has them."""


class Fetched(Struct, frozen=True):
    """A commit that was checked out."""

    path: str
    commit: str
    author: str


def describe(directory: str) -> Commit | None:
    """The commit that a directory stands at; None: it is in no work tree, or nobody can tell."""
    try:
        commit = _commit(_git(["-C", directory, "log", "-1", _FORMAT], LOOK_TIMEOUT))
        status = ["-C", directory, "status", "--porcelain", "--untracked-files=all", "--", "."]
        changed = _git(status, LOOK_TIMEOUT)
    except HostError:
        return None
    return Commit(
        commit=commit.commit, author=commit.author, subject=commit.subject, dirty=bool(changed)
    )


@dataclass(slots=True)
class Mirror:
    """A branch of a remote repository, checked out below `into`; `current` leads to the newest.

    One at a time of the same `into`. A crash at any point leaves the last checkout in place.
    """

    url: str
    branch: str
    into: str
    key: str | None = None
    """A file with the private key for ssh."""
    token: Secret | None = field(default=None, repr=False)
    signers: str | None = None
    """A file of allowed signers, see ssh-keygen(1); every other commit is refused."""
    _known: set[str] = field(default_factory=set)
    """Commits whose checkouts are known to be whole: this process made or compared them."""

    def __post_init__(self) -> None:
        """Raises HostError."""
        if wrong := unusable(self.url):
            raise HostError(f"cannot fetch from Git: {wrong}", "Git")
        if self.branch.startswith("-") or not re.fullmatch(r"[\w./+@-]{1,250}", self.branch):
            raise HostError(f"cannot fetch {self.url}: {self.branch!r} is no branch", "Git")

    @property
    def current(self) -> str:
        """The symlink that leads to the newest checkout."""
        return os.path.join(self.into, "current")

    @property
    def _mirror(self) -> str:
        return os.path.join(self.into, "mirror.git")

    def fetch(self) -> Fetched:
        """Bring `current` to where the branch is now. Raises HostError, and then it stays."""
        try:
            os.makedirs(self.into, mode=0o700, exist_ok=True)
            try:
                commit = self._fetched()
            except HostError as error:
                if not _DAMAGED.search(str(error)):
                    raise
                shutil.rmtree(self._mirror, ignore_errors=True)
                commit = self._fetched()
            if self.signers is not None:
                self._verify(commit, self.signers)
            self._check_out(commit.commit)
            self._point(commit.commit)
            self._clean()
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            said = f"cannot fetch {self.url}: {where}{error.strerror}"
            raise HostError(said, "Git") from error
        return Fetched(self.current, commit.commit, commit.author)

    def describe(self, directory: str) -> Commit | None:
        """The commit of a directory in a checkout; None: it is in none."""
        inside = os.path.relpath(os.path.realpath(directory), os.path.realpath(self.into))
        name = inside.split("/")[0]
        if not _COMMIT.fullmatch(name):
            return None
        try:
            return self._log(name)
        except HostError:
            return None

    def _fetched(self) -> Commit:
        """Get what is new; the commit that the branch is at."""
        if not os.path.isdir(self._mirror):
            self._run(["init", "--quiet", "--bare", self._mirror], LOOK_TIMEOUT)
        self._unlock()
        wanted = f"+refs/heads/{self.branch}:refs/heads/fetched"
        options = ["--quiet", "--no-tags", "--no-recurse-submodules"]
        arguments = ["fetch", *options, "--", self.url, wanted]
        self._run([f"--git-dir={self._mirror}", *arguments], FETCH_TIMEOUT)
        return self._log("refs/heads/fetched")

    def _log(self, of: str) -> Commit:
        arguments = [f"--git-dir={self._mirror}", "log", "-1", _FORMAT, of, "--"]
        return _commit(self._run(arguments, LOOK_TIMEOUT))

    def _unlock(self) -> None:
        """Remove what a git that was killed left locked; nobody else works here."""
        for root, _, names in os.walk(self._mirror):
            for name in names:
                if name.endswith(".lock"):
                    os.unlink(os.path.join(root, name))

    def _verify(self, commit: Commit, signers: str) -> None:
        """Only a signature by one of the signers counts, whatever keys this machine trusts."""
        options = {
            "gpg.ssh.allowedSignersFile": signers,
            "gpg.minTrustLevel": "fully",
            "gpg.program": "false",
            "gpg.openpgp.program": "false",
            "gpg.x509.program": "false",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        arguments = [*settings, f"--git-dir={self._mirror}", "verify-commit", "--", commit.commit]
        try:
            self._run(arguments, LOOK_TIMEOUT)
        except HostError as error:
            raise HostError(
                f"cannot use commit {commit.commit[:12]} of {self.url}, by {commit.author}: nobody "
                f"in {signers} has signed it ({error}); sign it, or add the signer there",
                "Git",
            ) from error

    def _check_out(self, commit: str) -> None:
        """The commit as a directory of its name, whole or not at all."""
        path = os.path.join(self.into, commit)
        if commit in self._known and os.path.isdir(path):
            return
        index = os.path.join(self.into, f".index-{secrets.token_hex(4)}")
        try:
            self._index(index, ["read-tree", commit])
            if os.path.isdir(path) and self._whole(index, path):
                self._known.add(commit)
                return
            new = os.path.join(self.into, f".new-{secrets.token_hex(4)}")
            os.mkdir(new, 0o700)
            self._index(index, ["checkout-index", "--all", "--quiet", f"--prefix={new}/"])
            if os.path.isdir(path):  # it is not what a checkout was: a power cut, or somebody
                os.rename(path, os.path.join(self.into, f".old-{secrets.token_hex(4)}"))
            os.rename(new, path)
            self._known.add(commit)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(index)

    def _whole(self, index: str, path: str) -> bool:
        """Whether a checkout of an earlier process is as the commit has it."""
        try:
            arguments = [f"--work-tree={path}", "update-index", "--quiet", "--refresh"]
            self._index(index, arguments)
        except HostError:
            return False
        return True

    def _index(self, index: str, arguments: Sequence[str]) -> None:
        own = {"GIT_INDEX_FILE": index}
        self._run([f"--git-dir={self._mirror}", *arguments], LOOK_TIMEOUT, own)

    def _point(self, commit: str) -> None:
        """Swap `current`, in one step for whoever reads."""
        with contextlib.suppress(OSError):
            if os.readlink(self.current) == commit:
                return
        new = os.path.join(self.into, f".current-{secrets.token_hex(4)}")
        os.symlink(commit, new)
        os.replace(new, self.current)

    def _clean(self) -> None:
        """Remove old checkouts, and what a crash left."""
        found = []
        for entry in os.scandir(self.into):
            if entry.name.startswith((".new-", ".old-")):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name.startswith((".index-", ".current-")):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
            elif _COMMIT.fullmatch(entry.name):
                found.append((entry.stat().st_ctime_ns, entry.name, entry.path))
        used = os.readlink(self.current)
        others = sorted(one for one in found if one[1] != used)
        for _, name, path in others[: max(0, len(others) - KEPT + 1)]:
            self._known.discard(name)
            shutil.rmtree(path, ignore_errors=True)

    def _run(
        self, arguments: Sequence[str], timeout: Seconds, own: Mapping[str, str] | None = None
    ) -> str:
        """One git command of this mirror; its output. Raises HostError."""
        try:
            return _git([*_HARDENED, *arguments], timeout, {**self._access(), **(own or {})})
        except HostError as error:
            raise HostError(f"cannot fetch {self.url}: {error}", "Git") from error

    def _access(self) -> dict[str, str]:
        """How a child gets in, by its environment."""
        found = {"GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh"}
        if self.key:
            options = "-o IdentitiesOnly=yes -o BatchMode=yes -o ConnectTimeout=10"
            found["GIT_SSH_COMMAND"] = f"ssh -i {shlex.quote(self.key)} {options}"
        else:
            found["GIT_SSH_COMMAND"] = "ssh -o BatchMode=yes -o ConnectTimeout=10"
        if self.token:
            parts = urlsplit(self.url)
            # For this host alone: a server that sends us elsewhere does not send the token along.
            host = parts.netloc.rsplit("@", 1)[-1]
            user = "" if parts.username else "echo username=git; "
            found |= {
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": f"credential.{parts.scheme}://{host}.helper",
                "GIT_CONFIG_VALUE_0": f'!f() {{ {user}printf "password=%s\\n" "${TOKEN}"; }}; f',
                TOKEN: self.token.reveal(),
            }
        return found


_HARDENED: Final = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.symlinks=false"),  # a link out of the checkout would read any file of the hub
    *("-c", "gc.auto=0"),
    *("-c", "maintenance.auto=false"),
    *("-c", "protocol.file.allow=always"),
)


def unusable(url: str) -> str:
    """Why a URL cannot be fetched from; empty: it can. A password in it is not repeated."""
    if url.startswith("-") or "::" in url or not url.isprintable() or not url:
        return "this is no URL of a repository"
    parts = urlsplit(url)
    if parts.password is not None:
        return (
            f"the URL of {parts.hostname} has a password in it, which any user of this machine "
            "could read: write `git: {token: {file: …}}` into the config instead"
        )
    return ""


def _commit(text: str) -> Commit:
    commit, author, subject = text.rstrip("\n").split("\0")
    return Commit(commit=commit, author=shortened(author, 100), subject=shortened(subject, 200))


def _git(
    arguments: Sequence[str], timeout: Seconds, environment: Mapping[str, str] | None = None
) -> str:
    """The output of one git command. Raises HostError, with git's last line."""
    clean = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    clean |= {
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_OPTIONAL_LOCKS": "0",
        **(environment or {}),
    }
    try:
        done = subprocess.run(
            ["git", *arguments],
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError("there is no program git: install it", "GitMissing") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"git did not end within {timeout:g} s", "Git") from error
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        fatal = [line for line in said if line.startswith(("fatal:", "error:"))]
        last = (fatal or said or [f"git ended with {done.returncode}"])[-1]
        raise HostError(shortened(last.removeprefix("fatal: "), 300), "Git")
    return done.stdout.decode(errors="replace")
