"""The configuration file → Settings, checked, every value with file:line:column."""

from __future__ import annotations

import base64
import binascii
import hashlib
import posixpath
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from reconciler.core.access import SCOPES, SOLE
from reconciler.core.document import Document
from reconciler.core.document import Path as Keys
from reconciler.core.errors import ConfigError, Diagnostic, described
from reconciler.core.explain import explained
from reconciler.core.settings import (
    LISTEN,
    MIN_FREE,
    PORTS,
    TUNNEL_USER,
    Api,
    ApiLimits,
    ApiToken,
    Appliance,
    GitSource,
    Limit,
    Loop,
    Notify,
    QemuNbd,
    SecretRef,
    Settings,
    SpecRules,
    SqlInventory,
    Tls,
    VCenter,
    state_directory,
)
from reconciler.core.spec import Name, Strict
from reconciler.core.units import Bytes, Endpoint, PortRange, parse_duration, parse_size


def _duration(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("write a duration like 10s or 5m")
    seconds = parse_duration(value)
    if not 0 < seconds <= 30 * 86400:
        raise ValueError(f"{value!r} is not a usable duration: between 1ms and 30d")
    return seconds


def _range(value: object) -> PortRange:
    if not isinstance(value, str):
        raise ValueError("write a port range like 10100-10200")
    return PortRange.parse(value)


def _size(value: object) -> Bytes:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("write a size like 1GiB or 500MiB")
    return parse_size(value)


def _limit(value: object) -> Limit:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return Limit(count=value)
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]+)?) ?%", value) if isinstance(value, str) else None
    if not found or float(found[1]) > 100:
        raise ValueError("write a number of VMs like 3, or a part of them like 25%")
    return Limit(percent=float(found[1]))


def _endpoint(value: object) -> Endpoint:
    if not isinstance(value, str):
        raise ValueError("write an address like 127.0.0.1:8082")
    return Endpoint.parse(value)


def _path_or_false(value: object) -> str | None:
    """Empty: none is wanted."""
    if value is False:
        return ""
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError("write a path, or false to have none")


def _shown(value: str) -> str:
    """A URL that cannot be read, for an error; what stands before an `@` may be a password."""
    return "this" if "@" in value else repr(value)


def _is_http(value: str) -> bool:
    """Whether something can be asked at this URL."""
    try:
        parts = urlsplit(value)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, or half of an IPv6 address
        return False
    return bool(named and re.fullmatch(r"[!-~]+", value))


def _url(value: str) -> str:
    if not _is_http(value):
        raise ValueError(f"{_shown(value)} is not a URL like http://127.0.0.1:9081")
    parts = urlsplit(value)
    if parts.username or parts.password:
        raise ValueError("a URL with a password in it: write `token: {file: …}` instead")
    return value.rstrip("/")


def _notify_url(value: str) -> str:
    if not _is_http(value):
        raise ValueError("this is not a URL like https://alerts.example/reconciler")
    parts = urlsplit(value)
    if parts.username or parts.password:
        raise ValueError("a URL with a password in it: write `secret: {file: …}` instead")
    return value


def _git_url(value: str) -> str:
    if urlsplit(value).password is not None:
        raise ValueError("a URL with a password in it: write `token: {file: …}` instead")
    if not re.fullmatch(r"(https?|ssh|git|file)://.+|[^-:/][^:/]*:[^:].*|/.+", value):
        raise ValueError(
            f"{_shown(value)} is not a repository: write https://HOST/PATH, ssh://HOST/PATH, "
            "USER@HOST:PATH, or an absolute path"
        )
    return value


SQL_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "mysql": ("unix_socket", "charset", "ssl_ca", "ssl_cert", "ssl_key", "ssl_verify_identity"),
    "postgresql": ("host", "sslmode", "sslrootcert", "sslcert", "sslkey"),
    "sqlite": (),
}
"""Kind of a database → what may stand behind the `?` of its URL. Source: PyMySQL's connect(), and
libpq's connection parameters."""
_SAME_SQL: Final = {"mariadb": "mysql", "postgres": "postgresql"}


def _sql_url(value: str) -> str:
    """The URL of a database in its one form. No error shows it: it may hold a password."""
    scheme, colon, rest = value.partition("://")
    kind = _SAME_SQL.get(scheme, scheme)
    if ":" in rest.rpartition("@")[0]:
        raise ValueError("a URL with a password in it: write `password: {file: …}` beside it")
    if not colon or kind not in SQL_OPTIONS:
        raise ValueError(
            "this is no database: write mysql://USER@HOST:3306/DB, postgresql://USER@HOST/DB or "
            "sqlite:///ABSOLUTE/PATH"
        )
    parts = urlsplit(value)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if any("pass" in name.lower() for name in options):
        raise ValueError("a URL with a password in it: write `password: {file: …}` beside it")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or parts.fragment:
        raise ValueError(
            "this URL cannot be read: a port is a number; a `/`, `#`, `?` or `@` that belongs to a "
            "name is written as %2F, %23, %3F, %40; a password stands beside it: `password: "
            "{file: …}`"
        )
    unknown = [name for name in options if name not in SQL_OPTIONS[kind]]
    if unknown:
        known = ", ".join(SQL_OPTIONS[kind]) or "none"
        raise ValueError(f"unknown option {unknown[0][:40]!r} in the URL (known: {known})")
    if kind == "sqlite":
        if parts.netloc or not parts.path.startswith("/") or parts.path.endswith("/"):
            raise ValueError("write sqlite:///ABSOLUTE/PATH")
        return f"sqlite://{posixpath.normpath(parts.path).replace('//', '/')}"
    if not parts.path.strip("/") or "/" in parts.path.strip("/"):
        raise ValueError("this URL names no database: it ends in /DB")
    if not (parts.hostname or options.keys() & {"unix_socket", "host"}):
        raise ValueError("this URL names no host, such as mysql://USER@HOST:3306/DB")
    return f"{kind}://{rest}"


def _query(value: str) -> str:
    if not value.strip().rstrip(";").strip():
        raise ValueError("an empty query; leave it out for that of the field's tables")
    return value.strip().rstrip(";").strip()


def _sealed(value: str) -> str:
    """What age has encrypted, as far as its outer form tells."""
    text = value.strip()
    if text.startswith(_ARMOR[0]):
        if not text.endswith(_ARMOR[1]):
            raise ValueError(
                f"its last line is not {_ARMOR[1]}: copy all of it, and write it as a block "
                "(`age: |`)"
            )
        return f"{text}\n"
    if "AGE-SECRET-KEY" in text.upper():
        raise ValueError(
            "this is a private key; here stands what it opens: reconciler secret encrypt"
        )
    try:
        binary = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        binary = b""
    if not binary.startswith(b"age-encryption.org/v1\n"):
        raise ValueError(
            f"write what `reconciler secret encrypt` prints: a text that begins with {_ARMOR[0]}, "
            "or base64 of what age writes"
        )
    return "".join(text.split())


_ARMOR: Final = ("-----BEGIN AGE ENCRYPTED FILE-----", "-----END AGE ENCRYPTED FILE-----")
"""First and last line. Source: age-encryption.org/v1."""


def _address(value: str) -> str:
    if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", value) or any(
        int(p) > 255 for p in value.split(".")
    ):
        raise ValueError(f"{value!r} is not an IPv4 address like 127.0.0.1")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]+", value):
        raise ValueError(f"{value!r} cannot stand in a target: write a host name or IPv4 address")
    return value


Path = Annotated[str, Field(min_length=1)]
Duration = Annotated[float, BeforeValidator(_duration)]


class SecretModel(Strict):
    """A secret is never written in place, but for one that is encrypted."""

    file: str | None = None
    env: str | None = None
    credential: str | None = None
    age: Annotated[str, AfterValidator(_sealed)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _never_in_place(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(
                "a secret is never written in place: write {file: PATH}, {env: NAME}, "
                "{credential: NAME} or {age: ENCRYPTED}"
            )
        return value

    @model_validator(mode="after")
    def _one(self) -> SecretModel:
        if sum(v is not None for v in (self.file, self.env, self.credential, self.age)) != 1:
            raise ValueError("name exactly one of file, env, credential and age")
        return self


_LIMITS: Final = ApiLimits()


class RepositoryModel(Strict):
    root: Path
    min_free: Annotated[int, BeforeValidator(_size)] = MIN_FREE
    digest: Literal["sha256", "none"] = "sha256"


class PortsModel(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    range: Annotated[PortRange, BeforeValidator(_range)] = PORTS
    bind: Annotated[str, AfterValidator(_address)] = "127.0.0.1"
    advertise: Annotated[str, AfterValidator(_host)] = "127.0.0.1"


class QemuModel(Strict):
    binary: Annotated[str, Field(min_length=1)] = "qemu-nbd"
    shared: Annotated[int, Field(ge=2, le=1000)] = 10
    start_timeout: Duration = 10.0
    stop_grace: Duration = 5.0
    cache: Literal["none", "writeback", "writethrough", "directsync"] | None = None
    aio: Literal["threads", "native", "io_uring"] | None = None
    discard: Literal["ignore", "unmap"] | None = None
    detect_zeroes: Literal["off", "on", "unmap"] | None = None
    parallel: Annotated[int, Field(ge=0, le=256)] = 0

    @model_validator(mode="after")
    def _native_is_direct(self) -> QemuModel:
        if self.aio == "native" and self.cache not in ("none", "directsync"):
            raise ValueError("aio: native needs `cache: none` or `cache: directsync`")
        return self


class ApplianceModel(Strict):
    url: Annotated[str, AfterValidator(_url)]
    connect_timeout: Duration = 5.0
    timeout: Duration = 30.0
    poll: Duration = 10.0
    remembers_jobs: bool = False
    reports_end: bool = False
    max_running: Annotated[int, Field(ge=1)] = 8
    token: SecretModel | None = None


class VCenterModel(Strict):
    host: Annotated[str, Field(min_length=1)]
    user: Annotated[str, Field(min_length=1)]
    password: SecretModel


class SqlModel(Strict):
    url: Annotated[str, AfterValidator(_sql_url)]
    password: SecretModel | None = None
    query: Annotated[str, AfterValidator(_query)] | None = None
    timeout: Duration = 5.0


class InventoryModel(Strict):
    file: Path | None = None
    sql: SqlModel | None = None
    required: bool = False

    @model_validator(mode="after")
    def _one(self) -> InventoryModel:
        if self.file is not None and self.sql is not None:
            raise ValueError("`file` and `sql` are both given: one of them is the inventory")
        return self


class TokenModel(Strict):
    name: Name
    token: SecretModel
    scopes: Annotated[list[Literal["read", "operate", "callback"]], Field(min_length=1)]

    @model_validator(mode="after")
    def _once(self) -> TokenModel:
        if self.name == SOLE:
            raise ValueError(f"{SOLE!r} is the name of the one that is written as `token`")
        return self


class TlsModel(Strict):
    cert: Path
    key: Path
    client_ca: Path | None = None


class ApiLimitsModel(Strict):
    body: Annotated[int, BeforeValidator(_size)] = _LIMITS.body
    headers: Annotated[int, BeforeValidator(_size)] = _LIMITS.headers
    rate: Annotated[float, Field(ge=1, le=1e6)] = _LIMITS.rate
    callback_rate: Annotated[float, Field(ge=1, le=1e6)] = _LIMITS.callback_rate
    concurrency: Annotated[int, Field(ge=1, le=32)] = _LIMITS.concurrency
    connections: Annotated[int, Field(ge=8, le=10_000)] = _LIMITS.connections
    timeout: Duration = _LIMITS.timeout
    idle: Duration = _LIMITS.idle

    @model_validator(mode="after")
    def _sane(self) -> ApiLimitsModel:
        for name, most in (("body", 64 << 20), ("headers", 1 << 20)):
            if not 1024 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be within 1KiB and {most >> 20}MiB")
        return self


class ApiModel(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    listen: Annotated[Endpoint, BeforeValidator(_endpoint)] = LISTEN
    socket: Annotated[str | None, BeforeValidator(_path_or_false)] = None
    group: Annotated[str, Field(min_length=1)] | None = None
    token: SecretModel | None = None
    tokens: list[TokenModel] = Field(default_factory=list)
    tls: TlsModel | None = None
    limits: ApiLimitsModel = ApiLimitsModel()

    @model_validator(mode="after")
    def _told_apart(self) -> ApiModel:
        names = [one.name for one in self.tokens]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two tokens are named {twice[0]!r}: each has a name of its own")
        if self.group is not None and self.socket == "":
            raise ValueError("`group` is about the socket, and `socket: false` says there is none")
        return self


class LoopModel(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    resync: Duration = 30.0
    stale_after: Duration = 300.0
    healthy_after: Duration = 60.0
    prune: bool = False
    max_delete: Annotated[Limit, BeforeValidator(_limit)] = Limit(percent=25.0)


class GitModel(Strict):
    url: Annotated[str, AfterValidator(_git_url)] | None = None
    branch: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+@][A-Za-z0-9_./+@-]{0,249}$")] = "main"
    interval: Duration = 30.0
    key: SecretModel | None = None
    token: SecretModel | None = None
    allowed_signers: Path | None = None

    @model_validator(mode="after")
    def _ways_in(self) -> GitModel:
        if self.key and (self.key.env is not None or self.key.age is not None):
            raise ValueError(
                "ssh reads `key` from a file: write {file: PATH} or {credential: NAME}"
            )
        if self.token and self.url and not self.url.startswith("https://"):
            raise ValueError("`token` is for an https URL; ssh has `key`")
        return self


class SpecsModel(Strict):
    root: Path | None = None
    env: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_*?]+$")]] = Field(default_factory=list)


class NotifyModel(Strict):
    url: Annotated[str, AfterValidator(_notify_url)] | None = None
    secret: SecretModel | None = None
    timeout: Duration = 10.0

    @model_validator(mode="after")
    def _somebody(self) -> NotifyModel:
        if self.secret and not self.url:
            raise ValueError("`secret` signs what is posted to `url`, which is not given")
        return self


class TunnelModel(Strict):
    user: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")] = TUNNEL_USER


class SecretsModel(Strict):
    age_identity: SecretModel | None = None

    @model_validator(mode="after")
    def _open(self) -> SecretsModel:
        if self.age_identity and self.age_identity.age is not None:
            raise ValueError("the key that opens the others cannot be encrypted itself")
        return self


class ConfigModel(Strict):
    hub: Name | None = None
    state: Path | None = None
    repositories: Mapping[Name, RepositoryModel] = Field(default_factory=dict)
    ports: PortsModel = PortsModel()
    qemu_nbd: QemuModel = QemuModel()
    snas: Mapping[Name, ApplianceModel] = Field(default_factory=dict)
    vcenters: Mapping[Name, VCenterModel] = Field(default_factory=dict)
    inventory: InventoryModel = InventoryModel()
    api: ApiModel = ApiModel()
    loop: LoopModel = LoopModel()
    git: GitModel = GitModel()
    notify: NotifyModel = NotifyModel()
    specs: SpecsModel = SpecsModel()
    secrets: SecretsModel = SecretsModel()
    tunnel: TunnelModel = TunnelModel()


class _Refs:
    """The references to secrets of one config."""

    def __init__(self, model: ConfigModel, document: Document | None, base: str) -> None:
        self.document, self.base = document, base
        self.wrong: list[Diagnostic] = []
        identity = model.secrets.age_identity
        self.identity = self._plain(identity) if identity else None

    def _plain(self, model: SecretModel) -> SecretRef:
        if model.file is not None:
            return SecretRef("file", _absolute(model.file, self.base))
        if model.env is not None:
            return SecretRef("env", model.env)
        return SecretRef("credential", model.credential or "")

    def of(self, model: SecretModel, *path: str | int) -> SecretRef:
        """The reference that is written at a path."""
        if model.age is None:
            return self._plain(model)
        keys: Keys = (*path, "age")
        place = self.document.place(keys) if self.document else None
        if self.identity is None:
            summary = (
                f"{'.'.join(map(str, path))}: it is encrypted, and the config names no key that "
                "opens it: write `secrets: {age_identity: {file: PATH}}`"
            )
            self.wrong.append(Diagnostic("error", summary, place))
        digest = hashlib.sha256(model.age.encode()).hexdigest()[:12]
        return SecretRef("age", digest, model.age, self.identity, f"{place or ''}")

    def maybe(self, model: SecretModel | None, *path: str) -> SecretRef | None:
        return self.of(model, *path) if model else None


_SCALARS: dict[str, tuple[str, ...]] = {
    "hub": (),
    "state": (),
    "api": ("listen", "group"),
    "git": ("url", "branch", "interval"),
    "notify": ("url", "timeout"),
    "tunnel": ("user",),
} | {
    section: tuple(name for name in model.model_fields if name != "sql")
    for section, model in (
        ("ports", PortsModel),
        ("qemu_nbd", QemuModel),
        ("inventory", InventoryModel),
        ("loop", LoopModel),
    )
}


def overlaid(value: object, environment: Mapping[str, str]) -> tuple[object, list[str]]:
    """The config's value with RECONCILER_<SECTION>_<KEY> on top, and which of them were used."""
    if not (value is None or isinstance(value, dict)):
        return value, []
    merged: dict[str, Any] = dict(value or {})
    used = []
    for section, keys in _SCALARS.items():
        for key in keys or ("",):
            name = "_".join(part for part in ("RECONCILER", section, key) if part).upper()
            text = environment.get(name)
            if text is None:
                continue
            used.append(name)
            typed: object = (
                int(text)
                if key in ("shared", "parallel") and re.fullmatch(r"[0-9]{1,9}", text)
                else text
            )
            if key in ("required", "prune"):
                typed = text.lower() in ("1", "true", "yes")
            if not key:
                merged[section] = typed
            elif isinstance(merged.get(section, {}), dict):
                merged[section] = {**(merged.get(section) or {}), key: typed}
    return merged, used


def settings(
    document: Document | None,
    environment: Mapping[str, str],
    *,
    base: str,
    cwd: str,
    host_name: str,
    root: bool,
) -> Settings:
    """Settings from a config document (None: the built-in defaults). Raises ConfigError.

    `base` is the directory of the config file: its relative paths are relative to that. Those
    from the environment are relative to `cwd`.
    """
    written = document.value if document else None
    if not (written is None or isinstance(written, dict)):
        raise ConfigError(
            [
                Diagnostic(
                    "error",
                    f"expected keys and values, found {described(written)}",
                    document.place(()) if document else None,
                )
            ]
        )
    value, used = overlaid(written, environment)
    try:
        model = ConfigModel.model_validate(value or {})
    except ValidationError as error:
        raise ConfigError(
            [
                Diagnostic(
                    "error",
                    summary + (f" (from the environment: {', '.join(used)})" if used else ""),
                    document.place(path, key=summary.startswith("unknown key"))
                    if document
                    else None,
                )
                for path, summary in explained(error, value, ConfigModel)
            ]
        ) from None
    given = (
        _absolute(model.state, cwd if "RECONCILER_STATE" in used else base) if model.state else None
    )
    state = state_directory(given, {**environment, "RECONCILER_STATE": ""}, root=root)
    inventory_base = cwd if "RECONCILER_INVENTORY_FILE" in used else base
    refs = _Refs(model, document, base)
    found = Settings(
        hub=model.hub or default_hub(host_name),
        state=state,
        repositories={
            name: _absolute(repository.root, base)
            for name, repository in model.repositories.items()
        }
        or {"local": f"{state}/repository"},
        min_free={name: one.min_free for name, one in model.repositories.items()},
        digests={name: one.digest for name, one in model.repositories.items()},
        ports=model.ports.range,
        bind=model.ports.bind,
        advertise=model.ports.advertise,
        qemu_nbd=QemuNbd(**model.qemu_nbd.model_dump()),
        snas={
            name: Appliance(
                **sna.model_dump(exclude={"token"}),
                token=refs.maybe(sna.token, "snas", name, "token"),
            )
            for name, sna in model.snas.items()
        },
        vcenters={
            name: VCenter(
                host=one.host,
                user=one.user,
                password=refs.of(one.password, "vcenters", name, "password"),
            )
            for name, one in model.vcenters.items()
        },
        inventory=_absolute(model.inventory.file, inventory_base) if model.inventory.file else None,
        inventory_sql=_sql(model.inventory.sql, refs),
        inventory_required=model.inventory.required,
        listen=model.api.listen,
        api=_api(model.api, refs, used),
        loop=Loop(**{name: getattr(model.loop, name) for name in Loop.__struct_fields__}),
        git=_git(model.git, refs),
        notify=Notify(
            url=model.notify.url or "",
            secret=refs.maybe(model.notify.secret, "notify", "secret"),
            timeout=model.notify.timeout,
        ),
        specs=SpecRules(
            root=_absolute(model.specs.root, base) if model.specs.root else None,
            env=tuple(model.specs.env),
        ),
        tunnel_user=model.tunnel.user,
    )
    if refs.wrong:
        raise ConfigError(refs.wrong)
    return found


def _sql(model: SqlModel | None, refs: _Refs) -> SqlInventory | None:
    if model is None:
        return None
    return SqlInventory(
        url=model.url,
        password=refs.maybe(model.password, "inventory", "sql", "password"),
        query=model.query or "",
        timeout=model.timeout,
    )


def _api(model: ApiModel, refs: _Refs, used: Collection[str]) -> Api:
    sole = refs.maybe(model.token, "api", "token")
    tokens = [ApiToken(SOLE, sole, tuple(map(str, SCOPES)))] if sole else []
    tokens += [
        ApiToken(one.name, refs.of(one.token, "api", "tokens", i, "token"), tuple(one.scopes))
        for i, one in enumerate(model.tokens)
    ]
    lacks = [
        word
        for word, there in (
            ("`tls: {cert: PATH, key: PATH}`", model.tls),
            ("`tokens: [{name: NAME, token: {file: PATH}, scopes: [read, operate]}]`", tokens),
        )
        if not there
    ]
    if lacks and not model.listen.loopback:
        place = refs.document.place(("api", "listen")) if refs.document else None
        said = (
            f"listen: cannot listen on {str(model.listen)!r}, which other machines can reach: "
            f"anybody could start and end backups there; write {' and '.join(lacks)} beside it, or "
            "listen on loopback, where the tunnel ends: 127.0.0.1:8082"
        )
        if "RECONCILER_API_LISTEN" in used:
            said += " (from the environment: RECONCILER_API_LISTEN)"
        refs.wrong.append(Diagnostic("error", said, place))
    tls, socket = model.tls, model.socket
    return Api(
        tokens=tuple(tokens),
        callbacks_closed=any("callback" in one.scopes for one in model.tokens),
        socket=_absolute(socket, refs.base) if socket else socket,
        group=model.group or "",
        tls=Tls(
            cert=_absolute(tls.cert, refs.base),
            key=_absolute(tls.key, refs.base),
            client_ca=_absolute(tls.client_ca, refs.base) if tls.client_ca else None,
        )
        if tls
        else None,
        limits=ApiLimits(**model.limits.model_dump()),
    )


def _git(model: GitModel, refs: _Refs) -> GitSource:
    signers = model.allowed_signers
    return GitSource(
        url=model.url or "",
        branch=model.branch,
        interval=model.interval,
        key=refs.maybe(model.key, "git", "key"),
        token=refs.maybe(model.token, "git", "token"),
        allowed_signers=_absolute(signers, refs.base) if signers else None,
    )


def default_hub(host_name: str) -> str:
    """The host's name as far as it can be a name here."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", host_name).strip("-.") or "hub"


def _absolute(path: str, base: str) -> str:
    return posixpath.normpath(posixpath.join(base, path))
