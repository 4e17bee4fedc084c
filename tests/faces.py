"""Every function of fcomm.compat: how it is called, and what it means over the list of all ranks' tensors.

A derivative is torch's own derivative of the meaning, counting every rank's output. Megatron's region functions count a
replicated value once; for them `pull` states the cotangents as in Megatron's source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fcomm.compat import fastvideo, funcol, lax, megatron

Ranks = list[Tensor]


@dataclass(frozen=True)
class Face:
    """call(x, group, backend) on one rank; meaning(xs) -> ys and pull(cts) -> cotangents of xs over all ranks."""

    name: str
    call: Callable[..., Tensor]
    shape: Callable[[int], Sequence[int]]
    meaning: Callable[[Ranks], Ranks]
    pull: Callable[[Ranks], Ranks] | None = None


def everywhere(y: Tensor, n: int) -> Ranks:
    return [y] * n


def total(xs: Ranks) -> Tensor:
    return torch.stack(xs).sum(0)


def chunks(x: Tensor, n: int, dim: int) -> Ranks:
    return list(x.chunk(n, dim))


def exchanged(xs: Ranks, split: int, concat: int) -> Ranks:
    blocks = [chunks(x, len(xs), split) for x in xs]
    return [torch.cat([row[r] for row in blocks], concat) for r in range(len(xs))]


def swapped(xs: Ranks, split: int, concat: int) -> Ranks:
    return [torch.stack([x.select(split, r) for x in xs], concat) for r in range(len(xs))]


def cycle(n: int) -> list[int]:
    """Destinations 1, 2, .., 0: not its own inverse for n > 2."""
    return [(r + 1) % n for r in range(n)]


def whole(xs: Ranks, dim: int) -> Ranks:
    return everywhere(torch.cat(xs, dim), len(xs))


def own_sum(xs: Ranks, dim: int) -> Ranks:
    return chunks(total(xs), len(xs), dim)


def small(n: int) -> tuple[int, ...]:
    return 2, 3


def square(n: int) -> tuple[int, ...]:
    return n, 2, n


def wide(n: int) -> tuple[int, ...]:
    return 2 * n, n, 2 * n


def _tree(x: Tensor, group: Any, backend: Any) -> Tensor:
    tree = lax.psum({"a": x, "b": (x.sin(), [None])}, group, backend)
    return tree["a"] + tree["b"][0]


def _ragged(x: Tensor, group: Any, backend: Any) -> Tensor:
    """Two slices for each rank, of 1 row and of none: row r of x lands in row 2 * sender + 1 of rank r's output."""
    n = group.size
    mine = lax.axis_index(group, backend)
    starts = torch.arange(n).repeat_interleave(2)
    sizes = torch.tensor([1, 0]).repeat(n)
    lands = (2 * mine + 1).expand(2 * n)
    return lax.ragged_all_to_all(x, torch.ones_like(torch.cat([x, x])), starts, sizes, lands, sizes, group, backend)


def _ragged_meaning(xs: Ranks) -> Ranks:
    rows = swapped(xs, 0, 0)
    return [torch.stack([torch.ones_like(y), y], 1).flatten(0, 1) for y in rows]


LAX = [
    Face("lax.psum", lax.psum, small, lambda xs: everywhere(total(xs), len(xs))),
    Face("lax.psum tree", _tree, small, lambda xs: everywhere(total(xs) + total([x.sin() for x in xs]), len(xs))),
    Face("lax.pmean", lax.pmean, small, lambda xs: everywhere(total(xs) / len(xs), len(xs))),
    Face("lax.pmax", lax.pmax, small, lambda xs: everywhere(torch.stack(xs).amax(0), len(xs))),
    Face("lax.pmin", lax.pmin, small, lambda xs: everywhere(torch.stack(xs).amin(0), len(xs))),
    Face("lax.all_gather", lax.all_gather, small, lambda xs: everywhere(torch.stack(xs), len(xs))),
    Face(
        "lax.all_gather tiled", lambda x, g, b: lax.all_gather(x, g, b, axis=1, tiled=True), small,
        lambda xs: whole(xs, 1),
    ),
    Face(
        "lax.all_gather invarying", lambda x, g, b: lax.all_gather(x, g, b, axis=1, to="invarying"), small,
        lambda xs: everywhere(torch.stack(xs, 1), len(xs)), lambda cts: [ct[:, r] for r, ct in enumerate(cts)],
    ),
    Face("lax.psum_scatter", lax.psum_scatter, square, lambda xs: list(total(xs).unbind(0))),
    Face(
        "lax.psum_scatter tiled", lambda x, g, b: lax.psum_scatter(x, g, b, scatter_dimension=2, tiled=True), wide,
        lambda xs: own_sum(xs, 2),
    ),
    Face("lax.all_to_all", lambda x, g, b: lax.all_to_all(x, g, b, 0, 1), square, lambda xs: swapped(xs, 0, 1)),
    Face(
        "lax.all_to_all tiled", lambda x, g, b: lax.all_to_all(x, g, b, 2, 0, tiled=True), wide,
        lambda xs: exchanged(xs, 2, 0),
    ),
    Face("lax.pswapaxes", lambda x, g, b: lax.pswapaxes(x, g, b, 2), square, lambda xs: swapped(xs, 2, 2)),
    Face(
        "lax.ppermute", lambda x, g, b: lax.ppermute(x, g, b, list(enumerate(cycle(g.size)))), small,
        lambda xs: [xs[r - 1] for r in range(len(xs))],
    ),
    Face(
        "lax.pshuffle", lambda x, g, b: lax.pshuffle(x, g, b, cycle(g.size)), small,
        lambda xs: [xs[s] for s in cycle(len(xs))],
    ),
    Face(
        "lax.pbroadcast", lambda x, g, b: lax.pbroadcast(x, g, b, g.size - 1), small,
        lambda xs: everywhere(xs[-1], len(xs)),
    ),
    Face("lax.pvary", lax.pvary, small, lambda xs: xs, lambda cts: everywhere(total(cts), len(cts))),
    Face(
        "lax.axis_index", lambda x, g, b: x * lax.axis_index(g, b) + lax.axis_size(g, b), small,
        lambda xs: [x * r + len(xs) for r, x in enumerate(xs)],
    ),
    Face("lax.ragged_all_to_all", _ragged, lambda n: (n, 2), _ragged_meaning),
]  # fmt: skip


def _reduced(op: Any, fold: Callable[[Tensor], Tensor]) -> Face:
    return Face(
        f"funcol.all_reduce {op}", lambda x, g, b: funcol.all_reduce(x, op, g, backend=b), small,
        lambda xs: everywhere(fold(torch.stack(xs)), len(xs)),
    )  # fmt: skip


def _several(name: str, *args: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, g: Any, b: Any) -> Tensor:
        ys = getattr(funcol, name)([x, x.sin()], *args, g, backend=b)
        return torch.cat([y.reshape(-1) for y in ys])

    return call


def _each(of: Callable[[Ranks], Ranks], of_second: Callable[[Ranks], Ranks] | None = None) -> Callable[[Ranks], Ranks]:
    def meaning(xs: Ranks) -> Ranks:
        parts = of(xs), (of_second or of)([x.sin() for x in xs])
        return [torch.cat([y.reshape(-1) for y in ys]) for ys in zip(*parts, strict=True)]

    return meaning


FUNCOL = [
    _reduced("sum", lambda rows: rows.sum(0)),
    _reduced("AVG", lambda rows: rows.mean(0)),
    _reduced("product", lambda rows: rows.prod(0)),
    _reduced("Max", lambda rows: rows.amax(0)),
    _reduced(dist.ReduceOp.MIN, lambda rows: rows.amin(0)),
    Face(
        "funcol.all_gather_single", lambda x, g, b: funcol.all_gather_single(x, 1, g, backend=b), small,
        lambda xs: whole(xs, 1),
    ),
    Face(
        "funcol.all_gather_tensor 0-d", lambda x, g, b: funcol.all_gather_tensor(x, 0, g, backend=b), lambda n: (),
        lambda xs: everywhere(torch.stack(xs), len(xs)),
    ),
    Face(
        "funcol.reduce_scatter_tensor", lambda x, g, b: funcol.reduce_scatter_tensor(x, "sum", 2, g, backend=b), wide,
        lambda xs: own_sum(xs, 2),
    ),
    Face(
        "funcol.reduce_scatter_single_autograd max",
        lambda x, g, b: funcol.reduce_scatter_single_autograd(x, "max", 0, g, "", backend=b), wide,
        lambda xs: chunks(torch.stack(xs).amax(0), len(xs), 0),
    ),
    Face(
        "funcol.all_to_all_single", lambda x, g, b: funcol.all_to_all_single(x, None, None, g, backend=b), wide,
        lambda xs: exchanged(xs, 0, 0),
    ),
    Face(
        "funcol.broadcast", lambda x, g, b: funcol.broadcast(x, g.size - 1, g, backend=b), small,
        lambda xs: everywhere(xs[-1], len(xs)),
    ),
    Face(
        "funcol.permute_tensor", lambda x, g, b: funcol.permute_tensor(x, cycle(g.size), g, backend=b), small,
        lambda xs: [xs[r - 1] for r in range(len(xs))],
    ),
    Face("funcol.wait_tensor", lambda x, g, b: funcol.wait_tensor(x) * 1, small, lambda xs: xs),
    Face(
        "funcol.all_reduce_coalesced", _several("all_reduce_coalesced", "sum"), small,
        _each(lambda xs: everywhere(total(xs), len(xs))),
    ),
    Face(
        "funcol.all_gather_into_tensor_coalesced", _several("all_gather_into_tensor_coalesced"), small,
        _each(lambda xs: whole(xs, 0)),
    ),
    Face(
        "funcol.reduce_scatter_tensor_coalesced", _several("reduce_scatter_tensor_coalesced", "sum", [2, 0]), wide,
        _each(lambda xs: own_sum(xs, 2), lambda xs: own_sum(xs, 0)),
    ),
]  # fmt: skip


def _gathered(cts: Ranks, dim: int) -> Ranks:
    return whole(cts, dim)


def _own_slices(cts: Ranks, dim: int) -> Ranks:
    return [chunks(ct, len(cts), dim)[r] for r, ct in enumerate(cts)]


MEGATRON = [
    Face(
        "megatron.copy_to_tensor", megatron.copy_to_tensor_model_parallel_region, small,
        lambda xs: xs, lambda cts: everywhere(total(cts), len(cts)),
    ),
    Face(
        "megatron.reduce_from_tensor", megatron.reduce_from_tensor_model_parallel_region, small,
        lambda xs: everywhere(total(xs), len(xs)), lambda cts: cts,
    ),
    Face(
        "megatron.scatter_to_tensor", megatron.scatter_to_tensor_model_parallel_region, wide,
        lambda xs: _own_slices(xs, -1), lambda cts: _gathered(cts, -1),
    ),
    Face(
        "megatron.gather_from_tensor", megatron.gather_from_tensor_model_parallel_region, small,
        lambda xs: whole(xs, -1), lambda cts: _own_slices(cts, -1),
    ),
    Face(
        "megatron.scatter_to_sequence", megatron.scatter_to_sequence_parallel_region, wide,
        lambda xs: _own_slices(xs, 0), lambda cts: _gathered(cts, 0),
    ),
    Face(
        "megatron.gather_from_sequence", megatron.gather_from_sequence_parallel_region, small,
        lambda xs: whole(xs, 0), lambda cts: own_sum(cts, 0),
    ),
    Face(
        "megatron.gather_from_sequence replicated",
        lambda x, g, b: megatron.gather_from_sequence_parallel_region(x, False, group=g, backend=b), small,
        lambda xs: whole(xs, 0), lambda cts: _own_slices(cts, 0),
    ),
    Face(
        "megatron.reduce_scatter_to_sequence", megatron.reduce_scatter_to_sequence_parallel_region, wide,
        lambda xs: own_sum(xs, 0), lambda cts: _gathered(cts, 0),
    ),
    Face(
        "megatron.all_gather_last_dim", megatron.all_gather_last_dim_from_tensor_parallel_region, small,
        lambda xs: whole(xs, -1), lambda cts: own_sum(cts, -1),
    ),
    Face(
        "megatron.reduce_scatter_last_dim", megatron.reduce_scatter_last_dim_to_tensor_parallel_region, wide,
        lambda xs: own_sum(xs, -1), lambda cts: _gathered(cts, -1),
    ),
    Face(
        "megatron.all_to_all", lambda x, g, b: megatron.all_to_all(g, x, backend=b), wide,
        lambda xs: exchanged(xs, 0, 0),
    ),
    Face(
        "megatron.all_to_all_sp2hp", megatron.all_to_all_sp2hp, wide,
        lambda xs: exchanged([x.flatten(0, 1) for x in xs], 1, 0),
    ),
    Face(
        "megatron.all_to_all_hp2sp", megatron.all_to_all_hp2sp, wide,
        lambda xs: exchanged([x.flatten(0, 1) for x in xs], 0, 1),
    ),
]  # fmt: skip


def _heads(n: int) -> tuple[int, ...]:
    return 2, 2 * n, n, 3


def _gather(x: Tensor, g: Any, b: Any) -> Tensor:
    y = fastvideo.gather(x, g, b, dst=g.size - 1)
    return x.new_zeros((*x.shape[:-1], g.size * x.shape[-1])) + 0 * x.sum() if y is None else y


FASTVIDEO = [
    Face("fastvideo.all_reduce", fastvideo.all_reduce, small, lambda xs: everywhere(total(xs), len(xs))),
    Face(
        "fastvideo.all_reduce prod", lambda x, g, b: fastvideo.all_reduce(x, dist.ReduceOp.PRODUCT, g, b), small,
        lambda xs: everywhere(torch.stack(xs).prod(0), len(xs)),
    ),
    Face("fastvideo.all_gather", fastvideo.all_gather, small, lambda xs: whole(xs, -1)),
    Face(
        "fastvideo.all_gatherv", lambda x, g, b: fastvideo.all_gatherv(x, 0, [x.shape[0]] * g.size, g, b), small,
        lambda xs: whole(xs, 0),
    ),
    Face("fastvideo.reduce_scatter", fastvideo.reduce_scatter, wide, lambda xs: own_sum(xs, -1)),
    Face("fastvideo.reduce_scatterv", fastvideo.reduce_scatterv, wide, lambda xs: own_sum(xs, -1)),
    Face("fastvideo.broadcast", fastvideo.broadcast, small, lambda xs: everywhere(xs[0], len(xs))),
    Face(
        "fastvideo.slice", lambda x, g, b: fastvideo.slice(x, g, b, scale_grad=False), wide,
        lambda xs: _own_slices(xs, -1), lambda cts: _gathered(cts, -1),
    ),
    Face("fastvideo.all_to_all_4D", fastvideo.all_to_all_4D, _heads, lambda xs: exchanged(xs, 2, 1)),
    Face(
        "fastvideo.all_to_all_4D back", lambda x, g, b: fastvideo.all_to_all_4D(x, 1, 2, group=g, backend=b), _heads,
        lambda xs: exchanged(xs, 1, 2),
    ),
]  # fmt: skip

# Not in FACES, since ranks other than the root get None, which carries no cotangent back.
GATHER = Face(
    "fastvideo.gather", _gather, small,
    lambda xs: [torch.zeros_like(torch.cat(xs, -1)) for _ in xs[:-1]] + [torch.cat(xs, -1)],
)  # fmt: skip

FACES = {face.name: face for face in LAX + FUNCOL + MEGATRON + FASTVIDEO}
