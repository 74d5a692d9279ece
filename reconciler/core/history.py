"""The runs of one VM, newest first, as values; light, as `history` is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from reconciler.core.call import Call
from reconciler.core.ledger import VERIFY, Ledger, Proof
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.proofs import digested, summary
from reconciler.core.units import Seconds, stamp


def runs(ledger: Ledger, vm: str) -> list[Call]:
    """Every attempt of every run of a VM, newest first."""
    return sorted(ledger.runs(vm), key=lambda call: (call.created, call.attempt), reverse=True)


def ended(call: Call) -> Seconds | None:
    """When a run ended; None: it has not. An old store knows only when it last changed."""
    if not call.state.terminal:
        return None
    return call.ended or call.changed


def duration(call: Call, now: Seconds) -> Seconds | None:
    """From the call to its end, or until now; None: it was not called, or nobody wrote when."""
    if not call.called:
        return None
    end = ended(call)
    if end is None and not call.state.active:
        return None
    return max(0.0, (now if end is None else end) - call.called)


Proofs: TypeAlias = Mapping[str, Mapping[str, Proof]]
"""Job id → kind → what was found when somebody last looked whether its images can be used."""


def document(
    vm: str,
    shown: Sequence[Call],
    total: int,
    hub: str,
    now: Seconds,
    proofs: Proofs,
    broken: Mapping[str, str],
) -> dict[str, Any]:
    """The history of a VM, as `history -o json` prints it.

    `broken`: job id → why it cannot be restored although its own images are kept.
    """
    return {
        "format_version": FORMAT_VERSION,
        "hub": hub,
        "vm": vm,
        "total": total,
        "runs": [
            _run(call, now, proofs.get(call.job_id, {}), broken.get(call.job_id, ""))
            for call in shown
        ],
    }


def proof(found: Proof, lacks: str = "") -> dict[str, Any]:
    """One proof, for a document. `lacks`: why the backup cannot be restored; empty: it can.

    `verify` is about all that a backup needs: where something below it is damaged, it has failed.
    """
    result = json.loads(found.result)
    said = {"ok": found.ok, "summary": result.get("summary", "")}
    if found.kind == VERIFY:
        since = digested(found)
        said = {
            "ok": found.ok and not lacks,
            "summary": lacks if found.ok and lacks else summary(found),
            "digests": stamp(since) if since else None,
        }
    return {**said, "at": stamp(found.at), "who": found.who, "result": result}


def _run(call: Call, now: Seconds, proofs: Mapping[str, Proof], lacks: str) -> dict[str, Any]:
    span, end = duration(call, now), ended(call)
    return {
        "run": call.run,
        "attempt": call.attempt,
        "type": call.type,
        "state": str(call.state),
        "reason": call.reason,
        "message": call.message,
        "asked": stamp(call.created),
        "called": stamp(call.called) if call.called else None,
        "ended": None if end is None else stamp(end),
        "seconds": None if span is None else round(span),
        "sna": call.sna,
        "job_id": call.job_id,
        "nbd_targets": call.targets or None,
        "who": call.who or None,
        "tainted": call.tainted,
        "fallback": call.fallback or None,
        "doubt": call.doubt or None,
        "proofs": {kind: proof(found, lacks) for kind, found in sorted(proofs.items())},
    }
