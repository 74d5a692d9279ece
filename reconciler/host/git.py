"""Git by its own command: what a work tree stands at, and a remote branch as a directory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
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
"""Checkouts that stay: the one in use, and the one before, which may just be being read."""
_OWN_CONFIG: Final = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
"""For what is fetched: nothing that is configured on this machine for people."""
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
    git = Git()
    try:
        commit = _commit(git.run(["-C", directory, "log", "-1", _FORMAT], LOOK_TIMEOUT))
        status = ["-C", directory, "status", "--porcelain", "--untracked-files=all", "--", "."]
        changed = git.run(status, LOOK_TIMEOUT)
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
    token: Callable[[], Secret] | None = None
    """Reads it anew for each command, so that one that is renewed is used."""
    signers: str | None = None
    """A file of allowed signers, see ssh-keygen(1); every other commit is refused."""
    _known: set[str] = field(default_factory=set)
    """Commits whose checkouts are known to be whole: this process made or compared them."""
    _git: Git = field(default_factory=lambda: Git(_OWN_CONFIG))

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

    def stop(self) -> None:
        """End a fetch that is under way, and let no other begin. From any thread."""
        self._git.stop()

    def describe(self, directory: str) -> Commit | None:
        """The commit of a directory in a checkout; None: it is in none. From any thread."""
        inside = os.path.relpath(os.path.realpath(directory), os.path.realpath(self.into))
        name = inside.split("/")[0]
        if not _COMMIT.fullmatch(name):
            return None
        arguments = [*_HARDENED, f"--git-dir={self._mirror}", "log", "-1", _FORMAT, name, "--"]
        try:  # not by the git of the fetch, which another thread may be waiting for
            return _commit(Git(_OWN_CONFIG).run(arguments, LOOK_TIMEOUT))
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
            self._index(index, [f"--work-tree={new}", "checkout-index", "--all", "--quiet"])
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
            environment = {**self._access(), **(own or {})}
            return self._git.run([*_HARDENED, *arguments], timeout, environment)
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
                TOKEN: self.token().reveal(),
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


class Git:
    """Runs git commands, one at a time, and ends them with all that they started."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        clean = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        fixed = {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
        self.environment = {**clean, **fixed, **(environment or {})}
        self._mutex = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def stop(self) -> None:
        """End what runs, and let nothing more begin. From any thread."""
        with self._mutex:
            self._stopped = True
            self._kill()

    def run(
        self,
        arguments: Sequence[str],
        timeout: Seconds,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """The output of one command. Raises HostError, with git's last line."""
        with self._mutex:
            if self._stopped:
                raise HostError("it was asked to end", "Git")
            self._running = process = self._start(arguments, environment or {})
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            with self._mutex:
                self._kill()
            process.communicate()
            raise HostError(f"git did not end within {timeout:g} s", "Git") from error
        finally:
            with self._mutex:
                self._running = None
        if process.returncode:
            raise HostError(_last_words(err, process.returncode), "Git")
        return out.decode(errors="replace")

    def _start(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                ["git", *arguments],
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that ssh, which it starts, ends with it
            )
        except FileNotFoundError as error:
            raise HostError("there is no program git: install it", "GitMissing") from error
        except OSError as error:
            raise HostError(f"cannot start git: {error.strerror}", "Git") from error

    def _kill(self) -> None:
        """Its session is ours alone, and it is not waited for yet, so the number is still its."""
        if self._running and self._running.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)


_HOLLOW: Final = re.compile(
    r"warning:|Could not read from remote repository|^Please make sure|^and the repository exists|"
    r"^$",
    re.IGNORECASE,
)
"""What git says beside the cause."""


def _last_words(err: bytes, code: int) -> str:
    """What git, or the ssh that it started, says of why it ended."""
    lines = [line.strip() for line in err.decode(errors="replace").splitlines()]
    said = [line for line in lines if not _HOLLOW.search(line.removeprefix("fatal: "))] or lines
    words = (re.sub(r"^(fatal|error): ", "", line) for line in said[:2])
    return shortened("; ".join(words) or f"git ended with {code}", 300)
