"""Every collective of a vendor's machine: its natives where they mean the same, else a composition of its moves.

Where the libraries lack what fcomm/arithmetic.py requires (half types accumulated in float32, NaN in max and min, bit
operations, dtypes that they have no name for), a reduction is one exchange of blocks, a fold in rank order on this
device, and one gather of the folded blocks: the traffic of a ring all_reduce. notes/0050-device-lowerings.md has the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fcomm.arithmetic import divide, fold
from fcomm.backends.ccall import Library
from fcomm.backends.communicator import issue, team
from fcomm.backends.failure import raise_failure
from fcomm.backends.later import send_later
from fcomm.backends.machine import Comm, Machine, is_capturing, synchronize
from fcomm.backends.rows import (
    HEADER,
    check_blocks,
    check_same,
    elements,
    exchange_uneven,
    header,
    misfit,
    nbytes,
    pack,
    pad,
    stack_blocks,
    unstack,
)
from fcomm.collectives.exchange import pairs
from fcomm.collectives.reductions import scan_spec
from fcomm.errors import FcommError
from fcomm.group import BACKENDS, Backend, Group, Lowering, register_backend


def table(machine: Machine) -> dict[str, Lowering]:
    """The machine's lowerings, by collective."""
    return {name: partial(_new, lowering, machine) for name, lowering in _LOWERINGS.items()}


def _new(lowering: Callable[..., Tensor], *args: Any, **params: Any) -> Tensor:
    """The result, detached so that it is not a view: autograd would not let the caller write into one."""
    return lowering(*args, **params).detach()


def backend_on(lib: Library, device: str, machine: Callable[[str, Callable[[], Library]], Machine]) -> Backend:
    """The backend on a library, registered at the first call; ranks and graphs know it by the library's path."""
    name = f"{lib.name}@{device}:{lib.path}"
    if name not in BACKENDS:
        register_backend(Backend(name, devices=(device,), lowerings=table(machine(name, lambda: lib))))
    return BACKENDS[name]


def _call(m: Machine, name: str, group: Group, x: Tensor, fn: Callable[[Comm], None]) -> None:
    issue(team(m, group, x.device), name, fn)


# --- movement -----------------------------------------------------------------------------------------------------


def _flat(m: Machine, x: Tensor) -> Tensor:
    """x as the library moves it: complex as pairs, dtypes without a name in some version as bytes."""
    return _as(m.moves.get(x.dtype, torch.uint8), x)


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    # A tensor over a foreign buffer may start anywhere; the libraries require a multiple of the element size.
    flat = elements(x, dtype)
    return flat.clone() if flat.data_ptr() % dtype.itemsize else flat


def _exchange(m: Machine, name: str, group: Group, x: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
    """Send the first sends[0] elements of flat x to rank 0, the next sends[1] to rank 1, ...; recvs[r] come from r."""
    y = x.new_empty(sum(recvs))
    sent, received = _flat(m, x), _flat(m, y)
    each = x.element_size() // sent.element_size()
    counts = [d * each for d in sends], [d * each for d in recvs]
    # Even a rank that neither sends nor receives makes the call: on HCCL it is a collective.
    _call(m, name, group, x, lambda c: m.exchange(c, sent, counts[0], received, counts[1]))
    return y


def _move(
    m: Machine, name: str, group: Group, x: Tensor, y: Tensor, native: Callable[..., None], *rest: int | None
) -> Tensor:
    """y, after native(comm, x, y, *rest) on both as the library moves them; either all ranks have elements or none."""
    if x.numel():
        sent, received = _flat(m, x), _flat(m, y)
        _call(m, name, group, x, lambda c: native(c, sent, received, *rest))
    else:
        raise_failure(team(m, group, x.device), name)
    return y


def _exchange_rows(m: Machine, name: str, group: Group, x: Tensor) -> Tensor:
    """x is [n, ..]: row r goes to rank r, and row r of the result comes from it."""
    return _move(m, name, group, x, torch.empty_like(x), m.all_to_all)


def _gather_rows(m: Machine, name: str, group: Group, x: Tensor) -> Tensor:
    """[n, *x.shape]: every rank's x."""
    return _move(m, name, group, x, x.new_empty((group.size, *x.shape)), m.all_gather)


def _said(m: Machine, name: str, group: Group, x: Tensor, sizes: Sequence[int]) -> list[list[int]] | None:
    """Every rank's sizes; None while a graph is captured: the host cannot read what a captured stream will receive."""
    if is_capturing(x.device):
        return None
    mine = torch.tensor(list(sizes), dtype=torch.int64, device=x.device)
    said: list[list[int]] = _gather_rows(m, name, group, mine).tolist()
    raise_failure(team(m, group, x.device), name)  # a failure may have ended the kernel and left anything there
    return said


# --- reductions ---------------------------------------------------------------------------------------------------

# The mean of these is their sum, divided. Not bool, whose mean has no meaning, nor wide unsigned integers, which torch
# does not divide.
_DIVIDED = (
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip


def _native(m: Machine, dtype: torch.dtype, op: str) -> tuple[torch.dtype, str] | None:
    """The dtype and op by which the library reduces dtype by op; None if it cannot, or means something else."""
    if op == "mean":
        # Not ncclAvg: it multiplies each summand by 1/n, which rounds where dividing the sum does not.
        return m.reductions["sum"].get(dtype) if dtype in _DIVIDED else None
    return m.reductions.get(op, {}).get(dtype)


def _summand(wire: torch.dtype, x: Tensor) -> Tensor:
    """x as the library reduces it. A bool becomes 0 or 1 first, since torch takes every byte except 0 for True."""
    return _as(wire, x.view(torch.uint8).ne(0) if x.dtype == torch.bool else x)


def _divided(y: Tensor, op: str, size: int) -> Tensor:
    return divide(y, size) if op == "mean" else y


def _fold_rows(
    m: Machine, name: str, group: Group, x: Tensor, of: Callable[[Sequence[Tensor]], Tensor], each: bool = False
) -> Tensor:
    """Each rank folds one block of all ranks' x.

    of: the ranks' blocks -> the result's block, or with each=True one block for each rank.
    """
    n, flat = group.size, x.reshape(-1)
    blocks = x.new_zeros((n, -(-flat.numel() // n)))
    blocks.view(-1)[: flat.numel()].copy_(flat)
    folded = of(_exchange_rows(m, name, group, blocks).unbind(0))
    rows = _exchange_rows(m, name, group, folded) if each else _gather_rows(m, name, group, folded)
    return rows.reshape(-1)[: flat.numel()].reshape(x.shape).contiguous()


def _all_reduce(m: Machine, x: Tensor, group: Group, *, op: str) -> Tensor:
    if not x.numel():
        raise_failure(team(m, group, x.device), "all_reduce")
        return torch.empty_like(x)
    native = _native(m, x.dtype, op)
    if native is None:
        return _fold_rows(m, "all_reduce", group, x, lambda blocks: fold(blocks, op))
    wire, wire_op = native
    y = torch.empty_like(x)
    sent, received = _summand(wire, x), _as(wire, y)
    _call(m, "all_reduce", group, x, lambda c: m.all_reduce(c, sent, received, wire_op))
    return _divided(y, op, group.size)


def _scan(m: Machine, x: Tensor, group: Group, *, op: str, exclusive: bool, reverse: bool) -> Tensor:
    def prefixes(blocks: Sequence[Tensor]) -> Tensor:
        return torch.stack(scan_spec(blocks, op, exclusive, reverse))

    return _fold_rows(m, "scan", group, x, prefixes, each=True)


def _reduce(m: Machine, x: Tensor, group: Group, *, dst: int, op: str) -> Tensor:
    root, native = group.rank == dst, _native(m, x.dtype, op)
    if native is None or not x.numel():
        y = _all_reduce(m, x, group, op=op)
        return y if root else y.zero_()
    wire, wire_op = native
    y = torch.empty_like(x)
    sent, received = _summand(wire, x), _as(wire, y)
    _call(m, "reduce", group, x, lambda c: m.reduce(c, sent, received, wire_op, dst))
    return _divided(y, op, group.size) if root else y.zero_()


def _reduce_scatter(
    m: Machine, x: Tensor, group: Group, *, dim: int, op: str, tiled: bool, sizes: Sequence[int] | None
) -> Tensor:
    n, rank, name = group.size, group.rank or 0, "reduce_scatter"
    if sizes is not None:
        check_same(name, "sizes", group, _said(m, name, group, x, sizes))
        packed, sends = pack(x, sizes, dim)
        shape = (*x.shape[:dim], sizes[rank], *x.shape[dim + 1 :])
        native = _native(m, x.dtype, op) if op != "prod" and m.has_uneven(name) else None  # HCCL's refuses prod
        if native is not None and native[0] not in m.uneven_refuses and packed.numel():
            wire, wire_op = native
            y = x.new_empty(shape)
            sent, received = _summand(wire, packed), _as(wire, y)
            counts = [d * sent.numel() // packed.numel() for d in sends]
            _call(m, name, group, x, lambda c: m.reduce_scatter_uneven(c, sent, counts, received, wire_op))
            return _divided(y, op, n)
        # An exchange of blocks of different lengths, then one fold.
        got = _exchange(m, name, group, packed, sends, [prod(shape)] * n)
        return fold([block.reshape(shape) for block in got.split([prod(shape)] * n)], op)
    rows = stack_blocks(x, dim, n) if tiled else x.movedim(dim, 0).contiguous()
    native = _native(m, x.dtype, op)
    if native is None or not x.numel():
        return fold(_exchange_rows(m, name, group, rows).unbind(0), op)
    wire, wire_op = native
    y = rows.new_empty(rows.shape[1:])
    sent, received = _summand(wire, rows), _as(wire, y)
    _call(m, name, group, x, lambda c: m.reduce_scatter(c, sent, received, wire_op))
    return _divided(y, op, n)


# --- the whole and its blocks -------------------------------------------------------------------------------------


def _all_gather(m: Machine, x: Tensor, group: Group, *, dim: int, tiled: bool, sizes: Sequence[int] | None) -> Tensor:
    if sizes is not None:
        check_same("all_gather", "sizes", group, _said(m, "all_gather", group, x, sizes))
        shapes = [(*x.shape[:dim], d, *x.shape[dim + 1 :]) for d in sizes]
        lengths = [prod(shape) for shape in shapes]
        if m.has_uneven("all_gather") and any(lengths):
            y = x.new_empty(sum(lengths))
            sent, received = _flat(m, x), _flat(m, y)
            counts = [d * received.numel() // y.numel() for d in lengths]
            _call(m, "all_gather", group, x, lambda c: m.all_gather_uneven(c, sent, received, counts))
            blocks = zip(y.split(lengths), shapes, strict=True)
            return torch.cat([block.reshape(shape) for block, shape in blocks], dim)
        # Padded to the longest this is one native call; unpadded blocks would be n * (n - 1) messages.
        rows = _gather_rows(m, "all_gather", group, pad(x, dim, max(sizes)))
        return torch.cat([row.narrow(dim, 0, d) for row, d in zip(rows, sizes, strict=True)], dim)
    rows = _gather_rows(m, "all_gather", group, x)
    return unstack(rows, dim) if tiled else rows.movedim(0, dim).contiguous()


def _all_to_all(
    m: Machine,
    x: Tensor,
    group: Group,
    *,
    split_dim: int,
    concat_dim: int,
    tiled: bool,
    send_sizes: Sequence[int] | None,
    recv_sizes: Sequence[int] | None,
) -> Tensor:
    n, name = group.size, "all_to_all"
    if not tiled:
        rows = _exchange_rows(m, name, group, x.movedim(split_dim, 0).contiguous())
        return rows.movedim(0, concat_dim).contiguous()
    if send_sizes is None or recv_sizes is None:
        return unstack(_exchange_rows(m, name, group, stack_blocks(x, split_dim, n)), concat_dim)
    said = _said(m, name, group, x, (*send_sizes, *recv_sizes))
    check_blocks(name, group, said, one_dim=split_dim == concat_dim)
    exchange = partial(_exchange, m, name, group)
    return exchange_uneven(exchange, x, group, split_dim, concat_dim, send_sizes, recv_sizes)


def _ppermute(m: Machine, x: Tensor, group: Group, *, perm: Sequence[int]) -> Tensor:
    here = group.rank or 0
    dst = next((d for s, d in pairs(perm) if s == here), None)
    src = next((s for s, d in pairs(perm) if d == here), None)
    on = team(m, group, x.device)
    # A rank without a peer must learn, like the others, that the group is unusable.
    raise_failure(on, "ppermute")
    y = torch.zeros_like(x) if src is None else torch.empty_like(x)
    if src != here and (src is not None or dst is not None):
        return _move(m, "ppermute", group, x, y, m.permute, dst, src)
    if x.numel():
        on.calls += 1  # as on ranks with a peer
    return x.clone() if src == here else y


def _broadcast(m: Machine, x: Tensor, group: Group, *, src: int) -> Tensor:
    return _move(m, "broadcast", group, x, torch.empty_like(x), m.broadcast, src)


def _gather(m: Machine, x: Tensor, group: Group, *, dst: int, dim: int) -> Tensor:
    rows = (x.new_empty if group.rank == dst else x.new_zeros)((group.size, *x.shape))
    return unstack(_move(m, "gather", group, x, rows, m.gather, dst), dim)


def _scatter(m: Machine, x: Tensor, group: Group, *, src: int, dim: int) -> Tensor:
    rows = stack_blocks(x, dim, group.size)
    return _move(m, "scatter", group, rows, rows.new_empty(rows.shape[1:]), m.scatter, src)


# --- one edge, and none -------------------------------------------------------------------------------------------


def _send(m: Machine, x: Tensor, group: Group, *, dst: int, derivative: int) -> Tensor:
    # A copy, since the caller may write to x before it is sent. A header tells the receiver what comes: NCCL would
    # write past the end of a smaller tensor, or wait for ever for the rest of a larger one. Both go as bytes, so that a
    # receiver that expects another dtype can take them and say what is wrong.
    on, edge = team(m, group, x.device), (group.rank or 0, dst)
    for part in (header(x, derivative), x.clone()):
        if part.numel():
            send_later(on, part, dst, partial(issue, on, "send", partial(_send_part, m, _as(torch.uint8, part)), edge))
    return x.new_empty(0)


def _send_part(m: Machine, part: Tensor, c: Comm) -> None:
    m.send(c, part, 1)


def _recv(m: Machine, after: Tensor, like: Tensor, group: Group, *, src: int, derivative: int) -> Tensor:
    on, edge = team(m, group, like.device), (src, group.rank or 0)
    if is_capturing(like.device):
        raise FcommError(f"{on.where('recv')}: a graph cannot capture it, it reads the message's size; use ppermute")
    head = torch.empty(HEADER, dtype=torch.int64, device=like.device)
    issue(on, "recv", lambda c: m.recv(c, _as(torch.uint8, head), 0), edge)
    said = head.tolist()
    raise_failure(on, "recv")  # a failure may have ended the kernel and left head as it was
    y = torch.empty_like(like)
    error = misfit(group, src, said, like, derivative)
    # A message that does not fit is still received, or the sender would wait for that.
    into = torch.empty(nbytes(said), dtype=torch.uint8, device=like.device) if error else _as(torch.uint8, y)
    if into.numel():
        issue(on, "recv", lambda c: m.recv(c, into, 0), edge)
    if error:
        raise error
    return y


def _barrier(m: Machine, x: Tensor, group: Group) -> Tensor:
    on, flags = team(m, group, x.device), torch.zeros(2, device=x.device)
    issue(on, "barrier", lambda c: m.barrier(c, flags))
    synchronize(x.device)
    raise_failure(on, "barrier")  # a failure may have ended the kernel
    return x.clone()


_LOWERINGS: dict[str, Callable[..., Tensor]] = {
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
