# ruff: noqa: N803  (reduceOp is torch's name)
"""torch.distributed._functional_collectives: its names, before and after torch 2.13 renamed them, and its signatures.

group is what torch takes: a ProcessGroup, a DeviceMesh, (DeviceMesh, dim), a list of ranks, a group's name; or a Group.
Every function also takes the keyword backend, by default fcomm.c10d (fcomm.sim on a simulated axis).
Unlike torch's, results are plain tensors that need no wait; every reduceOp has a derivative, broadcast's reaches the
source, and vmap, torch.func and forward mode work; permute_tensor takes tensors of any shape. What torch has only for
its compiler is not here, nor are isend_inplace and irecv_inplace: see batch_p2p_ops_inplace.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fcomm
from fcomm.compat.handles import GroupLike, as_backend, as_group
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.registration import async_collective_tensor

RANK_TYPES = GroupLike
ReduceOp = str | dist.ReduceOp | dist.ReduceOp.RedOpType

_OPS = {"avg": "mean", "product": "prod"}
# Pairs, not a dictionary: torch.compile before 2.13 cannot hash these objects.
_NAMES = (
    (dist.ReduceOp.SUM, "sum"),
    (dist.ReduceOp.AVG, "mean"),
    (dist.ReduceOp.PRODUCT, "prod"),
    (dist.ReduceOp.MIN, "min"),
    (dist.ReduceOp.MAX, "max"),
    (dist.ReduceOp.BAND, "band"),
    (dist.ReduceOp.BOR, "bor"),
    (dist.ReduceOp.BXOR, "bxor"),
)

_TO_TORCH = {name: theirs for theirs, name in _OPS.items()}
REDUCE_OP_TO_STR = {op: _TO_TORCH.get(name, name) for op, name in _NAMES}


def __getattr__(name: str) -> Any:
    if name == "AsyncCollectiveTensor":
        return async_collective_tensor()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def op_name(op: ReduceOp) -> str:
    """torch's name or object of a reduction -> fcomm's name."""
    if isinstance(op, str):
        return _OPS.get(op.lower(), op.lower())
    if isinstance(op, Tensor):  # == would compare elements
        raise ArgumentError("reduceOp is a tensor; pass the tensor of the result as out_tensor=, where there is one")
    for is_same in (operator.is_, operator.eq):  # torch.compile before 2.13 cannot compare with ==
        for known, name in _NAMES:
            if is_same(op, known):
                return name
    raise ArgumentError(f"reduceOp is {op!r}; choose one of {', '.join(name for _, name in _NAMES)}")


def _handles(group: GroupLike, tag: str, backend: Backend | None) -> tuple[Group, Backend]:
    g = as_group(group, tag)
    return g, as_backend(backend, g)


def wait_tensor(tensor: Tensor) -> Tensor:
    """tensor itself: results here are complete."""
    return tensor


def wait_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves: results here are complete."""
    return tensors


def broadcast(self: Tensor, src: int, group: GroupLike, tag: str = "", *, backend: Backend | None = None) -> Tensor:
    """Every rank gets self of rank src, counted within the group."""
    return fcomm.broadcast(self, *_handles(group, tag, backend), src=src)


def all_reduce(
    self: Tensor,
    reduceOp: ReduceOp,
    group: GroupLike,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Fold self over the group; reduceOp "sum", "avg", "product", "min", "max", "band", "bor", "bxor"."""
    return fcomm.all_reduce(self, *_handles(group, tag, backend), op=op_name(reduceOp))


def all_gather_single(
    self: Tensor, gather_dim: int, group: GroupLike, tag: str = "", *, backend: Backend | None = None
) -> Tensor:
    """Concatenate every rank's self along gather_dim; 0-d tensors become a vector."""
    return fcomm.all_gather(_at_least_1d(self), *_handles(group, tag, backend), dim=gather_dim)


def reduce_scatter_single(
    self: Tensor,
    reduceOp: ReduceOp,
    scatter_dim: int,
    group: GroupLike,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Fold self over the group and keep this rank's block of scatter_dim."""
    return fcomm.reduce_scatter(self, *_handles(group, tag, backend), dim=scatter_dim, op=op_name(reduceOp))


def all_reduce_coalesced(
    self: Sequence[Tensor],
    reduceOp: ReduceOp,
    group: GroupLike,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> list[Tensor]:
    """all_reduce of every tensor of a list, one message per dtype."""
    return fcomm.all_reduce_coalesced(self, *_handles(group, tag, backend), op=op_name(reduceOp))


def all_gather_single_coalesced(
    self: Sequence[Tensor], group: GroupLike, tag: str = "", *, backend: Backend | None = None
) -> list[Tensor]:
    """all_gather along dim 0 of every tensor of a list, one message per dtype."""
    return fcomm.all_gather_coalesced([_at_least_1d(x) for x in self], *_handles(group, tag, backend))


def reduce_scatter_single_coalesced(
    inputs: Sequence[Tensor],
    reduceOp: ReduceOp,
    scatter_dim: Sequence[int],
    group: GroupLike,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> list[Tensor]:
    """reduce_scatter of every tensor of a list, each along its own dim, one message per dtype."""
    if len(scatter_dim) != len(inputs):
        raise ArgumentError(
            f"reduce_scatter_single_coalesced: scatter_dim has {len(scatter_dim)} entries for {len(inputs)} tensors; "
            "pass one dim for each"
        )
    first = [x.movedim(d, 0) for x, d in zip(inputs, scatter_dim, strict=True)]
    ys = fcomm.reduce_scatter_coalesced(first, *_handles(group, tag, backend), op=op_name(reduceOp))
    return [y.movedim(0, d) for y, d in zip(ys, scatter_dim, strict=True)]


def all_to_all_single(
    self: Tensor,
    output_split_sizes: Sequence[int] | None,
    input_split_sizes: Sequence[int] | None,
    group: GroupLike,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Send input_split_sizes[r] rows to rank r and receive output_split_sizes[r] from it; None: equal blocks."""
    g, b = _handles(group, tag, backend)
    if output_split_sizes is None and input_split_sizes is None:
        return fcomm.all_to_all(self, g, b)
    equal = [self.shape[0] // g.size] * g.size
    send = equal if input_split_sizes is None else input_split_sizes
    if isinstance(send, Sequence) and send and isinstance(send[0], Sequence):
        return fcomm.all_to_all(self, g, b, send_sizes=send)
    recv = equal if output_split_sizes is None else output_split_sizes
    return fcomm.all_to_all(self, g, b, send_sizes=send, recv_sizes=recv)


def permute_tensor(
    self: Tensor, src_dst: Sequence[int], group: GroupLike, tag: str = "", *, backend: Backend | None = None
) -> Tensor:
    """Rank s sends self to rank src_dst[s]."""
    return fcomm.ppermute(self, *_handles(group, tag, backend), perm=list(enumerate(src_dst)))


# --- into tensors that are there ----------------------------------------------------------------------------------


def all_reduce_inplace(
    tensor: Tensor,
    op: ReduceOp = "sum",
    group: GroupLike | None = None,
    async_op: bool = False,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """all_reduce, copied into tensor."""
    return tensor.copy_(all_reduce(tensor, op, _or_world(group, async_op), tag, backend=backend))


def all_gather_tensor_inplace(
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: GroupLike | None = None,
    async_op: bool = False,
    tag: str = "",
    gather_dim: int = 0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """all_gather_single, copied into output_tensor."""
    y = all_gather_single(input_tensor, gather_dim, _or_world(group, async_op), tag, backend=backend)
    return output_tensor.copy_(y)


def all_gather_inplace(
    tensor_list: list[Tensor],
    tensor: Tensor,
    group: GroupLike | None = None,
    async_op: bool = False,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> list[Tensor]:
    """Every rank's tensor, copied into the tensors of a list, all of one shape."""
    g, b = _handles(_or_world(group, async_op), tag, backend)
    _one_each("all_gather_inplace", "tensor_list", tensor_list, "tensor", tensor, g)
    for out, row in zip(tensor_list, fcomm.all_gather(tensor, g, b, tiled=False), strict=True):
        out.copy_(row)
    return tensor_list


def reduce_scatter_tensor_inplace(
    output: Tensor,
    input: Tensor,
    op: ReduceOp = "sum",
    group: GroupLike | None = None,
    async_op: bool = False,
    scatter_dim: int = 0,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """reduce_scatter_single, copied into output."""
    return output.copy_(reduce_scatter_single(input, op, scatter_dim, _or_world(group, async_op), tag, backend=backend))


def reduce_scatter_inplace(
    output: Tensor,
    input_list: list[Tensor],
    op: ReduceOp = "sum",
    group: GroupLike | None = None,
    async_op: bool = False,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Fold the tensors of a list, one for each rank, and keep this rank's, copied into output."""
    g, b = _handles(_or_world(group, async_op), tag, backend)
    _one_each("reduce_scatter_inplace", "input_list", input_list, "output", output, g)
    return output.copy_(fcomm.reduce_scatter(torch.stack(input_list), g, b, op=op_name(op), tiled=False))


def all_to_all_inplace(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: GroupLike | None = None,
    async_op: bool = False,
    tag: str = "",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """all_to_all_single, copied into output."""
    g = _or_world(group, async_op)
    return output.copy_(all_to_all_single(input, output_split_sizes, input_split_sizes, g, tag, backend=backend))


def batch_p2p_ops_inplace(
    op_list: Sequence[str],
    peer_list: Sequence[int],
    tag_list: Sequence[int],
    tensors: Sequence[Tensor],
    group_name: GroupLike,
    *,
    backend: Backend | None = None,
) -> list[Tensor]:
    """Send the tensors of "isend", then receive into those of "irecv". Peers count within the group; no derivative.

    Messages from one rank to another arrive in the order in which they are sent; tags other than 0 are refused.
    """
    g, b = _handles(_or_world(group_name or None, False), "", backend)
    if not len(op_list) == len(peer_list) == len(tag_list) == len(tensors):
        raise ArgumentError(
            f"batch_p2p_ops_inplace: {len(op_list)} ops, {len(peer_list)} peers, {len(tag_list)} tags and "
            f"{len(tensors)} tensors; pass one of each for every message"
        )
    if not {*op_list} <= {"isend", "irecv"} or any(tag_list):
        raise ArgumentError(
            f"batch_p2p_ops_inplace: op_list is {list(op_list)} and tag_list is {list(tag_list)}; an op is isend or "
            "irecv, and a tag 0: messages between two ranks keep their order"
        )
    messages = list(zip(op_list, peer_list, tensors, strict=True))
    with torch.no_grad():
        for op, peer, x in messages:
            if op == "isend":
                fcomm.send(x, g, b, dst=peer)
        for op, peer, x in messages:
            if op == "irecv":
                x.copy_(fcomm.recv(x, g, b, src=peer))
    return list(tensors)


def _or_world(group: GroupLike | None, async_op: bool) -> GroupLike:
    """group, or torch's world."""
    if async_op:
        raise ArgumentError("async_op is True; results here are complete, leave it out")
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ArgumentError("group is None, and torch.distributed is not initialised; pass a Group")
    return group


def _one_each(name: str, option: str, xs: list[Tensor], like: str, x: Tensor, group: Group) -> None:
    if len(xs) != group.size or any(one.shape != x.shape for one in xs):
        raise ArgumentError(
            f"{name}: {option} has the shapes {[tuple(one.shape) for one in xs]}; group '{group.name}' needs "
            f"{group.size} tensors of {like}'s shape {tuple(x.shape)}"
        )


def _at_least_1d(x: Tensor) -> Tensor:
    return x.reshape(1) if x.dim() == 0 else x


# Here the plain functions have derivatives, and the names used before torch 2.13 mean the same.
all_gather_single_autograd = all_gather_tensor = all_gather_tensor_autograd = all_gather_single
reduce_scatter_single_autograd = reduce_scatter_tensor = reduce_scatter_tensor_autograd = reduce_scatter_single
all_to_all_single_autograd = all_to_all_single
all_gather_into_tensor_coalesced = all_gather_single_coalesced
reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
