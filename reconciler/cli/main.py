"""The `reconciler` command. Each subcommand is imported when it is called, not before."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final

import click

from reconciler import __version__
from reconciler.core.errors import Exit, InputError, ReconcilerError

COMMANDS: Final = {
    "validate": ("planning", "Check specs, inventory and config; change nothing."),
    "plan": ("planning", "Show what would be done and why; change nothing."),
    "diff": ("planning", "The same; exit 2 if there is something to do."),
    "show": ("planning", "Show a saved plan, and whether it was applied."),
    "vars": ("variables", "Show the variables of a VM, and where each comes from."),
    "apply": ("applying", "Make the specs true: servers, ports, and one call per VM."),
    "backup": ("backup", "Ask for a run of VMs, beside their specs."),
    "watch": ("watching", "Keep a directory of specs true, until it is stopped."),
    "reload": ("watching", "Have the daemon read its config again."),
    "serve": ("serving", "Take callbacks, and bring runs to their end, until it is stopped."),
    "stop": ("applying", "Stop the exports of VMs, whatever the specs say."),
    "status": ("looking", "What was applied, against what really runs."),
    "explain": ("looking", "What one VM waits for, since when, and what to type next."),
    "events": ("telling", "What happened, newest last; -w goes on telling."),
    "wait": ("waiting", "Stay until VMs are ready, completed or gone."),
    "restore-test": ("restoring", "Read a backup back: partitions, file systems, a file."),
    "history": ("history", "The runs of one VM: when, by whom, and how they ended."),
    "chain": ("chains", "What each backup of a VM is built on, and what it takes."),
    "verify": ("chains", "Check every image that a backup needs."),
    "retain": ("retaining", "Remove the backups that are older than `keep` says."),
    "resolve": ("calls", "Say what became of a call whose outcome is unknown."),
    "retry": ("calls", "Ask again for a run that was refused or could not be sent."),
    "pause": ("pausing", "Leave VMs as they are, until they are resumed."),
    "resume": ("pausing", "Have paused VMs as the specs say again."),
    "approve": ("source", "Let one revision of the directory remove many VMs."),
    "state": ("state", "Back up, restore and look into what the hub remembers."),
    "schema": ("schema", "Print what may be written as a JSON Schema, for editors."),
    "completion": ("completion", "Print the script by which a shell completes this command."),
    "man": ("manual", "Print a manual page."),
    "init": ("init", "Write the files of a new hub: a config, an inventory, a first spec."),
    "import": (
        "importing",
        "Print servers that the hub does not know as a spec; adopt its own.",
    ),
    "doctor": ("doctor", "Look at and try what this hub needs; say what helps."),
    "secret": ("secrets", "Encrypt a secret, so that the config can live in Git."),
    "render": ("render", "Print systemd units and both ends of a tunnel, for other programs."),
    "tunnel": ("trusting", "Say which host key is a hub's, at an appliance's side."),
    "version": ("looking", "Show the version."),
}
"""Command → the module that has it, and the line in --help that is shown without importing it."""
_FUNCTIONS: Final = {
    "vars": "variables",
    "import": "importing",
    "restore-test": "restore_test",
}
"""Command → the function, where that has another name."""


def _config() -> click.Option:
    """--config, also behind the command."""

    def use(ctx: click.Context, _option: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.obj = value

    return click.Option(
        ["--config"], metavar="FILE", expose_value=False, callback=use, help="The configuration."
    )


class Commands(click.Group):
    """Knows every command's name and summary, and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"reconciler.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, _FUNCTIONS.get(cmd_name, cmd_name))
        assert isinstance(command, click.Command)
        inner = list(command.commands.values()) if isinstance(command, click.Group) else []
        for one in [command, *inner]:
            if not any(parameter.name == "config" for parameter in one.params):
                one.params.append(_config())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from reconciler.core.errors import nearest

            raise click.UsageError(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--config", metavar="FILE", help="The configuration. [default: ./reconciler.yaml …]")
@click.version_option(__version__, "-V", "--version", message="reconciler %(version)s")
@click.pass_context
def cli(ctx: click.Context, config: str | None) -> None:
    """Make VM backup exports what YAML says they should be.

    A spec says "VM ctx-123 is exported for backup"; this makes it true: an image and a qemu-nbd
    server per disk, and one call to the node appliance when every disk answers.

    \b
    reconciler plan  -f specs/      show what would be done
    reconciler apply -f specs/      do it
    reconciler backup ctx-1 --run monday --apply    one more backup
    reconciler status               what is there now
    reconciler explain ctx-123      why it is not ready, and what to type
    """
    ctx.obj = config
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class Terminated(BaseException):
    """SIGTERM came."""


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing is raised."""
    signal.signal(signal.SIGTERM, _terminated)
    if known := sys.modules.get("reconciler.cli.options"):
        known.Manner.output, known.Manner.quiet = "text", False
    try:
        result = cli.main(list(arguments), prog_name="reconciler", standalone_mode=False)
        return int(result) if isinstance(result, int) else Exit.OK
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.UsageError as error:
        error.show()
        return Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was begun is safe, and apply goes on from there", err=True)
        return Exit.INTERRUPTED
    except Terminated:
        return Exit.TERMINATED
    except InputError as error:
        from reconciler.cli.failing import as_document, told

        as_document(error)
        for line in told(error, sys.stderr):
            click.echo(line, err=True)
        return error.exit
    except ReconcilerError as error:
        from reconciler.cli.failing import as_document

        as_document(error)
        click.echo(f"error: {error}", err=True)
        return error.exit
    except click.ClickException as error:
        error.show()
        return Exit.ERROR
    except BrokenPipeError:
        # Who read our output had enough; only commands that look are ended by that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        with contextlib.suppress(OSError):
            click.echo(f"error: cannot go on:{where} {error.strerror or error}", err=True)
        return Exit.ERROR
    except Exception as error:  # the last resort: a sentence, not a traceback
        if os.environ.get("RECONCILER_DEBUG"):
            raise
        kind = type(error).__name__
        click.echo(
            f"error: this is a bug: {kind}: {error}; RECONCILER_DEBUG=1 shows where", err=True
        )
        return Exit.ERROR


def main() -> None:
    """Entry point of the console script."""
    # One command, then the end: what it made is not worth collecting, nor taking apart at exit.
    gc.set_threshold(50_000, 50, 50)
    # What is validated is nobody's but ours, and looking for plugins among all that is installed
    # costs 2 ms and more.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        # What a command had to say was flushed as it was said, and a failure was told then. What is
        # left is of work that is done, whose code does not change because nobody listens.
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
