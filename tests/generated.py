"""Files that are made from the code: `python -m tests.generated` writes them, a test compares."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

from reconciler.core.schema import KINDS, schema

REFRESH: Final = "python -m tests.generated"
ROOT: Final = Path(__file__).resolve().parents[1]


def schemas() -> Mapping[Path, str]:
    """What editors read: the output of `reconciler schema`."""
    return {
        ROOT / "docs" / "schema" / f"{kind}.schema.json": (
            json.dumps(schema(kind), indent=2, ensure_ascii=False) + "\n"
        )
        for kind in KINDS
    }


def kind_of(parameter: click.Parameter) -> str:
    """What a shell completes: `files`, `dirs`, words with `|` between them, `vm`, `run`."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return ""
    if isinstance(parameter.type, click.Choice):
        return "|".join(parameter.type.choices) + ("" if len(parameter.type.choices) > 1 else "|")
    words = set(re.findall(r"[A-Z]+", parameter.metavar or ""))
    if "--run" in parameter.opts or "RUN" in words:
        return "run"
    if "VM" in words:
        return "vm"
    folder = isinstance(parameter.type, click.Path) and not parameter.type.file_okay
    if folder or words == {"DIR"}:
        return "dirs"
    if isinstance(parameter.type, click.Path) or "FILE" in words:
        return "files"
    return "value"


def grammar() -> str:
    """What completes a command line without loading a command."""
    from reconciler.cli.main import cli
    from reconciler.cli.manual import contexts

    top = click.Context(cli, info_name="reconciler", **cli.context_settings)
    rows = {}
    for context in contexts(top):
        command = context.command
        path = context.command_path.removeprefix("reconciler").strip()
        listed = []
        arguments = []
        for one in command.get_params(context):
            if isinstance(one, click.Argument):
                kind = kind_of(one)
                arguments.append("" if kind == "value" else kind + "*" * (one.nargs == -1))
            elif isinstance(one, click.Option) and not one.hidden:
                names = (*one.opts, *one.secondary_opts)
                if "--help" in names:  # click keeps the one of who asked first
                    names = tuple(context.help_option_names)
                listed.append((names, kind_of(one), (one.help or "").split("\n")[0]))
        inner = tuple(command.list_commands(context)) if isinstance(command, click.Group) else ()
        said = command.get_short_help_str(200)
        rows[path] = (said, tuple(listed), arguments[0] if arguments else "", inner)
    body = "\n".join(f"    {path!r}: {row!r}," for path, row in rows.items())
    return (
        f'"""What may stand on a command line. Made by `{REFRESH}`, from the commands."""\n\n'
        "from __future__ import annotations\n\n"
        "# fmt: off\n"
        "COMMANDS: dict[str, tuple[str, tuple[tuple[tuple[str, ...], str, str], ...], str, "
        "tuple[str, ...]]] = {\n"
        f"{body}\n}}\n"
        "# fmt: on\n"
        '"""Command → what it does, its options (names, kind of value, meaning), the kind of its '
        'arguments\n(with a star: any number of them), the commands below it."""\n'
    )


def everything() -> Mapping[Path, str]:
    return {**schemas(), ROOT / "reconciler" / "cli" / "grammar.py": grammar()}


if __name__ == "__main__":
    for path, text in everything().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
