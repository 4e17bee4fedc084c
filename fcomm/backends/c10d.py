"""c10d: any torch.distributed group. A group made elsewhere gets its own gloo (CPU) or NCCL (CUDA) process group.

Everything is moved as bytes, so that every dtype can be, and all of it goes through one exchange. torch.distributed
reduces only where its arithmetic is that of fcomm/arithmetic.py. (gloo has 59 of 136 pairs of dtype and op, does not
keep NaN in max, rounds half types at every step, and adds floats of three ranks in ring order.) The rest is an exchange
of blocks, a fold in rank order, and an exchange back, with the same traffic.

Ranks that differ in sizes raise MismatchError. gloo does not see other differences between the ranks' calls (it mixes
the calls up, aborts, or waits). FCOMM_CHECK=1 compares every call across the ranks first, at the price of a small
all_gather.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fcomm.arithmetic import divide, fold
from fcomm.backends.processgroup import Communicator, call, calling, compare_calls, receive, send_later
from fcomm.backends.rows import (
    check_blocks,
    check_same,
    elements,
    exchange_uneven,
    header,
    misfit,
    nbytes,
    pad,
    stack_blocks,
    unstack,
)
from fcomm.collectives.exchange import pairs
from fcomm.collectives.reductions import scan_spec
from fcomm.group import Backend, register_backend

# --- movement -----------------------------------------------------------------------------------------------------


def _bytes(x: Tensor) -> Tensor:
    return elements(x, torch.uint8)


def _exchange(on: Communicator, x: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
    """Send the first sends[0] elements of flat x to rank 0, the next sends[1] to rank 1, ...; recvs[r] come from r.

    Every rank must call it, even one with nothing to send or receive: gloo makes the others wait for it.
    """
    y = x.new_empty(sum(recvs))
    width = x.element_size()
    options = dist.AllToAllOptions()
    splits = [d * width for d in recvs], [d * width for d in sends]
    call(on, lambda pg: pg.alltoall_base(_bytes(y), _bytes(x), *splits, options))
    return y


def _exchange_rows(on: Communicator, x: Tensor) -> Tensor:
    """x is [n, ..]: row r goes to rank r, and row r of the result comes from it."""
    if not x.numel():
        return torch.empty_like(x)
    each = [x[0].numel()] * on.size
    return _exchange(on, x.reshape(-1), each, each).reshape(x.shape)


def _gather_rows(on: Communicator, x: Tensor) -> Tensor:
    """[n, *x.shape]: every rank's x."""
    y = x.new_empty((on.size, *x.shape))
    if x.numel():
        rows = [_bytes(row) for row in y.unbind(0)]
        call(on, lambda pg: pg.allgather([rows], [_bytes(x)]))
    return y


def _said(on: Communicator, x: Tensor, sizes: Sequence[int]) -> list[list[int]]:
    """Every rank's sizes."""
    mine = torch.tensor(list(sizes), dtype=torch.int64, device=x.device)
    said: list[list[int]] = _gather_rows(on, mine).tolist()
    return said


# --- reductions ---------------------------------------------------------------------------------------------------

# Exact in any order.
_INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
_NATIVE = dict.fromkeys(("sum", "prod", "max", "min"), _INTEGERS)
# Two numbers have only one order. On a device, speed matters more than the order of three.
_NATIVE_OF_TWO = {
    "sum": (torch.float32, torch.float64, torch.complex64, torch.complex128),
    "prod": (torch.float32, torch.float64),
}
_REDUCE_OPS = {"sum": "SUM", "prod": "PRODUCT", "max": "MAX", "min": "MIN"}


def _fold_rows(on: Communicator, x: Tensor, of: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """of: the ranks' blocks -> one row for each rank. Each rank applies it to one block of x, and the rows go back."""
    n, flat = on.size, x.reshape(-1)
    blocks = pad(flat, 0, -(-flat.numel() // n) * n).reshape(n, -1)
    folded = of(_exchange_rows(on, blocks).unbind(0))
    return _exchange_rows(on, folded).reshape(-1)[: flat.numel()].reshape(x.shape)


def _is_native(on: Communicator, dtype: torch.dtype, op: str) -> bool:
    if dtype in _NATIVE.get(op, ()):
        return True
    return dtype in _NATIVE_OF_TWO.get(op, ()) and (on.size == 2 or on.device != "cpu")


def _all_reduce(x: Tensor, on: Communicator, *, op: str) -> Tensor:
    if op == "mean" and x.dtype in _NATIVE_OF_TWO["sum"] and _is_native(on, x.dtype, "sum"):
        return divide(_all_reduce(x, on, op="sum"), on.size)
    if not _is_native(on, x.dtype, op):
        return _fold_rows(on, x, lambda blocks: fold(blocks, op).expand(on.size, -1).contiguous())
    y = x.clone()
    if y.numel():
        options = dist.AllreduceOptions()
        options.reduceOp = getattr(dist.ReduceOp, _REDUCE_OPS[op])
        flat = torch.view_as_real(y) if y.is_complex() else y
        call(on, lambda pg: pg.allreduce([flat], options))
    return y


def _scan(x: Tensor, on: Communicator, *, op: str, exclusive: bool, reverse: bool) -> Tensor:
    return _fold_rows(on, x, lambda blocks: torch.stack(scan_spec(blocks, op, exclusive, reverse)))


def _reduce(x: Tensor, on: Communicator, *, dst: int, op: str) -> Tensor:
    y = _all_reduce(x, on, op=op)
    return y if on.rank == dst else y.zero_()


def _reduce_scatter(
    x: Tensor, on: Communicator, *, dim: int, op: str, tiled: bool, sizes: Sequence[int] | None
) -> Tensor:
    if sizes is not None:
        check_same(on.name, "sizes", on.group, _said(on, x, sizes))
        rows = torch.stack([pad(block, dim, max(sizes)) for block in x.split(list(sizes), dim)])
    else:
        rows = stack_blocks(x, dim, on.size) if tiled else x.movedim(dim, 0).contiguous()
    y = fold(_exchange_rows(on, rows).unbind(0), op)
    return y if sizes is None else y.narrow(dim, 0, sizes[on.rank]).contiguous()


# --- the whole and its blocks -------------------------------------------------------------------------------------


def _all_gather(x: Tensor, on: Communicator, *, dim: int, tiled: bool, sizes: Sequence[int] | None) -> Tensor:
    if sizes is not None:
        check_same(on.name, "sizes", on.group, _said(on, x, sizes))
        rows = _gather_rows(on, pad(x, dim, max(sizes)))
        return torch.cat([row.narrow(dim, 0, d) for row, d in zip(rows, sizes, strict=True)], dim)
    rows = _gather_rows(on, x)
    return unstack(rows, dim) if tiled else rows.movedim(0, dim).contiguous()


def _all_to_all(
    x: Tensor,
    on: Communicator,
    *,
    split_dim: int,
    concat_dim: int,
    tiled: bool,
    send_sizes: Sequence[int] | None,
    recv_sizes: Sequence[int] | None,
) -> Tensor:
    if not tiled:
        return _exchange_rows(on, x.movedim(split_dim, 0).contiguous()).movedim(0, concat_dim).contiguous()
    if send_sizes is None or recv_sizes is None:
        return unstack(_exchange_rows(on, stack_blocks(x, split_dim, on.size)), concat_dim)
    said = _said(on, x, (*send_sizes, *recv_sizes))
    check_blocks("all_to_all", on.group, said, one_dim=split_dim == concat_dim)
    return exchange_uneven(partial(_exchange, on), x, on.group, split_dim, concat_dim, send_sizes, recv_sizes)


def _ppermute(x: Tensor, on: Communicator, *, perm: Sequence[int]) -> Tensor:
    here, size = on.rank, x.numel()
    if not size:
        return torch.empty_like(x)
    sends = [size if (here, r) in pairs(perm) else 0 for r in range(on.size)]
    recvs = [size if (r, here) in pairs(perm) else 0 for r in range(on.size)]
    y = _exchange(on, x.reshape(-1) if any(sends) else x.new_empty(0), sends, recvs)
    return y.reshape(x.shape) if any(recvs) else torch.zeros_like(x)


def _broadcast(x: Tensor, on: Communicator, *, src: int) -> Tensor:
    y = x.clone()
    if y.numel():
        options = dist.BroadcastOptions()
        options.rootRank = src
        call(on, lambda pg: pg.broadcast([_bytes(y)], options))
    return y


def _gather(x: Tensor, on: Communicator, *, dst: int, dim: int) -> Tensor:
    root, size = on.rank == dst, x.numel()
    rows = x.new_zeros((on.size, *x.shape))
    if size:
        sends = [size if r == dst else 0 for r in range(on.size)]
        y = _exchange(on, x.reshape(-1), sends, [size if root else 0] * on.size)
        rows = y.reshape(rows.shape) if root else rows
    return unstack(rows, dim)


def _scatter(x: Tensor, on: Communicator, *, src: int, dim: int) -> Tensor:
    rows = stack_blocks(x, dim, on.size)
    size = rows[0].numel()
    if not size:
        return rows[0].clone()
    sends = [size if on.rank == src else 0] * on.size
    recvs = [size if r == src else 0 for r in range(on.size)]
    flat = rows.reshape(-1) if on.rank == src else x.new_empty(0)
    return _exchange(on, flat, sends, recvs).reshape(rows.shape[1:])


# --- one edge, and none -------------------------------------------------------------------------------------------


def _send(x: Tensor, on: Communicator, *, dst: int, derivative: int) -> Tensor:
    # A header tells the receiver what comes: torch.distributed would abort or wait for ever if the sizes differed, and
    # read the bits of another dtype as its own.
    for tag, part in enumerate((header(x, derivative), _bytes(x.clone()))):
        if part.numel():
            send_later(on, part, dst, tag)
    return x.new_empty(0)


def _recv(after: Tensor, like: Tensor, on: Communicator, *, src: int, derivative: int) -> Tensor:
    head = header(like, derivative)
    receive(on, head, src, 0)
    said = head.tolist()
    y = torch.empty_like(like)
    error = misfit(on.group, src, said, like, derivative)
    # A message that does not fit is still received, so that the next receive does not get it.
    into = torch.empty(nbytes(said), dtype=torch.uint8, device=like.device) if error else _bytes(y)
    if into.numel():
        receive(on, into, src, 1)
    if error:
        raise error
    return y


def _barrier(x: Tensor, on: Communicator) -> Tensor:
    call(on, lambda pg: pg.barrier(dist.BarrierOptions()))
    return x.clone()


# --- the table ----------------------------------------------------------------------------------------------------


def _lowering(name: str, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def lowering(*args: Any, **params: Any) -> Tensor:
        *tensors, group = args
        x: Tensor = tensors[-1]
        with calling(name, group, x.device.type) as on:
            if on.check and name not in ("send", "recv"):
                compare_calls(on, x, _described(name, x, params))
            # Not a view, even of a tensor made here: autograd would not let the caller write into it.
            return fn(*tensors, on, **params).detach()

    return lowering


def _described(name: str, x: Tensor, params: Mapping[str, Any]) -> str:
    """The parts of a call that are the same on all ranks."""
    if name == "barrier":
        return ""
    shape: list[int | str] = list(x.shape)
    own: tuple[str, ...] = ()
    if params.get("sizes") is not None and name == "all_gather":
        shape[params["dim"]] = "*"
    if params.get("send_sizes") is not None:
        own = ("send_sizes", "recv_sizes")
        shape[params["split_dim"]] = shape[params["concat_dim"]] = "*"
    options = ", ".join(f"{k}={v}" for k, v in params.items() if k not in own)
    return f"({options}) of {x.dtype} [{', '.join(map(str, shape))}]"


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
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
}

c10d = register_backend(Backend("c10d", lowerings={name: _lowering(name, fn) for name, fn in _FUNCTIONS.items()}))
