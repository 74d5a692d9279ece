"""The daemon tells a webhook of a trouble: once, signed, whoever restarts."""

from __future__ import annotations

import hashlib
import hmac
import json
import time

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from reconciler.host.store import Store
from reconciler.host.webhook import SIGNATURE, TIMESTAMP
from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching

KEY = "the-signing-key"


def test_a_trouble_is_told_once_signed_and_not_again_after_a_restart(
    site: Site, appliance: Appliance, httpserver: HTTPServer
) -> None:
    taken: list[Request] = []

    def take(request: Request) -> Response:
        request.get_data()
        taken.append(request)
        return Response(status=204)

    httpserver.expect_request("/the-way-in", method="POST").respond_with_handler(take)
    (site.folder / "key").write_text(f"{KEY}\n")
    url = httpserver.url_for("/the-way-in")
    site.write_config(loop={"resync": "1s"}, notify={"url": url, "secret": {"file": "key"}})
    appliance.misbehave("refuse")
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    with watching(site) as daemon:
        until(lambda: len(taken) == 2, "both are told", 60)
        first = daemon.log
    with watching(site) as daemon:
        looked = time.time()
        until(lambda: site.status()["ctx-1"]["call"]["state"] == "REJECTED", "it looks again")
        until(lambda: time.time() > looked + 1.5, "another resync")
        second = daemon.log
    assert len(taken) == 2
    for request in taken:
        body = request.get_data()
        text = request.headers[TIMESTAMP].encode() + b"." + body
        expected = hmac.new(KEY.encode(), text, hashlib.sha256).hexdigest()
        assert request.headers[SIGNATURE] == f"sha256={expected}"
        assert json.loads(body)["data"]["reason"] == "CallRejected"
    assert {json.loads(one.get_data())["subject"] for one in taken} == {"ctx-1/r1", "ctx-2/r1"}
    store = Store(site.folder / "state", site.hub)
    kept = json.dumps(store.ledger().settings)
    store.close()
    for told in (first, second, kept, site.run("status", "-o", "json")):
        assert "the-way-in" not in told and KEY not in told
