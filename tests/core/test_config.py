"""The configuration: what it comes to, and what is refused where."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any, Final

import pytest

from reconciler.core.config import default_hub, settings
from reconciler.core.errors import ConfigError, Exit
from reconciler.core.settings import (
    MIN_FREE,
    ApiLimits,
    Appliance,
    QemuNbd,
    Secret,
    SecretRef,
    Settings,
    Tls,
    VCenter,
    state_directory,
)
from reconciler.core.units import Endpoint, PortRange
from tests.core.builders import document, lines, says


def read(text: str | None = None, environment: dict[str, str] | None = None) -> Settings:
    """The settings from /etc/r/config.yaml, for a root in /work."""
    return settings(
        None if text is None else document(text, "config.yaml"),
        environment or {},
        base="/etc/r",
        cwd="/cwd",
        host_name="node.example",
        root=True,
    )


def wrong(text: str, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as refusal:
        read(text, environment)
    assert refusal.value.exit is Exit.CONFIG
    return "\n".join(lines(refusal.value.diagnostics))


FULL: Final = """\
hub: hub-a
state: state
repositories:
  local: {root: /backup/repository}
  near: {root: ../near, min_free: 20GiB, digest: none}
ports: {range: 10300-10310, bind: 0.0.0.0, advertise: hub.example}
qemu_nbd: {binary: /opt/qemu-nbd, shared: 12, start_timeout: 1m, stop_grace: 250ms, cache: none}
snas:
  site-a: {url: "http://127.0.0.1:9081/", timeout: 2m, max_running: 3, token: {file: token}}
vcenters:
  vc1: {host: vcenter.example, user: backup@vsphere.local, password: {env: VC1}}
inventory: {file: inventory.yaml, required: true}
api: {listen: "127.0.0.1:8099"}
loop: {resync: 30s, stale_after: 5m, prune: false, max_delete: 25%}
"""


def test_the_full_config_is_read() -> None:
    found = read(FULL)
    assert (found.hub, found.state) == ("hub-a", "/etc/r/state")
    assert found.repositories == {"local": "/backup/repository", "near": "/etc/near"}
    assert found.min_free == {"local": 1 << 30, "near": 20 << 30}
    assert found.digests == {"local": "sha256", "near": "none"}
    assert found.ports == PortRange(10300, 10310)
    assert (found.bind, found.advertise) == ("0.0.0.0", "hub.example")
    assert found.qemu_nbd == QemuNbd(
        binary="/opt/qemu-nbd", shared=12, start_timeout=60.0, stop_grace=0.25, cache="none"
    )
    assert found.snas == {
        "site-a": Appliance(
            url="http://127.0.0.1:9081",
            timeout=120.0,
            max_running=3,
            token=SecretRef("file", "/etc/r/token"),
        )
    }
    assert found.vcenters == {
        "vc1": VCenter(
            host="vcenter.example",
            user="backup@vsphere.local",
            password=SecretRef("env", "VC1"),
        )
    }
    assert (found.inventory, found.inventory_required) == ("/etc/r/inventory.yaml", True)
    assert found.listen == Endpoint("127.0.0.1", 8099)


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_without_a_config_the_defaults_work(text: str | None) -> None:
    found = read(text)
    assert (found.hub, found.state) == ("node.example", "/var/lib/reconciler")
    assert found.repositories == {"local": "/var/lib/reconciler/repository"}
    assert found.ports == PortRange(10100, 10200)
    assert (found.bind, found.qemu_nbd) == ("127.0.0.1", QemuNbd())
    assert (found.snas, found.vcenters, found.inventory) == ({}, {}, None)
    assert str(found.listen) == "127.0.0.1:8082"
    sna = read("snas: {a: {url: http://x}}").snas["a"]
    assert (sna.timeout, sna.connect_timeout, sna.poll, sna.max_running) == (30.0, 5.0, 10.0, 8)
    assert (sna.remembers_jobs, sna.reports_end, sna.token) == (False, False, None)


def test_the_environment_goes_before_the_file() -> None:
    found = read(
        FULL,
        {
            "RECONCILER_HUB": "hub-z",
            "RECONCILER_STATE": "here",
            "RECONCILER_PORTS_RANGE": "10400-10401",
            "RECONCILER_QEMU_NBD_SHARED": "20",
            "RECONCILER_QEMU_NBD_START_TIMEOUT": "3s",
            "RECONCILER_INVENTORY_FILE": "other.yaml",
            "RECONCILER_INVENTORY_REQUIRED": "false",
            "RECONCILER_API_LISTEN": "localhost:8100",
        },
    )
    assert (found.hub, found.state) == ("hub-z", "/cwd/here")
    assert str(found.ports) == "10400-10401"
    assert found.bind == "0.0.0.0"
    assert (found.qemu_nbd.shared, found.qemu_nbd.start_timeout) == (20, 3.0)
    assert (found.inventory, found.inventory_required) == ("/cwd/other.yaml", False)
    assert found.listen == Endpoint("localhost", 8100)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "hub.example", "[::]", "[2001:db8::1]"])
def test_beyond_this_machine_the_api_needs_tls_and_a_token(host: str) -> None:
    found = wrong(f'hub: a\napi: {{listen: "{host}:8082"}}')
    says(
        found,
        "2:15 error: listen: cannot listen on",
        f"{host}:8082",
        "write `tls: {cert: PATH, key: PATH}` and `tokens: [{name: NAME, token: {file: PATH}, ",
        "or listen on loopback",
    )


@pytest.mark.parametrize("written", ["8082", "127.0.0.1", "127.0.0.1:0", "127.1:8082", "x y:1"])
def test_an_address_that_is_none_is_refused(written: str) -> None:
    assert "error: listen: " in wrong(f'api: {{listen: "{written}"}}')
    assert "write an address like 127.0.0.1:8082" in wrong("api: {listen: 8082}")


@pytest.mark.parametrize("value", ["x", "²", "1.5", "1"])
def test_a_fault_in_the_environment_is_named(value: str) -> None:
    found = wrong("hub: a", {"RECONCILER_QEMU_NBD_SHARED": value})
    says(found, "error: shared", "from the environment: RECONCILER_QEMU_NBD_SHARED")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ["1:1 error: expected keys and values, found a list"]),
        ("hubb: a", ["1:1 error: unknown key 'hubb'", "did you mean 'hub'"]),
        ("hub: a b", ["1:6 error: hub: 'a b' holds ' '"]),
        ("hub: ''", ["1:6 error: hub: a name cannot be empty"]),
        ("ports: {rang: 1-2}", ["1:9 error: unknown key 'rang'", "did you mean 'range'"]),
        ("ports: {range: 10100}", ["1:16 error: range: write a port range like 10100-10200"]),
        ("ports: {range: 5-1}", ["1:16 error: range: ", "must rise"]),
        ("ports: {bind: localhost}", ["1:15 error: bind: 'localhost' is not an IPv4 address"]),
        ("ports: {bind: 1.2.3.256}", ["'1.2.3.256' is not an IPv4 address"]),
        ("ports: {advertise: 'a,b'}", ["1:20 error: advertise: 'a,b' cannot stand in a target"]),
        ("ports: {advertise: '::1'}", ["cannot stand in a target"]),
        ("qemu_nbd: {shared: 1}", ["1:20 error: shared: ", "2"]),
        ("qemu_nbd: {shared: '10'}", ["shared: expected a whole number", "without quotes"]),
        ("qemu_nbd: {aio: native}", ["1:11 error: qemu_nbd: aio: native needs `cache: none`"]),
        ("qemu_nbd: {cache: fast}", ["1:19 error: cache: expected one of none, writeback"]),
        ("qemu_nbd: {stop_grace: 0s}", ["1:24 error: stop_grace: '0s' is not a usable duration"]),
        ("qemu_nbd: {stop_grace: 90d}", ["not a usable duration"]),
        ("qemu_nbd: {stop_grace: soon}", ["cannot read duration 'soon'"]),
        ("qemu_nbd: {stop_grace: true}", ["write a duration like 10s"]),
        (f"qemu_nbd: {{stop_grace: {10**400}}}", ["1:24 error: stop_grace"]),
        ("qemu_nbd: {binary: ''}", ["1:20 error: binary"]),
        ("repositories: {local: /backup}", ["1:23 error: local: expected keys and values"]),
        (
            "repositories: {local: {root: /x, min_free: 1GB}}",
            ["1:44 error: min_free", "powers of 1000 or of 1024"],
        ),
        (
            "repositories: {local: {root: /x, min_free: -1}}",
            ["1:44 error: min_free", "it is negative"],
        ),
        ("repositories: {local: {root: /x, min_free: true}}", ["write a size like 1GiB"]),
        ("repositories: {local: {}}", ["1:23 error: the key 'root' is missing"]),
        ("repositories: {a/b: {root: /x}}", ["'a/b' holds '/'"]),
        ("snas: {a: {}}", ["1:11 error: the key 'url' is missing"]),
        ("snas: {a: {url: 127.0.0.1:9081}}", ["1:17 error: url: ", "is not a URL like http://"]),
        ("snas: {a: {url: 'http://h:99999'}}", ["'http://h:99999' is not a URL like http://"]),
        ("snas: {a: {url: 'http://h:abc'}}", ["'http://h:abc' is not a URL like http://"]),
        ("snas: {a: {url: 'http://h:0'}}", ["'http://h:0' is not a URL like http://"]),
        ("snas: {a: {url: 'http://h/a b'}}", ["'http://h/a b' is not a URL like http://"]),
        ("snas: {a: {url: 'http://ho st'}}", ["'http://ho st' is not a URL like http://"]),
        ("snas: {a: {url: 'http://[::1'}}", ["'http://[::1' is not a URL like http://"]),
        ("snas: {a: {url: 'ftp://x'}}", ["is not a URL"]),
        ("snas: {a: {url: 'http://'}}", ["is not a URL"]),
        ("snas: {a: {url: 'http://u:p@x'}}", ["a URL with a password in it", "token: {file:"]),
        ("snas: {a: {url: 'http://x', max_running: 0}}", ["1:42 error: max_running"]),
        ("snas: {a: {url: 'http://x', timeot: 1s}}", ["unknown key 'timeot'", "mean 'timeout'"]),
        ("vcenters: {a: {host: h, user: u}}", ["1:15 error: the key 'password' is missing"]),
        ("vcenters: {a: {hots: h}}", ["unknown key 'hots'", "did you mean 'host'"]),
        ("inventory: {sql: {}}", ["1:18 error: the key 'url' is missing"]),
        ("loop: {resink: 1s}", ["1:8 error: unknown key 'resink'", "did you mean 'resync'"]),
    ],
)
def test_what_cannot_be_right_is_refused_at_its_place(text: str, words: list[str]) -> None:
    says(wrong(text), *words)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (
            "s3cret",
            [
                "1:46 error: password",
                "never written in place",
                "{file: PATH}",
                "{env: NAME}",
                "{credential: NAME}",
            ],
        ),
        ("{}", ["name exactly one of file, env, credential and age"]),
        ("{file: a, env: b}", ["name exactly one of file, env, credential and age"]),
        ("{file: 3}", ["expected text"]),
        ("{value: s3cret}", ["unknown key 'value'"]),
    ],
)
def test_a_secret_is_never_written_in_place_nor_repeated(written: str, words: list[str]) -> None:
    found = wrong(f"vcenters: {{vc1: {{host: h, user: u, password: {written}}}}}")
    says(found, "error: ", *words)
    assert "s3cret" not in found


def test_a_secret_cannot_get_out_by_accident() -> None:
    secret = Secret("s3cret")
    assert secret.reveal() == "s3cret"
    shown = [repr(secret), str(secret), f"{secret}", f"{[secret]!r}"]
    assert not any("s3cret" in text for text in shown)
    for serialise in (pickle.dumps, json.dumps):
        with pytest.raises(TypeError):
            serialise(secret)
    assert not hasattr(secret, "__dict__")


def test_what_is_remembered_of_the_settings_holds_no_way_to_a_secret() -> None:
    text = json.dumps(read(FULL).to_json())
    assert "VC1" not in text
    assert "token" not in text


def test_what_is_remembered_of_the_settings_is_what_status_needs() -> None:
    found = read(FULL)
    again = Settings.from_json(json.loads(json.dumps(found.to_json())))
    for what in (
        *("hub", "state", "repositories", "min_free"),
        *("ports", "bind", "advertise", "qemu_nbd"),
    ):
        assert getattr(again, what) == getattr(found, what)
    assert again.snas["site-a"].max_running == 3
    old = {key: value for key, value in found.to_json().items() if key != "min_free"}
    assert Settings.from_json(old).least_free("/etc/near/x") == MIN_FREE


@pytest.mark.parametrize(
    ("path", "name", "least"),
    [
        ("/backup/repository/a/b.qcow2", "local", 1 << 30),
        ("/backup/repository/inner/b.qcow2", "inner", 2 << 30),
        ("/backup/repository-2/b.qcow2", None, 1 << 30),
        ("/backup/repository", None, 1 << 30),
    ],
)
def test_a_file_is_in_the_innermost_repository(path: str, name: str | None, least: int) -> None:
    found = read(
        "repositories: {local: {root: /backup/repository}, "
        "inner: {root: /backup/repository/inner, min_free: 2GiB}}"
    )
    assert found.repository_of(path) == name
    assert found.least_free(path) == least


@pytest.mark.parametrize(
    ("host", "hub"),
    [
        ("hub-a", "hub-a"),
        ("hub.example.org", "hub.example.org"),
        ("hübsch host", "h-bsch-host"),
        ("-.", "hub"),
        ("", "hub"),
    ],
)
def test_a_hub_without_a_name_takes_its_hosts(host: str, hub: str) -> None:
    assert default_hub(host) == hub


@pytest.mark.parametrize(
    ("written", "environment", "root", "directory"),
    [
        ("/a", {"RECONCILER_STATE": "/b"}, True, "/b"),
        ("/a", {"STATE_DIRECTORY": "/c"}, True, "/a"),
        (None, {"STATE_DIRECTORY": "/c:/d"}, True, "/c"),
        (None, {}, True, "/var/lib/reconciler"),
        (None, {"XDG_STATE_HOME": "/x"}, False, "/x/reconciler"),
        (None, {"HOME": "/home/u"}, False, "/home/u/.local/state/reconciler"),
    ],
)
def test_the_state_directory_is_the_first_that_is_named(
    written: Any, environment: dict[str, str], root: bool, directory: str
) -> None:
    assert state_directory(written, environment, root=root) == directory


def test_a_branch_to_be_watched() -> None:
    found = read(
        "git: {url: 'https://git.example/specs.git', branch: prod, interval: 1m, token: {env: T}, "
        "allowed_signers: signers}"
    ).git
    assert (found.url, found.branch, found.interval) == (
        "https://git.example/specs.git",
        "prod",
        60,
    )
    assert (found.token, found.key) == (SecretRef("env", "T"), None)
    assert found.allowed_signers == "/etc/r/signers"
    assert read("git: {url: 'git@h:x.git', key: {file: k}}").git.key == SecretRef(
        "file", "/etc/r/k"
    )
    assert read("", {"RECONCILER_GIT_BRANCH": "other"}).git.branch == "other"
    assert read().git.url == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("git: {url: 'https://me:hunter2@h/x'}", ["1:12", "password in it"]),
        ("git: {url: 'ext::sh -c id'}", ["is not a repository"]),
        ("git: {url: --upload-pack=x}", ["is not a repository"]),
        ("git: {url: specs.git}", ["is not a repository", "absolute path"]),
        ("git: {url: /x, branch: --x}", ["branch"]),
        ("git: {url: 'git@h:x', key: {env: KEY}}", ["from a file"]),
        ("git: {url: 'http://h/x', token: {env: T}}", ["https"]),
        ("git: {url: /x, interval: 0s}", ["duration"]),
        ("git: {url: /x, brunch: main}", ["unknown key", "branch"]),
    ],
)
def test_a_branch_that_cannot_be_watched(text: str, words: list[str]) -> None:
    found = wrong(text)
    says(found, *words)
    assert "hunter2" not in found


def test_who_is_told_is_read() -> None:
    found = read("notify: {url: 'https://a.example/in?k=1', secret: {file: s}, timeout: 3s}").notify
    assert found.url == "https://a.example/in?k=1"
    assert (str(found.secret), found.timeout) == ("file /etc/r/s", 3.0)
    assert read().notify.url == ""
    assert read(environment={"RECONCILER_NOTIFY_URL": "http://b"}).notify.url == "http://b"


@pytest.mark.parametrize(
    ("text", "says_so"),
    [
        ("{url: 'https://user:the-secret@a.example'}", "write `secret: {file: …}`"),
        ("{url: 'ftp://the-secret'}", "not a URL like"),
        ("{url: https://a, secret: the-secret}", "never written in place"),
        ("{secret: {file: s}}", "which is not given"),
        ("{url: https://a, timeout: 0s}", "not a usable duration"),
    ],
)
def test_who_is_told_cannot_be_written_so(text: str, says_so: str) -> None:
    found = wrong(f"notify: {text}")
    assert says_so in found
    assert "the-secret" not in found


def test_who_is_told_is_not_in_what_was_applied() -> None:
    found = read("notify: {url: 'https://a.example/the-way-in', secret: {file: the-way-in}}")
    assert "the-way-in" not in json.dumps(found.to_json())


# -- a database as the inventory


def sql(url: str, more: str = "") -> str:
    return f"inventory: {{sql: {{url: '{url}'{more}}}}}"


@pytest.mark.parametrize(
    ("written", "url", "origin"),
    [
        ("mysql://hub@db:3306/oma", "mysql://hub@db:3306/oma", "mysql://db:3306/oma"),
        ("mariadb://hub@db/oma", "mysql://hub@db/oma", "mysql://db/oma"),
        ("postgres://hub@db/oma", "postgresql://hub@db/oma", "postgresql://db/oma"),
        ("postgresql://db/oma?sslmode=require", None, "postgresql://db/oma"),
        ("mysql://hub@localhost/oma?unix_socket=/run/s", None, "mysql://localhost/oma"),
        ("postgresql:///oma?host=%2Frun", None, "postgresql:///oma"),
        ("mysql://h%40b@[::1]:3306/oma", None, "mysql://[::1]:3306/oma"),
        ("sqlite:///var/lib/oma.db", None, "sqlite:///var/lib/oma.db"),
        ("sqlite:////var/lib/oma.db", "sqlite:///var/lib/oma.db", "sqlite:///var/lib/oma.db"),
    ],
)
def test_a_database_may_be_the_inventory(written: str, url: str | None, origin: str) -> None:
    found = read(sql(written, ", password: {file: pw}, timeout: 2s")).inventory_sql
    assert found is not None
    assert found.url == (url or written)
    assert found.origin == origin
    assert (found.password, found.timeout, found.query) == (
        SecretRef("file", "/etc/r/pw"),
        2.0,
        "",
    )


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://hub:hunter2@db/oma", ["a URL with a password", "write `password: {file: …}`"]),
        ("mysql://hub:@db/oma", ["a URL with a password"]),
        ("mysql://hub@db/oma?passwd=hunter2", ["a URL with a password"]),
        ("postgresql://db/oma?password=hunter2", ["a URL with a password"]),
        ("mysql://hub:hunt/er2@db/oma", ["a URL with a password"]),
        ("oracle://hub:hunter2@db/oma", ["a URL with a password"]),
        ("mysql://hub@db:port/oma", ["cannot be read", "a port is a number"]),
        ("mysql://hub@db/oma#hunter2", ["cannot be read"]),
        ("oracle://hub@db/hunter2", ["no database", "sqlite:///ABSOLUTE/PATH"]),
        ("hunter2", ["no database"]),
        ("mysql://hub@db", ["names no database"]),
        ("mysql://hub@db/a/b", ["names no database"]),
        ("mysql:///oma", ["names no host"]),
        ("mysql://db/oma?local_infile=1", ["unknown option 'local_infile'", "unix_socket"]),
        ("sqlite://inventory.db", ["sqlite:///ABSOLUTE/PATH"]),
        ("sqlite:///dir/", ["sqlite:///ABSOLUTE/PATH"]),
        ("sqlite:///a.db?mode=rwc", ["unknown option 'mode'", "known: none"]),
    ],
)
def test_a_url_that_is_no_database_is_refused_and_not_repeated(url: str, words: list[str]) -> None:
    found = wrong(sql(url))
    says(found, "1:24 error: url: ", *words)
    assert "hunter2" not in found
    assert "er2" not in found


def test_the_inventory_is_a_file_or_a_database() -> None:
    text = "inventory: {file: a, sql: {url: 'sqlite:///a.db'}}"
    says(wrong(text), "1:12 error", "`file` and `sql` are both given")


def test_a_query_is_one_statement_with_words_in_it() -> None:
    found = read(sql("sqlite:///a.db", ", query: ' SELECT 1; '")).inventory_sql
    assert found is not None
    assert found.query == "SELECT 1"
    says(wrong(sql("sqlite:///a.db", ", query: ' ;'")), "an empty query")


def test_what_is_remembered_of_the_settings_holds_no_database() -> None:
    found = read(sql("mysql://hub@db/oma", ", password: {env: DB}"))
    assert "oma" not in json.dumps(found.to_json())


# -- who may use the API

TLS: Final = "tls: {cert: c.pem, key: /k.pem}"
TOKEN: Final = "{name: a, token: {env: A}, scopes: [read]}"


def test_who_may_use_the_api() -> None:
    found = read(
        f"""\
api:
  listen: 0.0.0.0:8443
  socket: run/api.sock
  group: backup
  token: {{file: token}}
  tokens: [{TOKEN}, {{name: b, token: {{credential: b}}, scopes: [operate, callback]}}]
  tls: {{cert: c.pem, key: /k.pem, client_ca: ca.pem}}
  limits: {{body: 2MiB, headers: 8KiB, rate: 5, callback_rate: 50, concurrency: 3, connections: 9,
    timeout: 2s, idle: 1m}}
"""
    )
    api = found.api
    assert [(one.name, str(one.secret), one.scopes) for one in api.tokens] == [
        ("token", "file /etc/r/token", ("read", "operate", "callback")),
        ("a", "env A", ("read",)),
        ("b", "credential b", ("operate", "callback")),
    ]
    assert (found.api_socket, api.group) == ("/etc/r/run/api.sock", "backup")
    assert api.tls == Tls("/etc/r/c.pem", "/k.pem", "/etc/r/ca.pem")
    assert api.limits == ApiLimits(
        body=2 << 20,
        headers=8192,
        rate=5.0,
        callback_rate=50.0,
        concurrency=3,
        connections=9,
        timeout=2.0,
        idle=60.0,
    )
    assert {one.secret for one in api.tokens} <= set(found.secrets)
    told = json.dumps(found.to_json())
    assert not any(word in told for word in ("token", "credential", "k.pem"))


@pytest.mark.parametrize(
    ("written", "closed"),
    [
        ("token: {env: A}", False),  # one that may all does not shut out who sends none
        (f"tokens: [{TOKEN}]", False),
        ("tokens: [{name: b, token: {env: B}, scopes: [callback]}]", True),
    ],
)
def test_callbacks_need_a_token_where_one_is_made_for_them(written: str, closed: bool) -> None:
    assert read(f"api: {{{written}}}").api.callbacks_closed is closed


def test_the_socket_is_in_the_state_directory_or_where_it_is_said_or_nowhere() -> None:
    assert read("state: /s").api_socket == "/s/api.sock"
    assert read("api: {socket: /run/x}").api_socket == "/run/x"
    assert read("api: {socket: false}").api_socket == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "hub.example", "[::]"])
@pytest.mark.parametrize("beside", ["", TLS, f"tokens: [{TOKEN}]", "token: {env: A}"])
def test_tls_or_a_token_alone_is_not_enough_beyond_this_machine(host: str, beside: str) -> None:
    found = wrong(f'api:\n  listen: "{host}:8082"\n' + (f"  {beside}\n" if beside else ""))
    says(found, "2:11 error: listen: cannot listen on")
    assert ("`tls: {" in found) is (beside != TLS)
    assert ("`tokens: [" in found) is ("token" not in beside)


def test_beyond_this_machine_with_tls_and_a_token() -> None:
    for token in (f"tokens: [{TOKEN}]", "token: {env: A}"):
        found = read(f'api: {{listen: "[::]:8443", {TLS}, {token}}}')
        assert str(found.listen) == "[::]:8443"
    environment = {"RECONCILER_API_LISTEN": "0.0.0.0:1"}
    assert "from the environment: RECONCILER_API_LISTEN" in wrong("hub: a", environment)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("tokens: [{name: a, token: secret-in-place, scopes: [read]}]", "never written in place"),
        (
            "tokens: [{name: a, token: {env: A}, scopes: []}]",
            "1:51 error: scopes: list",
        ),
        ("tokens: [{name: a, token: {env: A}}]", "the key 'scopes' is missing"),
        (
            "tokens: [{name: a, token: {env: A}, scopes: [write]}]",
            "expected one of read, op",
        ),
        ("tokens: [{name: token, token: {env: A}, scopes: [read]}]", "is the name of the one"),
        (f"tokens: [{TOKEN}, {TOKEN}]", "two tokens are named 'a'"),
        ("socket: true", "write a path, or false to have none"),
        ("socket: ''", "write a path, or false to have none"),
        ("socket: false, group: backup", "`socket: false` says there is none"),
        ("tls: {cert: c}", "key"),
        ("limits: {rate: 0}", "1:22 error: rate: "),
        ("limits: {concurrency: 33}", "1:29 error: concurrency: "),
        ("limits: {body: 1}", "body must be within 1KiB and 64MiB"),
        ("limits: {headers: 2MiB}", "headers must be within 1KiB and 1MiB"),
        ("limits: {timeout: 0s}", "1:25 error: timeout: "),
        ("limit: {rate: 1}", "limits"),
    ],
)
def test_what_the_api_cannot_be_told(written: str, said: str) -> None:
    found = wrong(f"api: {{{written}}}")
    assert said in found
    assert "secret-in-place" not in found


def test_an_encrypted_token_needs_its_key() -> None:
    sealed = base64.b64encode(b"age-encryption.org/v1\n").decode()
    found = wrong(f"api: {{tokens: [{{name: a, token: {{age: {sealed}}}, scopes: [read]}}]}}")
    says(found, "api.tokens.0.token: it is encrypted")
