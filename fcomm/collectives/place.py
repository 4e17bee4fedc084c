"""axis_index, axis_size, barrier: which rank this is, and that all ranks have arrived."""

from __future__ import annotations

import torch
from torch import Tensor

from fcomm.collectives import checks
from fcomm.group import Backend, Group
from fcomm.registration import apply, define


def axis_index(group: Group, backend: Backend) -> Tensor:
    """This rank's number within the group.

        rank 0  0
        rank 1  1

    An int64 tensor of shape (). It is on the CPU, so that it mixes with tensors of any device; under simulate it is on
    the device of the first tensor argument. It is a tensor and not an int, so that one graph serves every rank, real or
    simulated.
    vjp: none, it is an integer. Traffic: none.
    """
    return apply("axis_index", (), group, backend)


define(
    "axis_index",
    inputs=(),
    spec=lambda index: index,
    shape=lambda group: (),
    vjp=None,
    jvp=None,
    dtype=torch.int64,
    compose=lambda group, backend: torch.tensor(group.rank),
)


def axis_size(group: Group, backend: Backend) -> int:
    """Number of ranks in the group, an int."""
    checks.is_group("axis_size", group)
    return group.size


def barrier(group: Group, backend: Backend, *, after: Tensor | None = None) -> Tensor:
    """Return when every rank of the group has called it.

    after: a tensor that is computed before the barrier. The result is a copy of it that exists only once all ranks have
    arrived, so whatever uses the result runs later, in compiled graphs too. Without `after`, the result is a float32
    zero of shape () on a device that the backend accepts.
    vjp: a barrier on the cotangent. Traffic: one flag per rank.
    """
    if after is None:
        devices = backend.devices if isinstance(backend, Backend) else ()  # anything else apply refuses
        after = torch.zeros((), device=devices[0] if devices else None)
    checks.is_tensor("barrier", "after", after)
    return apply("barrier", after, group, backend)


define(
    "barrier",
    spec=lambda xs: [x.clone() for x in xs],
    shape=lambda s, group: s,
    vjp=lambda ct, group, backend: barrier(group, backend, after=ct),
)
