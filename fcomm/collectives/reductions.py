"""all_reduce and scan: a value from every rank, folded in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fcomm.arithmetic import LINEAR_OPS, fold, product_of_others, ties
from fcomm.collectives import checks
from fcomm.collectives.blocks import all_gather
from fcomm.collectives.place import axis_index
from fcomm.group import Backend, Group
from fcomm.registration import apply, define


def all_reduce(x: Tensor, group: Group, backend: Backend, *, op: str = "sum") -> Tensor:
    """Fold x over the group; every rank gets the result.

        rank 0  [a]      [a + b]
        rank 1  [b]  ->  [a + b]

    x and the result have the same shape and dtype. op: "sum", "mean", "max", "min", "prod"; "band", "bor", "bxor" on
    integers and bool. Half types and float8 (e4m3fn, e5m2) accumulate in float32, integers wrap, max and min propagate
    NaN, all in rank order; of 0.0 and -0.0, max and min give either. max, min and prod save the result, so do not
    change it in place before backward.
    vjp: sum: all_reduce; mean: all_reduce mean; max, min: all_reduce, shared equally among the ranks that attain the
    extremum (NaN attains NaN); prod: all_reduce times the product of the other ranks' x, right at zeros.
    Traffic: 2(n-1)/n of x's bytes per rank (nccl-tests, PERFORMANCE.md).
    Raises TypeError if op has no meaning for x's dtype, FcommError for an unknown op.
    """
    checks.op_of("all_reduce", op, x)
    return apply("all_reduce", x, group, backend, op)


def _extremum_share(x: Tensor, y: Tensor, group: Group, backend: Backend) -> Tensor:
    """This rank's share of the cotangent of y = max or min over the group: 1 / (number of ranks attaining it), or 0."""
    attained = ties(x.detach(), y.detach())
    return (attained / all_reduce(attained, group, backend)).to(x.dtype)


def other_ranks_product(x: Tensor, group: Group, backend: Backend) -> Tensor:
    """The product of the other ranks' x. All of them are gathered, since prod / x would be 0/0 where x is 0."""
    rows = all_gather(x, group, backend, tiled=False)
    ranks = torch.arange(group.size, device=x.device).reshape(-1, *[1] * x.dim())
    return product_of_others(rows, ranks == axis_index(group, backend).to(x.device))


def weight(x: Tensor, y: Tensor, group: Group, backend: Backend, op: str) -> Tensor:
    """The derivative of the fold with respect to this rank's x, for the non-linear ops."""
    if op == "prod":
        return other_ranks_product(x, group, backend)
    return _extremum_share(x, y, group, backend)


def _all_reduce_vjp(ct: Tensor, group: Group, backend: Backend, op: str, **xy: Any) -> Tensor:
    if op in LINEAR_OPS:
        return all_reduce(ct, group, backend, op=op)
    return all_reduce(ct, group, backend) * weight(**xy, group=group, backend=backend, op=op).conj()


def _all_reduce_jvp(t: Tensor, group: Group, backend: Backend, op: str, **xy: Any) -> Tensor:
    if op in LINEAR_OPS:
        return all_reduce(t, group, backend, op=op)
    return all_reduce(t * weight(**xy, group=group, backend=backend, op=op), group, backend)


define(
    "all_reduce",
    schema="str op",
    spec=lambda xs, op: [fold(xs, op)] * len(xs),
    shape=lambda s, group, op: s,
    vjp=_all_reduce_vjp,
    jvp=_all_reduce_jvp,
    nonlinear=lambda op: op not in LINEAR_OPS,
    busbw=lambda n: 2 * (n - 1) / n,
)


def scan(
    x: Tensor, group: Group, backend: Backend, *, op: str = "sum", exclusive: bool = False, reverse: bool = False
) -> Tensor:
    """The prefix sum over the ranks.

        rank 0  [a]      [a]            [0]                 [a + b + c]
        rank 1  [b]  ->  [a + b]        [a]      reverse:   [b + c]
        rank 2  [c]      [a + b + c]    [a + b]             [c]
                         inclusive      exclusive

    x and the result have the same shape and dtype; op is "sum". reverse starts from the last rank.
    vjp: the scan in the other direction. Traffic: x's bytes per rank (a chain), in n - 1 steps.
    Raises FcommError for another op, TypeError if op has no meaning for x's dtype.
    """
    checks.op_of("scan", op, x, ("sum",))
    return apply("scan", x, group, backend, op, bool(exclusive), bool(reverse))


def scan_spec(xs: Sequence[Tensor], op: str, exclusive: bool, reverse: bool) -> list[Tensor]:
    """For each rank, the fold of the xs up to its own; machines without a scan apply it to exchanged blocks."""
    if reverse:
        return scan_spec(xs[::-1], op, exclusive, False)[::-1]
    if exclusive:
        return [torch.zeros_like(xs[0]), *scan_spec(xs[:-1], op, False, False)]
    return [fold(xs[: r + 1], op) for r in range(len(xs))]


define(
    "scan",
    schema="str op, bool exclusive, bool reverse",
    spec=scan_spec,
    shape=lambda s, group, op, exclusive, reverse: s,
    vjp=lambda ct, group, backend, op, exclusive, reverse: scan(
        ct, group, backend, op=op, exclusive=exclusive, reverse=not reverse
    ),
    busbw=lambda n: 1.0,
)
