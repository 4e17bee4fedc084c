"""c10d: any torch.distributed group. A group made elsewhere gets its own gloo (CPU) or NCCL (CUDA) process group.

Everything moves as bytes, so every dtype does, and what moves goes through one exchange. torch.distributed reduces only
what it reduces as fcomm/arithmetic.py says (59 of 136 pairs of dtype and op on gloo, not NaN in max, half types rounded
at every step); the rest is an exchange of blocks, a fold in rank order, and an exchange back: the same traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fcomm.arithmetic import fold
from fcomm.collectives.exchange import pairs
from fcomm.errors import BackendError, CollectiveTimeoutError, MismatchError, PeerDiedError
from fcomm.group import Backend, Group, register_backend
from fcomm.rendezvous import live


@dataclass
class _Communicator:
    """A process group, and the sends that may still be on their way with the tensors they read."""

    pg: Any
    owned: bool
    sending: list[tuple[Any, Tensor]] = field(default_factory=list)


def _open(group: Group, device: str) -> _Communicator:
    owner = live(group)
    if owner.process_group is not None:
        return _Communicator(owner.process_group, owned=False)
    rank, timeout = group.rank or 0, timedelta(seconds=owner.timeout_s)
    store = dist.PrefixStore(f"c10d/{device}", owner.store)
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        return _Communicator(dist.ProcessGroupNCCL(store, rank, group.size, options), owned=True)
    return _Communicator(dist.ProcessGroupGloo(store, rank, group.size, timeout), owned=True)


def _close(communicator: _Communicator) -> None:
    for work, _ in communicator.sending:
        work.wait()
    if communicator.owned:
        communicator.pg.shutdown()


def _communicator(group: Group, x: Tensor) -> _Communicator:
    device = x.device.type
    found = live(group).communicator(f"c10d/{device}", lambda: _open(group, device), _close)
    if found.sending:
        found.sending = [(work, sent) for work, sent in found.sending if not work.is_completed()]
    return found


def _wait(name: str, group: Group, start: Callable[[], Any]) -> None:
    """Start a torch.distributed call and wait for it; its errors become this package's."""
    try:
        start().wait()
    except RuntimeError as error:
        text = str(error).splitlines()[0][:200]
        where = f"{name}: on group '{group.name}' of size {group.size}, torch.distributed says: {text}"
        if "imed out" in text or "imeout" in text:
            raise CollectiveTimeoutError(f"{where}; look for a rank that did not call {name}") from error
        if "onnection" in text or "reset by peer" in text:
            raise PeerDiedError(f"{where}; a rank ended, look at the other ranks' logs") from error
        raise BackendError(where) from error


# --- movement -----------------------------------------------------------------------------------------------------


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _exchange(name: str, group: Group, x: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
    """Send the first sends[0] elements of flat x to rank 0, the next sends[1] to rank 1, ...; recvs[r] come from r."""
    y = x.new_empty(sum(recvs))
    width = x.element_size()
    options = dist.AllToAllOptions()
    pg = _communicator(group, x).pg
    splits = [d * width for d in recvs], [d * width for d in sends]
    if sum(sends) or sum(recvs):
        _wait(name, group, lambda: pg.alltoall_base(_bytes(y), _bytes(x), *splits, options))
    return y


def _exchange_rows(name: str, group: Group, x: Tensor) -> Tensor:
    """x is [n, ..]: row r goes to rank r, and row r of the result comes from it."""
    each = [x[0].numel()] * group.size
    return _exchange(name, group, x.reshape(-1), each, each).reshape(x.shape)


def _gather_rows(name: str, group: Group, x: Tensor) -> Tensor:
    """[n, *x.shape]: every rank's x."""
    y = x.new_empty((group.size, *x.shape))
    if x.numel():
        rows = [_bytes(row) for row in y.unbind(0)]
        pg = _communicator(group, x).pg
        _wait(name, group, lambda: pg.allgather([rows], [_bytes(x)]))
    return y


def _agree(name: str, group: Group, x: Tensor, numbers: Sequence[int]) -> list[list[int]]:
    """What each rank says, so that ranks that disagree all raise instead of waiting for bytes that never come."""
    mine = torch.tensor(list(numbers), dtype=torch.int64, device=x.device)
    return _gather_rows(name, group, mine).tolist()  # type: ignore[no-any-return]


def _agree_on(name: str, option: str, group: Group, x: Tensor, sizes: Sequence[int]) -> None:
    said = _agree(name, group, x, sizes)
    if any(row != said[0] for row in said):
        raise MismatchError(
            f"{name}: the ranks of group '{group.name}' pass different {option}: {said}; make them equal"
        )


def _unstack(rows: Tensor, dim: int) -> Tensor:
    """[n, .., d, ..] -> [.., n * d, ..]: the rows concatenated along dim (a dim of one row)."""
    return rows.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _stack_blocks(x: Tensor, dim: int, size: int) -> Tensor:
    """[.., n * d, ..] -> [n, .., d, ..]: the inverse."""
    return x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0).contiguous()


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    y = x.new_zeros((*x.shape[:dim], length, *x.shape[dim + 1 :]))
    y.narrow(dim, 0, x.shape[dim]).copy_(x)
    return y


# --- reductions ---------------------------------------------------------------------------------------------------

_INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
_NATIVE = {
    "sum": (*_INTEGERS, torch.float32, torch.float64, torch.complex64, torch.complex128),
    "prod": (*_INTEGERS, torch.float32, torch.float64),
    "max": _INTEGERS,
    "min": _INTEGERS,
}
_REDUCE_OPS = {"sum": "SUM", "prod": "PRODUCT", "max": "MAX", "min": "MIN"}


def _fold_rows(name: str, group: Group, x: Tensor, of: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """of: the ranks' blocks -> one row for each rank. Each rank does it for one block of x, and the rows go back."""
    n, flat = group.size, x.reshape(-1)
    blocks = _pad(flat, 0, -(-flat.numel() // n) * n).reshape(n, -1)
    rows = of(_exchange_rows(name, group, blocks).unbind(0))
    return _exchange_rows(name, group, rows).reshape(-1)[: flat.numel()].reshape(x.shape)


def _all_reduce(x: Tensor, group: Group, *, op: str) -> Tensor:
    if op == "mean" and x.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return _all_reduce(x, group, op="sum").div_(group.size)
    if x.dtype in (torch.float16, torch.bfloat16) and op == "sum":
        return _all_reduce(x.float(), group, op="sum").to(x.dtype)
    if x.dtype not in _NATIVE.get(op, ()):
        return _fold_rows("all_reduce", group, x, lambda blocks: fold(blocks, op).expand(group.size, -1).contiguous())
    y = x.clone()
    if y.numel():
        options = dist.AllreduceOptions()
        options.reduceOp = getattr(dist.ReduceOp, _REDUCE_OPS[op])
        pg, flat = _communicator(group, x).pg, torch.view_as_real(y) if y.is_complex() else y
        _wait("all_reduce", group, lambda: pg.allreduce([flat], options))
    return y


def _scan(x: Tensor, group: Group, *, op: str, exclusive: bool, reverse: bool) -> Tensor:
    def prefixes(blocks: Sequence[Tensor]) -> Tensor:
        order = list(blocks)[::-1] if reverse else list(blocks)
        rows = [fold(order[: r + 1], op) for r in range(len(order))]
        if exclusive:
            rows = [torch.zeros_like(rows[0]), *rows[:-1]]
        return torch.stack(rows[::-1] if reverse else rows)

    return _fold_rows("scan", group, x, prefixes)


def _reduce(x: Tensor, group: Group, *, dst: int, op: str) -> Tensor:
    y = _all_reduce(x, group, op=op)
    return y if group.rank == dst else y.zero_()


def _reduce_scatter(x: Tensor, group: Group, *, dim: int, op: str, tiled: bool, sizes: Sequence[int] | None) -> Tensor:
    if sizes is not None:
        _agree_on("reduce_scatter", "sizes", group, x, sizes)
        rows = torch.stack([_pad(block, dim, max(sizes)) for block in x.split(list(sizes), dim)])
    else:
        rows = _stack_blocks(x, dim, group.size) if tiled else x.movedim(dim, 0).contiguous()
    y = fold(_exchange_rows("reduce_scatter", group, rows).unbind(0), op)
    return y if sizes is None else y.narrow(dim, 0, sizes[group.rank or 0]).contiguous()


# --- the whole and its blocks -------------------------------------------------------------------------------------


def _all_gather(x: Tensor, group: Group, *, dim: int, tiled: bool, sizes: Sequence[int] | None) -> Tensor:
    if sizes is not None:
        _agree_on("all_gather", "sizes", group, x, sizes)
        rows = _gather_rows("all_gather", group, _pad(x, dim, max(sizes)))
        return torch.cat([row.narrow(dim, 0, d) for row, d in zip(rows, sizes, strict=True)], dim)
    rows = _gather_rows("all_gather", group, x)
    return _unstack(rows, dim) if tiled else rows.movedim(0, dim).contiguous()


def _all_to_all(
    x: Tensor,
    group: Group,
    *,
    split_dim: int,
    concat_dim: int,
    tiled: bool,
    send_sizes: Sequence[int] | None,
    recv_sizes: Sequence[int] | None,
) -> Tensor:
    if not tiled:
        return (
            _exchange_rows("all_to_all", group, x.movedim(split_dim, 0).contiguous())
            .movedim(0, concat_dim)
            .contiguous()
        )
    if send_sizes is None or recv_sizes is None:
        return _unstack(_exchange_rows("all_to_all", group, _stack_blocks(x, split_dim, group.size)), concat_dim)
    n, rank = group.size, group.rank or 0
    said = _agree("all_to_all", group, x, (*send_sizes, *recv_sizes))
    for s in range(n):
        for r in range(n):
            if split_dim == concat_dim and said[s][r] != said[r][n + s]:
                raise MismatchError(
                    f"all_to_all: rank {s} of group '{group.name}' sends {said[s][r]} to rank {r}, which expects "
                    f"{said[r][n + s]}; make send_sizes of rank {s} and recv_sizes of rank {r} agree"
                )
    if split_dim != concat_dim and any(row != said[0] for row in said):
        raise MismatchError(
            f"all_to_all: the ranks of group '{group.name}' pass different send_sizes and recv_sizes: {said}; "
            "with split_dim != concat_dim they partition the two dims, the same on every rank"
        )
    shapes = [list(x.shape) for _ in range(n)]
    for s, shape in enumerate(shapes):
        shape[split_dim] = send_sizes[rank]
        shape[concat_dim] = recv_sizes[s]
    packed = torch.cat([block.reshape(-1) for block in x.split(list(send_sizes), split_dim)])
    sends = [d * (x.numel() // max(x.shape[split_dim], 1)) for d in send_sizes]
    recvs = [prod(shape) for shape in shapes]
    blocks = _exchange("all_to_all", group, packed, sends, recvs).split(recvs)
    return torch.cat([b.reshape(shape) for b, shape in zip(blocks, shapes, strict=True)], concat_dim)


def _ppermute(x: Tensor, group: Group, *, perm: Sequence[int]) -> Tensor:
    here, size = group.rank, x.numel()
    sends = [size if (here, r) in pairs(perm) else 0 for r in range(group.size)]
    recvs = [size if (r, here) in pairs(perm) else 0 for r in range(group.size)]
    y = _exchange("ppermute", group, x.reshape(-1) if any(sends) else x.new_empty(0), sends, recvs)
    return y.reshape(x.shape) if any(recvs) else torch.zeros_like(x)


def _broadcast(x: Tensor, group: Group, *, src: int) -> Tensor:
    y = x.clone()
    if y.numel():
        options = dist.BroadcastOptions()
        options.rootRank = src
        pg = _communicator(group, x).pg
        _wait("broadcast", group, lambda: pg.broadcast([_bytes(y)], options))
    return y


def _gather(x: Tensor, group: Group, *, dst: int, dim: int) -> Tensor:
    root, size = group.rank == dst, x.numel()
    sends = [size if r == dst else 0 for r in range(group.size)]
    y = _exchange("gather", group, x.reshape(-1), sends, [size if root else 0] * group.size)
    rows = y.reshape(group.size, *x.shape) if root else x.new_zeros((group.size, *x.shape))
    return _unstack(rows, dim)


def _scatter(x: Tensor, group: Group, *, src: int, dim: int) -> Tensor:
    rows = _stack_blocks(x, dim, group.size)
    size = rows[0].numel()
    sends = [size if group.rank == src else 0] * group.size
    recvs = [size if r == src else 0 for r in range(group.size)]
    flat = rows.reshape(-1) if group.rank == src else x.new_empty(0)
    return _exchange("scatter", group, flat, sends, recvs).reshape(rows.shape[1:])


# --- one edge, and none -------------------------------------------------------------------------------------------


def _header(x: Tensor) -> Tensor:
    return torch.tensor([x.numel(), x.element_size()], dtype=torch.int64, device=x.device)


def _send(x: Tensor, group: Group, *, dst: int) -> Tensor:
    # The receiver learns the size first: torch.distributed would abort or wait for ever where it differs.
    communicator = _communicator(group, x)
    for tag, part in enumerate((_header(x), _bytes(x.clone()))):
        if part.numel():
            communicator.sending.append((communicator.pg.send([part], dst, tag), part))
    return x.new_empty(0)


def _recv(after: Tensor, like: Tensor, group: Group, *, src: int) -> Tensor:
    y, header = torch.empty_like(like), _header(like)
    pg = _communicator(group, like).pg
    _wait("recv", group, lambda: pg.recv([header], src, 0))
    if not torch.equal(header, _header(like)):
        raise MismatchError(
            f"recv: rank {src} of group '{group.name}' sends {header[0]} elements of {header[1]} bytes, like has "
            f"{like.numel()} of {like.element_size()}; pass a like of the message's shape and dtype"
        )
    if y.numel():
        _wait("recv", group, lambda: pg.recv([_bytes(y)], src, 1))
    return y


def _barrier(x: Tensor, group: Group) -> Tensor:
    pg = _communicator(group, x).pg
    _wait("barrier", group, lambda: pg.barrier(dist.BarrierOptions()))
    return x.clone()


c10d = register_backend(
    Backend(
        "c10d",
        lowerings={
            "all_reduce": _all_reduce,
            "scan": _scan,
            "reduce": _reduce,
            "reduce_scatter": _reduce_scatter,
            "all_gather": _all_gather,
            "all_to_all": _all_to_all,
            "ppermute": _ppermute,
            "broadcast": _broadcast,
            "gather": _gather,
            "scatter": _scatter,
            "send": _send,
            "recv": _recv,
            "barrier": _barrier,
        },
    )
)
