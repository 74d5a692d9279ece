"""Templates filled for other programs, each value in the way that its reader takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from reconciler.cli import options
from reconciler.core.errors import HostError
from reconciler.core.settings import below

HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 named, not used
"""What a unit with ProtectHome and PrivateTmp does not see."""


CREDENTIALS: Final = "/etc/reconciler/credentials"
"""Where secrets wait for systemd to hand them over, root's and readable by nobody else."""


def inside(root: str, path: str) -> bool:
    """Whether a path is a directory, or lies in it."""
    return path == root or below(root, path)


def unseen(paths: Iterable[str]) -> list[str]:
    """Those that a unit does not see."""
    return sorted({one for one in paths if any(inside(hidden, one) for hidden in HIDDEN)})


def warn_unseen(paths: Iterable[str]) -> None:
    """Say of each on stderr that a unit does not see it."""
    for one in unseen(paths):
        options.say(
            f"warning: the unit will not see {one}: ProtectHome and PrivateTmp hide "
            f"{', '.join(HIDDEN)} from it; move it elsewhere, or relax them with "
            "`systemctl edit`",
            err=True,
        )


def rendered(name: str, values: Mapping[str, Any]) -> str:
    """The template of a file, filled. Raises HostError for what cannot be written into it."""
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 no HTML; each value goes through a filter of ours
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = {"text": literal, "word": word, "argument": argument, "ssh": ssh_word, "shell": quote}
    environment.filters.update(filters)
    return environment.get_template(f"{name}.j2").render(values)


def literal(text: str) -> str:
    """A value in which nothing is special to systemd. Raises HostError.

    Source: systemd.unit(5), specifiers.
    """
    return plain(text, "a unit").replace("%", "%%")


def plain(text: str, where: str) -> str:
    """The text itself, if it is one line. Raises HostError."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise HostError(f"cannot write {text!r} into {where}: it holds a control character")
    return text


def word(text: str) -> str:
    """One word of a list of words. Source: systemd.syntax(7), quoting."""
    escaped = literal(text)
    if re.fullmatch(r"[A-Za-z0-9_./:@%+=,-]+", escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'


def argument(text: str) -> str:
    """One word of a command line, where a dollar is special too. Source: systemd.service(5)."""
    return word(text).replace("$", "$$")


def ssh_word(text: str) -> str:
    """One value of ssh's or sshd's configuration. Source: ssh_config(5).

    Paths there have tokens that begin with a percent sign; a quote within quotes is not portable.
    """
    if '"' in plain(text, "a configuration of ssh"):
        raise HostError(f"cannot write {text!r} into a configuration of ssh: it holds a quote")
    return f'"{text}"' if re.search(r"[\s#\\\\]", text) else text


def tokens(path: str, *, variable: bool = False) -> str:
    """A path in which ssh finds no token of its own. `variable`: but one of the environment.

    Raises HostError. Source: ssh_config(5), TOKENS and ENVIRONMENT VARIABLES.
    """
    if "${" in path and not variable:
        raise HostError(f"cannot write {path!r} into a configuration of ssh: it holds a variable")
    return path.replace("%", "%%")


def quote(text: str) -> str:
    """One word of a shell's command."""
    import shlex

    return shlex.quote(plain(text, "a command"))


def given(files: Mapping[str, str], output: str | None) -> None:
    """Print files, each below its name, or write them into a directory. Raises HostError."""
    import click

    if output is None:
        click.echo("\n".join(f"# {name}\n{text}" for name, text in files.items()), nl=False)
        return
    for name, text in files.items():
        write(Path(output) / name, text)


def write(path: Path, text: str) -> None:
    """Write a file and say so on stderr. Raises HostError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from error
    options.say(f"wrote {path}", err=True)
