"""Arguments of collectives: made canonical, or refused before any communication, with the same text on every rank."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fcomm.arithmetic import OPS, check_op
from fcomm.errors import ArgumentError, MismatchError
from fcomm.group import Group
from fcomm.registration import holds, not_a_group, not_a_tensor, refuse_nested


def is_tensor(name: str, option: str, x: object) -> None:
    """x must be a tensor; apply checks the rest."""
    if not isinstance(x, Tensor):
        raise not_a_tensor(name, option, x)


def is_group(name: str, group: object) -> None:
    """group must be a Group."""
    if not isinstance(group, Group):
        raise not_a_group(name, group)


def op_of(name: str, op: str, x: Tensor, allowed: Sequence[str] = OPS) -> None:
    """op must be known and have a meaning for x's dtype."""
    is_tensor(name, "x", x)
    check_op(name, op, x.dtype, allowed)


def canonical_dim(name: str, option: str, dim: int, x: Tensor, group: Group, *, new: int = 0) -> int:
    """dim counted from the front, in x or in x with `new` more dimensions."""
    is_tensor(name, "x", x)
    is_group(name, group)
    if x.is_nested:  # before its shape is read
        refuse_nested(name)
    ndim = x.dim() + new
    at = dim if type(dim) is int else integer(dim, none=ndim)
    if not -ndim <= at < ndim:
        remedy = f"choose one in {-ndim} .. {ndim - 1}" if ndim else "reshape x to (1,)"
        of = f"the {ndim} dimensions of the result" if new else f"x of shape {tuple(x.shape)}"
        raise ArgumentError(f"{name}: {option} is {dim!r}, out of range for {of} on group '{group.name}'; {remedy}")
    return at + ndim if at < 0 else at


def divisible(name: str, x: Tensor, dim: int, group: Group) -> None:
    """x.shape[dim] must be cut into group.size equal blocks."""
    size, length = group.size, x.shape[dim]
    if not holds(length % size == 0):
        raise ArgumentError(
            f"{name}: x.shape[{dim}] is {length}, not divisible by group '{group.name}' of size {size}; "
            f"pad to {length + size - length % size} or choose another dim"
        )


def one_each(name: str, x: Tensor, dim: int, group: Group) -> None:
    """x.shape[dim] must be the number of ranks."""
    if not holds(x.shape[dim] == group.size):
        raise ArgumentError(
            f"{name}: x.shape[{dim}] is {x.shape[dim]}, but with tiled=False it must be {group.size}, the size of "
            f"group '{group.name}'; reshape x or pass tiled=True"
        )


def canonical_sizes(name: str, option: str, sizes: Sequence[int], group: Group) -> list[int]:
    """One block length for each rank."""
    result: list[int] | None = None
    if not isinstance(sizes, Sequence) and hasattr(sizes, "tolist"):  # an array or a tensor
        sizes = sizes.tolist()
    if isinstance(sizes, Sequence) and not isinstance(sizes, str):
        # Under compile a symbolic size is not an int, and operator.index would fix its value.
        result = [s if isinstance(s, int | torch.SymInt) else integer(s) for s in sizes]
    if result is None or len(result) != group.size or any(isinstance(s, bool) or not holds(s >= 0) for s in result):
        raise ArgumentError(
            f"{name}: {option} is {sizes!r}; group '{group.name}' of size {group.size} needs a list of "
            f"{group.size} lengths >= 0, one for each rank"
        )
    return result


def integer(number: object, none: int = -1) -> int:
    """number as an int, also from numpy or a tensor of one integer; `none` if it is not an integer, or a bool."""
    if isinstance(number, bool) or (isinstance(number, Tensor) and number.dtype == torch.bool):
        return none
    try:
        return operator.index(number)  # type: ignore[arg-type]  # it may be anything
    except TypeError:
        return none


def own_length(name: str, option: str, sizes: Sequence[int], x: Tensor, dim: int, group: Group) -> None:
    """x.shape[dim] must be this rank's entry of sizes; on a simulated axis, where shapes are equal, the largest."""
    expected = max(sizes) if group.simulated else sizes[group.rank or 0]
    if not holds(x.shape[dim] == expected):
        which = "the largest" if group.simulated else f"rank {group.rank}'s"
        raise ArgumentError(
            f"{name}: x.shape[{dim}] is {x.shape[dim]}, but {which} entry of {option}={list(sizes)} is {expected}; "
            f"pass the lengths that the ranks of group '{group.name}' hold"
        )


def total_length(name: str, option: str, sizes: Sequence[int], x: Tensor, dim: int, group: Group) -> None:
    """x.shape[dim] must be the sum of sizes."""
    if not holds(x.shape[dim] == sum(sizes)):
        raise ArgumentError(
            f"{name}: x.shape[{dim}] is {x.shape[dim]}, but {option}={list(sizes)} add up to {sum(sizes)}; "
            f"make them agree on group '{group.name}'"
        )


def rank_in_group(name: str, option: str, rank: int, group: Group) -> int:
    """rank must be a rank within the group."""
    is_group(name, group)
    at = rank if type(rank) is int else integer(rank)
    if not 0 <= at < group.size:
        raise ArgumentError(
            f"{name}: {option} is {rank!r}, not a rank of group '{group.name}' of size {group.size}; "
            f"ranks count within the group, 0 .. {group.size - 1}"
        )
    return at


def same_message(name: str, message: Tensor, like: Tensor, group: Group) -> None:
    """The message must have the dtype and shape that like announces."""
    fits = message.dtype == like.dtype and message.dim() == like.dim()
    if not (fits and all(holds(sent == d) for sent, d in zip(message.shape, like.shape, strict=True))):
        raise MismatchError(
            f"{name}: the message on group '{group.name}' is {message.dtype} {tuple(message.shape)}, like is "
            f"{like.dtype} {tuple(like.shape)}; pass a like of the message's shape and dtype",
            op=name, group=group.name, rank=group.rank,
        )  # fmt: skip


_PAIRS = (tuple, list, Sequence)  # the usual ones first: isinstance of an abstract class is slow


def canonical_perm(name: str, perm: Sequence[tuple[int, int]], group: Group) -> tuple[int, ...]:
    """The pairs of a permutation, flat; every source and every destination at most once."""
    is_group(name, group)
    if not isinstance(perm, Sequence) or isinstance(perm, str):
        raise ArgumentError(f"{name}: perm is {perm!r} on group '{group.name}'; pass (source, destination) pairs")
    flat: list[int] = []
    for pair in perm:
        if not isinstance(pair, _PAIRS) or len(pair) != 2:
            raise ArgumentError(
                f"{name}: perm has the entry {pair!r} on group '{group.name}'; pass (source, destination) pairs"
            )
        flat += pair
    n = group.size
    # A call for each rank would take as long as everything else here.
    flat = [
        rank if type(rank) is int and 0 <= rank < n else rank_in_group(name, "a rank in perm", rank, group)
        for rank in flat
    ]
    for what, ranks in (("source", flat[::2]), ("destination", flat[1::2])):
        if len(set(ranks)) < len(ranks):
            twice = min(r for r in ranks if ranks.count(r) > 1)
            raise ArgumentError(
                f"{name}: perm={list(perm)} names {what} {twice} twice on group '{group.name}'; "
                "each rank sends at most once and receives at most once, use broadcast or reduce for more"
            )
    return tuple(flat)
