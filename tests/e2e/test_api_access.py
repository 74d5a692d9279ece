"""Who may use the API of a daemon: by its config, by its socket, and after a reload."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching

READER, STARTER, NEXT = (f"{who}-0123456789abcdef" for who in ("reader", "starter", "next"))


def ask(
    site: Site, method: str, path: str, token: str = "", body: Any = None, local: Path | None = None
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", site.api, timeout=30)
    if local:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(str(local))
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, body and json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_a_daemon_asks_for_tokens_and_takes_new_ones(site: Site, appliance: Appliance) -> None:
    backups = "/api/v1/backups"
    (site.folder / "starter").write_text(f"{STARTER}\n")
    (site.folder / "reader").write_text(f"{READER}\n")
    tokens = [
        {"name": "reader", "token": {"file": "reader"}, "scopes": ["read"]},
        {"name": "starter", "token": {"file": "starter"}, "scopes": ["operate", "read"]},
    ]
    address = {"listen": f"127.0.0.1:{site.api}"}
    site.write_config(api={**address, "tokens": tokens})
    site.spec({**site.vm("ctx-1"), "backup": None})
    local = site.folder / "state" / "api.sock"
    with watching(site) as watcher:
        assert watcher.said("callbacks are taken without a token")
        asked = {"vm_name": "ctx-1", "backup_type": "full", "repository_id": "local"}
        assert ask(site, "GET", backups)[0] == 401
        assert ask(site, "GET", backups, READER)[0] == 200
        status, refusal = ask(site, "POST", backups, READER, asked)
        assert status == 403
        assert "needs the scope operate, and token reader has read" in refusal["details"]
        status, started = ask(site, "POST", backups, STARTER, asked)
        assert status in (201, 202), started
        # a callback needs none; the socket asks the kernel
        assert ask(site, "GET", f"{backups}/changeid?vm_name=ctx-1")[0] == 200
        assert ask(site, "GET", backups, local=local)[1]["total"] == 1
        # a reload takes what can be used, and keeps what was where it cannot
        (site.folder / "reader").write_text("short")
        site.run("reload")
        until(lambda: watcher.said("it has 5 characters"), "the warning")
        assert ask(site, "GET", backups, READER)[0] == 200
        (site.folder / "reader").write_text(NEXT)
        site.run("reload")
        until(lambda: ask(site, "GET", backups, NEXT)[0] == 200, "the new token")
        assert ask(site, "GET", backups, READER)[0] == 401
    assert not local.exists()
    history = site.run("history", "ctx-1")
    assert "token starter" in history
    for text in (READER, STARTER, NEXT):
        assert text not in watcher.log + history
        store = b"".join(one.read_bytes() for one in (site.folder / "state").glob("state.db*"))
        assert text.encode() not in store


def test_a_token_that_cannot_be_used_keeps_the_daemon_from_starting(site: Site) -> None:
    (site.folder / "token").write_text("short")
    site.write_config(
        api={"listen": f"127.0.0.1:{site.api}", "token": {"file": "token"}, "group": None}
    )
    said = site.run("serve", code=1)
    assert "cannot use the token of `api` (file" in said
    assert "openssl rand -hex 32" in said
    assert not os.path.exists(site.folder / "state" / "api.sock")
