"""What only a device shows, on one that is emulated (emulated.py): test_cuda.py has the rest, on a real one."""

from __future__ import annotations

import threading

import torch
from emulated import emulate, team

import fcomm
from fcomm.backends import later
from fcomm.testing import run_ranks


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
