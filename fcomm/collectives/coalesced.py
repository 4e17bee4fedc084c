"""Lists of tensors, one message per dtype: flattened, communicated by the collective of that name, and cut apart.

The cost of a small collective is the call, so a list of small tensors is sent as one. These functions are compositions,
so they need no rules of their own.

Results of one dtype are parts of one tensor, and torch tracks their changes together: if a derivative has saved one of
them, as that of y.sin() does, and another is changed in place, backward raises. Change a clone() instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fcomm.arithmetic import FOLDED_OPS, OPS, check_op
from fcomm.collectives import checks
from fcomm.collectives.blocks import all_gather, reduce_scatter
from fcomm.collectives.reductions import all_reduce
from fcomm.group import Backend, Group
from fcomm.registration import check_call


def all_reduce_coalesced(xs: Iterable[Tensor], group: Group, backend: Backend, *, op: str = "sum") -> list[Tensor]:
    """all_reduce of every tensor of a list, one message per dtype.

    Shapes, dtypes, op, vjp, traffic and errors as all_reduce.
    """
    xs = _list("all_reduce_coalesced", xs, group, backend)
    _check_op("all_reduce_coalesced", op, xs, OPS)

    def communicate(flat: Tensor) -> Tensor:
        return all_reduce(flat, group, backend, op=op)

    return _by_dtype(xs, [x.reshape(-1, 1) for x in xs], communicate, [x.shape for x in xs])


def all_gather_coalesced(xs: Iterable[Tensor], group: Group, backend: Backend, *, dim: int = 0) -> list[Tensor]:
    """all_gather along dim of every tensor of a list, one message per dtype.

    Shapes, dtypes, vjp, traffic and errors as all_gather.
    """
    xs = _list("all_gather_coalesced", xs, group, backend)
    dims = [checks.canonical_dim("all_gather_coalesced", "dim", dim, x, group) for x in xs]

    def communicate(flat: Tensor) -> Tensor:
        return all_gather(flat, group, backend, tiled=False)

    stacks = _by_dtype(xs, [x.reshape(-1, 1) for x in xs], communicate, [(group.size, *x.shape) for x in xs])
    return [y.movedim(0, d).flatten(d, d + 1).contiguous() for y, d in zip(stacks, dims, strict=True)]


def reduce_scatter_coalesced(
    xs: Iterable[Tensor], group: Group, backend: Backend, *, dim: int = 0, op: str = "sum"
) -> list[Tensor]:
    """reduce_scatter along dim of every tensor of a list, one message per dtype.

    Shapes, dtypes, op, vjp, traffic and errors as reduce_scatter.
    """
    xs = _list("reduce_scatter_coalesced", xs, group, backend)
    _check_op("reduce_scatter_coalesced", op, xs, FOLDED_OPS)
    dims = [checks.canonical_dim("reduce_scatter_coalesced", "dim", dim, x, group) for x in xs]
    blocks = []
    for x, d in zip(xs, dims, strict=True):
        checks.divisible("reduce_scatter_coalesced", x, d, group)
        blocks.append(x.unflatten(d, (group.size, x.shape[d] // group.size)).movedim(d, 0))

    def communicate(rows: Tensor) -> Tensor:
        return reduce_scatter(rows, group, backend, dim=0, op=op, tiled=False)

    return _by_dtype(xs, [b.reshape(group.size, -1, 1) for b in blocks], communicate, [b.shape[1:] for b in blocks])


def _list(name: str, xs: Iterable[Tensor], group: Group, backend: Backend) -> list[Tensor]:
    """xs, which may be a generator, as a list of tensors that can take part."""
    if isinstance(xs, Tensor):
        raise TypeError(f"{name}: xs is one tensor; pass a list of tensors, or call the collective without _coalesced")
    if not isinstance(xs, Iterable):
        raise TypeError(f"{name}: xs is {type(xs).__name__}; pass a list of tensors")
    result = list(xs)
    check_call(name, result, group, backend)
    return result


def _check_op(name: str, op: str, xs: Sequence[Tensor], allowed: Sequence[str]) -> None:
    # Check all dtypes before the first is sent. For an empty list check integers, which have every op.
    for dtype in dict.fromkeys(x.dtype for x in xs) or (torch.int64,):
        check_op(name, op, dtype, allowed)


def _by_dtype(
    xs: Sequence[Tensor],
    flats: Sequence[Tensor],
    communicate: Callable[[Tensor], Tensor],
    shapes: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Concatenate the flats of one dtype, communicate, cut at the same places, shape each.

    A flat is a column, [.., length, 1], because vmap of torch.cat loses the batch of empty vectors.
    """
    ys: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in xs):
        places = [i for i, x in enumerate(xs) if x.dtype == dtype]
        lengths = [flats[i].shape[-2] for i in places]
        result = communicate(torch.cat([flats[i] for i in places], -2))
        # Not torch.split: torch does not let the caller write into one of its several views.
        for i, end, length in zip(places, accumulate(lengths), lengths, strict=True):
            ys[i] = result.narrow(-2, end - length, length).reshape(shapes[i])
    return [ys[i] for i in range(len(xs))]
