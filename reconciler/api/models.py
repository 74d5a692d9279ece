"""What goes over the wire, by name: the fields of the clients and schedulers in the field."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from reconciler.core.declared import MAX_WHO
from reconciler.core.spec import checked_tags

JOB: Final = "ctx-123-59b39fbc044d902475847e4e7f2784bd"
"""The backup that the examples are about."""
_AT: Final = "2026-11-23T15:04:05Z"

Number: TypeAlias = StrictInt | StrictFloat | None
BackupType: TypeAlias = Literal["full", "incremental"]
Status: TypeAlias = Literal["pending", "running", "completed", "failed", "cancelled"]


def _position(value: Any) -> Any:
    """A position as a number; our own answers write it as text, so text is read too."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value


class Said(BaseModel):
    """A body; what we do not know in it is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(extra="ignore", frozen=True, json_schema_extra={"examples": [fields]})


# -- what the appliances' clients tell


class Completion(Said):
    """One disk has arrived."""

    model_config = _example(change_id="52 d0 eb 11/42", disk_id=0, bytes_transferred=42949672960)

    change_id: Annotated[str, Field(description="1 to 500 printable characters.")]
    disk_id: Annotated[
        StrictInt | None,
        BeforeValidator(_position),
        Field(description="Position of the disk; may be left out where there is one."),
    ] = None
    bytes_transferred: Annotated[Number, Field(description="As the client counts them.")] = None


class Failure(Said):
    """What went wrong, in the client's words."""

    message: str | None = None
    code: StrictInt | str | None = None

    def __str__(self) -> str:
        known = [str(one) for one in (self.message, self.code) if one not in (None, "")]
        return f"{known[0]} ({known[1]})" if len(known) == 2 else "".join(known)


class Progress(Said):
    """How far a job is. What it says of single disks is not kept."""

    model_config = _example(
        job_id=JOB,
        job_type="backup",
        status="running",
        current_phase="transferring",
        bytes_transferred=51539607552,
        total_bytes=103079215104,
        transfer_speed_bps=125829120,
        eta_seconds=410,
        progress_percent=50.0,
        disks=[],
        timestamp=_AT,
    )

    status: str | None = None
    current_phase: str | None = None
    bytes_transferred: Number = None
    total_bytes: Number = None
    transfer_speed_bps: Number = None
    progress_percent: Number = None
    error: Failure | None = None


class ChangeId(BaseModel):
    """From which change id a disk of the active run goes on."""

    model_config = _example(
        vm_name="pgtest1",
        disk_id="1",
        change_id="52 d0 eb 11/42",
        backup_job_id=JOB,
        message="run nightly-24 of ctx-123 goes on from run nightly-23",
    )

    vm_name: str
    disk_id: str
    change_id: Annotated[str, Field(description="Empty: there is none; make a full copy.")]
    backup_job_id: Annotated[str, Field(description="The job of the parent; empty: none.")]
    message: str


class Completed(BaseModel):
    """What became of a report."""

    model_config = _example(
        status="completed",
        backup_id=JOB,
        change_id="52 d0 eb 11/42",
        message="disk 2000 of run nightly-23 of ctx-123 is noted as complete",
        timestamp=_AT,
    )

    status: Annotated[
        str, Field(description="`completed`; of a run that had ended before, how that ended.")
    ]
    backup_id: str
    change_id: Annotated[str, Field(description="The one that counts for this disk.")]
    message: str
    timestamp: str


class Heard(BaseModel):
    """Telemetry was noted."""

    model_config = _example(
        status="success", message="the progress of run nightly-23 is noted", timestamp=_AT
    )

    status: Literal["success"]
    message: str
    timestamp: str


class Health(BaseModel):
    """Whether requests can be taken, and by whom."""

    model_config = _example(
        status="healthy",
        hub="hub-a",
        state="/var/lib/reconciler",
        state_id="8a416982dde55488",
        pid=4711,
        command="reconciler watch (root)",
        version="0.1.0",
        timestamp=_AT,
    )

    status: Literal["healthy", "not ready"]
    error: str = ""
    details: str = ""
    hub: str
    state: Annotated[str, Field(description="The state directory.")]
    state_id: Annotated[str, Field(description="Of its store; empty: there is none yet.")]
    pid: int
    command: str
    version: str
    timestamp: str


# -- what schedulers ask


def _no_disk(value: Any) -> Any:
    if value is None:
        return None
    raise ValueError(
        "a backup is of a whole VM: one call takes one snapshot of all its disks, and one snapshot "
        "per disk would be of several moments; leave disk_id out"
    )


def _policy(value: str) -> str:
    if len(value) > MAX_WHO or not value.isprintable():
        raise ValueError(f"write one line of at most {MAX_WHO} characters")
    return value


class Start(Said):
    """A backup of a whole VM is asked for."""

    model_config = _example(
        vm_name="pgtest1",
        backup_type="full",
        repository_id="local",
        policy_id="nightly",
        tags={"tier": "gold"},
    )

    vm_name: Annotated[
        StrictStr, Field(min_length=1, description="A VM context, or a VM's name in vCenter.")
    ]
    backup_type: BackupType
    fallback: Annotated[
        Literal["full"] | None,
        Field(
            description="With `incremental`: where none can be made, the backup is full, and "
            "`fell_back` says why. Without it such a request is refused."
        ),
    ] = None
    repository_id: Annotated[
        StrictStr, Field(min_length=1, description="That of the VM: a name in the hub's config.")
    ]
    policy_id: Annotated[
        StrictStr | None,
        AfterValidator(lambda value: value if value is None else _policy(value)),
        Field(description="The scheduler's rule; kept with the run, and given back."),
    ] = None
    tags: Annotated[
        dict[StrictStr, StrictStr] | None,
        AfterValidator(lambda value: value if value is None else dict(checked_tags(value))),
        Field(description="At most 32, of 256 characters each; kept, and given back."),
    ] = None
    disk_id: Annotated[
        None, BeforeValidator(_no_disk), Field(description="Refused: a backup is of a whole VM.")
    ] = None

    @model_validator(mode="after")
    def _falls_back(self) -> Start:
        if self.fallback and self.backup_type == "full":
            raise ValueError("fallback goes with backup_type incremental: leave it out")
        return self


class DiskResult(BaseModel):
    """One disk of a run: how it is served."""

    disk_id: Annotated[int, Field(description="Position of the disk.")]
    nbd_port: int
    nbd_export_name: str
    qcow2_path: str
    qemu_nbd_pid: Annotated[int | None, Field(description="null: no server of it runs now.")]
    status: Literal["port_allocated", "qemu_started", "failed"]
    error_message: str = ""


_RUNNING: Final[dict[str, Any]] = {
    "backup_id": JOB,
    "vm_context_id": "ctx-123",
    "vm_name": "pgtest1",
    "disk_results": [
        {
            "disk_id": position,
            "nbd_port": 10100 + position,
            "nbd_export_name": f"ctx-123-api-5d0cbe1a9f3e4471-disk{position}",
            "qcow2_path": f"/backup/ctx-123/{2000 + position}/api-5d0cbe1a9f3e4471.qcow2",
            "qemu_nbd_pid": 4711 + position,
            "status": "qemu_started",
        }
        for position in (0, 1)
    ],
    "nbd_targets_string": ",".join(
        f"{2000 + one}:nbd://127.0.0.1:{10100 + one}/ctx-123-api-5d0cbe1a9f3e4471-disk{one}"
        for one in (0, 1)
    ),
    "backup_type": "full",
    "repository_id": "local",
    "policy_id": "nightly",
    "status": "running",
    "bytes_transferred": 0,
    "total_bytes": 150323855360,
    "disks_count": 2,
    "current_phase": "accepted by the appliance",
    "transfer_speed_bps": 0,
    "progress_percent": 0.0,
    "created_at": _AT,
    "started_at": _AT,
    "tags": {"tier": "gold"},
}


class Backup(BaseModel):
    """One run of one VM, as it is now."""

    model_config = _example(**_RUNNING)

    backup_id: Annotated[str, Field(description="Also the job_id that the appliance knows.")]
    vm_context_id: str
    vm_name: Annotated[str, Field(description="In vCenter; the context, where that is not known.")]
    disk_results: Annotated[
        list[DiskResult], Field(description="By position; empty until every disk has a port.")
    ]
    nbd_targets_string: Annotated[
        str, Field(description="As the appliance is told; empty until every disk has a port.")
    ]
    backup_type: BackupType
    repository_id: str
    policy_id: str = ""
    status: Status
    bytes_transferred: int
    total_bytes: int
    disks_count: int
    change_id: Annotated[
        str, Field(description="Of the disk at position 0, once every disk is reported complete.")
    ] = ""
    error_message: str = ""
    fell_back: Annotated[
        str, Field(description="Why it is full although an incremental was asked for.")
    ] = ""
    current_phase: str
    transfer_speed_bps: int
    progress_percent: float
    last_telemetry_at: str = ""
    created_at: str
    started_at: Annotated[str, Field(description="When the appliance was called.")] = ""
    completed_at: Annotated[str, Field(description="When it ended, however it did.")] = ""
    tags: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What is not known is left out, where it may be."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Backups(BaseModel):
    """Some runs, the newest first."""

    model_config = _example(backups=[_RUNNING], total=1)

    backups: list[Backup]
    total: Annotated[int, Field(description="Of those that are meant, on all pages.")]


class Chain(BaseModel):
    """The newest chain of one disk: a full backup, and all that was built on it, oldest first."""

    model_config = _example(
        chain_id=f"{JOB}.disk0",
        vm_context_id="ctx-123",
        vm_name="pgtest1",
        disk_id=0,
        repository_id="local",
        full_backup_id=JOB,
        backups=[],
        total_size_bytes=42949672960,
        backup_count=6,
    )

    chain_id: str
    vm_context_id: str
    vm_name: str
    disk_id: Annotated[int, Field(description="Position of the disk.")]
    repository_id: str
    full_backup_id: str
    backups: Annotated[list[Backup], Field(description="Those whose images are kept.")]
    total_size_bytes: Annotated[int, Field(description="What this disk's images take.")]
    backup_count: int


class Stats(BaseModel):
    """What the completed backups come to whose images are kept."""

    model_config = _example(
        backup_count=31, total_size_bytes=214748364800, last_backup_at="2026-11-23T15:31:40Z"
    )

    backup_count: int
    total_size_bytes: Annotated[int, Field(description="What their files take.")]
    last_backup_at: str | None


class Error(BaseModel):
    """Why a request was not carried out."""

    model_config = _example(
        error="Not Found", details="this hub knows no backup 'ctx-9'", timestamp=_AT
    )

    error: Annotated[str, Field(description="The status in words.")]
    details: Annotated[str, Field(description="What is wrong, and what helps.")]
    timestamp: str
