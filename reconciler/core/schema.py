"""What may be written, as JSON Schema draft-07: for editors, made from the models that read it.

A schema knows one file and no template's result, so it lets pass what `validate` refuses; what it
refuses is wrong. Editors know draft-07 best, and pydantic writes 2020-12, so it is brought down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from reconciler.core import config, declared, inventory_file, spec, tunnel_spec
from reconciler.core.settings import Limit
from reconciler.core.template import MAX_LOOP
from reconciler.core.units import Endpoint, PortRange, format_size

DRAFT: Final = "http://json-schema.org/draft-07/schema#"
KINDS: Final = ("spec", "config", "inventory")

_SIZE: Final = r"^\s*[0-9]{1,24}(\.[0-9]{1,24})?\s*([KMGTPkmgtp]([iI][bB])?|[bB])?\s*$"
_SPAN: Final = r"^\s*([0-9]{1,12}(\.[0-9]{1,12})?\s*([mM][sS]|[sSmMhHdD]))+\s*$"
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_NAME_OR_TEMPLATE: Final = rf"{_NAME}|\{{\{{"
_VARIABLE: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"

_Schema = dict[str, Any]


_DURATION: Final[_Schema] = {
    "type": ["string", "number"],
    "pattern": _SPAN,
    "exclusiveMinimum": 0,
    "maximum": 30 * 86400,
    "examples": ["250ms", "10s", "5m", "1h30m"],
}
_BYTES: Final[_Schema] = {
    "type": ["string", "integer"],
    "pattern": _SIZE,
    "minimum": 0,
    "description": "K, M, G, T, P are powers of 1024.",
    "examples": ["1GiB", "500MiB"],
}
_READ_BY: Final[Mapping[object, _Schema]] = {
    config._duration: _DURATION,
    config._limit: {
        "type": ["string", "integer"],
        "pattern": r"^[0-9]{1,3}(\.[0-9]+)? ?%$|^[1-9][0-9]{0,5}$",
        "minimum": 1,
        "examples": [3, "25%"],
    },
    config._endpoint: {"type": "string", "examples": ["127.0.0.1:8082"]},
    config._path_or_false: {
        "type": ["string", "boolean", "null"],
        "minLength": 1,
        "not": {"const": True},
        "examples": ["/run/reconciler/api.sock", False],
    },
    config._range: {
        "type": "string",
        "pattern": r"^\s*[0-9]{1,5}\s*-\s*[0-9]{1,5}\s*$",
        "examples": ["10100-10200"],
    },
    config._size: _BYTES,
    tunnel_spec._host_key: {
        "type": ["string", "object"],
        "pattern": "(ssh|ecdsa|sk)-",
        "properties": {
            "file": {
                "description": "The file with the key, as `reconciler tunnel trust` writes it.",
                "type": "string",
                "minLength": 1,
            }
        },
        "additionalProperties": False,
        "required": ["file"],
        "examples": ["ssh-ed25519 AAAAC3Nz…", {"file": "hub-a.pub"}],
    },
    spec._size: {
        **_BYTES,
        "minimum": 512,
        "multipleOf": 512,
        "maximum": 1 << 60,
        "description": "A multiple of 512 bytes; K, M, G, T, P are powers of 1024.",
        "examples": ["40GiB", "1.5TiB"],
    },
}
"""The function that reads a value → what it takes."""
_CHECKED_BY: Final[Mapping[object, _Schema]] = {
    config._address: {"format": "ipv4"},
    config._url: {"pattern": "^https?://", "examples": ["http://127.0.0.1:9081"]},
    config._sealed: {
        "pattern": r"^(-----BEGIN AGE ENCRYPTED FILE-----\s|YWdlLWVuY3J5cHRpb24ub3JnL3Yx)"
    },
    config._sql_url: {
        "pattern": r"^(mysql|mariadb|postgres|postgresql)://[^:]|^sqlite:///",
        "examples": ["mysql://hub@db.example:3306/migratekit_oma"],
    },
    config._notify_url: {"pattern": "^https?://", "examples": ["https://alerts.example/hook"]},
    spec.checked_name: {"pattern": _NAME, "maxLength": declared.MAX_NAME},
    spec._export: {"pattern": r"^[A-Za-z0-9._-]*disk[0-9]+$", "maxLength": 255},
    spec._inside: {"pattern": r"^(?!/)(?!(.*/)?\.\.(/|$)).+$", "maxLength": declared.MAX_PATH},
    spec._who: {"maxLength": declared.MAX_WHO},
}
"""The function that checks a value → what it lets pass, besides its type."""

SAYS: Final[Mapping[str, str]] = {
    "AddressSpec.name": "The VM's name in vCenter; default: the inventory's, else the VM context.",
    "AddressSpec.path": "Its inventory path in vCenter, such as /DC1/vm/pgtest1.",
    "AddressSpec.vcenter": "A vCenter of the config; default: the inventory's, else the only one.",
    "ApiLimitsModel.body": "The most of a request's body.",
    "ApiLimitsModel.callback_rate": "Callbacks a second of one client.",
    "ApiLimitsModel.concurrency": "Requests of one scope that are worked on at once.",
    "ApiLimitsModel.connections": "Open at once.",
    "ApiLimitsModel.headers": "The most of a request's path, query and headers.",
    "ApiLimitsModel.idle": "How long a connection may rest between two requests.",
    "ApiLimitsModel.rate": "Requests a second of one client, twice as many at once.",
    "ApiLimitsModel.timeout": "Until a request that was begun must have arrived.",
    "ApiModel.group": "A group whose members may read and operate by the Unix socket.",
    "ApiModel.limits": "How much is taken.",
    "ApiModel.listen": "An address and a port; beyond loopback with `tls` and a token only.",
    "ApiModel.socket": "The path of the Unix socket; false: none; default: api.sock in `state`.",
    "ApiModel.tls": "Speak TLS at `listen`.",
    "ApiModel.token": "One token that may do everything.",
    "ApiModel.tokens": "Who may do what.",
    "ApplianceModel.connect_timeout": "For the TCP (and TLS) connection.",
    "ApplianceModel.max_running": "Backups at once; others wait.",
    "ApplianceModel.poll": "How often it is looked again.",
    "ApplianceModel.remembers_jobs": "It keeps its jobs over a restart, so that its `not found` "
    "means `never called`. Say it only of one that does.",
    "ApplianceModel.reports_end": "Its status `completed` or `failed` ends the run.",
    "ApplianceModel.timeout": "For the answer to the call; after that the outcome is unknown.",
    "ApplianceModel.token": "Sent as `Authorization: Bearer …`.",
    "ApplianceModel.url": "Its base URL; often the near end of a tunnel.",
    "BackupSpec.fallback": "`full`: where no incremental can be made, all disks are backed up in "
    "full, and that is told. Left out: the run is refused then.",
    "BackupSpec.run": "The identity of the one call; another one asks for another backup.",
    "BackupSpec.type": "`incremental`: each image is an overlay on its parent.",
    "ConfigModel.api": "Where the API is, and who may use it.",
    "ConfigModel.git": "The branch that is watched in the place of a directory.",
    "ConfigModel.hub": "This hub; default: the host's name. Fixed at first use.",
    "ConfigModel.inventory": "Who knows all disks.",
    "ConfigModel.loop": "How a directory is watched.",
    "ConfigModel.notify": "Who is told of troubles.",
    "ConfigModel.tunnel": "How appliances come to this hub by SSH.",
    "ConfigModel.ports": "Which TCP ports exports may use.",
    "ConfigModel.qemu_nbd": "How servers are run.",
    "ConfigModel.repositories": "Where images live, by name.",
    "ConfigModel.secrets": "What opens encrypted secrets.",
    "ConfigModel.snas": "The node appliances, by name.",
    "ConfigModel.specs": "What specs may read beside them.",
    "ConfigModel.state": "The directory of the ledger, the lock and the logs.",
    "ConfigModel.vcenters": "What an appliance needs to log in, by name.",
    "DiskSpec.backing": "The parent image; default: the newest completed run's.",
    "DiskSpec.export": "The NBD export name; it holds the run and ends in disk<position>.",
    "DiskSpec.image": "The qcow2 file, below the repository.",
    "DiskSpec.key": "VMware's VirtualDisk.key, such as 2000.",
    "DiskSpec.size": "The size of the virtual disk; default: the inventory's.",
    "GitModel.allowed_signers": "Who may sign commits; a file as ssh-keygen(1) has it.",
    "GitModel.branch": "Which branch.",
    "GitModel.interval": "From the end of one fetch to the next.",
    "GitModel.key": "The private key for ssh.",
    "GitModel.token": "For an https URL.",
    "GitModel.url": "https://HOST/PATH, ssh://HOST/PATH, USER@HOST:PATH, or an absolute path.",
    "InventoryModel.file": "The inventory file.",
    "InventoryModel.sql": "The database that is the inventory, in the place of a file.",
    "InventoryModel.required": "A VM that the inventory does not know is refused.",
    "KnownDiskSpec.key": "VMware's VirtualDisk.key, such as 2000.",
    "KnownDiskSpec.size": "The size of the virtual disk.",
    "KnownVmSpec.disks": "Every disk of the VM, in the order that gives the positions.",
    "KnownVmSpec.vm": "Where the VM is in vCenter, where the spec does not say it.",
    "KeepSpec.days": "Chains whose newest backup ended within so many days are kept.",
    "KeepSpec.full": "So many of the newest chains are kept; at least 1, which is the default.",
    "LoopModel.healthy_after": "How long a server lives before its end is an accident.",
    "LoopModel.max_delete": "VMs that one revision may remove without `approve`.",
    "LoopModel.prune": "Stop what the directory does not name any more.",
    "LoopModel.resync": "Between two looks at a VM of which nothing was heard.",
    "LoopModel.stale_after": "How long the client of an accepted run may be silent.",
    "NotifyModel.secret": "What messages are signed with.",
    "NotifyModel.timeout": "For the answer to one message.",
    "NotifyModel.url": "Where messages are posted.",
    "PortsModel.advertise": "The host in the targets that the appliance is told.",
    "PortsModel.bind": "The IPv4 address where servers listen.",
    "PortsModel.range": "FIRST-LAST, both included; one port per disk.",
    "QemuModel.aio": "Passed on to qemu-nbd; `native` needs `cache: none` or `directsync`.",
    "QemuModel.binary": "The program.",
    "QemuModel.cache": "Passed on to qemu-nbd; `writethrough` loses nothing that was acknowledged.",
    "QemuModel.detect_zeroes": "Passed on to qemu-nbd.",
    "QemuModel.discard": "Passed on to qemu-nbd: whether a client's trim frees space.",
    "QemuModel.parallel": "Servers started at once; 0: four per core.",
    "QemuModel.shared": "Clients at once per server.",
    "QemuModel.start_timeout": "Until a new server must answer an NBD handshake.",
    "QemuModel.stop_grace": "Between SIGTERM and SIGKILL.",
    "RepositoryModel.digest": "What is taken of each image of a run that is published.",
    "RepositoryModel.min_free": "What a disk of a run is reckoned to need at least.",
    "RepositoryModel.root": "The directory below which its images live.",
    "RestoreSpec.run": "A run of it that is COMPLETED.",
    "RestoreSpec.vm": "The VM context of the backup.",
    "RunSpec.by": "Who asked; written by tools.",
    "RunSpec.policy": "The rule by which a scheduler asked; kept with the run and given back.",
    "RunSpec.run": "The identity of the one call.",
    "RunSpec.fallback": "As in `backup`.",
    "RunSpec.tags": "Words of the scheduler, by name; kept with the run and given back.",
    "RunSpec.type": "`incremental`: each image is an overlay on its parent.",
    "RunSpec.vm": "A VM that is declared, or that the inventory knows.",
    "SecretModel.age": "What age has encrypted, as `reconciler secret encrypt` prints it.",
    "SecretModel.credential": "The name of a systemd credential.",
    "SecretModel.env": "The name of an environment variable.",
    "SecretModel.file": "The path of a file.",
    "SecretsModel.age_identity": "The private key that opens encrypted secrets.",
    "SpecsModel.env": "Variables of the environment that specs may look up; * and ? may stand.",
    "SpecsModel.root": "The directory out of which specs read nothing.",
    "SqlModel.password": "Of the user who is named in the URL.",
    "SqlModel.query": "One row per disk; default: that of the field's tables.",
    "SqlModel.timeout": "For all of one reading: to connect, to ask, to take the answer.",
    "SqlModel.url": "mysql://USER@HOST:3306/DB, postgresql://USER@HOST/DB or sqlite:///ABSOLUTE/PATH.",
    "TlsModel.cert": "The certificate, and those that lead from it to a root; PEM.",
    "TlsModel.client_ca": "Who must have signed the certificate of each client; PEM.",
    "TlsModel.key": "Its key, without a password; PEM.",
    "TokenModel.name": "What who asked is called in runs and events.",
    "TokenModel.scopes": "`read`: see backups. `operate`: start and end them. `callback`: report.",
    "TokenModel.token": "At least 16 characters.",
    "ForwardSpec.api": "The port of the hub's API.",
    "ForwardSpec.bind": "Where the appliance's programs find them.",
    "ForwardSpec.ports": "The hub's range of exports; default: the config's `ports.range`.",
    "ForwardSpec.to": "What the forwards name at the hub.",
    "HubSpec.host": "The hub's name or address.",
    "HubSpec.port": "Where its sshd listens.",
    "IdentitySpec.credential": "A systemd credential with the private key.",
    "IdentitySpec.file": "A file with the private key; relative to this file.",
    "KeepaliveSpec.count": "So many unanswered questions end the connection.",
    "KeepaliveSpec.interval": "From one question to the next.",
    "ReverseSpec.port": "At the hub; each appliance has its own.",
    "ReverseSpec.to": "The appliance's own API.",
    "TunnelSpec.ciphers": "In the order of preference, as `ssh -Q cipher` names them.",
    "TunnelSpec.connect_timeout": "For the TCP connection and the greeting.",
    "TunnelSpec.forward": "What the appliance reaches at the hub, on the same numbers.",
    "TunnelSpec.host_key": "The hub's host key, pinned: a line like in a `.pub` file, or its file.",
    "TunnelSpec.hub": "Where the hub's sshd is.",
    "TunnelSpec.identity": "The private key by which the hub knows this appliance.",
    "TunnelSpec.keepalive": "When a connection of which nothing is heard is given up.",
    "TunnelSpec.name": "What the tunnel is called; in commands: `tunnel/NAME`.",
    "TunnelSpec.reverse": "How the hub reaches the appliance.",
    "TunnelSpec.split": "Exports have a connection of their own, beside that for the APIs.",
    "TunnelSpec.state": "`down`: hung up, and not dialled.",
    "TunnelSpec.token": "For the question which exports are up, where the hub's API asks for one.",
    "TunnelSpec.user": "Who logs in at the hub.",
    "TunnelModel.user": "The account of this hub that its appliances come to.",
    "VCenterModel.host": "As the appliance reaches it.",
    "VCenterModel.password": "Sent to the appliance in the call, and nowhere else.",
    "VCenterModel.user": "Who logs in.",
    "VmSpec.backup": "Which run is asked for.",
    "VmSpec.disks": "`inventory`: every disk that it has for this VM; or a list of all of them.",
    "VmSpec.for": "`backup`: written by the appliance. `restore`: read-only, nobody is called.",
    "VmSpec.keep": "How many of its backups are kept at least; left out: all. Older ones go with "
    "`reconciler retain`.",
    "VmSpec.labels": "Yours; `backup -l` chooses by them.",
    "VmSpec.name": "The VM context, its identity here.",
    "VmSpec.of": "The completed run that a restore reads.",
    "VmSpec.protect": "A server of this VM that runs is not stopped or restarted, by nobody.",
    "VmSpec.release": "When the run has ended, its servers are stopped, or stay until `absent`.",
    "VmSpec.repository": "A repository of the config; default: the only one.",
    "VmSpec.sna": "An appliance of the config; default: the only one.",
    "VmSpec.state": "`absent`: servers stopped, ports released; images and history stay.",
    "VmSpec.vm": "Where the VM is in vCenter.",
    "_File.groups": "Group → the names of its VMs, or patterns of names.",
    "_File.vms": "VM context → all its disks.",
}
"""Model and key → what an editor says of it."""


class UnknownReaderError(TypeError):
    """A function reads a value, and nobody has said here what it takes."""


class _Generator(GenerateJsonSchema):
    """Knows what our own readers take, and how our own values are written."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> _Schema:
        function = schema["function"]["function"]
        if function is spec._text:
            return {**self.generate_inner(schema["schema"]), "type": ["string", "integer"]}
        if function in _READ_BY:
            return dict(_READ_BY[function])
        if getattr(function, "__name__", "") == "_never_in_place":
            return self.generate_inner(schema["schema"])
        raise UnknownReaderError(f"no schema is known of what {function} reads")

    def function_after_schema(self, schema: core_schema.AfterValidatorFunctionSchema) -> _Schema:
        inner = self.generate_inner(schema["schema"])
        return {**inner, **_CHECKED_BY.get(schema["function"]["function"], {})}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> _Schema:
        if isinstance(schema.get("default"), BaseModel):
            return self.generate_inner(schema["schema"])  # it is that of each of its keys
        return super().default_schema(schema)

    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, PortRange | Endpoint):
            return str(dft)
        if isinstance(dft, Limit):
            return dft.count or f"{dft.percent:g}%"
        return super().encode_default(dft)


def schema(kind: str) -> _Schema:
    """The schema of one of KINDS."""
    match kind:
        case "spec":
            found = _spec()
        case "config":
            found = _of(config.ConfigModel)
        case _:
            found = _of(inventory_file._File)
    titles = {"spec": "Specs", "config": "Configuration", "inventory": "Inventory"}
    about = {
        "spec": "What should be true of VMs: a file of specs of nbd-reconciler.",
        "config": "What holds for a whole hub: the configuration of nbd-reconciler.",
        "inventory": "What is known of VMs: an inventory file of nbd-reconciler.",
    }
    head = {"$schema": DRAFT, "title": titles[kind], "description": about[kind]}
    rest = {key: value for key, value in found.items() if key not in head}
    return {**head, **rest}


def _of(model: type[BaseModel]) -> _Schema:
    """The schema of a model in draft-07."""
    found = model.model_json_schema(
        by_alias=True, schema_generator=_Generator, ref_template="#/definitions/{model}"
    )
    definitions = found.pop("$defs", {})
    if "properties" not in found:  # a model that holds itself
        found = definitions[model.__name__]
    _described(model.__name__, found)
    for name, one in definitions.items():
        _described(name, one)
        one["title"] = name.removesuffix("Spec").removesuffix("Model")
    lowered: _Schema = _lowered({**found, "definitions": definitions})
    return lowered


def _described(model: str, found: _Schema) -> None:
    """What an editor says of each key; titles that only repeat the key are left out."""
    for key, one in found.get("properties", {}).items():
        one.pop("title", None)
        said = SAYS.get(f"{model}.{key}", "")
        if "description" in one:
            said = f"{said} {one['description']}".strip()
        if said:
            one["description"] = said
        if one.get("pattern") == _SPAN and "default" in one:
            one["default"] = f"{one['default']:g}s"
        if one.get("pattern") == _SIZE and one.get("default") is not None:
            one["default"] = format_size(one["default"]).replace(" ", "")


def _lowered(value: Any) -> Any:
    """2020-12 as pydantic writes it, in words that draft-07 has: there, whatever stands beside a
    `$ref` is not read."""
    if isinstance(value, list):
        return [_lowered(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: _lowered(one) for key, one in value.items()}
    if "const" in found and not isinstance(found["const"], dict):
        found["enum"] = [found.pop("const")]  # so that it is the same with every pydantic
    if "patternProperties" in found:
        found["additionalProperties"] = False
    if "anyOf" in found:
        found = _decided(found)
    if found.get("default", 0) is None:
        del found["default"]  # what it means is in the description
    if "$ref" in found and len(found) > 1:
        found["allOf"] = [{"$ref": found.pop("$ref")}]
    return found


_NULL: Final[_Schema] = {"type": "null"}


def _decided(found: _Schema) -> _Schema:
    """One of several types, so that what is wrong is said where it is, and not of the whole: by
    `type` where that is enough, else by `if`."""
    branches = [one for one in found["anyOf"] if one != _NULL]
    null = _NULL in found["anyOf"]
    rest = {key: value for key, value in found.items() if key != "anyOf"}
    lists = [one for one in branches if one.get("type") == "array"]
    words = [word for one in branches for word in one.get("enum", ())] + [None] * null
    if len(branches) == 2 and len(lists) == 1 and words:
        return {**rest, "if": {"type": "array"}, "then": lists[0], "else": {"enum": words}}
    if len(branches) != 1 or not null:
        return found
    (inner,) = branches
    if "type" not in inner or inner["type"] == "object":
        return {**rest, "if": _NULL, "else": inner}
    kinds = inner["type"] if isinstance(inner["type"], list) else [inner["type"]]
    enum = {"enum": words} if "enum" in inner else {}
    return {**inner, **rest, "type": [*kinds, "null"], **enum}


# -- specs: defaults, loops, and templates anywhere

_VARS: Final[_Schema] = {
    "type": ["object", "null"],
    "description": "Variables; each may use the others.",
    "propertyNames": {"pattern": _VARIABLE},
}
_FILES: Final[_Schema] = {
    "type": ["string", "array", "null"],
    "minLength": 1,
    "items": {"type": "string", "minLength": 1},
}
_ITEM: Final[_Schema] = {
    "loop": {
        "description": "One of this for each item of a list, or of an expression that gives one.",
        "type": ["array", "string"],
        "maxItems": MAX_LOOP,
        "pattern": r"\{\{",
        "examples": ["{{ range(3) | list }}"],
    },
    "loop_var": {
        "description": "What the item of the loop is called.",
        "type": "string",
        "pattern": _VARIABLE,
        "default": "item",
    },
    "when": {
        "description": "An expression, with or without {{ }}; false: this is not declared.",
        "type": ["boolean", "string"],
        "default": True,
        "examples": ['site == "a"'],
    },
    "vars": {**_VARS, "description": "Variables of this VM alone."},
    "groups": {
        "description": "Groups whose group_vars hold for this VM, beside those of the inventory.",
        "type": ["string", "array", "null"],
        "pattern": _NAME_OR_TEMPLATE,
        "items": {"type": "string", "pattern": _NAME_OR_TEMPLATE},
    },
}
"""What may stand beside the keys of a VM or a run."""
_MERGED: Final = ("AddressSpec", "BackupSpec", "RestoreSpec")
"""What `defaults` may complete, so that no key of it is required of a VM."""


def _spec() -> _Schema:
    """The schema of a file of specs."""
    vms, runs, tunnels = _of(spec.VmSpec), _of(spec.RunSpec), _of(tunnel_spec.TunnelSpec)
    definitions = {**vms.pop("definitions"), **runs.pop("definitions")}
    theirs = tunnels.pop("definitions")
    definitions |= {name: _templated(one, own=True) for name, one in theirs.items()}
    tunnels = _templated(tunnels, own=True)
    item = {key: one for key, one in _ITEM.items() if key != "groups"}
    for name in _MERGED:
        definitions[name].pop("required", None)
    definitions["DiskSpec"] = _templated(definitions["DiskSpec"], own=True)
    for name in _MERGED:
        definitions[name] = _templated(definitions[name], own=True)
    vms, runs = _templated(vms, own=True), _templated(runs, own=True)
    defaults = {key: one for key, one in vms["properties"].items() if key != "name"}
    defaults["groups"] = _ITEM["groups"]
    return {
        "type": "object",
        "additionalProperties": False,
        "anyOf": [{"required": [key]} for key in ("vms", "runs", "tunnels", "include")],
        "properties": {
            "vars": {**_VARS, "description": "Variables of this file; each may use the others."},
            "vars_files": {**_FILES, "description": "Files of variables, beside this one."},
            "include": {
                "description": "Other files of specs, read where this one is.",
                "if": {"type": "array"},
                "then": {"items": {"$ref": "#/definitions/include"}},
                "else": {"$ref": "#/definitions/include"},
            },
            "defaults": {
                "description": "What the VMs of this file do not say themselves.",
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {key: _without_default(one) for key, one in defaults.items()},
            },
            "vms": {
                "description": "The VMs; [] for none.",
                "type": "array",
                "items": {"$ref": "#/definitions/VmSpec"},
            },
            "runs": {
                "description": "Runs that are asked for beside the VMs' own `backup`.",
                "type": "array",
                "items": {"$ref": "#/definitions/RunSpec"},
            },
            "tunnels": {
                "description": "The tunnels that this machine, an appliance's, dials to hubs.",
                "type": "array",
                "items": {"$ref": "#/definitions/TunnelSpec"},
            },
        },
        "definitions": {
            **definitions,
            "VmSpec": {**vms, "properties": {**vms["properties"], **_ITEM}},
            "RunSpec": {**runs, "properties": {**runs["properties"], **_ITEM}},
            "TunnelSpec": {**tunnels, "properties": {**tunnels["properties"], **item}},
            "include": {
                "type": ["string", "object"],
                "minLength": 1,
                "additionalProperties": False,
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "minLength": 1},
                    "vars": {**_VARS, "description": "Variables for that file."},
                },
            },
        },
    }


def _without_default(one: _Schema) -> _Schema:
    return {key: value for key, value in one.items() if key != "default"}


def _templated(one: Any, *, own: bool = False) -> Any:
    """The same, and an expression wherever a value may stand. `own`: not in the place of this one.

    `if` and `else`, not `anyOf`: so whatever is wrong is said where it is, and not of the whole.
    """
    if not isinstance(one, dict) or set(one) <= {"description"}:
        return one
    found = dict(one)
    if "properties" in found:
        found["properties"] = {key: _templated(inner) for key, inner in found["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = _templated(found[key])
    for key in ("then", "else"):
        if key in found:
            found[key] = _templated(found[key], own=True)
    told = ("description", "default", "examples", "title")
    kept = {key: value for key, value in found.items() if key in told}
    rest = {key: value for key, value in found.items() if key not in told}
    if own or not rest or rest == {"type": "string"}:
        return found
    return {**kept, "if": {"type": "string", "pattern": r"\{\{"}, "else": rest}
