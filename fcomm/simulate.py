"""simulate: a named axis of N ranks in one process, as one level of torch.vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

# Private: torch.vmap takes in_dims shaped like its arguments, and torch has no public way to walk them.
from torch.utils import _pytree as pytree

from fcomm.errors import ArgumentError, FcommError
from fcomm.group import Group
from fcomm.registration import bound, is_bound

P = ParamSpec("P")
T = TypeVar("T")


def simulate(fn: Callable[P, T], axis: Group, *, randomness: str = "error") -> Callable[P, T]:
    """The function that runs fn on every rank of a simulated axis at once.

        g = fcomm.simulate(lambda x: fcomm.all_reduce(x, tp, fcomm.sim), tp)
        g(x)[r]  ==  what rank r would return for x[r]

    Tensors in and out are stacked: their leading dimension, of axis.size, is the rank. Other arguments are passed to
    every rank as they are. Arguments and results may be nested in tuples, lists and dicts. Composes with every
    transform, inside and around, and with itself under another axis name.

    randomness: as in torch.vmap; "different" gives each rank its own random numbers, "same" the same ones.
    Raises FcommError if axis is not simulated, is already bound, or a tensor's leading dimension is not its size.
    """
    if not isinstance(axis, Group) or not axis.simulated:
        raise ArgumentError(f"simulate: axis is {axis!r}; pass a simulated group, fcomm.axis('tp', 4)")
    if not callable(fn):
        raise TypeError(f"simulate: fn is {fn!r}; pass the function that each rank runs")
    key, size = axis.key, axis.size

    def one_rank(index: Tensor, args: Any, kwargs: Any) -> T:
        with bound(key, index):
            result = fn(*args, **kwargs)
        for y in pytree.tree_leaves(result):
            if not isinstance(y, Tensor):
                raise TypeError(f"simulate: fn returned {y!r}; return tensors, nested in tuples, lists and dicts")
        return result

    def in_dim(x: object) -> int | None:
        if not isinstance(x, Tensor):
            return None
        if x.is_nested:  # before its shape is read
            raise TypeError(
                f"simulate: an argument is a nested tensor, whose rows have lengths of their own, but all ranks of "
                f"'{axis.name}' have one shape; pass torch.nested.to_padded_tensor(x, 0.0)"
            )
        if x.dim() == 0 or x.shape[0] != size:
            raise ArgumentError(
                f"simulate: an argument has shape {tuple(x.shape)}; stack the values of the {size} ranks of "
                f"'{axis.name}' in its leading dimension, or close over a value that all ranks share"
            )
        return 0

    def simulated(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_bound(key):
            raise FcommError(f"simulate: axis '{axis.name}' is bound already; give the inner axis another name")
        in_dims = pytree.tree_map(in_dim, (args, kwargs))
        # In processes axis_index is a 0-d CPU tensor, which mixes with those of any device; batched, it would not.
        device = next((x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
        index = torch.arange(size, device=device)
        return torch.vmap(one_rank, in_dims=(0, *in_dims), randomness=randomness)(index, args, kwargs)

    return simulated
