"""Values that are the same on all ranks: how they are made, and how they enter per-rank use.

An invariant value is one value, replicated; its cotangent is one cotangent, replicated. A varying value is each rank's
own. The derivatives here count an invariant value once; the literal collectives count it once per rank:

    function               from         to           derivative
    pvary                  invariant    varying      all_reduce_invariant
    all_reduce_invariant   varying      invariant    pvary
    all_gather_invariant   varying      invariant    shard
    shard                  invariant    varying      all_gather_invariant

(JAX: pvary and psum under check_vma; Megatron: copy_to, reduce_from, gather_from, scatter_to.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcomm.arithmetic import LINEAR_OPS, divide, fold
from fcomm.collectives import checks
from fcomm.collectives.blocks import all_gather, own_block
from fcomm.collectives.exchange import concat
from fcomm.collectives.reductions import all_reduce
from fcomm.group import Backend, Group
from fcomm.registration import apply, define


def pvary(x: Tensor, group: Group, backend: Backend) -> Tensor:
    """Let a replicated value enter per-rank use: the identity, whose cotangents are summed over the ranks.

        rank 0  [a]      [a]
        rank 1  [a]  ->  [a]

    x is the same on all ranks; the result is a copy, any dtype.
    vjp: all_reduce_invariant. Traffic: none; backward 2(n-1)/n of x's bytes per rank.
    """
    return apply("pvary", x, group, backend)


define(
    "pvary",
    spec=lambda xs: [x.clone() for x in xs],
    shape=lambda s, group: s,
    vjp=lambda ct, group, backend: all_reduce_invariant(ct, group, backend, op="sum"),
    replicated=("x",),
    compose=lambda x, group, backend: x.clone(memory_format=torch.contiguous_format),
)


def all_reduce_invariant(x: Tensor, group: Group, backend: Backend, *, op: str = "sum") -> Tensor:
    """Sum x over the group for a use that is identical on all ranks.

        rank 0  [a]      [a + b]
        rank 1  [b]  ->  [a + b]

    x and the result have the same shape and dtype; op: "sum", "mean".
    vjp: sum: pvary, the identity, since all ranks hold the same cotangent; mean: that divided by n. Use all_reduce if
    the ranks then use the result differently. Traffic: 2(n-1)/n of x's bytes per rank; backward none.
    Raises FcommError for another op, TypeError if op has no meaning for x's dtype.
    """
    checks.op_of("all_reduce_invariant", op, x, LINEAR_OPS)
    return apply("all_reduce_invariant", x, group, backend, op)


def _all_reduce_invariant_vjp(ct: Tensor, group: Group, backend: Backend, op: str) -> Tensor:
    return pvary(divide(ct, group.size) if op == "mean" else ct, group, backend)


define(
    "all_reduce_invariant",
    schema="str op",
    spec=lambda xs, op: [fold(xs, op)] * len(xs),
    shape=lambda s, group, op: s,
    vjp=_all_reduce_invariant_vjp,
    replicated=("y",),
    busbw=lambda n: 2 * (n - 1) / n,
    compose=lambda x, group, backend, op: all_reduce(x, group, backend, op=op),
)


def all_gather_invariant(x: Tensor, group: Group, backend: Backend, *, dim: int = 0) -> Tensor:
    """Concatenate every rank's x along dim for a use that is identical on all ranks.

        rank 0  [a]      [a b]
        rank 1  [b]  ->  [a b]

    x is [.., d, ..] at dim and the result [.., n*d, ..], n = group.size, any dtype.
    vjp: shard, this rank's own slice, since all ranks hold the same cotangent. Use all_gather if the ranks then use the
    result differently. Traffic: (n-1)/n of the result's bytes per rank; backward none.
    Raises FcommError if dim is out of range.
    """
    dim = checks.canonical_dim("all_gather_invariant", "dim", dim, x, group)
    return apply("all_gather_invariant", x, group, backend, dim)


define(
    "all_gather_invariant",
    schema="int dim",
    dims=("dim",),
    spec=lambda xs, dim: [concat(xs, dim)] * len(xs),
    shape=lambda s, group, dim: (*s[:dim], s[dim] * group.size, *s[dim + 1 :]),
    vjp=lambda ct, group, backend, dim: shard(ct, group, backend, dim=dim),
    replicated=("y",),
    busbw=lambda n: (n - 1) / n,
    compose=lambda x, group, backend, dim: all_gather(x, group, backend, dim=dim),
)


def shard(x: Tensor, group: Group, backend: Backend, *, dim: int = 0) -> Tensor:
    """This rank's own slice of a replicated value.

        rank 0  [a b]      [a]
        rank 1  [a b]  ->  [b]

    x is [.., n*d, ..] at dim, the same on all ranks, and the result [.., d, ..], n = group.size, any dtype.
    vjp: all_gather_invariant. Traffic: none; backward (n-1)/n of x's bytes per rank.
    Raises FcommError if dim is out of range or n does not divide x.shape[dim].
    """
    dim = checks.canonical_dim("shard", "dim", dim, x, group)
    checks.divisible("shard", x, dim, group)
    return apply("shard", x, group, backend, dim)


define(
    "shard",
    schema="int dim",
    dims=("dim",),
    spec=lambda xs, dim: [own_block(x, r, len(xs), dim) for r, x in enumerate(xs)],
    shape=lambda s, group, dim: (*s[:dim], s[dim] // group.size, *s[dim + 1 :]),
    vjp=lambda ct, group, backend, dim: all_gather_invariant(ct, group, backend, dim=dim),
    replicated=("x",),
    compose=lambda x, group, backend, dim: own_block(x, group.rank, group.size, dim).clone(
        memory_format=torch.contiguous_format
    ),
)
