"""What a status of the shared-memory engine means, in words: the culprit, what each rank asked for, what to do.

The first rank that notices a failure writes it down in shared memory, and every rank reports what is written there; so
all of them name the same culprit, even those that saw a survivor exit first.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from fcomm.errors import (
    BackendError,
    CollectiveTimeoutError,
    FcommError,
    GroupClosedError,
    GroupPoisonedError,
    MismatchError,
    PeerDiedError,
    printable,
)
from fcomm.group import Group

# fcomm_status in csrc/fcomm.h
DIED, LEFT, TIMEOUT, MISMATCH, INTERRUPTED, POISONED, CLOSED, FORKED, INVALID, SYSTEM = range(1, 11)

_UNUSABLE = "the group is unusable now; fcomm.close it on every rank and create it again"
# How long ranks wait for each other's descriptions of a call in which they differ. A rank in the call describes it
# within milliseconds, a late rank when it arrives; both must count, or the majority would be a different one. A rank
# that was killed never will.
_PATIENCE_S = 1.0


def failure(status: int, op: str, group: Group, native: Any, comm: Any, asked: str) -> FcommError:
    """The error of a call that returned status; asked describes the call, so that other ranks can quote it."""
    about: dict[str, Any] = {"op": op, "group": group.name, "rank": group.rank}
    here = f"{op}: [rank {group.rank} of {group.size}, group '{group.name}']"
    if status == CLOSED:
        return GroupClosedError(f"{op}: group '{group.name}' is closed; create it again", **about)
    if status == FORKED:
        return GroupClosedError(
            f"{op}: group '{group.name}' was opened in the parent of this forked process; create a group in the child, "
            "or start processes with fcomm.run",
            **about,
        )
    if status in (INVALID, SYSTEM):
        return BackendError(
            f"{here} the engine refused {asked} with status {status}; this is a fault of fcomm, please report it",
            code=status, code_name={INVALID: "FCOMM_INVALID", SYSTEM: "FCOMM_SYSTEM"}[status], **about,
        )  # fmt: skip
    reason, culprit, reporter, _ = native.failure(comm)
    native.describe(asked, comm)
    who = f"rank {culprit} (pid {native.pid(comm, culprit)})"
    about["culprits"] = [culprit]
    if reason == DIED:
        return PeerDiedError(
            f"{here} {who} ended and does not take part in {asked}; look at its log; {_UNUSABLE}", **about
        )
    if reason == LEFT:
        return PeerDiedError(
            f"{here} {who} closed the group, or exited, and does not take part in {asked}; make every rank call "
            f"the same collectives; {_UNUSABLE}",
            **about,
        )
    if reason == INTERRUPTED:
        return PeerDiedError(f"{here} {who} was interrupted (Ctrl-C) while it waited in {asked}; {_UNUSABLE}", **about)
    if reason == TIMEOUT:
        return _timeout(here, about, native, comm, asked, culprit, group.size)
    if reason == MISMATCH:
        return _mismatch(here, about, native, comm, asked, group.size)
    return BackendError(f"{here} rank {reporter} reports status {reason} of {who}; {_UNUSABLE}", code=reason, **about)


def poisoned(op: str, group: Group, first: str) -> GroupPoisonedError:
    """The error of every later call on a group that failed."""
    return GroupPoisonedError(
        f"{op}: group '{group.name}' is unusable since an earlier error; fcomm.close it on every rank and create it "
        f"again. The error was: {first}",
        op=op, group=group.name, rank=group.rank,
    )  # fmt: skip


def _timeout(
    here: str, about: dict[str, Any], native: Any, comm: Any, asked: str, culprit: int, size: int
) -> CollectiveTimeoutError:
    behind = [r for r in range(size) if native.behind(comm, r)] or [culprit]
    about["culprits"] = behind
    named = ", ".join(f"{r} (pid {native.pid(comm, r)})" for r in behind)
    return CollectiveTimeoutError(
        f"{here} rank{'s' if len(behind) > 1 else ''} {named} did not arrive in {asked} before the group's deadline; "
        f"see what they do instead, or raise timeout_s; {_UNUSABLE}",
        **about,
    )


def _mismatch(here: str, about: dict[str, Any], native: Any, comm: Any, asked: str, size: int) -> MismatchError:
    words = {about["rank"]: asked}
    until = time.monotonic() + _PATIENCE_S
    for rank in range(size):
        if rank != about["rank"]:
            text = native.description(rank, max(0.0, until - time.monotonic()), comm)
            if text or not native.behind(comm, rank):
                words[rank] = printable(text)
    usual = Counter(words.values()).most_common()
    if len(usual) > 1 and usual[0][1] > usual[1][1]:
        about["culprits"] = [r for r, text in words.items() if text != usual[0][0]]
    said = "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text or 'nothing known'}"
        for text in dict.fromkeys(words[r] for r in sorted(words))
        if (ranks := [r for r in sorted(words) if words[r] == text])
    )
    return MismatchError(
        f"{here} the ranks ask for different things: {said}; make every rank call the same collectives in the "
        f"same order with the same shapes, dtypes and options; {_UNUSABLE}",
        **about,
    )
