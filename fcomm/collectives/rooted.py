"""broadcast, reduce, gather, scatter: one rank is the root. On the others, results are zeros or arguments are ignored.

broadcast and reduce, gather and scatter are each other's derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fcomm.arithmetic import LINEAR_OPS, divide, fold
from fcomm.collectives import checks
from fcomm.collectives.blocks import own_block
from fcomm.collectives.exchange import concat
from fcomm.collectives.reductions import weight
from fcomm.group import Backend, Group
from fcomm.registration import apply, define


def _on_root(y: Tensor, root: int, size: int) -> list[Tensor]:
    return [y if r == root else torch.zeros_like(y) for r in range(size)]


def broadcast(x: Tensor, group: Group, backend: Backend, *, src: int = 0) -> Tensor:
    """Every rank gets x of rank src.

        src=0    rank 0  [a]      [a]
                 rank 1  [b]  ->  [a]

    x and the result have the same shape and dtype on every rank, any dtype.
    vjp: reduce to src; the other ranks' x get zeros. Traffic: x's bytes per rank (nccl-tests, PERFORMANCE.md).
    Raises FcommError if src is not a rank of the group.
    """
    return apply("broadcast", x, group, backend, checks.rank_in_group("broadcast", "src", src, group))


define(
    "broadcast",
    schema="int src",
    spec=lambda xs, src: [xs[src]] * len(xs),
    shape=lambda s, group, src: s,
    vjp=lambda ct, group, backend, src: reduce(ct, group, backend, dst=src),
    busbw=lambda n: 1.0,
)


def reduce(x: Tensor, group: Group, backend: Backend, *, dst: int = 0, op: str = "sum") -> Tensor:
    """Fold x over the group; rank dst gets the result, the others zeros.

        dst=0    rank 0  [a]      [a + b]
                 rank 1  [b]  ->  [0]

    x and the result have the same shape and dtype; op and arithmetic as in all_reduce.
    vjp: broadcast from dst; mean: divided by n; max, min, prod: weighted as all_reduce's.
    Traffic: x's bytes per rank (nccl-tests, PERFORMANCE.md).
    Raises FcommError if dst is not a rank of the group, TypeError if op has no meaning for x's dtype.
    """
    checks.op_of("reduce", op, x)
    return apply("reduce", x, group, backend, checks.rank_in_group("reduce", "dst", dst, group), op)


def _weight(x: Tensor, y: Tensor, group: Group, backend: Backend, dst: int, op: str) -> Tensor:
    # Only the root's y is the result. A product's weight does not need it: it depends only on x.
    return weight(x, y if op == "prod" else broadcast(y, group, backend, src=dst), group, backend, op)


def _reduce_vjp(ct: Tensor, group: Group, backend: Backend, dst: int, op: str, **xy: Any) -> Tensor:
    ct = broadcast(ct, group, backend, src=dst)
    if op in LINEAR_OPS:
        return divide(ct, group.size) if op == "mean" else ct
    return ct * _weight(**xy, group=group, backend=backend, dst=dst, op=op).conj()


def _reduce_jvp(t: Tensor, group: Group, backend: Backend, dst: int, op: str, **xy: Any) -> Tensor:
    if op in LINEAR_OPS:
        return reduce(t, group, backend, dst=dst, op=op)
    return reduce(t * _weight(**xy, group=group, backend=backend, dst=dst, op=op), group, backend, dst=dst)


define(
    "reduce",
    schema="int dst, str op",
    spec=lambda xs, dst, op: _on_root(fold(xs, op), dst, len(xs)),
    shape=lambda s, group, dst, op: s,
    vjp=_reduce_vjp,
    jvp=_reduce_jvp,
    nonlinear=lambda dst, op: op not in LINEAR_OPS,
    busbw=lambda n: 1.0,
)


def gather(x: Tensor, group: Group, backend: Backend, *, dst: int = 0, dim: int = 0) -> Tensor:
    """Concatenate every rank's x along dim; rank dst gets the whole, the others zeros of its shape.

        dst=0    rank 0  [a]      [a b]
                 rank 1  [b]  ->  [0 0]

    x is [.., d, ..] at dim and the result [.., n*d, ..], n = group.size, any dtype.
    vjp: scatter from dst. Traffic: (n-1)/n of the result's bytes at the root.
    Raises FcommError if dst is not a rank of the group or dim is out of range.
    """
    dst = checks.rank_in_group("gather", "dst", dst, group)
    return apply("gather", x, group, backend, dst, checks.canonical_dim("gather", "dim", dim, x, group))


define(
    "gather",
    schema="int dst, int dim",
    dims=("dim",),
    spec=lambda xs, dst, dim: _on_root(concat(xs, dim), dst, len(xs)),
    shape=lambda s, group, dst, dim: (*s[:dim], s[dim] * group.size, *s[dim + 1 :]),
    vjp=lambda ct, group, backend, dst, dim: scatter(ct, group, backend, src=dst, dim=dim),
    busbw=lambda n: (n - 1) / n,
)


def scatter(x: Tensor, group: Group, backend: Backend, *, src: int = 0, dim: int = 0) -> Tensor:
    """Each rank gets its block of rank src's x.

        src=0    rank 0  [a0 a1]      [a0]
                 rank 1  [b0 b1]  ->  [a1]

    x is [.., n*d, ..] at dim on every rank and the result [.., d, ..], n = group.size, any dtype.
    vjp: gather to src; the other ranks' x get zeros. Traffic: (n-1)/n of x's bytes at the root.
    Raises FcommError if src is not a rank of the group, dim is out of range, or n does not divide x.shape[dim].
    """
    src = checks.rank_in_group("scatter", "src", src, group)
    dim = checks.canonical_dim("scatter", "dim", dim, x, group)
    checks.divisible("scatter", x, dim, group)
    return apply("scatter", x, group, backend, src, dim)


define(
    "scatter",
    schema="int src, int dim",
    dims=("dim",),
    spec=lambda xs, src, dim: [own_block(xs[src], r, len(xs), dim) for r in range(len(xs))],
    shape=lambda s, group, src, dim: (*s[:dim], s[dim] // group.size, *s[dim + 1 :]),
    vjp=lambda ct, group, backend, src, dim: gather(ct, group, backend, dst=src, dim=dim),
    busbw=lambda n: (n - 1) / n,
)
