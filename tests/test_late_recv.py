"""A message may come much later than its receiver waits for it: longer than a waiting rank's looks around."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

import fcomm


def _late(world: fcomm.Group, backend: str) -> Tensor:
    handles = world, getattr(fcomm, backend)
    x = fcomm.all_reduce(torch.ones(3), *handles)
    if world.rank == 0:
        time.sleep(1.0)
        fcomm.send(x, *handles, dst=1)
        return x
    return fcomm.recv(torch.zeros(3), *handles, src=0)


@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_a_late_message_arrives(backend: str) -> None:
    for x in fcomm.run(_late, 2, backend):
        torch.testing.assert_close(x, torch.full((3,), 2.0))
