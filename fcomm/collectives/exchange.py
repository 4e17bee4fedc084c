"""all_to_all and ppermute: every value moves to another rank. The derivative moves it back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fcomm.collectives import checks
from fcomm.dtypes import REDUCED, carrier
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.registration import apply, define, holds

Sizes = Sequence[int] | Sequence[Sequence[int]]


def all_to_all(
    x: Tensor,
    group: Group,
    backend: Backend,
    *,
    split_dim: int = 0,
    concat_dim: int = 0,
    tiled: bool = True,
    send_sizes: Sizes | None = None,
    recv_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Cut x along split_dim into one block for each rank, and concatenate the received blocks along concat_dim.

        rank 0  [a0 a1]      [a0 b0]
        rank 1  [b0 b1]  ->  [a1 b1]

    tiled: split_dim shrinks and concat_dim grows by n = group.size. tiled=False: x.shape[split_dim] is n; the result
    lacks that dimension and has a new one of length n at concat_dim (counted without split_dim), as in
    jax.lax.all_to_all. Any dtype.

    send_sizes, recv_sizes: the lengths, along split_dim, of the blocks that this rank sends to each rank, and, along
    concat_dim, of those that it receives from each. With split_dim == concat_dim they are this rank's row and column of
    the matrix of all sends; send_sizes may also be that whole matrix; then leave recv_sizes out. With different dims
    the two lists are the partitions of the two dimensions over the ranks, the same on every rank. On a simulated axis,
    where all ranks have one shape, pass the matrix; x and the result are padded with zeros at their ends to the largest
    rank's length.

    vjp: all_to_all with dims and sizes swapped. Traffic: (n-1)/n of x's bytes per rank (nccl-tests, PERFORMANCE.md).
    Raises FcommError if n does not divide x.shape[split_dim], or the sizes do not fit x or the group; MismatchError if
    the ranks' sizes disagree.
    """
    split_dim = checks.canonical_dim("all_to_all", "split_dim", split_dim, x, group)
    concat_dim = checks.canonical_dim("all_to_all", "concat_dim", concat_dim, x, group)
    send = recv = None
    if send_sizes is not None or recv_sizes is not None:
        if not tiled or send_sizes is None:
            raise ArgumentError(
                f"all_to_all: send_sizes is {send_sizes}, recv_sizes {recv_sizes} and tiled {tiled} on group "
                f"'{group.name}'; blocks of different lengths need send_sizes and tiled=True"
            )
        send, recv = _canonical_blocks(x, group, split_dim, concat_dim, send_sizes, recv_sizes)
    elif tiled:
        checks.divisible("all_to_all", x, split_dim, group)
    else:
        checks.one_each("all_to_all", x, split_dim, group)
    return apply("all_to_all", x, group, backend, split_dim, concat_dim, bool(tiled), send, recv)


def _canonical_blocks(
    x: Tensor, group: Group, split_dim: int, concat_dim: int, send_sizes: Sizes, recv_sizes: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """send and recv, n lengths each; if one dim is split and joined on a simulated axis, all ranks' n*n, row by row."""
    n = group.size
    if isinstance(send_sizes, Sequence) and send_sizes and isinstance(send_sizes[0], Sequence):
        rows = [checks.canonical_sizes("all_to_all", "a row of send_sizes", row, group) for row in send_sizes]  # type: ignore[arg-type]  # a matrix
        if len(rows) != n or recv_sizes is not None or split_dim != concat_dim:
            raise ArgumentError(
                f"all_to_all: a matrix send_sizes needs {n} rows for group '{group.name}', no recv_sizes, and "
                f"split_dim == concat_dim; got {len(rows)} rows, recv_sizes={recv_sizes}, {split_dim} and {concat_dim}"
            )
        columns = [list(column) for column in zip(*rows, strict=True)]
        if not group.simulated:
            send, recv = rows[group.rank or 0], columns[group.rank or 0]
            checks.total_length("all_to_all", "send_sizes", send, x, split_dim, group)
            return send, recv
        longest = max(map(sum, rows))
        checks.total_length("all_to_all", "the longest row of send_sizes", [longest], x, split_dim, group)
        return [*chain(*rows)], [*chain(*columns)]
    if recv_sizes is None or (group.simulated and split_dim == concat_dim):
        either = "" if group.simulated else "recv_sizes beside send_sizes, or "
        raise ArgumentError(
            f"all_to_all: group '{group.name}' needs {either}send_sizes as the matrix of all ranks' sends"
        )
    send = checks.canonical_sizes("all_to_all", "send_sizes", send_sizes, group)  # type: ignore[arg-type]  # a row
    recv = checks.canonical_sizes("all_to_all", "recv_sizes", recv_sizes, group)
    checks.total_length("all_to_all", "send_sizes", send, x, split_dim, group)
    if split_dim != concat_dim:
        checks.own_length("all_to_all", "recv_sizes", recv, x, concat_dim, group)
    elif not holds(send[group.rank or 0] == recv[group.rank or 0]):
        raise ArgumentError(
            f"all_to_all: this rank sends itself {send[group.rank or 0]} of send_sizes={send} and receives "
            f"{recv[group.rank or 0]} of recv_sizes={recv} on group '{group.name}'; make the two equal"
        )
    return send, recv


def _all_to_all_spec(
    xs: list[Tensor],
    split_dim: int,
    concat_dim: int,
    tiled: bool,
    send_sizes: Sequence[int] | None,
    recv_sizes: Sequence[int] | None,
) -> list[Tensor]:
    n = len(xs)
    if not tiled:
        return [torch.stack([x.select(split_dim, r) for x in xs], concat_dim) for r in range(n)]
    if send_sizes is None or recv_sizes is None:
        blocks = [x.chunk(n, split_dim) if x.shape[split_dim] else [x] * n for x in xs]
        return [concat([row[r] for row in blocks], concat_dim) for r in range(n)]
    if split_dim == concat_dim:
        rows = [send_sizes[r * n : r * n + n] for r in range(n)] if n > 1 else [send_sizes]
        blocks = [x.narrow(split_dim, 0, sum(row)).split(list(row), split_dim) for x, row in zip(xs, rows, strict=True)]
    else:
        xs = [x.narrow(concat_dim, 0, d) for x, d in zip(xs, recv_sizes, strict=True)]
        blocks = [x.split(list(send_sizes), split_dim) for x in xs]
    ys = [concat([row[r] for row in blocks], concat_dim) for r in range(n)]
    return [pad_end(y, split_dim, max(y.shape[split_dim] for y in ys)) for y in ys]


def concat(xs: list[Tensor], dim: int) -> Tensor:
    """torch.cat; vectors are joined as columns, since vmap of torch.cat loses the batch of empty vectors."""
    if xs[0].dim() > 1:
        return torch.cat(xs, dim)
    return torch.cat([x.unsqueeze(1) for x in xs]).squeeze(1)


def pad_end(x: Tensor, dim: int, length: int) -> Tensor:
    """x padded with zeros at the end of dim, up to length."""
    if x.dtype not in REDUCED:  # torch cannot fill these either
        return pad_end(x.view(carrier(x.dtype)), dim, length).view(x.dtype)
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, length - x.shape[dim]))


def _all_to_all_shape(
    s: Sequence[int],
    group: Group,
    split_dim: int,
    concat_dim: int,
    tiled: bool,
    send_sizes: Sequence[int] | None,
    recv_sizes: Sequence[int] | None,
) -> list[int]:
    shape = list(s)
    if not tiled:
        del shape[split_dim]
        shape.insert(concat_dim, group.size)
    elif send_sizes is None or recv_sizes is None:
        shape[split_dim] //= group.size
        shape[concat_dim] *= group.size
    else:
        shape[split_dim] = send_sizes[group.rank or 0]
        shape[concat_dim] = sum(recv_sizes)
    return shape


def _all_to_all_vjp(
    ct: Tensor, group: Group, backend: Backend, split_dim: int, concat_dim: int, tiled: bool, **sizes: Any
) -> Tensor:
    # apply, not all_to_all: on a simulated axis the sizes are already flat matrices.
    send, recv = sizes["send_sizes"], sizes["recv_sizes"]
    return apply("all_to_all", ct, group, backend, concat_dim, split_dim, tiled, recv, send)


define(
    "all_to_all",
    schema="int split_dim, int concat_dim, bool tiled, SymInt[]? send_sizes, SymInt[]? recv_sizes",
    dims=("split_dim", "concat_dim"),
    spec=_all_to_all_spec,
    shape=_all_to_all_shape,
    vjp=_all_to_all_vjp,
    busbw=lambda n: (n - 1) / n,
)


def ppermute(x: Tensor, group: Group, backend: Backend, *, perm: Sequence[tuple[int, int]]) -> Tensor:
    """Send x from each source to its destination; a rank that is not a destination gets zeros.

        perm=[(0, 1), (1, 2)]    rank 0  [a]      [0]
                                 rank 1  [b]  ->  [a]
                                 rank 2  [c]      [b]

    x and the result have the same shape and dtype, any dtype. perm: (source, destination) pairs of ranks within the
    group, each rank at most once on either side.
    vjp: ppermute with the inverse permutation. Traffic: x's bytes per rank.
    Raises FcommError if perm names a rank twice, or one outside the group.
    """
    return apply("ppermute", x, group, backend, checks.canonical_perm("ppermute", perm, group))


def pairs(perm: Sequence[int]) -> list[tuple[int, int]]:
    """The (source, destination) pairs of a flat perm."""
    return list(zip(perm[::2], perm[1::2], strict=True))


def _ppermute_spec(xs: list[Tensor], perm: Sequence[int]) -> list[Tensor]:
    source = {d: s for s, d in pairs(perm)}
    return [xs[source[r]] if r in source else torch.zeros_like(xs[r]) for r in range(len(xs))]


define(
    "ppermute",
    schema="int[] perm",
    spec=_ppermute_spec,
    shape=lambda s, group, perm: s,
    vjp=lambda ct, group, backend, perm: ppermute(ct, group, backend, perm=[(d, s) for s, d in pairs(perm)]),
    busbw=lambda n: 1.0,
)
