"""The main paths do exactly so much, as a function of the VMs and disks: equal, not at most.

Whoever makes one do less changes a line of the table; whoever makes one do more sees it here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, NamedTuple

import pytest

from tests.e2e.counting import counted
from tests.e2e.site import Appliance, Site


class Grows(NamedTuple):
    """`base + vm * VMs + disk * disks`."""

    base: int
    vm: int = 0
    disk: int = 0

    def at(self, vms: int, disks: int) -> int:
        return self.base + self.vm * vms + self.disk * disks


DIED: Final = "apply, one server died"
LOOK: Final[Mapping[str, Grows]] = {
    "start sh": Grows(1),  # which touches the repository before a thread of ours does
    "connect to a server": Grows(0, disk=1),
    "open /proc of a server": Grows(0, disk=3),  # cmdline, stat, fd
    "open repository": Grows(0, vm=1, disk=1),  # claims; images
}
"""What each look at what runs costs."""
COUNTS: Final[Mapping[str, Mapping[str, Grows]]] = {
    "apply, cold": {
        "commits": Grows(4, vm=4),
        "sync state": Grows(13, vm=4),  # a commit's one each; the others make the store
        "sync repository": Grows(0, vm=4, disk=2),
        "start qemu-img": Grows(0, disk=1),
        "start sh": Grows(1, disk=1),  # each server is one until it may go on
        "connect to a server": Grows(0, disk=2),  # it answers; it still does before the call
        "connect to the appliance": Grows(1, vm=1),
        "open repository": Grows(0, vm=7, disk=5),
        "open spec and config": Grows(11, vm=1),
        "open state": Grows(11, disk=2),
        "modules of ours": Grows(100),
    },
    "apply, nothing to do": {
        **LOOK,
        "commits": Grows(4),
        "sync state": Grows(8),
        "connect to the appliance": Grows(1),
        "open spec and config": Grows(5),
        "open state": Grows(9),
        "modules of ours": Grows(90),
    },
    "plan, nothing to do": {
        **LOOK,
        "connect to the appliance": Grows(1),
        "open spec and config": Grows(5),
        "open state": Grows(2),
        "modules of ours": Grows(88),
    },
    "status": {
        **LOOK,
        "open spec and config": Grows(2),
        "open state": Grows(2),
        "modules of ours": Grows(57),
    },
    DIED: {
        "commits": Grows(3),
        "sync state": Grows(7),
        "start sh": Grows(2),
        "connect to a server": Grows(-1, disk=2),  # all but the dead one, then all
        "connect to the appliance": Grows(1),
        "open /proc of a server": Grows(-6, disk=6),
        "open repository": Grows(0, vm=2, disk=2),
        "open spec and config": Grows(5),
        "open state": Grows(11),
        "modules of ours": Grows(90),
    },
}
"""What is not named does not happen at all: `plan` and `status` commit and sync nothing."""
COMMANDS: Final = {
    "apply, cold": ("apply", "-y"),
    "apply, nothing to do": ("apply", "-y"),
    "plan, nothing to do": ("plan",),
    "status": ("status",),
    DIED: ("apply", "-y"),
}
"""In their order: each goes on where the one before it ended."""


@pytest.mark.parametrize(("vms", "disks"), [(1, 1), (1, 3), (3, 6)])
def test_the_main_paths_do_no_more(site: Site, appliance: Appliance, vms: int, disks: int) -> None:
    sizes = (1 << 20,) * (disks // vms)
    names = [f"ctx-{number}" for number in range(vms)]
    site.inventory({name: {2000 + i: size for i, size in enumerate(sizes)} for name in names})
    site.spec(*(site.vm(name, sizes) for name in names))
    for what, command in COMMANDS.items():
        if what == DIED:
            site.kill(site.pids()[names[0], 2000])
        wanted = {name: grows.at(vms, disks) for name, grows in COUNTS[what].items()}
        assert counted(site, appliance.port, *command) == Counter(wanted), what
