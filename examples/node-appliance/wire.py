"""What the hub sends: the start request and its targets string, read strictly."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final, NoReturn
from urllib.parse import quote

Json = dict[str, object]

START_PATH: Final = "/api/v1/backup/start"
REQUIRED: Final = (
    *("job_id", "vm_name", "vcenter_host", "vcenter_user", "vcenter_password"),
    *("vm_path", "nbd_targets", "backup_type"),
)
JOB_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
TARGET: Final = re.compile(
    r"(?P<key>[^:,/\s]+):nbd://(?P<host>[^:,/\s]+):(?P<port>[0-9]{1,5})"
    r"/(?P<export>[^:,/\s]*disk(?P<position>[0-9]{1,5}))"
)


class RefusedError(Exception):
    """A request that is not carried out: the HTTP status to answer with, and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


def refuse(why: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> NoReturn:
    """Raise RefusedError for a start."""
    raise RefusedError(status, f"cannot accept the start: {why}")


@dataclass(frozen=True, slots=True)
class Target:
    """Where one disk goes: a pair of the targets string."""

    key: str
    host: str
    port: int
    export: str
    position: int  # the <N> of "disk<N>" at the end of the export name, as the field's client does

    @property
    def url(self) -> str:
        """The export, as nbdcopy wants it."""
        return f"nbd://{self.host}:{self.port}/{quote(self.export)}"


def parse_targets(text: str) -> tuple[Target, ...]:
    """Read a targets string, strictly: the field's client skips bad pairs in silence."""
    targets = []
    for pair in text.split(","):
        found = TARGET.fullmatch(pair)
        if not found or not pair.isprintable() or not 0 < int(found["port"]) < 1 << 16:
            refuse(f"nbd_targets holds {pair!r}; write key:nbd://host:port/name-disk<N>")
        place = (found["host"], int(found["port"]), found["export"], int(found["position"]))
        targets.append(Target(found["key"], *place))
    for column in (
        {t.key for t in targets},
        {t.url for t in targets},
        {t.position for t in targets},
    ):
        if len(column) < len(targets):
            refuse("nbd_targets repeats a key, an export or a position; name each disk once")
    return tuple(targets)


@dataclass(frozen=True, slots=True)
class Start:
    """A valid start request. The password is checked and left behind: nothing here can leak it."""

    job_id: str
    vm_name: str
    vm_path: str
    nbd_targets: str
    backup_type: str
    previous_change_id: str
    idempotency_key: str | None  # the header, for the log alone: jobs are not de-duplicated


def parse_start(body: bytes, idempotency_key: str | None) -> Start:
    """Check a start request (raises RefusedError). No message repeats what may be secret."""
    values = {"previous_change_id": "", **parse_json(body)}
    text = {name: value for name, value in values.items() if isinstance(value, str)}
    for name in REQUIRED:
        if not text.get(name):
            refuse(f"{name} is missing, empty or not a string; send a non-empty string")
    if "previous_change_id" not in text:
        refuse("previous_change_id is not a string; send one, or leave it out of a full backup")
    if not JOB_ID.fullmatch(text["job_id"]):
        refuse("job_id is not 1 to 64 of A-Z a-z 0-9 . _ -; send such a name")
    vm_name = text["vm_name"]
    if vm_name in {".", ".."} or "/" in vm_name or not vm_name.isprintable():
        refuse("vm_name is no folder name; send one without a slash")
    if text["backup_type"] not in {"full", "incremental"}:
        refuse("backup_type is neither full nor incremental; send one of the two")
    if text["backup_type"] == "incremental" and not text["previous_change_id"]:
        refuse("previous_change_id is empty; an incremental backup needs one")
    parse_targets(text["nbd_targets"])
    kept = set(Start.__slots__) - {"idempotency_key"}
    return Start(**{name: text[name] for name in kept}, idempotency_key=idempotency_key)


def parse_json(body: bytes) -> Json:
    """Read a JSON object (raises RefusedError)."""
    with contextlib.suppress(ValueError):
        value = json.loads(body)
        if isinstance(value, dict):
            return value
    raise RefusedError(HTTPStatus.BAD_REQUEST, "cannot read the body: send one JSON object")


def rfc3339(when: datetime | None = None) -> str:
    """Write a time as the wire format wants it; now, if none is given."""
    return (when or datetime.now(UTC)).isoformat(timespec="milliseconds")
