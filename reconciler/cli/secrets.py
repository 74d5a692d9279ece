"""secret: what is encrypted in the config, so that the config can live in Git."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from reconciler.core.errors import Exit, HostError

if TYPE_CHECKING:
    import pyrage

    Recipient = pyrage.x25519.Recipient | pyrage.ssh.Recipient


@click.group()
def secret() -> None:
    """Secrets that may stand in the config: encrypted by age."""


@secret.command()
@click.option(
    "-r",
    "--recipient",
    "recipients",
    multiple=True,
    required=True,
    metavar="KEY",
    help="A public key: age1… (age-keygen shows it), or a line of an ssh .pub file. Repeatable: "
    "any of them opens it.",
)
@click.option(
    "--file", "source", metavar="FILE|-", help="Where the secret is. [default: asked for, or -]"
)
def encrypt(recipients: tuple[str, ...], source: str | None) -> int:
    """Encrypt a secret for the config, and print the value that goes there.

    The secret is asked for, or read from standard input or a file; never from the command line,
    which others can see. One newline at its end does not belong to it. Nothing is read of the
    config, and no private key is needed.
    """
    import pyrage

    keys = [_recipient(one) for one in recipients]
    text = _text(source)
    try:
        sealed = pyrage.encrypt(text.encode(), keys, armored=True).decode()
    except pyrage.EncryptError as error:
        raise HostError(f"cannot encrypt it: {error}") from None
    click.echo("age: |")
    for line in sealed.splitlines():
        click.echo(f"  {line}")
    return Exit.OK


def _recipient(written: str) -> Recipient:
    """A public key. Raises click.UsageError; a private one is not shown."""
    import pyrage

    key = written.strip()
    if "PRIVATE" in key.upper() or key.upper().startswith("AGE-SECRET-KEY"):
        raise click.UsageError(
            "this is a private key, which belongs to who decrypts; the public one is age1…, in the "
            "same file behind `# public key:`. Others may have seen it on this command line"
        )
    kinds = (pyrage.x25519.Recipient, pyrage.ssh.Recipient)
    for kind in kinds if key.startswith("age1") else reversed(kinds):
        try:
            return kind.from_str(key)
        except pyrage.RecipientError:
            continue
    raise click.UsageError(
        f"cannot encrypt for {key[:20]!r}…: write age1… or `ssh-ed25519 …`, a public key"
    )


def _text(source: str | None) -> str:
    """The secret. Raises click.UsageError, OSError."""
    if source is None and sys.stdin.isatty():
        text: str = click.prompt("Secret", hide_input=True, confirmation_prompt=True, err=True)
    elif source in (None, "-"):
        text = _decoded(sys.stdin.buffer.read())
    else:
        with open(str(source), "rb") as file:
            text = _decoded(file.read())
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise click.UsageError("cannot encrypt an empty secret")
    return text


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise click.UsageError("cannot encrypt this: it is not UTF-8 text") from None
