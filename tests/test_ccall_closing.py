"""Closing on the doubles: communicators end once, nobody waits for a rank or a message in vain, errors are raised."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deadlines import hasten, tell, wait_for_word
from test_ccall_faults import CALLS, DEADLINE_S, check_killed, twice
from vendors import DEAF, DELAY, HANG, STATUS, backend, calls, control, plant

import fcomm
from fcomm.backends import communicator
from fcomm.backends.communicator import issue
from fcomm.backends.machine import Comm
from fcomm.backends.worker import start_worker
from fcomm.rendezvous import live
from fcomm.testing import run_ranks


def at_the_end(world: fcomm.Group, double: str, symbols: list[str], code: int) -> list[str]:
    """A status while a group is closed."""
    on, failures = backend(double), []
    for symbol in symbols:
        group = fcomm.subgroup(world, range(world.size), name="ending", timeout_s=DEADLINE_S)
        fcomm.all_reduce(torch.ones(1), group, on)
        if world.rank == 1:
            plant(double, symbol, STATUS, code)
            with pytest.raises(fcomm.BackendError, match=f"close: on group 'ending'.*{symbol} returned") as caught:
                fcomm.close(group)
            failures += [] if caught.value.code == code else [str(caught.value)]
        else:
            fcomm.close(group)
        control(double).double_clear_faults()
        after = fcomm.subgroup(world, range(world.size), name="after")
        assert fcomm.all_reduce(torch.ones(1), after, on).item() == world.size
        fcomm.close(after)
    return failures


@pytest.mark.parametrize(
    ("double", "symbols", "code"),
    [
        ("nccl", ["ncclCommGetAsyncError", "ncclCommFinalize", "ncclCommDestroy"], 3),
        ("hccl", ["HcclGetCommAsyncError", "HcclCommDestroy"], 4),
    ],
)
def test_a_status_at_the_end(double: str, symbols: list[str], code: int) -> None:
    run_ranks(at_the_end, 2, double, symbols, code, timeout_s=60)


def interrupted(world: fcomm.Group, double: str) -> None:
    def interrupt(comm: Comm) -> None:
        raise KeyboardInterrupt

    fcomm.all_reduce(torch.ones(1), world, backend(double))
    ((on, *_),) = live(world)._communicators.values()
    with pytest.raises(KeyboardInterrupt):
        issue(on, "all_reduce", interrupt)
    with pytest.raises(fcomm.GroupPoisonedError, match=r"unusable since: .*KeyboardInterrupt"):
        fcomm.all_reduce(torch.ones(1), world, backend(double))
    fcomm.close(world)


def test_closing_does_not_raise_again_what_interrupted_a_call() -> None:
    run_ranks(interrupted, 2, "nccl", timeout_s=60)


def opened_late(world: fcomm.Group, double: str, symbol: str, abort: str) -> None:
    """A communicator that finishes opening after its group has given up is still ended."""
    group = fcomm.subgroup(world, range(world.size), name="late", timeout_s=1.0)
    live = control(double).double_live()
    if world.rank == 1:
        plant(double, symbol, DELAY, 3000)
    with pytest.raises(fcomm.CollectiveTimeoutError):
        fcomm.all_reduce(torch.ones(1), group, backend(double))
    until = time.monotonic() + 10
    while (calls(double, abort) == 0 or control(double).double_live() != live) and time.monotonic() < until:
        time.sleep(0.1)
    assert control(double).double_live() == live


@pytest.mark.parametrize(
    ("double", "symbol", "abort"),
    [("nccl", "ncclCommInitRankConfig", "ncclCommAbort"), ("hccl", "HcclCommInitRootInfoConfig", "HcclCommDestroy")],
)
def test_a_communicator_that_opens_too_late_is_ended(double: str, symbol: str, abort: str) -> None:
    run_ranks(opened_late, 2, double, symbol, abort, timeout_s=60)


def ended_once(world: fcomm.Group, double: str, symbols: tuple[str, str]) -> None:
    """The call that ends a communicator passes the deadline: no further call uses what it may have freed."""
    on, (destroy, abort) = backend(double), symbols
    group = fcomm.subgroup(world, range(world.size), name="ending")
    hasten(group, on, 1.0)
    if world.rank == 0:
        plant(double, destroy, DELAY, 2500)
        with pytest.raises(fcomm.CollectiveTimeoutError) as caught:
            fcomm.close(group)
        assert caught.value.culprits == (), caught.value  # the other rank has closed, so it does not answer
        time.sleep(2)
    else:
        fcomm.close(group)
    assert calls(double, destroy) + (calls(double, abort) if abort != destroy else 0) == 1


@pytest.mark.parametrize(
    ("double", "symbols"),
    [("nccl", ("ncclCommDestroy", "ncclCommAbort")), ("hccl", ("HcclCommDestroy", "HcclCommDestroy"))],
)
def test_a_communicator_is_ended_once(double: str, symbols: tuple[str, str]) -> None:
    run_ranks(ended_once, 2, double, symbols, timeout_s=60)


def in_progress(world: fcomm.Group, double: str, symbol: str) -> None:
    """A communicator that cannot be destroyed while a call is in progress is destroyed when that call has returned."""
    on = backend(double)
    group = fcomm.subgroup(world, range(world.size), name="busy")
    hasten(group, on, 0.7)
    before = control(double).double_live()
    if world.rank == 0:
        plant(double, symbol, DEAF, 1500)
    with pytest.raises(fcomm.FcommError):
        twice(CALLS["all_reduce"], group, on)
    until = time.monotonic() + 10
    while control(double).double_live() == before and time.monotonic() < until:
        time.sleep(0.05)
    assert control(double).double_live() == before - 1


def test_a_communicator_in_use_is_destroyed_afterwards() -> None:
    run_ranks(in_progress, 2, "hccl", "HcclAllReduce", timeout_s=60)


def held_up(world: fcomm.Group, double: str) -> None:
    """A thread waits for a rank that does not come, in a call or to open the group; close must not wait for it."""
    communicator._GRACE_S = 0.2
    on, x = backend(double), torch.ones(1)
    open_, opening = (fcomm.subgroup(world, range(world.size), name=name) for name in ("open", "opening"))
    fcomm.all_reduce(x, open_, on)
    for group in (open_, opening):
        if world.rank == 0:
            call = start_worker().submit(partial(fcomm.all_reduce, x, group, on))
            time.sleep(0.3)
            start = time.monotonic()
            fcomm.close(group)
            assert time.monotonic() - start < 8
            assert isinstance(call.exception(5), fcomm.GroupClosedError), call
            tell(world, group.name)
        else:
            wait_for_word(world, group.name)
            with contextlib.suppress(fcomm.FcommError):  # it has opened its part
                fcomm.close(group)
    assert control(double).double_live() == 0


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_closing_does_not_wait_for_a_thread_in_a_call(double: str) -> None:
    run_ranks(held_up, 2, double, timeout_s=60)


def unreceived(world: fcomm.Group, double: str) -> None:
    on = backend(double)
    fcomm.all_reduce(torch.ones(1), world, on)
    if world.rank == 0:
        fcomm.send(torch.ones(1), world, on, dst=1)
    start = time.monotonic()
    fcomm.close(world)
    assert time.monotonic() - start < 10, "it waited for a rank that had closed"


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_message_to_a_rank_that_never_receives_does_not_hold_the_close(double: str) -> None:
    run_ranks(unreceived, 2, double, timeout_s=60)


def unreceived_behind_another(world: fcomm.Group, double: str) -> None:
    """The edge is open on both sides: its sender gives it up, and its receiver must not wait to end it jointly."""
    on, x = backend(double), torch.ones(1)
    for _ in range(2 if world.rank == 0 else 0):
        fcomm.send(x, world, on, dst=1)
    if world.rank == 1:
        assert torch.equal(fcomm.recv(x, world, on, src=0), x)
    fcomm.all_reduce(x, world, on)
    start = time.monotonic()
    fcomm.close(world)
    assert time.monotonic() - start < 10, "one side waited for the other to end the edge"
    assert control(double).double_live() == 0
    time.sleep(0.3)  # for the message's second part, in a thread of its own
    made = calls(double, "HcclGetRootInfo" if double == "hccl" else "ncclGetUniqueId")
    assert made == (2 if world.rank == 0 else 0), "the edge was opened again"


@pytest.mark.parametrize("double", ["nccl", "nccl-2.21", "hccl"])
def test_a_message_that_nobody_receives_behind_one_that_was_does_not_hold_the_close(double: str) -> None:
    run_ranks(unreceived_behind_another, 2, double, timeout_s=60)


def closes_early(world: fcomm.Group, double: str) -> None:
    """One rank's program ends, by an exception, say, while the others make a call that needs it."""
    on, x = backend(double), torch.ones(6)
    inner = fcomm.subgroup(world, range(world.size), name="inner")
    for group in (world, inner):
        fcomm.all_reduce(x, group, on)
        for pairs in ([(0, 2)], [(1, 1)], [(2, 0), (0, 1)]):  # not every rank is in each of them
            fcomm.ppermute(x, group, on, perm=pairs)
    if world.rank != 1:
        start = time.monotonic()
        with pytest.raises(fcomm.PeerDiedError) as raised:
            fcomm.all_reduce(x, world, on)
        assert "closed the group, or ended, and does not take part in all_reduce" in str(raised.value)
        assert raised.value.culprits == (1,)
        assert time.monotonic() - start < 4, "it waited for the end of a communicator on rank 1"
    else:  # the end of one may wait for the peers, which the double's does not
        plant(double, "HcclCommDestroy" if double == "hccl" else "ncclCommFinalize", HANG, 6000)
    with contextlib.suppress(fcomm.FcommError):
        fcomm.close()
    assert control(double).double_live() == 0


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_call_ends_at_once_where_a_rank_has_closed_the_group(double: str) -> None:
    run_ranks(closes_early, 3, double, timeout_s=60)


def opens_no_edge(world: fcomm.Group, double: str) -> None:
    """A receiver cannot open its edge and closes the group; the sender, which is opening it, checks only then."""
    on, x, look = backend(double), torch.ones(1), communicator.look_around
    group = fcomm.subgroup(world, range(world.size), name="failing")

    def late(*args: Any) -> None:
        wait_for_word(world, "closed")
        look(*args)

    fcomm.all_reduce(x, group, on)
    if world.rank == 1:
        plant(double, "ncclCommInitRankConfig", STATUS, 3)
        with pytest.raises(fcomm.BackendError):
            fcomm.recv(x, group, on, src=0)
        fcomm.close(group)
        tell(world, "closed")
    else:
        communicator.look_around = late
        fcomm.send(x, group, on, dst=1)
        with pytest.raises(fcomm.BackendError, match="rank 1 failed first: ncclCommInitRankConfig") as caught:
            fcomm.close(group)
        assert (caught.value.code, caught.value.culprits) == (3, (1,))
        assert calls(double, "ncclGetUniqueId") == 2, "the edge was opened again"
    assert control(double).double_live() == 0, "a communicator is left"
    assert control(double).double_stale() == 0


def test_a_message_whose_receiver_could_not_open_its_edge_fails_with_it() -> None:
    run_ranks(opens_no_edge, 2, "nccl", timeout_s=60)


def dies_closing(world: fcomm.Group, double: str, directory: str) -> None:
    """A rank has said that it closes, and dies before its part in ending a communicator."""
    on = backend(double)
    fcomm.all_reduce(torch.ones(1), world, on)
    if world.rank == 1:
        communicator.forget = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    # A library's end of a communicator may wait for the peers, the double's does not.
    plant(double, "HcclCommDestroy" if double == "hccl" else "ncclCommFinalize", HANG, 6000)
    start = time.monotonic()
    with pytest.raises(fcomm.PeerDiedError) as caught:
        fcomm.close(world)
    Path(directory, str(world.rank)).write_text(f"{caught.value.culprits} {time.monotonic() - start < 4}")


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_a_rank_that_dies_while_it_closes_is_named(double: str, tmp_path: Path) -> None:
    check_killed(tmp_path, dies_closing, double, str(tmp_path), dead=1)
