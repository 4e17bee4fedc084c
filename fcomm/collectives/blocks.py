"""all_gather and reduce_scatter: blocks become the whole, the whole becomes blocks. Each is the other's derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fcomm.arithmetic import FOLDED_OPS, LINEAR_OPS, divide, fold
from fcomm.collectives import checks
from fcomm.collectives.exchange import all_to_all, concat, pad_end
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.registration import apply, check_call, define


def all_gather(
    x: Tensor,
    group: Group,
    backend: Backend,
    *,
    dim: int = 0,
    tiled: bool = True,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Concatenate every rank's x along dim; every rank gets the whole.

        rank 0  [a]      [a b]
        rank 1  [b]  ->  [a b]

    x is [.., d, ..] at dim and the result [.., n*d, ..], n = group.size; with tiled=False the ranks are stacked in a
    new dimension of length n at dim. sizes: the ranks' lengths d, if they differ; x.shape[dim] == sizes[rank] and the
    result has sum(sizes). On a simulated axis, where all ranks have one shape, pad x at dim to max(sizes); the padding
    is not read. Any dtype.
    vjp: reduce_scatter along dim. Traffic: (n-1)/n of the result's bytes per rank (nccl-tests, PERFORMANCE.md).
    Raises FcommError if dim is out of range, or sizes does not fit x or the group.
    """
    dim = checks.canonical_dim("all_gather", "dim", dim, x, group, new=0 if tiled else 1)
    lengths = None
    if sizes is not None:
        _only_tiled("all_gather", tiled)
        lengths = checks.canonical_sizes("all_gather", "sizes", sizes, group)
        checks.own_length("all_gather", "sizes", lengths, x, dim, group)
    return apply("all_gather", x, group, backend, dim, bool(tiled), lengths)


def _all_gather_spec(xs: list[Tensor], dim: int, tiled: bool, sizes: Sequence[int] | None) -> list[Tensor]:
    if sizes is not None:
        xs = [x.narrow(dim, 0, d) for x, d in zip(xs, sizes, strict=True)]
    return [concat(xs, dim) if tiled else torch.stack(xs, dim)] * len(xs)


def _all_gather_shape(
    s: Sequence[int], group: Group, dim: int, tiled: bool, sizes: Sequence[int] | None
) -> tuple[int, ...]:
    if not tiled:
        return (*s[:dim], group.size, *s[dim:])
    return (*s[:dim], s[dim] * group.size if sizes is None else sum(sizes), *s[dim + 1 :])


def own_block(x: Tensor, rank: int, size: int, dim: int) -> Tensor:
    """The block of rank when x is cut into `size` equal ones along dim."""
    length = x.shape[dim] // size
    return x.narrow(dim, rank * length, length)


def _only_tiled(name: str, tiled: bool) -> None:
    if not tiled:
        raise ArgumentError(f"{name}: sizes is given with tiled=False; blocks of different lengths cannot be stacked")


define(
    "all_gather",
    schema="int dim, bool tiled, SymInt[]? sizes",
    dims=("dim",),
    spec=_all_gather_spec,
    shape=_all_gather_shape,
    vjp=lambda ct, group, backend, dim, tiled, sizes: reduce_scatter(
        ct, group, backend, dim=dim, tiled=tiled, sizes=sizes
    ),
    busbw=lambda n: (n - 1) / n,
)


def reduce_scatter(
    x: Tensor,
    group: Group,
    backend: Backend,
    *,
    dim: int = 0,
    op: str = "sum",
    tiled: bool = True,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Fold x over the group and keep this rank's block of dim.

        rank 0  [a0 a1]      [a0 + b0]
        rank 1  [b0 b1]  ->  [a1 + b1]

    x is [.., n*d, ..] and the result [.., d, ..] at dim, n = group.size; with tiled=False x.shape[dim] is n and the
    result lacks dim. sizes: the ranks' lengths d, if they differ; x.shape[dim] == sum(sizes) and the result has
    sizes[rank]. On a simulated axis, where all ranks have one shape, the result is padded with zeros to max(sizes).
    op: "sum", "mean", "max", "min", "prod", with all_reduce's arithmetic. max, min and prod are an all_to_all and a
    local fold: the traffic is the same, and torch differentiates the fold.
    vjp: sum: all_gather along dim; mean: that divided by n.
    Traffic: (n-1)/n of x's bytes per rank (nccl-tests, PERFORMANCE.md).
    Raises FcommError if n does not divide x.shape[dim], or sizes does not fit; TypeError if op does not fit x's dtype.
    """
    checks.op_of("reduce_scatter", op, x, FOLDED_OPS)
    dim = checks.canonical_dim("reduce_scatter", "dim", dim, x, group)
    lengths = None
    if sizes is not None:
        _only_tiled("reduce_scatter", tiled)
        lengths = checks.canonical_sizes("reduce_scatter", "sizes", sizes, group)
        checks.total_length("reduce_scatter", "sizes", lengths, x, dim, group)
    elif tiled:
        checks.divisible("reduce_scatter", x, dim, group)
    else:
        checks.one_each("reduce_scatter", x, dim, group)
    if op not in LINEAR_OPS:
        return _fold_of_exchanged_blocks(x, group, backend, dim, op, tiled, lengths)
    return apply("reduce_scatter", x, group, backend, dim, op, bool(tiled), lengths)


def _fold_of_exchanged_blocks(
    x: Tensor, group: Group, backend: Backend, dim: int, op: str, tiled: bool, sizes: Sequence[int] | None
) -> Tensor:
    check_call("reduce_scatter", (x,), group, backend)
    if sizes is not None:
        x = concat([pad_end(block, dim, max(sizes)) for block in x.split(sizes, dim)], dim)
    blocks = x.unflatten(dim, (group.size, x.shape[dim] // group.size)) if tiled else x
    blocks = all_to_all(blocks, group, backend, split_dim=dim, concat_dim=dim, tiled=False)
    y = fold(blocks.unbind(dim), op)
    if sizes is not None and not group.simulated:
        y = y.narrow(dim, 0, sizes[group.rank or 0]).contiguous()
    return y


def _reduce_scatter_spec(xs: list[Tensor], dim: int, op: str, tiled: bool, sizes: Sequence[int] | None) -> list[Tensor]:
    y = fold(xs, op)
    if not tiled:
        return list(y.unbind(dim))
    if sizes is None:
        return list(y.chunk(len(xs), dim)) if y.shape[dim] else [y] * len(xs)
    return [pad_end(block, dim, max(sizes)) for block in y.split(list(sizes), dim)]


def _reduce_scatter_shape(
    s: Sequence[int], group: Group, dim: int, op: str, tiled: bool, sizes: Sequence[int] | None
) -> tuple[int, ...]:
    if not tiled:
        return (*s[:dim], *s[dim + 1 :])
    return (*s[:dim], s[dim] // group.size if sizes is None else sizes[group.rank or 0], *s[dim + 1 :])


def _reduce_scatter_vjp(
    ct: Tensor, group: Group, backend: Backend, dim: int, op: str, tiled: bool, sizes: Sequence[int] | None
) -> Tensor:
    whole = all_gather(ct, group, backend, dim=dim, tiled=tiled, sizes=sizes)
    return divide(whole, group.size) if op == "mean" else whole


define(
    "reduce_scatter",
    schema="int dim, str op, bool tiled, SymInt[]? sizes",
    dims=("dim",),
    spec=_reduce_scatter_spec,
    shape=_reduce_scatter_shape,
    vjp=_reduce_scatter_vjp,
    busbw=lambda n: (n - 1) / n,
)
