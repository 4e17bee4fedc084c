"""The only list of (collective, parameters, shapes): every test loops over it.

A case calls a public function; n is the number of ranks. Dims are chosen so that a swapped pair of them, or an inverted
permutation, gives another shape or another value for n > 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fcomm
from fcomm.registration import RECORDS
from fcomm.testing import Case


def _case(
    name: str,
    label: str,
    shape: Callable[[int], Sequence[int]],
    options: Callable[[int], dict[str, Any]] | None = None,
    **rest: Any,
) -> Case:
    function = getattr(fcomm, name)

    def call(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
        return function(x, group, backend, **(options(group.size) if options else {}))

    return Case(name, label, call, shape, replicated=RECORDS[name].replicated, **rest)


# For cases that are constant on one rank.
SEVERAL = (2, 3, 4)


def same(n: int) -> tuple[int, ...]:
    return 2, 3


def blocks(n: int) -> tuple[int, ...]:
    return 2 * n, 3


def middle(n: int) -> tuple[int, ...]:
    return 2, n, 3


def shift(n: int) -> list[tuple[int, int]]:
    return [(r, (r + 1) % n) for r in range(n)]


def partial_shift(n: int) -> list[tuple[int, int]]:
    return [(r, r + 1) for r in range(n - 1)]


def uneven(n: int) -> list[int]:
    """Block lengths that differ, one of them zero: [1, 0, 3, 2]."""
    return [1, 0, 3, 2][:n]


def sends(n: int) -> list[list[int]]:
    """Row s: the lengths that rank s sends to each rank. Rows and columns have different sums, zeros occur."""
    return [[(2 * s + 3 * r + s * r) % 4 for r in range(n)] for s in range(n)]


def _uneven_all_gather(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    return fcomm.all_gather(_own(x, uneven(group.size), 1, group), group, backend, dim=1, sizes=uneven(group.size))


def _own(x: Tensor, sizes: Sequence[int], dim: int, group: fcomm.Group) -> Tensor:
    """In processes a rank holds only its own length of the padded x that simulated ranks hold."""
    return x if group.simulated else x.narrow(dim, 0, sizes[group.rank or 0])


def _padded(y: Tensor, sizes: Sequence[int], dim: int, group: fcomm.Group) -> Tensor:
    """The result, padded like those of simulated ranks, so that the two can be compared."""
    if group.simulated:
        return y
    width = [0, 0] * (y.dim() - 1 - dim) + [0, max(sizes) - y.shape[dim]]
    return torch.nn.functional.pad(y, width)


def _uneven_reduce_scatter(op: str) -> Callable[..., Tensor]:
    def call(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
        sizes = uneven(group.size)
        return _padded(fcomm.reduce_scatter(x, group, backend, dim=1, sizes=sizes, op=op), sizes, 1, group)

    return call


def _uneven_all_to_all(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    matrix = sends(group.size)
    rows, columns = [sum(row) for row in matrix], [sum(column) for column in zip(*matrix, strict=True)]
    y = fcomm.all_to_all(_own(x, rows, 1, group), group, backend, split_dim=1, concat_dim=1, send_sizes=matrix)
    return _padded(y, columns, 1, group)


def _uneven_two_dims(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    heads, lengths = uneven(group.size), uneven(group.size)[::-1]
    y = fcomm.all_to_all(
        _own(x, lengths, 0, group), group, backend, split_dim=1, concat_dim=0, send_sizes=heads, recv_sizes=lengths
    )
    return _padded(y, heads, 1, group)


def _ring(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    return fcomm.recv(torch.zeros_like(x), group, backend, after=fcomm.send(x, group, backend))


def _coalesced(name: str) -> Callable[..., Tensor]:
    def call(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
        parts = [x[:, :1], x[:, 1:].sin(), x.to(torch.float32)]
        a, b, c = getattr(fcomm, name)(parts, group, backend)
        return torch.cat([a, b, c.to(x.dtype)], 1)

    return call


def _routes(n: int) -> tuple[Tensor, ...]:
    """For ragged_all_to_all: input_offsets, send_sizes, output_offsets, recv_sizes, each [n, n], row = rank.

    Sent slices overlap (all start in the first rows), some are empty, received ones do not overlap.
    """
    sizes = torch.tensor(sends(n)).reshape(n, n) % 3
    starts = torch.arange(n)[None, :].expand(n, n) % 2
    # Where rank s's rows land at rank r: after those of lower ranks, with one untouched row in front.
    landing = 1 + sizes.cumsum(0) - sizes
    return starts.contiguous(), sizes, landing, sizes.T.contiguous()


def _ragged(x: Tensor, *rest: Any, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    operand, output = x[:4], x[4:]
    return fcomm.ragged_all_to_all(operand, output, *rest, group, backend)


def _barrier(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    return fcomm.barrier(group, backend, after=x)


def _axis_index(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    return x * fcomm.axis_index(group, backend)


_ALL = [
    _case("all_reduce", "sum", same),
    _case("all_reduce", "mean", same, lambda n: {"op": "mean"}),
    _case("all_reduce", "max", same, lambda n: {"op": "max"}, values="ties"),
    _case("all_reduce", "min", same, lambda n: {"op": "min"}, values="ties"),
    _case("all_reduce", "prod", same, lambda n: {"op": "prod"}, values="zeros"),
    _case("all_reduce", "complex", same, dtype=torch.complex128),
    _case("all_reduce", "complex prod", same, lambda n: {"op": "prod"}, values="zeros", dtype=torch.complex128),
    _case("all_reduce", "bor", same, lambda n: {"op": "bor"}, dtype=torch.int32),
    _case("all_reduce", "0-d", lambda n: ()),
    _case("all_reduce", "empty", lambda n: (0, 3)),
    _case("scan", "inclusive", same),
    _case("scan", "exclusive", same, lambda n: {"exclusive": True}, sizes=SEVERAL),
    _case("scan", "reverse", same, lambda n: {"reverse": True}),
    _case("scan", "exclusive reverse", same, lambda n: {"exclusive": True, "reverse": True}, sizes=SEVERAL),
    _case("all_gather", "dim 0", same),
    _case("all_gather", "dim -1", same, lambda n: {"dim": -1}),
    _case("all_gather", "untiled", same, lambda n: {"dim": 1, "tiled": False}),
    _case("all_gather", "untiled 0-d", lambda n: (), lambda n: {"tiled": False}),
    Case("all_gather", "uneven", _uneven_all_gather, lambda n: (2, max(uneven(n)))),
    _case("reduce_scatter", "dim 0", blocks),
    _case("reduce_scatter", "dim 1 mean", lambda n: (3, 2 * n), lambda n: {"dim": 1, "op": "mean"}),
    _case("reduce_scatter", "untiled", middle, lambda n: {"dim": 1, "tiled": False}),
    _case("reduce_scatter", "max", lambda n: (3, 2 * n), lambda n: {"dim": -1, "op": "max"}, values="ties"),
    _case("reduce_scatter", "min untiled", middle, lambda n: {"dim": 1, "op": "min", "tiled": False}, values="ties"),
    _case("reduce_scatter", "prod", blocks, lambda n: {"op": "prod"}, values="zeros"),
    Case("reduce_scatter", "uneven", _uneven_reduce_scatter("sum"), lambda n: (2, sum(uneven(n)))),
    Case("reduce_scatter", "uneven max", _uneven_reduce_scatter("max"), lambda n: (2, sum(uneven(n))), values="ties"),
    _case("all_to_all", "one dim", blocks),
    _case("all_to_all", "two dims", lambda n: (2 * n, 3), lambda n: {"split_dim": 0, "concat_dim": -1}),
    _case("all_to_all", "two dims back", lambda n: (2, 2 * n, 3), lambda n: {"split_dim": 1, "concat_dim": 0}),
    _case("all_to_all", "untiled", middle, lambda n: {"split_dim": 1, "concat_dim": 2, "tiled": False}),
    Case("all_to_all", "uneven", _uneven_all_to_all, lambda n: (2, max(map(sum, sends(n)))), sizes=SEVERAL),
    Case("all_to_all", "uneven two dims", _uneven_two_dims, lambda n: (max(uneven(n)), sum(uneven(n)), 2)),
    Case("ragged_all_to_all", "", _ragged, lambda n: (4 + 2 * n + 2, 2), aux=_routes),
    _case("ppermute", "shift", same, lambda n: {"perm": shift(n)}),
    _case("ppermute", "partial", same, lambda n: {"perm": partial_shift(n)}, sizes=SEVERAL),
    _case("broadcast", "first", same),
    _case("broadcast", "last", same, lambda n: {"src": n - 1}),
    _case("reduce", "sum", same, lambda n: {"dst": n - 1}),
    _case("reduce", "mean", same, lambda n: {"op": "mean"}),
    _case("reduce", "max", same, lambda n: {"op": "max", "dst": n - 1}, values="ties"),
    _case("reduce", "prod", same, lambda n: {"op": "prod", "dst": n // 2}, values="zeros"),
    _case("gather", "dim 1", same, lambda n: {"dst": n - 1, "dim": 1}),
    _case("scatter", "dim 1", lambda n: (3, 2 * n), lambda n: {"src": n - 1, "dim": 1}),
    Case("send and recv", "ring", _ring, same),
    _case("pvary", "", same),
    _case("all_reduce_invariant", "sum", same),
    _case("all_reduce_invariant", "mean", same, lambda n: {"op": "mean"}),
    _case("all_gather_invariant", "dim 1", same, lambda n: {"dim": 1}),
    _case("shard", "dim -1", lambda n: (3, 2 * n), lambda n: {"dim": -1}),
    Case("barrier", "", _barrier, same),
    Case("axis_index", "", _axis_index, same),
    Case("all_reduce_coalesced", "", _coalesced("all_reduce_coalesced"), blocks),
    Case("all_gather_coalesced", "", _coalesced("all_gather_coalesced"), blocks),
    Case("reduce_scatter_coalesced", "", _coalesced("reduce_scatter_coalesced"), blocks),
]

CASES: dict[str, Case] = {case.id: case for case in _ALL}
assert len(CASES) == len(_ALL), "two cases share an id"
