"""man: manual pages, made from what --help says."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from reconciler import __version__
from reconciler.cli import options
from reconciler.core.errors import Exit, HostError, UsageError, nearest

STATUSES: Final = {
    Exit.OK: "done, or nothing to do",
    Exit.ERROR: "an error",
    Exit.CHANGES: "there is something to do (plan --detailed-exitcode, diff)",
    Exit.PARTIAL: "some VMs converged, some did not, or some wait",
    Exit.HELD: "held by a guard; nothing was destroyed",
    Exit.STALE_PLAN: "a saved plan is stale, expired or used",
    Exit.LOCKED: "another is changing this hub, and did not finish in time",
    Exit.UNKNOWN: "the outcome of a call is not known",
    Exit.USAGE: "the command line is wrong",
    Exit.INVALID: "a spec is invalid, or -f names nothing",
    Exit.CONFIG: "the configuration cannot be used",
    Exit.TIMED_OUT: "the time is over",
    Exit.INTERRUPTED: "ended by SIGINT, in order",
    Exit.TERMINATED: "ended by SIGTERM, in order",
}
_ENVIRONMENT: Final = (
    ("RECONCILER_CONFIG", "the configuration, where --config does not name one"),
    ("RECONCILER_STATE", "the state directory"),
    ("RECONCILER_SECTION_KEY", "a key of the configuration, such as RECONCILER_PORTS_RANGE"),
    ("RECONCILER_DEBUG", "where a bug is: its traceback"),
    ("NO_COLOR", "if it is set, nothing is coloured"),
)
_FILES: Final = (
    ("./reconciler.yaml", "the configuration, if it is there"),
    ("$XDG_CONFIG_HOME/reconciler/config.yaml", "else this one"),
    ("/etc/reconciler/config.yaml", "else this one"),
    ("specs/", "the specs, where -f names none"),
    ("/var/lib/reconciler", "the state directory of root"),
)


@click.command()
@click.argument("command", nargs=-1, metavar="[COMMAND]")
@click.option(
    "--output", metavar="DIR", type=click.Path(file_okay=False), help="Write every page there."
)
@click.pass_context
def man(ctx: click.Context, command: tuple[str, ...], output: str | None) -> int:
    """Print the manual page of reconciler, or of one of its commands, for man(1).

    \b
    reconciler man apply | man -l -
    reconciler man --output /usr/local/share/man/man1
    """
    top = ctx.parent
    assert top is not None
    everything = {context.command_path: context for context in contexts(top)}
    if output is None:
        path = " ".join(["reconciler", *command])
        if path not in everything:
            known = [name.removeprefix("reconciler ") for name in everything]
            name = " ".join(command)
            raise UsageError(f"there is no command {name!r}{nearest(name, known)}")
        click.echo(page(everything[path]), nl=False)
        return Exit.OK
    if command:
        raise click.UsageError("--output writes every page: name no command")
    for path, context in everything.items():
        file = Path(output) / f"{path.replace(' ', '-')}.1"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(page(context), encoding="utf-8")
        except OSError as error:
            raise HostError(f"cannot write {file}: {error.strerror}") from error
        options.say(f"wrote {file}", err=True)
    return Exit.OK


def contexts(top: click.Context) -> Iterator[click.Context]:
    """A command and all below it, each as if it had been typed."""
    yield top
    if isinstance(top.command, click.Group):
        for name in top.command.list_commands(top):
            command = top.command.get_command(top, name)
            assert command is not None
            yield from contexts(click.Context(command, info_name=name, parent=top))


def page(context: click.Context) -> str:
    """One page in troff, with the man(7) macros."""
    return "\n".join(_lines(context)) + "\n"


def _lines(context: click.Context) -> Iterator[str]:
    command, path = context.command, context.command_path
    title = path.replace(" ", "-")
    summary = command.get_short_help_str(200).rstrip(".")
    yield (
        f'.TH "{_text(title.upper())}" "1" "{_date()}" "nbd\\-reconciler {_text(__version__)}" '
        '"User Commands"'
    )
    yield from (".SH NAME", f"{_text(title)} \\- {_text(summary[:1].lower() + summary[1:])}")
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (".SH SYNOPSIS", f"\\fB{_text(path)}\\fR {_text(usage)}")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(inspect.cleandoc(command.help or ""))
    options_ = [one for one in command.get_params(context) if isinstance(one, click.Option)]
    records = [one.get_help_record(context) for one in options_]
    if records:
        yield ".SH OPTIONS"
        for record in filter(None, records):
            yield from _item(*record)
    if isinstance(command, click.Group):
        yield ".SH COMMANDS"
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _item(name, inner.get_short_help_str(200))
    if context.parent is None:
        yield ".SH EXIT STATUS"
        for status, meaning in STATUSES.items():
            yield from _item(str(int(status)), meaning)
        for heading, rows in (("ENVIRONMENT", _ENVIRONMENT), ("FILES", _FILES)):
            yield f".SH {heading}"
            for name, meaning in rows:
                yield from _item(name, meaning)
    yield from (".SH SEE ALSO", _see_also(context))


def _see_also(context: click.Context) -> str:
    pages = ["qemu-nbd", "qemu-img"]
    if context.parent is not None:
        return f"\\fB{_text(context.parent.command_path.replace(' ', '-'))}\\fR(1)"
    assert isinstance(context.command, click.Group)
    pages = [f"reconciler-{name}" for name in context.command.list_commands(context)] + pages
    return ",\n".join(f"\\fB{_text(one)}\\fR({8 if one == 'qemu-nbd' else 1})" for one in pages)


def _item(name: str, meaning: str) -> Iterator[str]:
    yield from (".TP", f"\\fB{_text(name)}\\fR", _filled(meaning) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    """Click's help: paragraphs, and those behind a `\\b` line by line."""
    for number, part in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        if part.startswith("\b"):
            yield ".nf"
            yield from (_text(line) for line in part.split("\n")[1:])
            yield ".fi"
        else:
            yield _filled(part)


def _filled(text: str) -> str:
    """A paragraph, in lines that people can read too."""
    parts = textwrap.wrap(_text(text), 76, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"\\&{part}" if part.startswith(".") else part for part in parts)


def _text(text: str) -> str:
    """A text in which nothing is special to troff. Source: groff(7), groff_char(7)."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace('"', "\\(dq").replace("^", "\\(ha").replace("~", "\\(ti")
    text = "".join(one if one.isascii() else f"\\[u{ord(one):04X}]" for one in text)
    return f"\\&{text}" if text.startswith(".") else text


def _date() -> str:
    """When this version was made. Source: reproducible-builds.org, SOURCE_DATE_EPOCH."""
    stamp = os.environ.get("SOURCE_DATE_EPOCH")
    at = int(stamp) if stamp and stamp.isdigit() else Path(__file__).stat().st_mtime
    return time.strftime("%Y-%m-%d", time.gmtime(at))
