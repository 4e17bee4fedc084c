"""What c10d and the vendors' machines share: a tensor as one row for each rank, and sizes that must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from fcomm.dtypes import CODES
from fcomm.dtypes import name as dtype_name
from fcomm.errors import MismatchError
from fcomm.group import Group


def elements(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The elements of x, one after the other, as dtype; a view if x is contiguous."""
    # A tensor of one element is contiguous with any stride, but a view of another width needs stride 1.
    return x.contiguous().as_strided((x.numel(),), (1,)).view(dtype)


def unstack(rows: Tensor, dim: int) -> Tensor:
    """[n, .., d, ..] -> [.., n * d, ..]: the rows concatenated along dim (a dim of one row)."""
    return rows.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def stack_blocks(x: Tensor, dim: int, size: int) -> Tensor:
    """[.., n * d, ..] -> [n, .., d, ..]: the inverse."""
    blocks: Tensor = x.unflatten(dim, (size, x.shape[dim] // size))
    return blocks.movedim(dim, 0).contiguous()


def pad(x: Tensor, dim: int, length: int) -> Tensor:
    """x padded with zeros at the end of dim, up to length; by a copy, which every dtype has."""
    y = x.new_zeros((*x.shape[:dim], length, *x.shape[dim + 1 :]))
    y.narrow(dim, 0, x.shape[dim]).copy_(x)
    return y


def pack(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, list[int]]:
    """x cut along dim: its blocks one after the other in a flat tensor, and their lengths in it."""
    blocks = [block.reshape(-1) for block in x.split(list(sizes), dim)]
    return torch.cat(blocks), [block.numel() for block in blocks]


def exchange_uneven(
    exchange: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor],
    x: Tensor,
    group: Group,
    split_dim: int,
    concat_dim: int,
    send_sizes: Sequence[int],
    recv_sizes: Sequence[int],
) -> Tensor:
    """all_to_all with sizes, by exchange(flat, sends, recvs): sends[r] elements go to rank r, recvs[r] come from it."""
    packed, sends = pack(x, send_sizes, split_dim)
    shapes = [list(x.shape) for _ in range(group.size)]
    for shape, length in zip(shapes, recv_sizes, strict=True):
        shape[split_dim] = send_sizes[group.rank or 0]
        shape[concat_dim] = length
    recvs = [prod(shape) for shape in shapes]
    blocks = exchange(packed, sends, recvs).split(recvs)
    return torch.cat([b.reshape(shape) for b, shape in zip(blocks, shapes, strict=True)], concat_dim)


# --- agreement ----------------------------------------------------------------------------------------------------

# said: the sizes that each rank announces, in rank order; None in a captured graph, where they cannot be read. All
# ranks compare all of them, and raise together instead of waiting for bytes that never come.


def mismatch(name: str, group: Group, what: str) -> MismatchError:
    """The error of a call in which the ranks differ: what they do, and what to do about it."""
    text = f"{name}: the ranks of group '{group.name}' {what}"
    return MismatchError(text, op=name, group=group.name, rank=group.rank)


def check_same(name: str, option: str, group: Group, said: Sequence[Sequence[int]] | None) -> None:
    """Raise MismatchError unless all ranks pass the same option."""
    if said is not None and any(row != said[0] for row in said):
        raise mismatch(name, group, f"pass different {option}: {list(said)}; make them equal")


def check_blocks(name: str, group: Group, said: Sequence[Sequence[int]] | None, *, one_dim: bool) -> None:
    """Raise MismatchError unless all_to_all's sizes fit; a row of said is a rank's send_sizes and recv_sizes.

    one_dim: split_dim and concat_dim are the same, so each rank has its own sizes.
    """
    if said is None:
        return
    n = group.size
    wrong = [(s, r) for s in range(n) for r in range(n) if said[s][r] != said[r][n + s]]
    if one_dim and wrong:
        s, r = wrong[0]
        raise mismatch(
            name,
            group,
            f"disagree: rank {s} sends {said[s][r]} to rank {r}, which expects {said[r][n + s]}; "
            f"make send_sizes of rank {s} and recv_sizes of rank {r} agree",
        )
    if not one_dim and any(row != said[0] for row in said):
        raise mismatch(
            name,
            group,
            f"pass different send_sizes and recv_sizes: {list(said)}; with split_dim != concat_dim they partition the "
            "two dims, the same on every rank",
        )


# --- messages -----------------------------------------------------------------------------------------------------


# count, width, dtype, derivative, ndim, a hash of the whole shape, and as much of the shape as an error shows; int64.
_SHOWN = 16
HEADER = 6 + _SHOWN


def header(x: Tensor, derivative: int) -> Tensor:
    """What precedes a message, [HEADER]: its description, in numbers that are the same in all processes."""
    return torch.tensor(_described(x, derivative), dtype=torch.int64, device=x.device)


def _described(x: Tensor, derivative: int) -> list[int]:
    shape = tuple(x.shape)
    shown = [*shape[:_SHOWN], *[0] * (_SHOWN - len(shape))]
    # Only ints are hashed: the hash of a string differs among processes.
    return [x.numel(), x.element_size(), CODES[x.dtype], derivative, len(shape), hash(shape), *shown]


def nbytes(said: Sequence[int]) -> int:
    """The length of the message that the header announces."""
    return said[0] * said[1]


def misfit(group: Group, src: int, said: Sequence[int], like: Tensor, derivative: int) -> MismatchError | None:
    """The error of a message whose header differs from that of like; None if it does not."""
    own = _described(like, derivative)
    if list(said) == own:
        return None
    if said[3] != derivative:
        return mismatch(
            "recv",
            group,
            f"disagree: rank {src} sends {kind(said[3])}, rank {group.rank} expects {kind(derivative)}; {BOTH_OR_NONE}",
        )
    return mismatch(
        "recv",
        group,
        f"disagree: rank {src} sends {said[0]} elements of {said[1]} bytes, like of rank {group.rank} has {own[0]} "
        f"of {own[1]}: {_named(said)} is sent, {_named(own)} expected; pass a like of the message's shape and dtype",
    )


BOTH_OR_NONE = (
    "differentiate both the token of a send and the result of its recv on the other rank, or detach both: the "
    "derivative that one sends the other must take"
)


def kind(derivative: int) -> str:
    """What kind of message send has sent, in words."""
    return {0: "a message of send", 1: "the cotangent of a recv", 2: "the tangent of a send"}.get(
        derivative, "a derivative of higher order"
    )


def _named(said: Sequence[int]) -> str:
    dims = [*said[6 : 6 + said[4]], *["..."] * (said[4] > _SHOWN)]
    return f"{dtype_name(said[2])}[{', '.join(map(str, dims))}]"
