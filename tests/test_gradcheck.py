"""torch.autograd's numerical checks of every rule, first and second order, forward mode and batches.

Around simulate, torch would differentiate the meaning itself. So the stacked function is made an autograd node whose
backward is the rule, on all simulated ranks, and whose own derivative is again a node of that kind. Forward mode does
not nest in such a node, and is compared with finite differences here. On a live group of one rank torch meets the rule
directly, in forward mode too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cases import CASES
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vjp

import fcomm
from fcomm.testing import Case
from fcomm.testing.check import draw

Ranks = Callable[..., Tensor]

# A maximum at a tie has no derivative to compare with; test_rules.py has the numbers for ties.
SMOOTH = {"ties": "normal"}
CHECKED = [case for case in CASES.values() if case.differentiable]
COALESCED = [case for case in CHECKED if "coalesced" in case.name]


def ruled(fn: Ranks, group: fcomm.Group) -> Ranks:
    """simulate(fn, group), differentiated by vjp and jvp of fn on each rank: by fcomm's rules."""

    class Node(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*xs: Tensor) -> Tensor:
            return fcomm.simulate(fn, group)(*xs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, ct: Tensor) -> Any:
            xs = ctx.saved_tensors
            parts = [
                ruled(lambda ct, *xs, k=k: vjp(fn, *xs)[1](ct)[k], group)(ct, *xs) if ctx.needs_input_grad[k] else None
                for k in range(len(xs))
            ]
            return tuple(parts)

    return Node.apply


def _literal(case: Case, group: fcomm.Group, backend: fcomm.Backend) -> Callable[[Tensor, tuple[Tensor, ...]], Tensor]:
    """The case as a function that counts every rank's value: an invariant one enters and leaves by a reduction."""

    def fn(x: Tensor, *aux: Tensor) -> Tensor:
        if "x" in case.replicated:
            x = fcomm.all_reduce_invariant(x, group, backend)
        y = case.call(x, *aux, group=group, backend=backend)
        return fcomm.pvary(y, group, backend) if "y" in case.replicated else y

    return fn


def _input(case: Case, *ranks: int) -> Tensor:
    size = ranks[0] if ranks else 1
    values = SMOOTH.get(case.values, case.values)
    return draw((*ranks, *case.shape(size)), values, case.dtype, 7).requires_grad_()


def _on_axis(case: Case, group: fcomm.Group) -> Ranks:
    """The case as a function of x only; each rank takes its own further tensors."""
    fn = _literal(case, group, fcomm.sim)
    aux = case.aux(group.size)

    def of_aux(x: Tensor) -> Tensor:
        rank = fcomm.axis_index(group, fcomm.sim).reshape(1)
        return fn(x, *(a.index_select(0, rank)[0] for a in aux))

    return of_aux if aux else fn


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.id)
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_rules_against_finite_differences(case: Case, size: int) -> None:
    if case in COALESCED:
        case = _without_float32(case)
    group, x = fcomm.axis("ranks", size), _input(case, size)
    fn = _on_axis(case, group)
    f = ruled(fn, group)
    # The fast mode compares one random direction, which combines all of them.
    gradcheck(f, (x,), check_batched_grad=True, check_undefined_grad=False, fast_mode=size == 3)
    gradgradcheck(f, (x,), fast_mode=True, check_undefined_grad=False)
    if x.numel():
        _forward_mode(fn, group, x.detach())


def _forward_mode(fn: Ranks, group: fcomm.Group, x: Tensor) -> None:
    """jvp of fn, and of its vjp, against central differences of what they differentiate."""
    simulate = fcomm.simulate
    t = draw(x.shape, "normal", x.dtype, 11)
    y = simulate(fn, group)(x)
    ct = draw(y.shape, "normal", y.dtype, 13)

    def pull(x: Tensor, ct: Tensor) -> Tensor:
        return vjp(fn, x)[1](ct)[0]

    def along(x: Tensor, t: Tensor, ct: Tensor) -> Tensor:
        return jvp(lambda x: pull(x, ct), (x,), (t,))[1]

    def difference(f: Callable[[Tensor], Tensor], step: float = 1e-5) -> Tensor:
        return (f(x + step * t) - f(x - step * t)) / (2 * step)

    close = {"rtol": 1e-6, "atol": 1e-6}
    got = simulate(lambda x, t: jvp(fn, (x,), (t,))[1], group)(x, t)
    torch.testing.assert_close(got, difference(simulate(fn, group)), **close)
    got = simulate(along, group)(x, t, ct)
    torch.testing.assert_close(got, difference(lambda x: simulate(pull, group)(x, ct)), **close)


def _without_float32(case: Case) -> Case:
    """A list of two float64 and a complex128 tensor: finite differences need the double precision."""

    def call(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
        parts = [x[:, :1], x[:, 1:].sin(), torch.complex(x, x.cos())]
        a, b, c = getattr(fcomm, case.name)(parts, group, backend)
        return torch.cat([a, b, c.real, c.imag], 1)

    return Case(case.name, case.label, call, case.shape)


@cache
def _one_rank() -> fcomm.Group:
    return fcomm.init()


@pytest.mark.parametrize("case", [c for c in CHECKED if 1 in c.sizes], ids=lambda case: case.id)
def test_rules_on_one_live_rank(case: Case) -> None:
    if case in COALESCED:
        case = _without_float32(case)
    aux = [a[0] for a in case.aux(1)]
    fn = _literal(case, _one_rank(), fcomm.c10d)
    checks = {"check_batched_grad": True, "fast_mode": True}
    gradcheck(lambda x: fn(x, *aux), (_input(case),), check_forward_ad=True, check_batched_forward_grad=True, **checks)
    gradgradcheck(lambda x: fn(x, *aux), (_input(case),), check_fwd_over_rev=True, **checks)
