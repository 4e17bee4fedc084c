"""Results are new tensors: the caller may write into them, whatever a machine made them from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CASES
from doubles import build
from torch import Tensor
from vendors import DOUBLES, backend

import fcomm
from fcomm.testing import Case, run_ranks

# The others save their results, as torch's own non-linear functions do.
LINEAR = [
    case
    for case in CASES.values()
    if case.differentiable and case.values == "normal" and case.label not in ("0-d", "empty")
]


def _pairs(case: Case, world: fcomm.Group, on: fcomm.Backend) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of 3 y, once computed in place and once not."""
    shape, rank = tuple(case.shape(world.size)), world.rank or 0
    aux = [values[rank] for values in case.aux(world.size)]
    for _ in range(2):
        gradients = []
        for in_place in (True, False):
            x = torch.ones(shape, dtype=case.dtype, requires_grad=True)
            y = case.call(2 * x, *aux, group=world, backend=on)
            y = y.mul_(3) if in_place else y * 3
            gradients += torch.autograd.grad(y.abs().sum(), x)
        yield gradients[0], gradients[1]


def check_results(world: fcomm.Group, name: str) -> list[str]:
    on, failures = backend(name) if name in DOUBLES else getattr(fcomm, name), []
    for case in LINEAR:
        if world.size in case.sizes:
            for got, expected in _pairs(case, world, on):
                failures += [] if torch.equal(got, expected) else [f"{case.id}: {got} is not {expected}"]
    return failures


@pytest.mark.parametrize("name", ["cpu", "c10d", "nccl", "hccl"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_may_be_changed_in_place(name: str, size: int) -> None:
    if name in DOUBLES:
        build.path(DOUBLES[name])  # once, and not on every rank
    run_ranks(check_results, size, name, timeout_s=100)


# --- lists --------------------------------------------------------------------------------------------------------


def check_lists(world: fcomm.Group) -> list[str]:
    n = world.size
    a, b = torch.ones(2, n, requires_grad=True), torch.ones(3 * n, 1, requires_grad=True)
    calls = {
        "all_reduce_coalesced": lambda: fcomm.all_reduce_coalesced([2 * a, 2 * b], world, fcomm.c10d),
        "all_gather_coalesced": lambda: fcomm.all_gather_coalesced([2 * a, 2 * b], world, fcomm.c10d, dim=1),
        "reduce_scatter_coalesced": lambda: fcomm.reduce_scatter_coalesced([2 * b, 2 * b], world, fcomm.c10d),
    }
    failures = []
    for name, call in calls.items():
        ys = call()
        failures += [f"{name}: {y.shape} has strides {y.stride()}" for y in ys if not y.is_contiguous()]
        expected = torch.autograd.grad(sum((3 * y).sum() for y in call()), b)
        got = torch.autograd.grad(sum(y.mul_(3).sum() for y in ys), b)
        failures += [] if torch.equal(got[0], expected[0]) else [f"{name}: {got} is not {expected}"]
    return failures


@pytest.mark.parametrize("size", [1, 2])
def test_results_of_lists_are_contiguous_and_may_be_changed_in_place(size: int) -> None:
    run_ranks(check_lists, size, timeout_s=60)


def check_shared(world: fcomm.Group) -> list[str]:
    """Changing one result in place when a derivative reads another is refused, and never gives a wrong derivative."""
    failures = []
    for op in ("sum", "max"):
        a = torch.ones(3, requires_grad=True)
        p, q = fcomm.all_reduce_coalesced([a, 2 * a], world, fcomm.cpu, op=op)
        loss = q.sin().sum()
        p.mul_(2)
        try:
            (loss + p.sum()).backward()
            failures.append(f"{op}: not refused")
        except RuntimeError as error:
            failures += [] if "modified by an inplace operation" in str(error) else [f"{op}: {error}"]
    return failures


def test_results_of_a_list_share_their_changes() -> None:
    run_ranks(check_shared, 2)
