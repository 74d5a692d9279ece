"""Which host key may be trusted."""

from __future__ import annotations

import pytest

from reconciler.core.trust import at_hub, in_order, judge
from reconciler.core.tunnel import HostKey
from tests.core.test_sshd import KEY, OTHER

RSA = HostKey("ssh-rsa", KEY.blob)
ECDSA = HostKey("ecdsa-sha2-nistp256", KEY.blob)


def test_the_best_kind_comes_first_and_each_once() -> None:
    assert in_order([RSA, ECDSA, KEY, RSA]) == [KEY, ECDSA, RSA]
    assert at_hub(ECDSA) == "ssh-keygen -lf /etc/ssh/ssh_host_ecdsa_key.pub"
    assert at_hub(KEY).endswith("ssh_host_ed25519_key.pub")


@pytest.mark.parametrize(
    ("offered", "pinned", "fingerprint", "replace", "outcome", "key"),
    [
        ([KEY], None, "", False, "new", KEY),
        ([KEY], KEY, "", False, "known", KEY),
        ([OTHER, KEY], KEY, "", False, "known", KEY),
        ([KEY], OTHER, "", False, "other", KEY),
        ([KEY], OTHER, "", True, "replace", KEY),
        ([KEY], None, KEY.fingerprint, False, "new", KEY),
        ([OTHER, KEY], None, KEY.fingerprint, False, "new", KEY),
        ([KEY], None, OTHER.fingerprint, False, "unlike", KEY),
        ([KEY], OTHER, OTHER.fingerprint, True, "unlike", KEY),
        ([KEY], OTHER, KEY.fingerprint, False, "other", KEY),
        ([KEY], OTHER, KEY.fingerprint, True, "replace", KEY),
        ([OTHER, KEY], OTHER, KEY.fingerprint, False, "other", KEY),
    ],
)
def test_nothing_is_trusted_that_was_not_said(
    offered: list[HostKey],
    pinned: HostKey | None,
    fingerprint: str,
    replace: bool,
    outcome: str,
    key: HostKey,
) -> None:
    found = judge(offered, pinned, fingerprint, replace=replace)
    assert (found.outcome, found.key) == (outcome, key)
