"""What only a device shows, on an emulated one (emulated.py); test_cuda.py has the rest, on a real one."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from deadlines import tell, wait_for_word
from emulated import emulate, team
from torch import Tensor
from vendors import STATUS, plant

import fcomm
from fcomm import processes
from fcomm.backends import later, nccl
from fcomm.backends.communicator import issue
from fcomm.backends.rows import HEADER
from fcomm.rendezvous import live
from fcomm.testing import run_ranks

DOUBLE = "nccl-device"
TENSORS: list[Tensor] = []  # of calls that are not finished


def opened(world: fcomm.Group, timeout_s: float, name: str = "g") -> tuple[fcomm.Group, fcomm.Backend]:
    on, group = emulate(DOUBLE), fcomm.subgroup(world, range(world.size), name=name, timeout_s=timeout_s)
    add(group, on)
    return group, on


def add(group: fcomm.Group, on: fcomm.Backend) -> None:
    """Start an all_reduce."""
    x = torch.ones(2)
    TENSORS.extend((x, fcomm.all_reduce(x, group, on)))


def on_a_device(world: fcomm.Group, double: str) -> list[str]:
    on, rank = emulate(double), world.rank or 0
    y = fcomm.all_reduce(torch.ones(2), world, on)
    got = fcomm.recv(torch.zeros(1), world, on, after=fcomm.send(torch.full((1,), float(rank)), world, on))
    watcher = threading.Thread(target=later.look_at_pending, args=(team(world),))
    watcher.start()
    watcher.join()
    assert team(world).failure is None
    fcomm.close(world)
    return [] if (y.tolist(), got.item()) == ([2.0, 2.0], 1.0 - rank) else [f"{y} {got}"]


def test_hccl_is_called_by_threads_that_have_a_device() -> None:
    run_ranks(on_a_device, 2, "hccl", timeout_s=60)


def fails_to_open(world: fcomm.Group) -> None:
    """Rank 1's first call fails, so that rank 0's kernel waits for ever."""
    on = emulate(DOUBLE)
    group = fcomm.subgroup(world, range(world.size), name="g", timeout_s=20)
    if world.rank == 1:
        plant(DOUBLE, "ncclAllReduce", STATUS, 3)
    start = time.monotonic()
    with pytest.raises(fcomm.BackendError, match="ncclAllReduce returned ncclInternalError") as caught:
        fcomm.all_reduce(torch.ones(1), group, on)
    assert caught.value.culprits == (1,)
    assert time.monotonic() - start < 10


def test_a_rank_that_fails_while_a_group_opens_fails_it_on_all() -> None:
    run_ranks(fails_to_open, 2, timeout_s=60)


def closes_alone(world: fcomm.Group) -> None:
    group, on = opened(world, timeout_s=1.5)
    if world.rank == 0:
        add(group, on)
        start = time.monotonic()
        with pytest.raises(fcomm.CollectiveTimeoutError, match="close passed its deadline"):
            fcomm.close(group)
        assert time.monotonic() - start < 5
        tell(world, "closed")
    else:
        wait_for_word(world, "closed")
        wait_for_failure(group)
        with pytest.raises(fcomm.CollectiveTimeoutError, match="rank 0 failed first: close passed its deadline"):
            fcomm.close(group)


def test_closing_does_not_wait_for_ever_for_a_call_that_another_rank_does_not_make() -> None:
    run_ranks(closes_alone, 2, timeout_s=60)


def wait_for_failure(group: fcomm.Group) -> None:
    """Wait until the watching thread has found the failure."""
    until = time.monotonic() + 15
    while team(group).failure is None and time.monotonic() < until:
        time.sleep(0.05)


def fails_unnoticed(world: fcomm.Group, dead: bool) -> None:
    """The last call does not end: rank 1 counts as dead or does not make it, and no rank calls or waits after."""
    group, on = opened(world, timeout_s=30 if dead else 1.5)
    if world.rank == 0:
        add(group, on)
        if dead:
            processes.has_ended = lambda who: who == live(group).identities[1]
    wait_for_failure(group)
    error, text = fcomm.CollectiveTimeoutError, "all_reduce passed its deadline"
    if dead:
        error, text = fcomm.PeerDiedError, r"rank 1 \(process \d+\) ended"
    with pytest.raises(error, match=text):
        fcomm.close(group)
    fcomm.close(group)


@pytest.mark.parametrize("dead", [False, True], ids=["deadline", "dead rank"])
def test_closing_raises_what_no_call_has_raised(dead: bool) -> None:
    run_ranks(fails_unnoticed, 2, dead, timeout_s=60)


def is_not_received(world: fcomm.Group) -> None:
    """Rank 1 takes a message's header, and closes."""
    group, on = opened(world, timeout_s=20)
    if world.rank == 0:
        fcomm.send(torch.ones(2), group, on, dst=1)
    else:
        head = torch.empty(HEADER, dtype=torch.int64).view(torch.uint8)
        TENSORS.append(head)
        issue(team(group), "recv", lambda c: nccl._recv(c, head, 0), (0, 1))
    start = time.monotonic()
    fcomm.close(group)
    assert time.monotonic() - start < 10, "it waited for a rank that had closed"


def test_a_message_that_is_not_received_does_not_hold_the_close() -> None:
    run_ranks(is_not_received, 2, timeout_s=60)


def comes_alone(world: fcomm.Group) -> None:
    group, on = opened(world, timeout_s=1.5)
    if world.rank == 1:
        wait_for_failure(group)
    with pytest.raises(fcomm.CollectiveTimeoutError, match="barrier passed its deadline"):
        fcomm.barrier(group, on)


def test_a_barrier_that_the_deadline_ends_raises() -> None:
    run_ranks(comes_alone, 2, timeout_s=60)
