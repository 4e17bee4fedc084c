"""Faults planted in the doubles: every rank raises in time, communicators are aborted, a new group works."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deadlines import hasten, tell, wait_for_word
from vendors import ASYNC, DEAF, DELAY, HANG, STATUS, backend, control, module, plant

import fcomm
from fcomm import processes
from fcomm.backends import communicator, failure
from fcomm.rendezvous import live
from fcomm.testing import run_ranks

Call = Callable[[fcomm.Group, fcomm.Backend], object]

CALLS: dict[str, Call] = {
    "all_reduce": lambda group, on: fcomm.all_reduce(torch.ones(5), group, on),
    "all_gather": lambda group, on: fcomm.all_gather(torch.ones(5), group, on),
    "reduce_scatter": lambda group, on: fcomm.reduce_scatter(torch.ones(6), group, on),
    "reduce": lambda group, on: fcomm.reduce(torch.ones(6), group, on),
    "broadcast": lambda group, on: fcomm.broadcast(torch.ones(6), group, on),
    "all_to_all": lambda group, on: fcomm.all_to_all(torch.ones(6), group, on),
    "ppermute": lambda group, on: fcomm.ppermute(torch.ones(6), group, on, perm=[(0, 1), (1, 0)]),
    "gather": lambda group, on: fcomm.gather(torch.ones(6), group, on),
    "scatter": lambda group, on: fcomm.scatter(torch.ones(6), group, on),
    "barrier": fcomm.barrier,
    "exchange": lambda group, on: fcomm.all_to_all(
        torch.ones(group.size), group, on, send_sizes=[1] * group.size, recv_sizes=[1] * group.size
    ),
}
# Symbol -> a collective that calls it on rank 1. The first is reached while the communicator opens.
NCCL = {
    "ncclCommInitRankConfig": "all_reduce",
    "ncclCommGetAsyncError": "all_reduce",
    "ncclAllReduce": "all_reduce",
    "ncclAllGather": "all_gather",
    "ncclReduceScatter": "reduce_scatter",
    "ncclReduce": "reduce",
    "ncclBroadcast": "broadcast",
    "ncclAlltoAll": "all_to_all",
    "ncclGather": "gather",
    "ncclScatter": "scatter",
    "ncclGroupStart": "exchange",
    "ncclGroupEnd": "exchange",
    "ncclSend": "ppermute",
    "ncclRecv": "ppermute",
}
HCCL = {
    "HcclCommInitRootInfoConfig": "all_reduce",
    "HcclGetCommAsyncError": "all_reduce",
    "HcclAllReduce": "all_reduce",
    "HcclAllGather": "all_gather",
    "HcclReduceScatter": "reduce_scatter",
    "HcclReduce": "reduce",
    "HcclBroadcast": "broadcast",
    "HcclAlltoAll": "all_to_all",
    "HcclAlltoAllV": "exchange",
    "HcclScatter": "scatter",
    "HcclBatchSendRecv": "ppermute",
    "HcclBarrier": "barrier",
}
SYMBOLS = {"nccl": NCCL, "hccl": HCCL}
OPENING = ("ncclCommInitRankConfig", "HcclCommInitRootInfoConfig", "ncclCommGetAsyncError", "HcclGetCommAsyncError")
DEADLINE_S = 3.0


def twice(call: Call, group: fcomm.Group, on: fcomm.Backend) -> None:
    """This rank may already have done its part when another one fails; then the next call raises."""
    call(group, on)
    fcomm.all_reduce(torch.ones(1), group, on)


def failing(
    world: fcomm.Group, on: fcomm.Backend, double: str, symbol: str, action: int, value: int
) -> fcomm.FcommError:
    """The error that this rank raises when the fault is planted on rank 1; checks what must hold for all errors."""
    call = CALLS[SYMBOLS[double][symbol]]
    group = fcomm.subgroup(world, range(world.size), name="failing", timeout_s=DEADLINE_S)
    aborted, live = control(double).double_aborted(), control(double).double_live()
    if symbol not in OPENING:
        call(group, on)
    if world.rank == 1:
        plant(double, symbol, action, value)
    start = time.monotonic()
    with pytest.raises(fcomm.FcommError) as caught:
        twice(call, group, on)
    took = time.monotonic() - start
    control(double).double_clear_faults()
    error = caught.value
    assert took < DEADLINE_S + 2, f"{took} s: {error}"
    assert (error.group, error.rank) == ("failing", world.rank), error
    assert error.op, error
    with pytest.raises(fcomm.GroupPoisonedError, match="unusable since: ") as again:
        call(group, on)
    assert again.value.culprits == error.culprits
    for collective in (fcomm.all_reduce, fcomm.broadcast):
        with pytest.raises(fcomm.GroupPoisonedError):
            collective(torch.ones(0), group, on)
    fcomm.close(group)
    if double == "nccl" and symbol not in OPENING:
        assert control(double).double_aborted() == aborted + 1
    after = fcomm.subgroup(world, range(world.size), name="after")
    assert fcomm.all_reduce(torch.ones(1), after, on).item() == world.size
    fcomm.close(after)
    # A call that ignores the abort keeps its communicator: freeing it would pull it from under the call.
    assert action == DEAF or control(double).double_live() == live, f"{symbol}: communicators are left"
    assert control(double).double_stale() == 0, f"{symbol}: a communicator is used after its end"
    return error


def statuses(world: fcomm.Group, double: str, pairs: list[tuple[str, int]]) -> list[str]:
    failure._ANSWER_S, failure.STORE_S = 5.0, 15.0  # for ranks that get no core
    on, codes, failures = backend(double), module(double).STATUS, []
    for symbol, code in pairs:
        error = failing(world, on, double, symbol, STATUS, code)
        got = (getattr(error, "code", None), getattr(error, "code_name", None))
        if got != (code, codes.name(code)) or type(error) is not type(fcomm.backends.ccall.error_of(codes, code, "")):
            failures.append(f"{symbol} {code}: {error!r} has {got}")
        if code not in (*codes.remote, *codes.timeout) and error.culprits != (1,):
            failures.append(f"{symbol} {code}: culprits {error.culprits}: {error}")
        if world.rank != 1 and "rank 1 failed first" not in str(error):
            failures.append(f"{symbol} {code}: {error}")
    return failures


def _codes(double: str) -> list[int]:
    vendor = module(double)
    return [code for code in vendor.CODES if code not in (0, *vendor.STATUS.pending)]


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_each_call_and_each_status(double: str) -> None:
    """Every symbol with one status, one symbol with every status."""
    codes = _codes(double)
    pairs = [(symbol, codes[i % len(codes)]) for i, symbol in enumerate(SYMBOLS[double])]
    pairs += [(list(SYMBOLS[double])[2], code) for code in codes]
    run_ranks(statuses, 2, double, pairs, timeout_s=300)


@pytest.mark.parametrize(("double", "symbol"), [("nccl", "ncclSend"), ("hccl", "HcclBatchSendRecv")])
def test_a_rank_without_a_part_in_a_permutation_learns_of_its_failure(double: str, symbol: str) -> None:
    run_ranks(statuses, 3, double, [(symbol, _codes(double)[0])], timeout_s=60)


@pytest.mark.long
@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_each_status_at_each_call(double: str) -> None:
    pairs = [(symbol, code) for symbol in SYMBOLS[double] for code in _codes(double)]
    run_ranks(statuses, 3, double, pairs, timeout_s=590)


def hangs(world: fcomm.Group, double: str, symbols: list[str]) -> list[str]:
    """A call that does not return, whether or not the abort ends it: the deadline ends the collective in both cases."""
    on, failures = backend(double), []
    for symbol in symbols:
        for action in (HANG, DEAF):
            if action == DEAF and symbol in OPENING:
                continue
            error = failing(world, on, double, symbol, action, 1000 * int(DEADLINE_S + 2))
            if not isinstance(error, fcomm.CollectiveTimeoutError | TimeoutError):
                failures.append(f"{symbol} {action}: {error!r}")
    return failures


@pytest.mark.parametrize(("double", "symbol"), [("nccl", "ncclAllReduce"), ("hccl", "HcclAlltoAll")])
def test_a_call_that_hangs(double: str, symbol: str) -> None:
    run_ranks(hangs, 2, double, [symbol], timeout_s=120)


@pytest.mark.long
@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_every_call_that_hangs(double: str) -> None:
    run_ranks(hangs, 3, double, list(SYMBOLS[double])[2:], timeout_s=590)


def asynchronous(world: fcomm.Group, double: str, symbols: list[str], code: int) -> list[str]:
    """The call succeeds, but polling finds that the communicator has failed."""
    on, failures = backend(double), []
    for symbol in symbols:
        error = failing(world, on, double, symbol, ASYNC, code)
        if getattr(error, "code", None) != code or "asynchronously" not in str(error):
            failures.append(f"{symbol}: {error!r}")
    return failures


@pytest.mark.parametrize(
    ("double", "symbols", "code"),
    [("nccl", ["ncclAllReduce", "ncclAlltoAll", "ncclCommGetAsyncError"], 2), ("hccl", ["HcclAllReduce"], 19)],
)
def test_an_asynchronous_error(double: str, symbols: list[str], code: int) -> None:
    run_ranks(asynchronous, 3, double, symbols, code, timeout_s=120)


def slow(world: fcomm.Group, double: str, symbol: str) -> list[str]:
    group = fcomm.subgroup(world, range(world.size), name="slow", timeout_s=DEADLINE_S)
    on = backend(double)
    fcomm.all_reduce(torch.ones(1), group, on)
    if world.rank == 1:
        plant(double, symbol, DELAY, 1000)
    y = fcomm.all_reduce(torch.ones(1), group, on)
    return [] if y.item() == world.size else [f"{y}"]


@pytest.mark.parametrize(("double", "symbol"), [("nccl", "ncclAllReduce"), ("hccl", "HcclAllReduce")])
def test_a_slow_call_is_no_fault(double: str, symbol: str) -> None:
    run_ranks(slow, 2, double, symbol, timeout_s=60)


def absent(world: fcomm.Group, double: str) -> list[str]:
    """Rank 1 does not make the call: the others name it."""
    failure._ANSWER_S, failure.STORE_S = 2.0, 10.0  # for ranks that get no core
    on = backend(double)
    group = fcomm.subgroup(world, range(world.size), name="g")
    hasten(group, on, 1.5)
    if world.rank == 1:
        wait_for_word(world, 0, 2)
        with pytest.raises(fcomm.FcommError) as caught:
            twice(CALLS["all_reduce"], group, on)
    else:
        with pytest.raises(fcomm.CollectiveTimeoutError, match=r"ranks \[1\] have not answered") as caught:
            fcomm.all_reduce(torch.ones(1), group, on)
        tell(world, world.rank)
    return [] if caught.value.culprits == (1,) else [f"{caught.value.culprits}: {caught.value}"]


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_rank_that_does_not_come_is_named(double: str) -> None:
    run_ranks(absent, 3, double, timeout_s=60)


def killed(world: fcomm.Group, double: str, directory: str, before: int, dead: int, port: int) -> None:
    """A rank dies; if there is a port for the group's store, it is the one that serves the store."""
    on, group = backend(double), world
    if port:
        group = fcomm.stateless_group("127.0.0.1", port, world.rank or 0, world.size, name="own", timeout_s=30)
    for _ in range(before):
        fcomm.all_reduce(torch.ones(1), group, on)
    if world.rank == dead:
        os.kill(os.getpid(), signal.SIGKILL)
    kind = fcomm.FcommError if port else fcomm.PeerDiedError
    start = time.monotonic()
    try:
        fcomm.all_reduce(torch.ones(1), group, on)
        text = "no error"
    except kind as error:
        text = f"{error.culprits} {time.monotonic() - start < 5}"
    Path(directory, str(world.rank)).write_text(text)
    until = time.monotonic() + 20
    while len(list(Path(directory).iterdir())) < world.size - 1 and time.monotonic() < until:
        time.sleep(0.01)  # if one ended before the other has looked, it would be named too


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check_killed(directory: Path, fn: Callable[..., None], *args: Any, dead: int) -> None:
    """A rank dies in fn, and each of the others writes into the directory that it noticed in time."""
    with pytest.raises(fcomm.FcommError, match="SIGKILL"):
        run_ranks(fn, 3, *args, timeout_s=60)
    for rank in {0, 1, 2} - {dead}:
        assert (directory / str(rank)).read_text() == f"({dead},) True"


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_killed_rank_is_named(double: str, before: int, tmp_path: Path) -> None:
    check_killed(tmp_path, killed, double, str(tmp_path), before, 1, 0, dead=1)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_killed_rank_that_served_the_store_is_named(double: str, before: int, tmp_path: Path) -> None:
    check_killed(tmp_path, killed, double, str(tmp_path), before, 0, free_port(), dead=0)


def ends_first(world: fcomm.Group, double: str) -> list[str]:
    """Rank 0 comes late and then counts as ended, while rank 1 is held up between checking the call and checking it."""
    on, look = backend(double), communicator.look_around

    def late(*args: Any) -> None:
        tell(world, "waits")
        wait_for_word(world, "came")
        with mock.patch.object(processes, "has_ended", lambda who: who == live(world).identities[0]):
            look(*args)

    fcomm.barrier(world, on)
    if world.rank == 1:
        communicator.look_around = late
    else:
        wait_for_word(world, "waits")
    total = fcomm.all_reduce(torch.ones(1), world, on).item()
    communicator.look_around = look
    if world.rank == 0:
        tell(world, "came")
        wait_for_word(world, "done")  # once it closes, it would no longer count as ended
    else:
        tell(world, "done")
    return [] if total == 2 else [str(total)]


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_rank_that_ends_after_its_last_call_is_no_failure(double: str) -> None:
    run_ranks(ends_first, 2, double, timeout_s=60)


def first_rank(world: fcomm.Group, double: str, symbol: str, code: int) -> list[str]:
    """The unique id cannot be made: the ranks that wait for it hear why."""
    failure._ANSWER_S, failure.STORE_S = 5.0, 15.0  # for ranks that get no core
    on = backend(double)
    group = fcomm.subgroup(world, range(world.size), name="g", timeout_s=DEADLINE_S)
    if world.rank == 0:
        plant(double, symbol, STATUS, code)
    with pytest.raises(fcomm.BackendError) as caught:
        fcomm.all_reduce(torch.ones(1), group, on)
    return [] if (caught.value.code, caught.value.culprits) == (code, (0,)) else [repr(caught.value)]


@pytest.mark.parametrize(("double", "symbol", "code"), [("nccl", "ncclGetUniqueId", 2), ("hccl", "HcclGetRootInfo", 8)])
def test_an_id_that_cannot_be_made(double: str, symbol: str, code: int) -> None:
    run_ranks(first_rank, 3, double, symbol, code, timeout_s=60)


def loses_its_store(world: fcomm.Group, double: str, with_rank: bool) -> None:
    """The store ends while rank 1 opens a communicator, and rank 0 with it or not."""
    if world.rank == 0:
        return

    class Lost:
        def check(self, *args: object) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

        set = add = get = check

    group = fcomm.subgroup(world, range(world.size), name="g", timeout_s=30)
    live(group).store = Lost()  # type: ignore[assignment]
    processes.has_ended = lambda who: with_rank and who == live(group).identities[0]
    lost = r"the group's store is lost \(Connection reset by peer\)"
    cause = r"rank 0 \(process \d+\) ended" if with_rank else "look at the log of the process that served it"
    with pytest.raises(fcomm.PeerDiedError, match=rf"all_reduce: on group 'g'.*: {lost}[:;] {cause}") as caught:
        fcomm.all_reduce(torch.ones(1), group, backend(double))
    assert caught.value.culprits == ((0,) if with_rank else ())
    with pytest.raises(fcomm.GroupPoisonedError):
        fcomm.all_reduce(torch.ones(1), group, backend(double))


@pytest.mark.parametrize("with_rank", [True, False])
@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_store_that_is_lost_while_opening(double: str, with_rank: bool) -> None:
    run_ranks(loses_its_store, 2, double, with_rank, timeout_s=60)


def ring(world: fcomm.Group, double: str, symbol: str) -> None:
    """If a ring of messages fails, the threads of its sends do not raise again what a receive has raised."""
    on, x = backend(double), torch.ones(3)
    group = fcomm.subgroup(world, range(world.size), name="ring")

    def turn(group: fcomm.Group, on: fcomm.Backend) -> None:
        fcomm.recv(x, group, on, after=fcomm.send(x, group, on))

    turn(group, on)
    fcomm.all_reduce(x, group, on)  # the other rank has had its turn
    if world.rank == 1:
        plant(double, symbol, STATUS, 4)
    with pytest.raises(fcomm.BackendError) as caught:
        twice(turn, group, on)
    assert caught.value.culprits == (1,)
    ((team, *_),) = live(group)._communicators.values()
    for _, sent in team.sending:
        sent.exception(5)
    for call in (lambda: fcomm.all_reduce(x, group, on), lambda: fcomm.send(x, group, on)):
        with pytest.raises(fcomm.GroupPoisonedError):
            call()
    fcomm.close(group)


@pytest.mark.parametrize(("double", "symbol"), [("nccl", "ncclRecv"), ("hccl", "HcclRecv")])
def test_a_failed_ring_raises_its_error_once(double: str, symbol: str) -> None:
    run_ranks(ring, 2, double, symbol, timeout_s=60)
