"""The steps of random programs: what each does on a rank with fcomm, and what that means in plain torch.

`plain` never calls fcomm and works on the whole stack by indexing, whereas fcomm's specs work on lists of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

import fcomm
from fcomm.testing import strategies

LARGEST = 48  # elements on a rank


@dataclass(frozen=True)
class Kind:
    """A step.

    on_rank: on_rank(x, group, backend, **options).  plain: plain(x of all ranks, [n, ..], **options).
    options: options(draw, shape, size, dtype).  fits: fits(shape, size, dtype), whether the step can be done at all.
    exact: integers stay integers.  local: no communication.
    """

    on_rank: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    options: Callable[..., dict[str, Any]] = lambda draw, shape, size, dtype: {}
    fits: Callable[..., bool] = lambda shape, size, dtype: True
    exact: bool = True
    local: bool = False


# --- folds --------------------------------------------------------------------------------------------------------


def _fold(x: Tensor, op: str) -> Tensor:
    """op over the ranks, dim 0."""
    if x.dtype == torch.bool:
        if op == "bxor":
            return x.sum(0) % 2 == 1
        return x.any(0) if op in ("sum", "max", "bor") else x.all(0)
    if op in ("max", "min"):
        return x.amax(0) if op == "max" else x.amin(0)
    if op in ("sum", "prod"):
        return x.sum(0, dtype=x.dtype) if op == "sum" else x.prod(0, dtype=x.dtype)
    if op == "mean":
        total = x.sum(0, dtype=x.dtype)
        real = x.is_floating_point() or x.is_complex()
        return total / len(x) if real else torch.div(total, len(x), rounding_mode="trunc")
    y = x[0]
    for row in x[1:]:
        y = {"band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor}[op](y, row)
    return y


def _ops(dtype: torch.dtype, bits: bool = False) -> list[str]:
    if dtype.is_complex:
        return ["sum", "mean", "prod"]
    ops = ["sum", "max", "min", "prod"] if dtype == torch.bool else ["sum", "mean", "max", "min", "prod"]
    integer = not dtype.is_floating_point
    return ops + (["band", "bor", "bxor"] if bits and integer else [])


def _everywhere(y: Tensor, size: int) -> Tensor:
    return y.expand(size, *y.shape)


def _only_on(y: Tensor, rank: int, size: int) -> Tensor:
    rows = torch.zeros_like(_everywhere(y, size))
    return rows.index_copy(0, torch.tensor([rank]), y[None])


def _prefix(x: Tensor, exclusive: bool, reverse: bool) -> Tensor:
    if reverse:
        return _prefix(x.flip(0), exclusive, False).flip(0)
    sums = x.cumsum(0, dtype=torch.int64 if x.dtype == torch.bool else x.dtype)
    if exclusive:
        sums = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
    return sums > 0 if x.dtype == torch.bool else sums


# --- blocks -------------------------------------------------------------------------------------------------------


def _front(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else dim


def _gathered(x: Tensor, dim: int, tiled: bool = True) -> Tensor:
    """[..] of all ranks, joined: the rank dimension goes to dim."""
    d = _front(dim, x.dim() - 1 if tiled else x.dim())
    y = x.movedim(0, d)
    return y.flatten(d, d + 1) if tiled else y


def _cut(y: Tensor, dim: int, size: int, tiled: bool = True) -> Tensor:
    """A whole -> [n, ..]: rank r gets block r of dim."""
    d = _front(dim, y.dim())
    return (y.unflatten(d, (size, y.shape[d] // size)) if tiled else y).movedim(d, 0)


def _span(x: Tensor, dim: int, start: int, length: int, padded: int) -> Tensor:
    """length elements of dim from start on, then zeros up to padded."""
    piece = x.narrow(dim, start, length)
    return torch.cat([piece, piece.new_zeros([*piece.shape[:dim], padded - length, *piece.shape[dim + 1 :]])], dim)


def _own(x: Tensor, sizes: Sequence[int], dim: int, group: fcomm.Group) -> Tensor:
    """Ranks in processes hold their own length, simulated ones the longest."""
    return x if group.simulated else x.narrow(dim, 0, sizes[group.rank])


def _padded(y: Tensor, longest: int, dim: int) -> Tensor:
    d = dim % y.dim()
    return pad(y, [0, 0] * (y.dim() - 1 - d) + [0, longest - y.shape[d]])


def _gather_uneven(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    d = _front(dim, x.dim() - 1)
    return _everywhere(torch.cat([row.narrow(d, 0, k) for row, k in zip(x, sizes, strict=True)], d), len(x))


def _reduce_scatter_uneven(x: Tensor, dim: int, op: str, sizes: Sequence[int]) -> Tensor:
    y, d = _fold(x, op), _front(dim, x.dim() - 1)
    return torch.stack([_span(y, d, sum(sizes[:r]), k, max(sizes)) for r, k in enumerate(sizes)])


def _exchanged(x: Tensor, split_dim: int, concat_dim: int, tiled: bool) -> Tensor:
    n, ndim = len(x), x.dim() - 1
    a, b = _front(split_dim, ndim), _front(concat_dim, ndim)
    y = x.unflatten(a + 1, (n, x.shape[a + 1] // n)) if tiled else x
    # [sender, .., receiver, ..] -> [receiver, sender, ..] -> [receiver, .., sender at b, ..]
    y = y.movedim(a + 1, 0).movedim(1, b + 1)
    return y.flatten(b + 1, b + 2) if tiled else y


def _exchanged_uneven(x: Tensor, dim: int, matrix: Sequence[Sequence[int]]) -> Tensor:
    n, d = len(x), _front(dim, x.dim() - 1)
    received = [sum(matrix[s][r] for s in range(n)) for r in range(n)]
    rows = []
    for r in range(n):
        blocks = [x[s].narrow(d, sum(matrix[s][:r]), matrix[s][r]) for s in range(n)]
        rows.append(_span(torch.cat(blocks, d), d, 0, received[r], max(received)))
    return torch.stack(rows)


def _all_to_all_matrix(
    x: Tensor, group: fcomm.Group, backend: fcomm.Backend, dim: int, matrix: Sequence[Sequence[int]]
) -> Tensor:
    sent, received = [sum(row) for row in matrix], [sum(column) for column in zip(*matrix, strict=True)]
    y = fcomm.all_to_all(
        _own(x, sent, dim, group), group, backend, split_dim=dim, concat_dim=dim, send_sizes=matrix
    )  # fmt: skip
    return _padded(y, max(received), dim)


def _two_dims(
    x: Tensor, group: fcomm.Group, backend: fcomm.Backend, split: int, concat: int, send: list[int], recv: list[int]
) -> Tensor:
    y = fcomm.all_to_all(
        _own(x, recv, concat, group), group, backend, split_dim=split, concat_dim=concat,
        send_sizes=send, recv_sizes=recv,
    )  # fmt: skip
    return _padded(y, max(send), split)


def _two_dims_plain(x: Tensor, split: int, concat: int, send: list[int], recv: list[int]) -> Tensor:
    rows = []
    for r, k in enumerate(send):
        parts = [x[s].narrow(concat, 0, recv[s]).narrow(split, sum(send[:r]), k) for s in range(len(x))]
        rows.append(_span(torch.cat(parts, concat), split, 0, k, max(send)))
    return torch.stack(rows)


# --- single moves -------------------------------------------------------------------------------------------------


def _permuted(x: Tensor, perm: Sequence[tuple[int, int]]) -> Tensor:
    source = torch.full((len(x),), len(x))
    for s, d in perm:
        source[d] = s
    return torch.cat([x, torch.zeros_like(x[:1])]).index_select(0, source)


def _ring(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    if group.size == 1:
        return x
    return fcomm.recv(torch.zeros_like(x), group, backend, after=fcomm.send(x, group, backend))


def _output(x: Tensor, rows: int) -> Tensor:
    """The output argument of a ragged_all_to_all: something that depends on x."""
    return 3 * x[torch.arange(rows) % len(x)]


def _ragged(
    x: Tensor, group: fcomm.Group, backend: fcomm.Backend, rows: int, routes: Sequence[list[list[int]]]
) -> Tensor:
    mine = [_of_this_rank(torch.tensor(table), group, backend) for table in routes]
    return fcomm.ragged_all_to_all(x, _output(x, rows), *mine, group, backend)


def _ragged_plain(x: Tensor, rows: int, routes: Sequence[list[list[int]]]) -> Tensor:
    starts, sends, landing, _ = routes
    results = []
    for r in range(len(x)):
        y = list(_output(x[r], rows).unbind(0))
        for s in range(len(x)):
            for k in range(sends[s][r]):
                y[landing[s][r] + k] = x[s][starts[s][r] + k]
        results.append(torch.stack(y) if y else x[r][:0])
    return torch.stack(results)


def _ragged_options(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, tables = draw(strategies.routes(size, shape[0]))
    return {"rows": rows, "routes": tuple(t.tolist() for t in tables)}


def _of_this_rank(table: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    return table.index_select(0, fcomm.axis_index(group, backend).reshape(1))[0]


# --- values that are the same on all ranks ------------------------------------------------------------------------


def _common(x: Tensor) -> Tensor:
    """What all ranks do in the same way with an invariant value."""
    return x * x + x


def _reduce_then_vary(x: Tensor, group: fcomm.Group, backend: fcomm.Backend, op: str) -> Tensor:
    return fcomm.pvary(_common(fcomm.all_reduce_invariant(x, group, backend, op=op)), group, backend)


def _gather_then_vary(x: Tensor, group: fcomm.Group, backend: fcomm.Backend, dim: int) -> Tensor:
    return fcomm.pvary(_common(fcomm.all_gather_invariant(x, group, backend, dim=dim)), group, backend)


def _reduce_then_shard(x: Tensor, group: fcomm.Group, backend: fcomm.Backend, op: str, dim: int) -> Tensor:
    return fcomm.shard(_common(fcomm.all_reduce_invariant(x, group, backend, op=op)), group, backend, dim=dim)


def _gather_then_shard(x: Tensor, group: fcomm.Group, backend: fcomm.Backend, dim: int, shard_dim: int) -> Tensor:
    return fcomm.shard(_common(fcomm.all_gather_invariant(x, group, backend, dim=dim)), group, backend, dim=shard_dim)


# --- options ------------------------------------------------------------------------------------------------------


def _dim(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"dim": draw(strategies.dims(len(shape)))}


def _op(bits: bool = False) -> Callable[..., dict[str, Any]]:
    return lambda draw, shape, size, dtype: {"op": draw(st.sampled_from(_ops(dtype, bits)))}


def _linear_op(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"op": draw(st.sampled_from(["sum"] if dtype == torch.bool else ["sum", "mean"]))}


def _root(option: str) -> Callable[..., dict[str, Any]]:
    return lambda draw, shape, size, dtype: {option: draw(st.integers(0, size - 1))}


def _divisible(shape: Sequence[int], size: int) -> list[int]:
    return [d for d, k in enumerate(shape) if k % size == 0]


def _divisible_dim(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"dim": draw(st.sampled_from(_divisible(shape, size))) - draw(st.sampled_from([0, len(shape)]))}


def _single(shape: Sequence[int], size: int) -> list[int]:
    return [d for d, k in enumerate(shape) if k == size]


def _single_dim(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"dim": draw(st.sampled_from(_single(shape, size)))}


def _both(*parts: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *args: {key: value for part in parts for key, value in part(*args).items()}


def _can_grow(shape: Sequence[int], size: int, dtype: torch.dtype) -> bool:
    return len(shape) > 0 and prod(shape) * size <= LARGEST


def _can_cut(shape: Sequence[int], size: int, dtype: torch.dtype) -> bool:
    return bool(_divisible(shape, size))


def _cuttable_and_exchanged(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "split_dim": draw(st.sampled_from(_divisible(shape, size))),
        "concat_dim": draw(strategies.dims(len(shape))),
    }


def _untiled_exchange(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"split_dim": draw(st.sampled_from(_single(shape, size))), "concat_dim": draw(strategies.dims(len(shape)))}


def _longest(draw: st.DrawFn, size: int, longest: int) -> list[int]:
    """Block lengths of which the largest is `longest`."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=size, max_size=size))
    lengths[draw(st.integers(0, size - 1))] = longest
    return lengths


def _split(draw: st.DrawFn, size: int, total: int) -> list[int]:
    """Block lengths that add up to total."""
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=size - 1, max_size=size - 1)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _gather_sizes(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    d = draw(st.integers(0, len(shape) - 1))
    return {"dim": d, "sizes": _longest(draw, size, shape[d])}


def _scatter_sizes(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    d = draw(st.integers(0, len(shape) - 1))
    return {"dim": d, "sizes": _split(draw, size, shape[d])}


def _matrix(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    d = draw(st.integers(0, len(shape) - 1))
    return {"dim": d, "matrix": [_split(draw, size, total) for total in _longest(draw, size, shape[d])]}


def _two_partitions(draw: st.DrawFn, shape: Sequence[int], size: int, dtype: torch.dtype) -> dict[str, Any]:
    split, concat = draw(st.permutations(range(len(shape))))[:2]
    send, recv = _split(draw, size, shape[split]), _longest(draw, size, shape[concat])
    return {"split": split, "concat": concat, "send": send, "recv": recv}


# --- the table ----------------------------------------------------------------------------------------------------

COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "multiply": torch.mul}


def _is_number(shape: Sequence[int], size: int, dtype: torch.dtype) -> bool:
    return dtype != torch.bool


def _is_float(shape: Sequence[int], size: int, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _has_dim(shape: Sequence[int], size: int, dtype: torch.dtype) -> bool:
    return len(shape) > 0


def _local(fn: Callable[..., Tensor], **rest: Any) -> Kind:
    """An operation of one rank; the oracle does it row by row."""
    return Kind(
        lambda x, group, backend, **options: fn(x, **options),
        lambda x, **options: torch.stack([fn(row, **options) for row in x.unbind(0)]),
        local=True,
        **rest,
    )


def _squash(x: Tensor) -> Tensor:
    return x / (1 + (x * x.conj()).real) if x.is_complex() else x.tanh()


def _matrix_product(x: Tensor) -> Tensor:
    k = x.shape[-1]
    return x @ ((torch.arange(k * 2).reshape(k, 2) % 3 - 0.8) / max(k, 1)).to(x.dtype)


def _two_of(name: str) -> Callable[..., Tensor]:
    """A coalesced collective on x and something made from it, added up."""

    def on_rank(x: Tensor, group: fcomm.Group, backend: fcomm.Backend, **options: Any) -> Tensor:
        a, b = getattr(fcomm, name)([x, _common(x).to(torch.complex128)], group, backend, **options)
        return a + (b if x.is_complex() else b.real.to(x.dtype))

    return on_rank


def _twice(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def both(x: Tensor, **options: Any) -> Tensor:
        return plain(x, **options) + plain(_common(x), **options)

    return both


def _sum(x: Tensor, op: str = "sum") -> Tensor:
    return _everywhere(_fold(x, op), len(x))


KINDS: dict[str, Kind] = {
    # rounding apart, these keep integers
    "affine": _local(lambda x: 2 * x + 1, fits=_is_number),
    "square": _local(torch.square, fits=_is_number),
    "flip": _local(lambda x, dim: x.flip(dim), options=_dim, fits=_has_dim),
    "roll": _local(lambda x, dim: x.roll(1, dim), options=_dim, fits=_has_dim),
    "transpose": _local(
        lambda x, dim: x.transpose(dim, 0), options=_dim, fits=lambda shape, size, dtype: len(shape) > 1
    ),
    "flatten": _local(torch.flatten),
    "unsqueeze": _local(
        lambda x, dim: x.unsqueeze(dim),
        options=lambda draw, shape, size, dtype: {"dim": draw(strategies.dims(len(shape) + 1))},
        fits=lambda shape, size, dtype: len(shape) < 4,
    ),
    "sum over dim": _local(
        lambda x, dim: x.sum(dim, dtype=x.dtype), options=_dim, fits=lambda *a: _has_dim(*a) and _is_number(*a)
    ),
    "cumsum": _local(
        lambda x, dim: x.cumsum(dim, dtype=x.dtype), options=_dim, fits=lambda *a: _has_dim(*a) and _is_number(*a)
    ),
    "conj": _local(torch.conj, fits=lambda shape, size, dtype: dtype.is_complex),
    # these do not
    "sin": _local(lambda x: _squash(x).sin(), fits=_is_float, exact=False),
    "squash": _local(_squash, fits=_is_float, exact=False),
    "softmax": _local(
        lambda x, dim: x.softmax(dim),
        options=_dim,
        fits=lambda shape, size, dtype: len(shape) > 0 and dtype.is_floating_point,
        exact=False,
    ),
    "matrix product": _local(_matrix_product, fits=lambda *a: _has_dim(*a) and _is_float(*a), exact=False),
    # collectives
    "all_reduce": Kind(fcomm.all_reduce, lambda x, op: _everywhere(_fold(x, op), len(x)), _op(bits=True)),
    "scan": Kind(
        fcomm.scan,
        _prefix,
        lambda draw, *rest: {"exclusive": draw(st.booleans()), "reverse": draw(st.booleans())},
    ),
    "all_gather": Kind(
        fcomm.all_gather, lambda x, dim: _everywhere(_gathered(x, dim), len(x)), _dim, _can_grow
    ),
    "all_gather untiled": Kind(
        lambda x, group, backend, dim: fcomm.all_gather(x, group, backend, dim=dim, tiled=False),
        lambda x, dim: _everywhere(_gathered(x, dim, tiled=False), len(x)),
        lambda draw, shape, size, dtype: {"dim": draw(strategies.dims(len(shape) + 1))},
        lambda shape, size, dtype: len(shape) < 4 and prod(shape) * size <= LARGEST,
    ),
    "all_gather uneven": Kind(
        lambda x, group, backend, dim, sizes: fcomm.all_gather(
            _own(x, sizes, dim, group), group, backend, dim=dim, sizes=sizes
        ),
        _gather_uneven, _gather_sizes, _can_grow,
    ),
    "reduce_scatter": Kind(
        fcomm.reduce_scatter, lambda x, dim, op: _cut(_fold(x, op), dim, len(x)), _both(_divisible_dim, _op()), _can_cut
    ),
    "reduce_scatter untiled": Kind(
        lambda x, group, backend, dim, op: fcomm.reduce_scatter(x, group, backend, dim=dim, op=op, tiled=False),
        lambda x, dim, op: _cut(_fold(x, op), dim, len(x), tiled=False),
        _both(_single_dim, _op()),
        lambda shape, size, dtype: bool(_single(shape, size)),
    ),
    "reduce_scatter uneven": Kind(
        lambda x, group, backend, dim, op, sizes: _padded(
            fcomm.reduce_scatter(x, group, backend, dim=dim, op=op, sizes=sizes), max(sizes), dim
        ),
        _reduce_scatter_uneven, _both(_scatter_sizes, _op()), _has_dim,
    ),
    "all_to_all": Kind(
        fcomm.all_to_all, lambda x, **dims: _exchanged(x, **dims, tiled=True), _cuttable_and_exchanged, _can_cut
    ),
    "all_to_all untiled": Kind(
        lambda x, group, backend, **dims: fcomm.all_to_all(x, group, backend, **dims, tiled=False),
        lambda x, **dims: _exchanged(x, **dims, tiled=False),
        _untiled_exchange,
        lambda shape, size, dtype: bool(_single(shape, size)),
    ),
    "all_to_all uneven": Kind(_all_to_all_matrix, _exchanged_uneven, _matrix, _can_grow),
    "all_to_all uneven two dims": Kind(
        _two_dims, _two_dims_plain, _two_partitions, lambda *a: len(a[0]) > 1 and _can_grow(*a)
    ),
    "ragged_all_to_all": Kind(
        _ragged, _ragged_plain, _ragged_options,
        lambda *a: _can_grow(*a) and _is_number(*a) and a[0][0] > 0 and prod(a[0][1:]) * 12 <= LARGEST,
    ),
    "ppermute": Kind(
        fcomm.ppermute, _permuted, lambda draw, shape, size, dtype: {"perm": draw(strategies.perms(size))}
    ),
    "send and recv": Kind(_ring, lambda x: x.roll(1, 0)),
    "broadcast": Kind(fcomm.broadcast, lambda x, src: _everywhere(x[src], len(x)), _root("src")),
    "reduce": Kind(
        fcomm.reduce, lambda x, dst, op: _only_on(_fold(x, op), dst, len(x)), _both(_root("dst"), _op(bits=True))
    ),
    "gather": Kind(
        fcomm.gather, lambda x, dst, dim: _only_on(_gathered(x, dim), dst, len(x)), _both(_root("dst"), _dim), _can_grow
    ),
    "scatter": Kind(
        fcomm.scatter, lambda x, src, dim: _cut(x[src], dim, len(x)), _both(_root("src"), _divisible_dim), _can_cut
    ),
    "barrier": Kind(lambda x, group, backend: fcomm.barrier(group, backend, after=x), lambda x: x),
    "axis_index": Kind(
        lambda x, group, backend: x * fcomm.axis_index(group, backend).to(x.dtype),
        lambda x: x * torch.arange(len(x)).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)),
        fits=_is_number,
    ),
    "all_reduce_invariant, pvary": Kind(
        _reduce_then_vary, lambda x, op: _common(_sum(x, op)), _linear_op, _is_number
    ),
    "all_gather_invariant, pvary": Kind(
        _gather_then_vary, lambda x, dim: _common(_everywhere(_gathered(x, dim), len(x))), _dim,
        lambda *a: _can_grow(*a) and _is_number(*a),
    ),
    "all_reduce_invariant, shard": Kind(
        _reduce_then_shard, lambda x, op, dim: _cut(_common(_fold(x, op)), dim, len(x)),
        _both(_linear_op, _divisible_dim), lambda *a: _can_cut(*a) and _is_number(*a),
    ),
    "all_gather_invariant, shard": Kind(
        _gather_then_shard, lambda x, dim, shard_dim: _cut(_common(_gathered(x, dim)), shard_dim, len(x)),
        _both(_dim, lambda *a: {"shard_dim": _divisible_dim(*a)["dim"]}),
        lambda *a: _can_cut(*a) and _can_grow(*a) and _is_number(*a),
    ),
    "all_reduce_coalesced": Kind(_two_of("all_reduce_coalesced"), _twice(_sum), fits=_is_float),
    "all_gather_coalesced": Kind(
        _two_of("all_gather_coalesced"), _twice(lambda x, dim: _everywhere(_gathered(x, dim), len(x))), _dim,
        lambda *a: _can_grow(*a) and _is_float(*a),
    ),
    "reduce_scatter_coalesced": Kind(
        _two_of("reduce_scatter_coalesced"), _twice(lambda x, dim: _cut(_fold(x, "sum"), dim, len(x))),
        _divisible_dim, lambda *a: _can_cut(*a) and _is_float(*a),
    ),
}  # fmt: skip
