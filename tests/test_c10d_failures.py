"""Ranks that die, hang, leave or differ: every survivor names them within the deadline, other groups keep working."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deadlines import hasten, tell, wait_for_word

import fcomm
from fcomm import CollectiveTimeoutError, FcommError, Group, GroupPoisonedError, MismatchError, PeerDiedError, processes
from fcomm.backends import processgroup
from fcomm.bootstrap import wait_for_keys
from fcomm.rendezvous import live
from fcomm.testing import run_ranks

X = torch.ones(4)


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        call()
        error: Exception = AssertionError("it returned")
    except Exception as caught:
        error = caught
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "seconds": time.monotonic() - began,
        "where": [getattr(error, a, None) for a in ("op", "group", "rank")],
        "culprits": list(getattr(error, "culprits", ())),
    }


# --- a rank dies --------------------------------------------------------------------------------------------------


def one_dies(world: Group, folder: str, before: int, own_pg: bool) -> None:
    rank = world.rank or 0
    survivors = fcomm.subgroup(world, [0, 2], name="survivors") if rank != 1 else None
    if own_pg:
        fcomm.close()
        dist.init_process_group("gloo")
        world = fcomm.from_process_group(None, name="world", timeout_s=20)
    for _ in range(before):
        fcomm.all_reduce(X, world, fcomm.c10d)
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    first = outcome(lambda: fcomm.all_reduce(X, world, fcomm.c10d))
    later = outcome(lambda: fcomm.broadcast(X, world, fcomm.c10d))
    alive = None if own_pg else fcomm.all_reduce(X, survivors, fcomm.c10d).tolist()
    (Path(folder) / f"{rank}.json").write_text(json.dumps([first, later, alive]))


@pytest.mark.parametrize(("before", "own_pg"), [(0, False), (3, False), (2, True)])
def test_a_killed_rank_is_named_on_all_survivors(tmp_path: Path, before: int, own_pg: bool) -> None:
    with pytest.raises(FcommError, match="rank 1 of 3 failed:\nthe process ended without a result: killed by SIGKILL"):
        run_ranks(one_dies, 3, str(tmp_path), before, own_pg, timeout_s=60)
    for rank in (0, 2):
        first, later, alive = json.loads((tmp_path / f"{rank}.json").read_text())
        assert first["kind"] == "PeerDiedError", first
        assert "rank 1" in first["text"]
        assert "ended" in first["text"]
        assert first["culprits"] == [1]
        assert first["seconds"] < 15  # the deadline is 20 s, or 45
        if before:
            assert first["where"] == ["all_reduce", "world", rank]
            assert later["kind"] == "GroupPoisonedError"
            assert later["text"] == (
                f"broadcast: group 'world' is unusable on backend 'c10d' since: {first['text']}; "
                "close it and create another"
            )
            assert later["seconds"] < 15
        assert own_pg or alive == [2.0] * 4


# --- a rank does not come, or leaves ------------------------------------------------------------------------------


def one_is_late(world: Group) -> list[Any]:
    rank = world.rank or 0
    team = fcomm.subgroup(world, range(3), name="team")
    other = fcomm.subgroup(world, range(3), name="other")
    fcomm.all_reduce(X, other, fcomm.c10d)
    hasten(team, fcomm.c10d, 1.5)
    if rank == 2:
        wait_for_word(world, 0, 1)
    first = outcome(lambda: fcomm.all_gather(X, team, fcomm.c10d))
    tell(world, rank)
    later = outcome(lambda: fcomm.all_gather(X, team, fcomm.c10d))
    well = fcomm.all_reduce(X, other, fcomm.c10d).tolist()
    return [{"first": first, "later": later, "well": well}]


def test_a_late_rank_is_named_at_the_deadline_and_other_groups_work() -> None:
    results = [r[0] for r in fcomm.run(one_is_late, 3, timeout_s=60)]
    texts = {r["first"]["text"] for r in results}
    assert len(texts) == 1, texts  # the late rank, when it comes, says the same
    for rank, result in enumerate(results):
        first = result["first"]
        assert first["kind"] == CollectiveTimeoutError.__name__, first
        assert first["text"] == (
            "all_gather: call 2 on group 'team' of size 3: rank 2 did not arrive within 1.5 s (rank 0 in call 2, "
            "all_gather, rank 1 in call 2, all_gather); look at the log there"
        )
        assert first["culprits"] == [2]
        assert first["where"] == ["all_gather", "team", rank]
        assert first["seconds"] < 20
        assert result["later"]["kind"] == GroupPoisonedError.__name__
        assert result["later"]["seconds"] < 1.4  # it does not wait for the deadline again
        assert result["well"] == [3.0] * 4


def slow(world: Group) -> list[str]:
    team = fcomm.subgroup(world, range(2), name="team", timeout_s=30)
    for turn in range(3):
        time.sleep((world.rank == turn % 2) * 0.8)  # three slices of waiting
        if fcomm.all_reduce(X, team, fcomm.c10d).tolist() != [2.0] * 4:
            return ["wrong"]
        fcomm.recv(X, team, fcomm.c10d, after=fcomm.send(X, team, fcomm.c10d))
    return []


def test_a_slow_rank_is_waited_for() -> None:
    run_ranks(slow, 2)


def ends_first(world: Group) -> list[str]:
    """Rank 0 comes late and ends at once, while rank 1 is held up between checking the call and checking the others."""
    store, look = live(world).store, processgroup._look_around

    def late(on: processgroup.Communicator, deadline: float, needed: Sequence[str]) -> None:
        store.set("waits", "")
        while not processes.ended(on.peers) and time.monotonic() < deadline:
            time.sleep(0.01)
        look(on, deadline, needed)

    fcomm.barrier(world, fcomm.c10d)
    if world.rank == 1:
        processgroup._look_around = late
    else:
        wait_for_keys(store, ["waits"], 60)
    total = fcomm.all_reduce(X, world, fcomm.c10d).tolist()
    return [] if total == [2.0] * 4 else [str(total)]


def test_a_rank_that_ends_after_its_last_call_is_no_failure() -> None:
    run_ranks(ends_first, 2)


def one_leaves(world: Group) -> list[Any]:
    team = fcomm.subgroup(world, range(2), name="team", timeout_s=20)
    fcomm.recv(X, team, fcomm.c10d, after=fcomm.send(X, team, fcomm.c10d))
    if world.rank == 1:
        fcomm.close(team)
        result = {}
    else:
        result = outcome(lambda: fcomm.all_reduce(X, team, fcomm.c10d))
        fcomm.close(team)
        deadline = time.monotonic() + 20
        while any(t.name == "fcomm" for t in threading.enumerate()):  # those that waited for the messages
            assert time.monotonic() < deadline, threading.enumerate()
            time.sleep(0.01)
    fcomm.barrier(world, fcomm.c10d)
    return [result]


def test_a_rank_that_closed_the_group_is_named() -> None:
    result = fcomm.run(one_leaves, 2)[0][0]
    assert result["kind"] == PeerDiedError.__name__
    assert result["text"].endswith("rank 1 closed the group, or ended; close it after the last call")
    assert result["seconds"] < 15


def different_calls(world: Group) -> list[Any]:
    team = fcomm.subgroup(world, range(2), name="team")
    hasten(team, fcomm.c10d, 1.0)
    processgroup._ACCOUNT_S = 20.0  # both will report
    if world.rank == 0:
        result = outcome(lambda: fcomm.all_reduce(X, team, fcomm.c10d))
    else:
        result = outcome(lambda: fcomm.recv(X, team, fcomm.c10d))
    return [result]


def test_ranks_in_different_calls_are_told_at_the_deadline() -> None:
    for (result,) in fcomm.run(different_calls, 2):
        assert result["kind"] == MismatchError.__name__, result
        assert result["text"].endswith(
            "the ranks are in different calls: rank 0 in call 2, all_reduce, rank 1 in call 2, recv; "
            "make them call the same"
        )
        assert result["seconds"] < 20


# --- messages -----------------------------------------------------------------------------------------------------


def chain(world: Group, folder: str) -> None:
    """Rank 0 waits for rank 1, and rank 1 waits for rank 2, which is killed."""
    fcomm.barrier(world, fcomm.c10d)
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    got = outcome(lambda: fcomm.recv(X, world, fcomm.c10d, src=(world.rank or 0) + 1))
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(got))
    tell(world, world.rank)
    wait_for_word(world, 0)  # rank 1 stays alive, or rank 0 would see its end


def test_a_death_ends_the_receives_that_wait_for_other_ranks(tmp_path: Path) -> None:
    with pytest.raises(FcommError, match="killed by SIGKILL"):
        run_ranks(chain, 3, str(tmp_path), timeout_s=60)
    for rank in (0, 1):
        got = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (got["kind"], got["culprits"]) == ("PeerDiedError", [2]), got
        assert got["seconds"] < 20, got  # the deadline is 45 s


def one_ends(world: Group) -> list[str]:
    """Rank 2 ends after its last call, while rank 0 waits for rank 1."""
    fcomm.barrier(world, fcomm.c10d)
    if world.rank == 1:
        while not processes.ended(live(world).identities):
            time.sleep(0.01)
        time.sleep(0.6)
        fcomm.send(X, world, fcomm.c10d, dst=0)
    elif world.rank == 0:
        return [] if fcomm.recv(X, world, fcomm.c10d, src=1).tolist() == X.tolist() else ["wrong"]
    return []


def test_a_receive_needs_its_sender_alone() -> None:
    run_ranks(one_ends, 3)


def interrupted(world: Group) -> list[str]:
    failures = []
    waits = {"recv": lambda g: fcomm.recv(X, g, fcomm.c10d), "scan": lambda g: fcomm.scan(X, g, fcomm.c10d)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
    for name, call in waits.items():
        team = fcomm.subgroup(world, range(2), name=name, timeout_s=40)
        fcomm.barrier(team, fcomm.c10d)
        if world.rank == 1 and name == "scan":
            wait_for_word(world, name)
        elif world.rank == 0:
            threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        try:
            got = outcome(lambda call=call, team=team: call(team))
        except KeyboardInterrupt:
            got = {"kind": "KeyboardInterrupt", "seconds": time.monotonic() - began}
            tell(world, name)
        good = got["kind"] == ("PeerDiedError" if world.rank else "KeyboardInterrupt") and got["seconds"] < 15
        told = not world.rank or (got["culprits"] == [0] and "rank 0 left it in the middle (Keyb" in got["text"])
        failures += [] if good and told else [f"{name}: {got}"]
        later = outcome(lambda team=team: fcomm.all_reduce(X, team, fcomm.c10d))
        if later["kind"] != "GroupPoisonedError" or "left it in the middle" not in later["text"]:
            failures.append(f"{name}, later: {later}")
        fcomm.close(team)
    return failures


def test_ctrl_c_ends_a_call_and_the_others_are_told() -> None:
    run_ranks(interrupted, 2, timeout_s=60)


def lets_go(world: Group) -> list[str]:
    for _ in range(3):
        if world.rank == 0:
            fcomm.send(X, world, fcomm.c10d, dst=1)
        else:
            fcomm.recv(X, world, fcomm.c10d, src=0)
    fcomm.barrier(world, fcomm.c10d)
    sending, deadline = processgroup.communicator(world, "cpu").sending, time.monotonic() + 20
    while not all(processgroup._is_sent(work) for work, _ in sending):
        if time.monotonic() > deadline:
            return [f"{len(sending)} messages are taken and not let go"]
        time.sleep(0.01)
    return []


def test_a_message_that_was_taken_is_let_go() -> None:
    run_ranks(lets_go, 2)


# --- sizes that differ, always found ------------------------------------------------------------------------------

Calls = dict[str, tuple[Callable[[Group], Any], str]]

SIZES: Calls = {
    "all_gather": (
        lambda g: fcomm.all_gather(X[: 2 + g.rank], g, fcomm.c10d, sizes=[2 + g.rank, 2 + g.rank]),
        "all_gather: the ranks of group 'world' pass different sizes: [[2, 2], [3, 3]]; make them equal",
    ),
    "reduce_scatter": (
        lambda g: fcomm.reduce_scatter(X, g, fcomm.c10d, sizes=[[1, 3], [3, 1]][g.rank]),
        "reduce_scatter: the ranks of group 'world' pass different sizes: [[1, 3], [3, 1]]; make them equal",
    ),
    "all_to_all": (
        lambda g: fcomm.all_to_all(
            X, g, fcomm.c10d, send_sizes=[[1, 3], [1, 3]][g.rank], recv_sizes=[[1, 2], [3, 3]][g.rank]
        ),
        "all_to_all: the ranks of group 'world' disagree: rank 1 sends 1 to rank 0, which expects 2; "
        "make send_sizes of rank 1 and recv_sizes of rank 0 agree",
    ),
    "all_to_all two dims": (
        lambda g: fcomm.all_to_all(
            torch.ones(4, 2), g, fcomm.c10d, split_dim=0, concat_dim=1, send_sizes=[[1, 3], [2, 2]][g.rank],
            recv_sizes=[2, 2],
        ),
        "all_to_all: the ranks of group 'world' pass different send_sizes and recv_sizes: [[1, 3, 2, 2], "
        "[2, 2, 2, 2]]; with split_dim != concat_dim they partition the two dims, the same on every rank",
    ),
    "ragged_all_to_all": (
        lambda g: fcomm.ragged_all_to_all(
            X, X, torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([1, 2 - g.rank]),
            g, fcomm.c10d,
        ),
        "all_to_all: the ranks of group 'world' disagree: rank 1 sends 1 to rank 0, which expects 2; "
        "make send_sizes of rank 1 and recv_sizes of rank 0 agree",
    ),
}  # fmt: skip


def sizes_differ(world: Group) -> list[str]:
    failures = []
    for name, (call, text) in SIZES.items():
        got = outcome(lambda: call(world))
        if got["kind"] != "MismatchError" or got["text"] != text:
            failures.append(f"{name}: {got['kind']}: {got['text']}")
    # For a message, only the receiver raises; the next message on the edge is right.
    if world.rank == 0:
        fcomm.send(torch.ones(5), world, fcomm.c10d, dst=1)
        fcomm.send(torch.ones(4), world, fcomm.c10d, dst=1)
    else:
        got = outcome(lambda: fcomm.recv(torch.ones(4), world, fcomm.c10d, src=0))
        expected = (
            "recv: the ranks of group 'world' disagree: rank 0 sends 5 elements of 4 bytes, like of rank 1 has 4 of 4: "
            "float32[5] is sent, float32[4] expected; pass a like of the message's shape and dtype"
        )
        if got["text"] != expected:
            failures.append(got["text"])
        if fcomm.recv(torch.zeros(4), world, fcomm.c10d, src=0).tolist() != [1.0] * 4:
            failures.append("the next message is wrong")
    if fcomm.all_reduce(X, world, fcomm.c10d).tolist() != [2.0] * 4:
        failures.append("the group does not work afterwards")
    return failures


def test_sizes_that_differ_over_the_ranks_raise_on_all_of_them() -> None:
    run_ranks(sizes_differ, 2)


# --- FCOMM_CHECK=1: whatever differs ------------------------------------------------------------------------------

Differing = Callable[[Group, bool], Any]

DIFFERENT: dict[str, Differing] = {
    "collective": lambda g, odd: (fcomm.broadcast if odd else fcomm.all_reduce)(X, g, fcomm.c10d),
    "order": lambda g, odd: fcomm.all_reduce(X, g, fcomm.c10d, op="max" if odd else "sum"),
    "shape": lambda g, odd: fcomm.all_reduce(torch.ones(900 if odd else 1000), g, fcomm.c10d),
    "shape of as many elements": lambda g, odd: fcomm.all_reduce(torch.ones((2, 3) if odd else (3, 2)), g, fcomm.c10d),
    "dtype": lambda g, odd: fcomm.all_reduce(X.double() if odd else X, g, fcomm.c10d),
    "dtype of as many bytes": lambda g, odd: fcomm.all_reduce(X.int() if odd else X, g, fcomm.c10d),
    "op": lambda g, odd: fcomm.all_reduce(X, g, fcomm.c10d, op="prod" if odd else "sum"),
    "root": lambda g, odd: fcomm.broadcast(X, g, fcomm.c10d, src=1 if odd else 0),
    "dim": lambda g, odd: fcomm.all_gather(torch.ones(2, 2), g, fcomm.c10d, dim=1 if odd else 0),
    "tiled": lambda g, odd: fcomm.all_gather(X, g, fcomm.c10d, tiled=odd),
    "permutation": lambda g, odd: fcomm.ppermute(X, g, fcomm.c10d, perm=[(1, 0)] if odd else [(0, 1)]),
    "direction of scan": lambda g, odd: fcomm.scan(X, g, fcomm.c10d, reverse=odd),
    "shape of gathered": lambda g, odd: fcomm.gather(torch.ones(3 if odd else 2), g, fcomm.c10d),
    "barrier": lambda g, odd: fcomm.all_reduce(X, g, fcomm.c10d) if odd else fcomm.barrier(g, fcomm.c10d),
}


def differ(world: Group) -> list[str]:
    failures = []
    odd = world.rank == world.size - 1
    for name, call in DIFFERENT.items():
        got = outcome(lambda: call(world, odd))
        if got["kind"] != "MismatchError" or got["seconds"] > 20:
            failures.append(f"{name}: {got}")
        if world.size > 2 and got["culprits"] != [world.size - 1]:
            failures.append(f"{name}: culprits {got['culprits']}")
        # The texts are the same after the name of each rank's own call.
        said = fcomm.all_gather(
            torch.tensor(list(got["text"].partition(": ")[2].encode()[:200].ljust(200))), world, fcomm.c10d
        )
        if any(not torch.equal(row, said[:200]) for row in said.split(200)):
            failures.append(f"{name}: the ranks say different things")
    if fcomm.all_reduce(X, world, fcomm.c10d).tolist() != [float(world.size)] * 4:
        failures.append("the group does not work afterwards")
    # These may differ: lengths of uneven blocks, what comes after a barrier.
    rank, n = world.rank or 0, world.size
    fcomm.all_gather(torch.ones(rank), world, fcomm.c10d, sizes=list(range(n)))
    matrix = [[(s + r) % 3 for r in range(n)] for s in range(n)]
    fcomm.all_to_all(torch.ones(sum(matrix[rank])), world, fcomm.c10d, send_sizes=matrix)
    fcomm.barrier(world, fcomm.c10d, after=torch.ones(rank + 1))
    return failures


@pytest.mark.parametrize("size", [2, 3])
def test_with_fcomm_check_every_difference_raises_on_all_ranks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCOMM_CHECK", "1")
    run_ranks(differ, size)


def check_of_one(world: Group) -> list[str]:
    os.environ["FCOMM_CHECK"] = str(world.rank)
    got = outcome(lambda: fcomm.all_reduce(X, world, fcomm.c10d))
    expected = "the ranks of group 'world' have FCOMM_CHECK = 0, 1; set it to the same value on all"
    return [] if (got["kind"], got["text"]) == ("MismatchError", expected) else [str(got)]


def test_fcomm_check_on_one_rank_alone_is_refused() -> None:
    run_ranks(check_of_one, 2)


# --- the caller's own group ---------------------------------------------------------------------------------------


def own_group_times_out(world: Group) -> list[str]:
    first = live(world).identities[0]
    fcomm.close()
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    team = fcomm.from_process_group(None, name="team", timeout_s=20)
    fcomm.all_reduce(X, team, fcomm.c10d)
    live(team).timeout_s = 1.5
    if team.rank == 1:
        while not processes.has_ended(first):  # until then torch's own call goes on
            time.sleep(0.01)
    got = outcome(lambda: fcomm.all_reduce(X, team, fcomm.c10d))
    right = got["kind"] == "CollectiveTimeoutError" and got["culprits"] == [1] and got["seconds"] < 20
    return [] if right else [str(got)]


def test_our_deadline_holds_on_the_callers_process_group() -> None:
    run_ranks(own_group_times_out, 2, timeout_s=60)
