"""What several commands share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from reconciler.host.files import SPECS, Text, read

if TYPE_CHECKING:
    _FloatType = click.ParamType[float]
else:
    _FloatType = click.ParamType  # not generic before click 8.2

F = TypeVar("F", bound=Callable[..., Any])


def specs(command: F) -> F:
    """-f FILE|DIR|-, repeatable."""
    return click.option(
        "-f",
        "--file",
        "files",
        multiple=True,
        metavar="FILE|DIR|-",
        help="Specs to read; a directory means its *.yaml below; - is standard input. "
        f"[default: {SPECS}/, and what `backup` asked for]",
    )(command)


def extra_vars(command: F) -> F:
    """-e key=value, repeatable."""
    return click.option(
        "-e",
        "--extra-vars",
        "extra",
        multiple=True,
        metavar="KEY=VALUE|@FILE",
        help="A variable over all others; also {key: value}, as YAML.",
    )(command)


def extra_texts(written: Sequence[str]) -> tuple[Text, ...]:
    """What -e says, as texts of YAML. Raises click.UsageError."""
    return tuple(map(_extra, written))


def _extra(written: str) -> Text:
    if written.startswith("@"):
        text = read(written[1:])
        if text.error:
            raise click.UsageError(f"-e {written}: {text.error}")
        return text
    if written.lstrip().startswith("{"):
        return Text("-e", written)
    key, sign, value = written.partition("=")
    if not sign or not key.isidentifier():
        raise click.UsageError(
            f"cannot read -e {written!r}: write key=value, @FILE, or {{key: value}}; letters, "
            "digits and _ make a key"
        )
    import json

    return Text(f"-e {key}", f"{key}: {json.dumps(value)}")


class Manner:
    """How this command line wants to be spoken to; what fails is told after its command is left."""

    output = "text"
    quiet = False


def choice(command: F) -> F:
    """-l LABELS, and --vm NAME, repeatable."""
    labels = click.option(
        "-l",
        "--selector",
        metavar="LABELS",
        help="Only VMs with these labels: tier=gold, tier!=gold, tier; a comma means and.",
    )
    names = click.option(
        "--vm",
        "patterns",
        multiple=True,
        metavar="NAME|GLOB",
        help="Only these VMs; may be repeated. With -l: those of them with the labels.",
    )
    return labels(names(command))


def diff(command: F) -> F:
    """--diff."""
    return click.option(
        "--diff", is_flag=True, help="Show command lines and images, before and after."
    )(command)


def output(*kinds: str) -> Callable[[F], F]:
    """-o, the first kind being the default."""

    def note(_ctx: click.Context, _option: click.Parameter, value: str) -> str:
        Manner.output = value
        return value

    return click.option(
        "-o",
        "--output",
        type=click.Choice(kinds),
        default=kinds[0],
        show_default=True,
        callback=note,
        help="How to print it.",
    )


def quiet(command: F) -> F:
    """-q."""

    def note(_ctx: click.Context, _option: click.Parameter, value: bool) -> None:
        Manner.quiet = value

    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=note,
        help="Say nothing but errors; the exit code tells.",
    )(command)


def lock_timeout(command: F) -> F:
    """--lock-timeout."""
    return click.option(
        "--lock-timeout",
        type=Duration(),
        default="2m",
        show_default=True,
        help="How long to wait for another who is changing this hub.",
    )(command)


def drain_timeout(command: F) -> F:
    """--drain-timeout."""
    return click.option(
        "--drain-timeout",
        type=Duration(),
        default="0s",
        show_default=True,
        help="How long clients that hold a stop are given to leave; then it is held, exit 4.",
    )(command)


class Duration(_FloatType):
    """A span like 30s or 5m, as seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from reconciler.core.units import parse_duration

        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def say(text: str, *, err: bool = False, error: bool = False) -> None:
    """Print while work goes on. A closed pipe or a full disk under the output stops no backup.

    `error`: it is said with --quiet too, and then on stderr.
    """
    if Manner.quiet:
        if not error:
            return
        err = True
    with contextlib.suppress(OSError):
        click.echo(text, err=err)


def print_json(value: object) -> None:
    """A document on stdout."""
    import json

    if Manner.quiet:
        return
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def who(command: str) -> str:
    """Who asked, for the events: `reconciler apply (root)`."""
    import getpass

    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return f"{command} ({name})"


def confirmed(question: str) -> bool:
    """What a person answers; without a terminal there is nobody to ask, and -y must say it."""
    if Manner.quiet:
        raise click.UsageError("--quiet asks nothing: add -y")
    if not can_ask():
        raise click.UsageError("cannot ask without a terminal: add -y")
    return click.confirm(question, default=False, err=True)


def can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
