"""jax.lax's parallel operators. Where JAX has the axis name, these have the two handles.

    jax.lax.psum(x, "i")                        psum(x, group, backend)
    jax.lax.all_to_all(x, "i", 0, 1)            all_to_all(x, group, backend, 0, 1)

Names, options and defaults are JAX's (0.10), and so is the meaning; derivatives are those of check_vma=False. x may be
a pytree of tuples, lists, dicts and None; leaves may be tensors, arrays and Python numbers. Where JAX takes a sequence
of names, these take a sequence of groups, whose ranks are numbered row by row, the last group fastest; pargmax, pargmin
and ragged_all_to_all take one group. Over an empty sequence reductions, all_gather and psum_scatter return x. With
axis_index_groups every rank receives the values of all ranks and uses those of its block; a group of those ranks, made
by fcomm.subgroup, sends less.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import fcomm
from fcomm.arithmetic import FLOAT8, fold
from fcomm.collectives import checks
from fcomm.dtypes import REDUCED
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group

Tree = Any
Groups = Group | Sequence[Group]
Blocks = Sequence[Sequence[int]] | None
_NUMBERS = (bool, int, float, complex)
# Batched, torch has no index_select for other dtypes; slower indexing works for all except bits.
_SELECTED = frozenset(REDUCED) - {torch.uint16, torch.uint32, torch.uint64, *FLOAT8}


def psum(x: Tree, group: Groups, backend: Backend, *, axis_index_groups: Blocks = None) -> Tree:
    """Sum over the group. bool counts as int32; a Python number is size times itself, without communication."""

    def leaf(v: Any) -> Any:
        if isinstance(v, _NUMBERS):
            return _size("psum", group, backend, axis_index_groups) * v
        v = _array(v)
        v = v.to(torch.int32) if v.dtype == torch.bool else v
        return _fold("psum", v, group, backend, "sum", axis_index_groups)

    return _map(leaf, x)


def pmean(x: Tree, group: Groups, backend: Backend, *, axis_index_groups: Blocks = None) -> Tree:
    """Mean over the group. Integers and bool give torch's default float dtype.

    With axis_index_groups of different lengths the sums are divided by the length of the first, as in JAX.
    """
    n = _size("pmean", group, backend, axis_index_groups)
    unequal = axis_index_groups is not None and any(len(block) != n for block in axis_index_groups)

    def leaf(v: Any) -> Any:
        v = v if isinstance(v, _NUMBERS) else _array(v)
        if unequal or isinstance(v, _NUMBERS) or not (v.is_floating_point() or v.is_complex()):
            if isinstance(v, Tensor) and v.is_floating_point() and v.dtype.itemsize < 4:  # round once, as elsewhere
                return (psum(v.float(), group, backend, axis_index_groups=axis_index_groups) / n).to(v.dtype)
            return psum(v, group, backend, axis_index_groups=axis_index_groups) / n
        return _fold("pmean", v, group, backend, "mean", axis_index_groups)

    return _map(leaf, x)


def pmax(x: Tree, group: Groups, backend: Backend, *, axis_index_groups: Blocks = None) -> Tree:
    """Maximum over the group. Unlike JAX's it has a derivative: ties share the cotangent."""
    return _extremum("pmax", x, group, backend, "max", axis_index_groups)


def pmin(x: Tree, group: Groups, backend: Backend, *, axis_index_groups: Blocks = None) -> Tree:
    """Minimum over the group. Unlike JAX's it has a derivative: ties share the cotangent."""
    return _extremum("pmin", x, group, backend, "min", axis_index_groups)


def _extremum(name: str, x: Tree, group: Groups, backend: Backend, op: str, axis_index_groups: Blocks) -> Tree:
    def leaf(v: Any) -> Any:
        if isinstance(v, _NUMBERS):
            _size(name, group, backend, axis_index_groups)  # raises for invalid arguments
            return v
        return _fold(name, _array(v), group, backend, op, axis_index_groups)

    return _map(leaf, x)


def pargmax(x: Tree, group: Group, backend: Backend) -> Tree:
    """The first rank, in group order, that holds the maximum, elementwise."""
    return _map(lambda v: _rank_of(_array(v), pmax(_array(v), group, backend), group, backend), x)


def pargmin(x: Tree, group: Group, backend: Backend) -> Tree:
    """The first rank, in group order, that holds the minimum, elementwise."""
    return _map(lambda v: _rank_of(_array(v), pmin(_array(v), group, backend), group, backend), x)


def _rank_of(x: Tensor, y: Tensor, group: Group, backend: Backend) -> Tensor:
    index = fcomm.axis_index(group, backend).to(x.device)
    nowhere = torch.iinfo(index.dtype).max
    return fcomm.all_reduce(torch.where(x == y, index, nowhere), group, backend, op="min")


def all_gather(
    x: Tree,
    group: Groups,
    backend: Backend,
    *,
    axis_index_groups: Blocks = None,
    axis: int = 0,
    tiled: bool = False,
    to: str = "varying",
) -> Tree:
    """Stack every rank's x on a new axis; tiled: concatenate along axis. to="invarying": all_gather_invariant."""
    if to not in ("varying", "reduced", "invarying"):
        raise ArgumentError(f"all_gather: to is {to!r}; choose one of varying, reduced, invarying")

    def leaf(v: Any) -> Any:
        v, groups = _array(v), _groups("all_gather", group)
        if not groups and axis_index_groups is None:
            return v
        dim = _canonical("all_gather", "axis", axis, v, group, new=0 if tiled else 1)
        if axis_index_groups is not None:
            if to == "invarying":
                raise ArgumentError("all_gather: axis_index_groups needs to='varying'; use a group of those ranks")
            return _concatenated(_of_block("all_gather", v, group, backend, axis_index_groups), dim, tiled)
        gather = fcomm.all_gather_invariant if to == "invarying" else fcomm.all_gather
        v = v if tiled else v.unsqueeze(dim)
        for g in reversed(groups):
            v = gather(v, g, backend, dim=dim)
        return v

    return _map(leaf, x)


def psum_scatter(
    x: Tree,
    group: Groups,
    backend: Backend,
    *,
    scatter_dimension: int = 0,
    axis_index_groups: Blocks = None,
    tiled: bool = False,
) -> Tree:
    """Sum over the group and keep this rank's row; tiled: this rank's block of scatter_dimension."""

    def leaf(v: Any) -> Any:
        v, groups = _array(v), _groups("psum_scatter", group)
        if not groups and axis_index_groups is None:
            return v
        if v.dtype == torch.bool:
            raise TypeError("psum_scatter: x is torch.bool, which has no sum here, as in JAX; pass x.to(torch.int32)")
        if axis_index_groups is not None:
            dim = _canonical("psum_scatter", "scatter_dimension", scatter_dimension, v, group)
            _check_own("psum_scatter", v, group, backend, axis_index_groups, dim, tiled)
            v = _fold("psum_scatter", v, group, backend, "sum", axis_index_groups)
            return _own("psum_scatter", v, group, backend, axis_index_groups, dim, tiled)
        *outer, last = groups
        if outer:
            dim = _canonical("psum_scatter", "scatter_dimension", scatter_dimension, v, groups)
            _check_rows("psum_scatter", groups, v, dim, tiled)
        for g in outer:
            v = fcomm.reduce_scatter(v, g, backend, dim=scatter_dimension)
        return fcomm.reduce_scatter(v, last, backend, dim=scatter_dimension, tiled=tiled)

    return _map(leaf, x)


def all_to_all(
    x: Tree,
    group: Groups,
    backend: Backend,
    split_axis: int,
    concat_axis: int,
    *,
    axis_index_groups: Blocks = None,
    tiled: bool = False,
) -> Tree:
    """Row r of split_axis goes to rank r; the rows received are stacked on concat_axis. tiled: blocks, concatenated."""

    def leaf(v: Any) -> Any:
        v, groups = _array(v), _some_groups("all_to_all", group)
        split_dim = _canonical("all_to_all", "split_axis", split_axis, v, groups)
        concat_dim = _canonical("all_to_all", "concat_axis", concat_axis, v, groups)
        if axis_index_groups is not None:
            _check_own("all_to_all", v, groups, backend, axis_index_groups, split_dim, tiled)
            rows = _of_block("all_to_all", v, groups, backend, axis_index_groups)
            rows = _own("all_to_all", rows, groups, backend, axis_index_groups, split_dim + 1, tiled)
            return _concatenated(rows, concat_dim, tiled)
        if len(groups) > 1:
            return _all_to_all_over(v, groups, backend, split_dim, concat_dim, tiled)
        return fcomm.all_to_all(v, groups[0], backend, split_dim=split_dim, concat_dim=concat_dim, tiled=tiled)

    return _map(leaf, x)


def _all_to_all_over(
    x: Tensor, groups: tuple[Group, ...], backend: Backend, split_dim: int, concat_dim: int, tiled: bool
) -> Tensor:
    """One exchange per group, each along its own dimension: rows[i, j] goes to rank (i, j)."""
    sizes = [g.size for g in groups]
    n = math.prod(sizes)
    _check_rows("all_to_all", groups, x, split_dim, tiled)
    blocks = x.unflatten(split_dim, (n, x.shape[split_dim] // n)) if tiled else x
    rows: Tensor = blocks.movedim(split_dim, 0).unflatten(0, sizes)
    for k, g in enumerate(groups):
        rows = fcomm.all_to_all(rows, g, backend, split_dim=k, concat_dim=k)
    y: Tensor = rows.flatten(0, len(sizes) - 1).movedim(0, concat_dim)
    return y.flatten(concat_dim, concat_dim + 1) if tiled else y


def ragged_all_to_all(
    operand: Tensor,
    output: Tensor,
    input_offsets: Tensor,
    send_sizes: Tensor,
    output_offsets: Tensor,
    recv_sizes: Tensor,
    group: Group,
    backend: Backend,
    *,
    axis_index_groups: Blocks = None,
) -> Tensor:
    """Slices of operand's rows into slices of the receivers' outputs; k * size offsets are k slices for each rank."""
    n = _size("ragged_all_to_all", group, backend, axis_index_groups)
    columns: list[tuple[Tensor, ...]] = []
    for name, v in (
        ("input_offsets", input_offsets),
        ("send_sizes", send_sizes),
        ("output_offsets", output_offsets),
        ("recv_sizes", recv_sizes),
    ):
        checks.is_tensor("ragged_all_to_all", name, v)
        if v.dtype.is_floating_point or v.dtype.is_complex or v.dtype == torch.bool:
            raise ArgumentError(f"ragged_all_to_all {name} must be integer type, got {v.dtype}")
        if v.dim() != 1 or v.shape[0] < 1:
            raise ArgumentError(
                f"ragged_all_to_all {name} must be rank 1 with positive dimension size, but got shape {tuple(v.shape)}"
            )
        if v.shape[0] % n:
            raise ArgumentError(
                f"ragged_all_to_all: {name} has shape {tuple(v.shape)}; group '{group.name}' of size {n} "
                "needs one number for each slice, the same count for every rank"
            )
        of_each = v.reshape(n, -1)
        if axis_index_groups is not None:  # nothing goes to or comes from the ranks of other blocks
            members, _ = _block("ragged_all_to_all", group, backend, axis_index_groups)
            of_each = v.new_zeros(group.size, v.shape[0] // n).index_copy(0, members.to(v.device), of_each)
        columns.append(of_each.unbind(1))
    for starts, sends, lands, recvs in zip(*columns, strict=True):
        output = fcomm.ragged_all_to_all(operand, output, starts, sends, lands, recvs, group, backend)
    return output


def ppermute(x: Tree, group: Groups, backend: Backend, perm: Iterable[tuple[int, int]]) -> Tree:
    """Send x along the (source, destination) pairs of perm; a rank that is not a destination gets zeros.

    Over several groups every rank receives every x, and keeps that of its source.
    """
    try:
        pairs = [(source, destination) for source, destination in perm]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"ppermute: perm is {perm!r}; pass (source, destination) pairs") from error
    groups = _some_groups("ppermute", group)
    if len(groups) == 1:
        return _map(lambda v: fcomm.ppermute(_array(v), groups[0], backend, perm=pairs), x)
    n = axis_size(groups, backend)
    flat = checks.canonical_perm("ppermute", pairs, _joint(groups))
    sources = dict(zip(flat[1::2], flat[::2], strict=True))
    source_of = torch.tensor([sources.get(r, n) for r in range(n)])  # row n is zeros

    def leaf(v: Any) -> Tensor:
        v = _array(v)
        rows = all_gather(v, groups, backend)
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        source = source_of.index_select(0, axis_index(groups, backend).reshape(1))
        return _select(rows, 0, source).squeeze(0)

    return _map(leaf, x)


def pshuffle(x: Tree, group: Groups, backend: Backend, perm: Sequence[int]) -> Tree:
    """Rank i gets x of rank perm[i]."""
    if set(perm) != set(range(len(perm))):
        raise ArgumentError(f"pshuffle: `perm` does not represent a permutation: {list(perm)}; name each rank once")
    return ppermute(x, group, backend, list(zip(perm, range(len(perm)), strict=True)))


def pswapaxes(x: Tree, group: Groups, backend: Backend, axis: int, *, axis_index_groups: Blocks = None) -> Tree:
    """Swap the ranks with an axis of length n: all_to_all(x, .., axis, axis)."""
    return all_to_all(x, group, backend, axis, axis, axis_index_groups=axis_index_groups)


def pbroadcast(x: Tree, group: Groups, backend: Backend, source: int) -> Tree:
    """Every rank gets x of rank source."""
    groups = _some_groups("pbroadcast", group)
    rank = checks.rank_in_group("pbroadcast", "source", source, _joint(groups))

    def leaf(v: Any) -> Tensor:
        v, rest = _array(v), rank
        first, *others = groups
        for g in reversed(others):
            rest, src = divmod(rest, g.size)
            v = fcomm.broadcast(v, g, backend, src=src)
        return fcomm.broadcast(v, first, backend, src=rest)

    return _map(leaf, x)


def pvary(x: Tree, group: Groups, backend: Backend) -> Tree:
    """Let a replicated value enter per-rank use: the identity, whose cotangents are summed over the ranks."""

    def leaf(v: Any) -> Tensor:
        x = _array(v)
        for g in _groups("pvary", group):
            x = fcomm.pvary(x, g, backend)
        return x

    return _map(leaf, x)


def pcast(x: Tree, group: Groups, backend: Backend, *, to: str) -> Tree:
    """pvary, for to="varying"; JAX's other casts are between types that fcomm does not track."""
    if to != "varying":
        raise ArgumentError(f"pcast: to is {to!r}; only 'varying' has a meaning here")
    return pvary(x, group, backend)


def axis_index(group: Groups, backend: Backend) -> Tensor:
    """This rank's number, an int64 tensor; over several groups it counts row by row, the last group fastest."""
    groups = _groups("axis_index", group)
    if not groups:
        return torch.zeros((), dtype=torch.int64)
    first, *rest = groups
    index: Tensor = fcomm.axis_index(first, backend)
    for g in rest:
        index = index * g.size + fcomm.axis_index(g, backend)
    return index


def axis_size(group: Groups, backend: Backend) -> int:
    """Number of ranks, an int; over several groups their product."""
    return math.prod([g.size for g in _groups("axis_size", group)])


# --- private ------------------------------------------------------------------------------------------------------


def _groups(name: str, group: Groups) -> tuple[Group, ...]:
    if isinstance(group, Group):
        return (group,)
    if not isinstance(group, tuple | list) or not all(isinstance(g, Group) for g in group):
        raise TypeError(f"{name}: group is {group!r}; pass a Group, or a list or tuple of them")
    if len({g.key for g in group}) < len(group):
        raise ArgumentError(f"{name}: group is the sequence {[g.name for g in group]}; pass each once")
    return tuple(group)


def _some_groups(name: str, group: Groups) -> tuple[Group, ...]:
    groups = _groups(name, group)
    if not groups:
        raise ArgumentError(f"{name}: no group is given; pass a group, or a sequence of at least one")
    return groups


def _joint(groups: tuple[Group, ...]) -> Group:
    """A group that stands for several ones in checks of ranks."""
    if len(groups) == 1:
        return groups[0]
    return Group(" and ".join(g.name for g in groups), tuple(range(math.prod([g.size for g in groups]))), None, True)


def _check_rows(name: str, groups: tuple[Group, ...], x: Tensor, dim: int, tiled: bool) -> None:
    """x.shape[dim] must be the number of ranks of all groups; tiled: a multiple of it."""
    n = math.prod([g.size for g in groups])
    if x.shape[dim] % n if tiled else x.shape[dim] != n:
        raise ArgumentError(
            f"{name}: x.shape[{dim}] is {x.shape[dim]}; the {n} ranks of groups {[g.name for g in groups]} need "
            + (f"a multiple of {n}" if tiled else f"{n}, a row for each")
        )


def _array(v: Any) -> Tensor:
    return v if isinstance(v, Tensor) else torch.as_tensor(v)


def _canonical(name: str, option: str, dim: int, x: Tensor, group: Groups, new: int = 0) -> int:
    return checks.canonical_dim(name, option, dim, x, _some_groups(name, group)[-1], new=new)


def _select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """x.index_select, or indexing where torch lacks that."""
    index = index.to(x.device)
    return x.index_select(dim, index) if x.dtype in _SELECTED else x.movedim(dim, 0)[index].movedim(0, dim)


def _fold(name: str, x: Tensor, group: Groups, backend: Backend, op: str, blocks: Blocks) -> Tensor:
    if blocks is None:
        for g in _groups(name, group):
            x = fcomm.all_reduce(x, g, backend, op=op)
        return x
    _size(name, group, backend, blocks)
    checks.op_of(name, op, x)
    if len({len(block) for block in blocks}) == 1:
        return fold(_of_block(name, x, group, backend, blocks).unbind(0), op)
    rows = all_gather(x, group, backend)
    folded = torch.stack([fold([rows[int(r)] for r in block], op) for block in blocks])
    block_of = {int(r): k for k, block in enumerate(blocks) for r in block}
    own = torch.tensor([block_of[r] for r in sorted(block_of)]).index_select(0, axis_index(group, backend).reshape(1))
    return _select(folded, 0, own).squeeze(0)


# --- axis_index_groups: the ranks in blocks, of one length but for reductions -------------------------------------

_REDUCTIONS = ("psum", "pmean", "pmax", "pmin")


def _size(name: str, group: Groups, backend: Backend, blocks: Blocks) -> int:
    """Number of ranks that take part with this one; as in JAX, that of the first block if their lengths differ."""
    n = math.prod([g.size for g in _groups(name, group)])
    if blocks is None:
        return n
    _some_groups(name, group)
    try:
        lengths, ranks = {len(block) for block in blocks}, sorted(checks.integer(r) for block in blocks for r in block)
    except TypeError:  # not a list of lists
        lengths, ranks = {0}, []
    if ranks != list(range(n)) or 0 in lengths:
        raise ArgumentError(
            f"{name}: axis_index_groups is {blocks!r}; put each rank of 0 .. {n - 1} into one block, no block empty"
        )
    if len(lengths) > 1 and name not in _REDUCTIONS:
        raise ArgumentError(f"{name}: axis_index_groups is {blocks!r}; put the ranks into blocks all of a length")
    return len(blocks[0])


def _block(name: str, group: Groups, backend: Backend, blocks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The ranks of this rank's block, and this rank's position among them, of shape (1,)."""
    _size(name, group, backend, blocks)
    of = {int(r): [int(member) for member in block] for block in blocks for r in block}
    index = axis_index(group, backend).reshape(1)
    members = torch.tensor([of[r] for r in sorted(of)]).index_select(0, index)
    return members.squeeze(0), torch.tensor([of[r].index(r) for r in sorted(of)]).index_select(0, index)


def _of_block(name: str, x: Tensor, group: Groups, backend: Backend, blocks: Sequence[Sequence[int]]) -> Tensor:
    """x of every rank of this rank's block, stacked."""
    members, _ = _block(name, group, backend, blocks)
    rows: Tensor = all_gather(x, group, backend)
    return _select(rows, 0, members)


def _check_own(
    name: str, x: Tensor, group: Groups, backend: Backend, blocks: Sequence[Sequence[int]], dim: int, tiled: bool
) -> None:
    """x must have a row of dim for each rank of a block; tiled: a part."""
    n = _size(name, group, backend, blocks)
    if x.shape[dim] % n if tiled else x.shape[dim] != n:
        raise ArgumentError(
            f"{name}: an axis of length {x.shape[dim]} does not fit blocks of {n} ranks; "
            + (f"pass a multiple of {n}" if tiled else f"pass {n}, a row for each")
        )


def _own(
    name: str, x: Tensor, group: Groups, backend: Backend, blocks: Sequence[Sequence[int]], dim: int, tiled: bool
) -> Tensor:
    """This rank's row of dim; tiled: its part."""
    n = _size(name, group, backend, blocks)
    _, place = _block(name, group, backend, blocks)
    x = x.unflatten(dim, (n, x.shape[dim] // n)) if tiled else x
    return _select(x, dim, place).squeeze(dim)


def _concatenated(rows: Tensor, dim: int, tiled: bool) -> Tensor:
    """rows stacked on dim; tiled: concatenated along it."""
    if not tiled:
        return rows.movedim(0, dim)
    return rows.movedim(0, dim).flatten(dim, dim + 1)


def _map(fn: Callable[[Any], Any], tree: Tree) -> Tree:
    """fn of every leaf, in a tree of the same shape."""
    if tree is None:
        return None
    if isinstance(tree, OrderedDict):
        return OrderedDict((k, _map(fn, v)) for k, v in tree.items())
    if isinstance(tree, dict):
        return {k: _map(fn, v) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[_map(fn, v) for v in tree])
    if isinstance(tree, tuple | list):
        return type(tree)([_map(fn, v) for v in tree])
    return fn(tree)
