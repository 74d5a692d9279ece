"""Secrets in the config itself, encrypted by age."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pyrage
import pytest

from reconciler.core.config import settings
from reconciler.core.document import parse
from reconciler.core.errors import ConfigError, HostError
from reconciler.core.settings import SecretRef, Settings
from reconciler.host import files
from tests.core.builders import says

SECRET = "s3cret-of-the-vcenter"


class Key:
    """A key as age-keygen writes it."""

    def __init__(self) -> None:
        self.private = pyrage.x25519.Identity.generate()
        self.public = self.private.to_public()
        self.file = (
            f"# created: 2026-11-20T10:00:00Z\n# public key: {self.public}\n{self.private}\n"
        )


def sealed(*keys: Key, text: str = SECRET) -> str:
    recipients: Sequence[pyrage.x25519.Recipient] = [key.public for key in keys]
    return pyrage.encrypt(text.encode(), recipients, armored=True).decode()


def config(value: str, identity: str = "{file: key.txt}") -> str:
    block = "".join(f"        {line}\n" for line in value.splitlines())
    found = f"secrets: {{age_identity: {identity}}}\n" if identity else ""
    return (
        f"{found}vcenters:\n  vc1:\n    host: h\n    user: u\n    password:\n      age: |\n{block}"
    )


def read(text: str, base: Path) -> Settings:
    document, wrong = parse(text, "reconciler.yaml")
    assert document and not wrong
    return settings(document, {}, base=str(base), cwd=str(base), host_name="hub", root=False)


def opened(text: str, base: Path) -> str:
    ref = read(text, base).vcenters["vc1"].password
    return files.secret(ref, {}).reveal()


def wrong(text: str, base: Path) -> str:
    with pytest.raises(HostError) as error:
        opened(text, base)
    assert error.value.reason == "SecretUnreadable"
    said = str(error.value)
    assert SECRET not in said
    assert "AGE-SECRET-KEY" not in said
    return said


@pytest.fixture
def key(tmp_path: Path) -> Key:
    found = Key()
    (tmp_path / "key.txt").write_text(found.file)
    return found


@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n", "pässword", f"{SECRET}\r\n"])
def test_an_armored_secret(key: Key, tmp_path: Path, text: str) -> None:
    assert opened(config(sealed(key, text=text)), tmp_path) == text.strip()


def test_base64_of_what_age_writes(key: Key, tmp_path: Path) -> None:
    binary = pyrage.encrypt(SECRET.encode(), [key.public])
    assert opened(config(base64.b64encode(binary).decode()), tmp_path) == SECRET
    assert opened(config(base64.encodebytes(binary).decode()), tmp_path) == SECRET


def test_any_key_of_the_file_opens_what_was_encrypted_for_it(tmp_path: Path) -> None:
    one, two, three = Key(), Key(), Key()
    (tmp_path / "key.txt").write_text(f"\n{one.file}\n{two.file}")
    for used in ((one,), (two,), (three, two)):
        assert opened(config(sealed(*used)), tmp_path) == SECRET
    says(wrong(config(sealed(three)), tmp_path), "it was encrypted for none of the 2 keys")


def test_a_key_of_ssh(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "key.txt"],
                   cwd=tmp_path, check=True)  # fmt: skip
    public = pyrage.ssh.Recipient.from_str((tmp_path / "key.txt.pub").read_text())
    text = pyrage.encrypt(SECRET.encode(), [public], armored=True).decode()
    assert opened(config(text), tmp_path) == SECRET


def test_the_key_may_be_a_credential(key: Key, tmp_path: Path) -> None:
    text = config(sealed(key), "{credential: key.txt}")
    ref = read(text, tmp_path).vcenters["vc1"].password
    assert files.secret(ref, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).reveal() == SECRET
    says(wrong(text, tmp_path), "not started by systemd")


def test_another_key_is_told_with_the_place_of_the_secret(key: Key, tmp_path: Path) -> None:
    said = wrong(config(sealed(Key())), tmp_path)
    says(said, "the secret at reconciler.yaml:7:12", "encrypted for none of the 1 keys in file")
    says(said, str(tmp_path / "key.txt"))


def test_what_was_changed_since_is_broken(key: Key, tmp_path: Path) -> None:
    lines = sealed(key).splitlines()
    for at in (1, len(lines) - 2):
        other = lines.copy()
        other[at] = other[at][:-4] + ("AAAA" if other[at][-4:] != "AAAA" else "BBBB")
        says(
            wrong(config("\n".join(other)), tmp_path), "cannot decrypt the secret at", ".yaml:7:12"
        )


KEYS = {
    "nothing": ("", "is empty"),
    "only comments": ("# public key: age1x\n", "AGE-SECRET-KEY-1"),
    "a public key": ("age1w6s53wwvtlshjdrt3p7hgepv0zzar589glfhyx7qafzzw380qdws4054vv", "no line"),
    "a cut key": ("AGE-SECRET-KEY-1YT6P", "AGE-SECRET-KEY-1…"),
    "a cut key of ssh": ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAA\n", "ssh-keygen"),
}


@pytest.mark.parametrize(("text", "word"), KEYS.values(), ids=KEYS.keys())
def test_a_key_that_is_none(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "key.txt").write_text(text)
    with pytest.raises(HostError) as error:
        opened(config(sealed(Key())), tmp_path)
    says(str(error.value), word)
    assert "1YT6P" not in str(error.value)


def test_a_key_that_is_missing(tmp_path: Path) -> None:
    says(wrong(config(sealed(Key())), tmp_path), "its key", "key.txt: No such file")


# -- as the config is read


def refused(text: str, base: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read(text, base)
    return str(error.value)


def test_without_a_key_in_the_config(key: Key, tmp_path: Path) -> None:
    said = refused(config(sealed(key), ""), tmp_path)
    says(said, "reconciler.yaml:6:12: error", "vcenters.vc1.password", "age_identity: {file: PATH}")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("hunter2", "begins with -----BEGIN AGE"),
        ("aHVudGVyMg==", "begins with -----BEGIN AGE"),
        ("-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n", "its last line is not -----END AGE"),
        ("AGE-SECRET-KEY-1YT6P", "private key"),
    ],
)
def test_what_age_never_wrote(tmp_path: Path, value: str, word: str) -> None:
    said = refused(config(value), tmp_path)
    says(said, "reconciler.yaml:7:12: error", word)
    assert value.strip() not in said


def test_the_key_is_not_encrypted_itself(key: Key, tmp_path: Path) -> None:
    value = json.dumps(sealed(key))
    said = refused(f"secrets: {{age_identity: {{age: {value}}}}}\n", tmp_path)
    says(said, "cannot be encrypted itself")


def test_ssh_reads_its_key_itself(key: Key, tmp_path: Path) -> None:
    value = json.dumps(sealed(key))
    text = f"git: {{key: {{age: {value}}}}}\nsecrets: {{age_identity: {{file: key.txt}}}}\n"
    says(refused(text, tmp_path), "ssh reads `key` from a file")


def test_what_is_encrypted_gets_out_by_no_accident(key: Key, tmp_path: Path) -> None:
    found = read(config(sealed(key)), tmp_path)
    body = sealed(key).splitlines()[1]
    ref = found.vcenters["vc1"].password
    for shown in (str(ref), repr(ref), repr(found), json.dumps(found.to_json())):
        assert body not in shown
        assert "BEGIN AGE" not in shown
    with pytest.raises(TypeError):
        pickle.dumps(files.secret(ref, {}))


def test_another_secret_arms_a_refused_call_again(key: Key, tmp_path: Path) -> None:
    """`request` is made from what is told of the password: where it is, or which it is."""
    one, two = (read(config(sealed(key)), tmp_path).vcenters["vc1"].password for _ in range(2))
    assert str(one) != str(two)
    assert isinstance(one, SecretRef)
