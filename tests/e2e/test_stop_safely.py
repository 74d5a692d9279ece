"""A stop waits for clients, is held by them, and is over only when the image is free."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.site import Appliance, Site, until


def a_server_that_nobody_protects(site: Site) -> int:
    """Its run has ended, and it is kept up. The port."""
    site.spec(site.vm("ctx-1", release="keep"))
    site.apply()
    site.run("resolve", "ctx-1", "--failed", "--reason", "test", "-y")
    port: int = site.status()["ctx-1"]["disks"][0]["port"]
    return port


def test_clients_are_given_time_to_leave_and_the_stop_goes_on(
    site: Site, appliance: Appliance
) -> None:
    port = a_server_that_nobody_protects(site)
    client = socket.create_connection(("127.0.0.1", port))
    command = site.start("stop", "ctx-1", "--drain-timeout", "60s", "-y")
    assert command.stderr is not None
    said = until(
        lambda: line if "waiting up to" in (line := command.stderr.readline()) else None,  # type: ignore[union-attr]
        "that it says that it waits",
    )
    assert "1 min for the clients of ctx-1 to leave" in said
    assert len(site.servers()) == 1
    client.close()
    command.communicate(timeout=60)
    assert command.returncode == 0
    assert (site.servers(), site.listening()) == ({}, set())


def test_clients_that_do_not_leave_in_time_hold_the_stop_by_name(
    site: Site, appliance: Appliance
) -> None:
    port = a_server_that_nobody_protects(site)
    with socket.create_connection(("127.0.0.1", port)):
        text = site.run("stop", "ctx-1", "--drain-timeout", "1s", "-y", code=4)
        assert f"DrainTimedOut: 1 client is connected to port {port} after 1 s of draining" in text
        assert "reconciler stop ctx-1 --kill-clients" in text
        assert len(site.servers()) == 1
    site.run("stop", "ctx-1", "-y")
    assert site.servers() == {}


def test_the_lock_is_free_while_clients_are_waited_for(site: Site, appliance: Appliance) -> None:
    port = a_server_that_nobody_protects(site)
    client = socket.create_connection(("127.0.0.1", port))
    command = site.start("stop", "ctx-1", "--drain-timeout", "60s", "-y")
    assert command.stderr is not None
    until(lambda: "waiting up to" in command.stderr.readline(), "that it waits")  # type: ignore[union-attr]
    site.spec(site.vm("ctx-2"), file="other.yaml")
    site.apply("-f", "specs/other.yaml", "--lock-timeout", "20s")
    client.close()
    command.communicate(timeout=60)
    assert command.returncode == 0


def test_a_frozen_server_is_stopped_by_force_and_its_port_released(
    site: Site, appliance: Appliance
) -> None:
    a_server_that_nobody_protects(site)
    os.kill(site.pids()["ctx-1", 2000], signal.SIGSTOP)
    site.spec({"name": "ctx-1", "state": "absent"})
    site.apply()
    assert (site.servers(), site.listening()) == ({}, set())


@contextmanager
def locked(image: Path) -> Iterator[None]:
    """A lock on one byte of an image, held by us. Source: fcntl(2), F_OFD_SETLK."""
    fd = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 300, 1, 0))
        yield
    finally:
        os.close(fd)


def test_a_port_is_leased_until_the_image_is_free(site: Site, appliance: Appliance) -> None:
    a_server_that_nobody_protects(site)
    site.spec({"name": "ctx-1", "state": "absent"})
    with locked(site.image("ctx-1")):
        text = site.apply(code=1)
        assert f"{site.image('ctx-1')} is still locked by" in text
        assert "its port stays leased until it lets go" in text
    assert site.servers() == {}
    site.apply()
    assert site.status() == {}


def test_a_run_is_protected_with_no_client_connected(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    pids = site.pids()
    for arguments in (["stop", "ctx-1", "-y"], ["stop", "ctx-1", "-y", "--kill-clients"]):
        text = site.run(*arguments, code=4)
        assert "its run r1 is ACCEPTED" in text
    assert site.pids() == pids
