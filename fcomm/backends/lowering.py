"""Every collective of a vendor's machine: its natives where they mean the same, else a composition of its moves.

What fcomm/arithmetic.py asks for and the libraries do not give (half types accumulated in float32, NaN in max and min,
bit operations, dtypes without a name there) is one exchange of blocks, a fold in rank order on this device, and one
gather of the folded blocks: the traffic of a ring all_reduce. notes/0050-device-lowerings.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from fcomm.arithmetic import fold
from fcomm.backends.communicator import Comm, Machine, Team, is_capturing, issue, send_later, synchronize, team
from fcomm.collectives.exchange import pairs
from fcomm.errors import MismatchError
from fcomm.group import Backend, Group


def backend(machine: Machine, device: str) -> Backend:
    """The machine's backend: its lowerings, by collective."""
    table = {name: partial(lowering, machine) for name, lowering in _LOWERINGS.items()}
    return Backend(machine.name, devices=(device,), lowerings=table)


def _call(m: Machine, name: str, x: Tensor, group: Group, fn: Callable[[Comm], None]) -> None:
    issue(team(m, group, x.device), name, fn)


# --- movement -----------------------------------------------------------------------------------------------------


def _bytes(x: Tensor) -> Tensor:
    # Moving takes no dtype, and int16, complex and float8 have no name in every version.
    return x.reshape(-1).view(torch.uint8)


def _exchange(m: Machine, name: str, group: Group, x: Tensor, sends: Sequence[int], recvs: Sequence[int]) -> Tensor:
    """Send the first sends[0] elements of flat x to rank 0, the next sends[1] to rank 1, ...; recvs[r] come from r."""
    y, width = x.new_empty(sum(recvs)), x.element_size()
    if sum(sends) or sum(recvs):
        counts = [d * width for d in sends], [d * width for d in recvs]
        _call(m, name, x, group, lambda c: m.exchange(c, _bytes(x), counts[0], _bytes(y), counts[1]))
    return y


def _exchange_rows(m: Machine, name: str, group: Group, x: Tensor) -> Tensor:
    """x is [n, ..]: row r goes to rank r, and row r of the result comes from it."""
    y = torch.empty_like(x)
    if y.numel():
        _call(m, name, x, group, lambda c: m.all_to_all(c, _bytes(x), _bytes(y)))
    return y


def _gather_rows(m: Machine, name: str, group: Group, x: Tensor) -> Tensor:
    """[n, *x.shape]: every rank's x."""
    y = x.new_empty((group.size, *x.shape))
    if y.numel():
        _call(m, name, x, group, lambda c: m.all_gather(c, _bytes(x), _bytes(y)))
    return y


def _agree(m: Machine, name: str, group: Group, x: Tensor, numbers: Sequence[int]) -> list[list[int]] | None:
    """What each rank says, so that ranks that disagree all raise instead of waiting for bytes that never come.

    None while a graph is captured: the host cannot read what a captured stream will bring.
    """
    if is_capturing(x.device):
        return None
    mine = torch.tensor(list(numbers), dtype=torch.int64, device=x.device)
    return _gather_rows(m, name, group, mine).tolist()  # type: ignore[no-any-return]


def _agree_on(m: Machine, name: str, option: str, group: Group, x: Tensor, sizes: Sequence[int]) -> None:
    said = _agree(m, name, group, x, sizes)
    if said is not None and any(row != said[0] for row in said):
        raise MismatchError(
            f"{name}: the ranks of group '{group.name}' pass different {option}: {said}; make them equal"
        )


def _unstack(rows: Tensor, dim: int) -> Tensor:
    """[n, .., d, ..] -> [.., n * d, ..]: the rows concatenated along dim."""
    return rows.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _stack_blocks(x: Tensor, dim: int, size: int) -> Tensor:
    """[.., n * d, ..] -> [n, .., d, ..]: the inverse."""
    return x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0).contiguous()


def _pack(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, list[int]]:
    """x cut along dim, block after block in one flat tensor, and the blocks' lengths in it."""
    blocks = [block.reshape(-1) for block in x.split(list(sizes), dim)]
    return torch.cat(blocks), [block.numel() for block in blocks]


# --- reductions ---------------------------------------------------------------------------------------------------

# The mean of these is their sum, divided: of bool it has no meaning, and torch does not divide wide unsigned integers.
_DIVIDED = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
_DIVIDED += (torch.complex64, torch.complex128)


def _native(m: Machine, dtype: torch.dtype, op: str) -> tuple[torch.dtype, str] | None:
    """How the library reduces dtype by op: as which dtype, by which op; None if not, or not with the same meaning."""
    if op == "mean":
        # Not ncclAvg: it multiplies each summand by 1/n, which rounds where a division of the sum does not.
        return m.reductions["sum"].get(dtype) if dtype in _DIVIDED else None
    return m.reductions.get(op, {}).get(dtype)


def _divided(y: Tensor, op: str, size: int) -> Tensor:
    if op != "mean":
        return y
    return y.div_(size) if y.is_floating_point() or y.is_complex() else y.div_(size, rounding_mode="trunc")


def _fold_rows(
    m: Machine, name: str, group: Group, x: Tensor, of: Callable[[Sequence[Tensor]], Tensor], each: bool = False
) -> Tensor:
    """Each rank folds one block of all ranks' x. of: the ranks' blocks -> the result's block; each: one for each rank."""
    n, flat = group.size, x.reshape(-1)
    blocks = x.new_zeros((n, -(-flat.numel() // n)))
    blocks.view(-1)[: flat.numel()].copy_(flat)
    folded = of(_exchange_rows(m, name, group, blocks).unbind(0))
    rows = _exchange_rows(m, name, group, folded) if each else _gather_rows(m, name, group, folded)
    return rows.reshape(-1)[: flat.numel()].reshape(x.shape).contiguous()


def _all_reduce(m: Machine, x: Tensor, group: Group, *, op: str) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    native = _native(m, x.dtype, op)
    if native is None:
        return _fold_rows(m, "all_reduce", group, x, lambda blocks: fold(blocks, op))
    wire, wire_op = native
    y = torch.empty_like(x)
    sent, received = x.reshape(-1).view(wire), y.reshape(-1).view(wire)
    _call(m, "all_reduce", x, group, lambda c: m.all_reduce(c, sent, received, wire_op))
    return _divided(y, op, group.size)


def _scan(m: Machine, x: Tensor, group: Group, *, op: str, exclusive: bool, reverse: bool) -> Tensor:
    def prefixes(blocks: Sequence[Tensor]) -> Tensor:
        order = list(blocks)[::-1] if reverse else list(blocks)
        rows = [fold(order[: r + 1], op) for r in range(len(order))]
        if exclusive:
            rows = [torch.zeros_like(rows[0]), *rows[:-1]]
        return torch.stack(rows[::-1] if reverse else rows)

    return _fold_rows(m, "scan", group, x, prefixes, each=True)


def _reduce(m: Machine, x: Tensor, group: Group, *, dst: int, op: str) -> Tensor:
    root, native = group.rank == dst, _native(m, x.dtype, op)
    if native is None or not x.numel():
        y = _all_reduce(m, x, group, op=op)
        return y if root else y.zero_()
    wire, wire_op = native
    y = torch.empty_like(x)
    sent, received = x.reshape(-1).view(wire), y.reshape(-1).view(wire)
    _call(m, "reduce", x, group, lambda c: m.reduce(c, sent, received, wire_op, dst))
    return _divided(y, op, group.size) if root else y.zero_()


def _reduce_scatter(
    m: Machine, x: Tensor, group: Group, *, dim: int, op: str, tiled: bool, sizes: Sequence[int] | None
) -> Tensor:
    n, rank, name = group.size, group.rank or 0, "reduce_scatter"
    if sizes is not None:
        # Blocks of their own lengths, then one fold: NCCL has no uneven form, HCCL's refuses prod and some dtypes.
        _agree_on(m, name, "sizes", group, x, sizes)
        packed, sends = _pack(x, sizes, dim)
        shape = (*x.shape[:dim], sizes[rank], *x.shape[dim + 1 :])
        got = _exchange(m, name, group, packed, sends, [prod(shape)] * n)
        return fold([block.reshape(shape) for block in got.split([prod(shape)] * n)], op)
    rows = _stack_blocks(x, dim, n) if tiled else x.movedim(dim, 0).contiguous()
    native = _native(m, x.dtype, op)
    if native is None or not x.numel():
        return fold(_exchange_rows(m, name, group, rows).unbind(0), op)
    wire, wire_op = native
    y = rows.new_empty(rows.shape[1:])
    sent, received = rows.reshape(-1).view(wire), y.reshape(-1).view(wire)
    _call(m, name, x, group, lambda c: m.reduce_scatter(c, sent, received, wire_op))
    return _divided(y, op, n)


# --- the whole and its blocks -------------------------------------------------------------------------------------


def _all_gather(m: Machine, x: Tensor, group: Group, *, dim: int, tiled: bool, sizes: Sequence[int] | None) -> Tensor:
    if sizes is not None:
        _agree_on(m, "all_gather", "sizes", group, x, sizes)
        # Padded to the longest: one native call, where blocks of their own lengths would be n * (n - 1) messages.
        padded = x.new_zeros((*x.shape[:dim], max(sizes), *x.shape[dim + 1 :]))
        padded.narrow(dim, 0, x.shape[dim]).copy_(x)
        rows = _gather_rows(m, "all_gather", group, padded)
        return torch.cat([row.narrow(dim, 0, d) for row, d in zip(rows, sizes, strict=True)], dim)
    rows = _gather_rows(m, "all_gather", group, x)
    return _unstack(rows, dim) if tiled else rows.movedim(0, dim).contiguous()


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
    n, rank, name = group.size, group.rank or 0, "all_to_all"
    if not tiled:
        rows = _exchange_rows(m, name, group, x.movedim(split_dim, 0).contiguous())
        return rows.movedim(0, concat_dim).contiguous()
    if send_sizes is None or recv_sizes is None:
        return _unstack(_exchange_rows(m, name, group, _stack_blocks(x, split_dim, n)), concat_dim)
    _agree_on_sizes(m, group, x, split_dim == concat_dim, send_sizes, recv_sizes)
    shapes = [list(x.shape) for _ in range(n)]
    for s, shape in enumerate(shapes):
        shape[split_dim] = send_sizes[rank]
        shape[concat_dim] = recv_sizes[s]
    packed, sends = _pack(x, send_sizes, split_dim)
    recvs = [prod(shape) for shape in shapes]
    blocks = _exchange(m, name, group, packed, sends, recvs).split(recvs)
    return torch.cat([b.reshape(shape) for b, shape in zip(blocks, shapes, strict=True)], concat_dim)


def _agree_on_sizes(
    m: Machine, group: Group, x: Tensor, one_dim: bool, send_sizes: Sequence[int], recv_sizes: Sequence[int]
) -> None:
    n = group.size
    said = _agree(m, "all_to_all", group, x, (*send_sizes, *recv_sizes))
    if said is None:
        return
    wrong = [(s, r) for s in range(n) for r in range(n) if said[s][r] != said[r][n + s]]
    if one_dim and wrong:
        s, r = wrong[0]
        raise MismatchError(
            f"all_to_all: rank {s} of group '{group.name}' sends {said[s][r]} to rank {r}, which expects "
            f"{said[r][n + s]}; make send_sizes of rank {s} and recv_sizes of rank {r} agree"
        )
    if not one_dim and any(row != said[0] for row in said):
        raise MismatchError(
            f"all_to_all: the ranks of group '{group.name}' pass different send_sizes and recv_sizes: {said}; "
            "with split_dim != concat_dim they partition the two dims, the same on every rank"
        )


def _ppermute(m: Machine, x: Tensor, group: Group, *, perm: Sequence[int]) -> Tensor:
    here = group.rank or 0
    dst = next((d for s, d in pairs(perm) if s == here), None)
    src = next((s for s, d in pairs(perm) if d == here), None)
    if src == here:
        return x.clone()
    y = torch.zeros_like(x) if src is None else torch.empty_like(x)
    if x.numel() and (dst is not None or src is not None):
        _call(m, "ppermute", x, group, lambda c: m.permute(c, _bytes(x), dst, _bytes(y), src))
    return y


def _broadcast(m: Machine, x: Tensor, group: Group, *, src: int) -> Tensor:
    y = torch.empty_like(x)
    if y.numel():
        _call(m, "broadcast", x, group, lambda c: m.broadcast(c, _bytes(x), _bytes(y), src))
    return y


def _gather(m: Machine, x: Tensor, group: Group, *, dst: int, dim: int) -> Tensor:
    rows = (x.new_empty if group.rank == dst else x.new_zeros)((group.size, *x.shape))
    if rows.numel():
        _call(m, "gather", x, group, lambda c: m.gather(c, _bytes(x), _bytes(rows), dst))
    return _unstack(rows, dim)


def _scatter(m: Machine, x: Tensor, group: Group, *, src: int, dim: int) -> Tensor:
    rows = _stack_blocks(x, dim, group.size)
    y = rows.new_empty(rows.shape[1:])
    if y.numel():
        _call(m, "scatter", x, group, lambda c: m.scatter(c, _bytes(rows), _bytes(y), src))
    return y


# --- one edge, and none -------------------------------------------------------------------------------------------


def _header(x: Tensor) -> Tensor:
    return torch.tensor([x.numel(), x.element_size()], dtype=torch.int64, device=x.device)


def _send(m: Machine, x: Tensor, group: Group, *, dst: int) -> Tensor:
    # A copy: the caller may write x again before it has left. The receiver learns the size first: NCCL would write past
    # the end of a smaller tensor, or wait for ever for the rest of a larger one.
    for part in (_header(x), x.clone()):
        if part.numel():
            _send_part(team(m, group, x.device), m, part, dst)
    return x.new_empty(0)


def _send_part(on: Team, m: Machine, part: Tensor, dst: int) -> None:
    send_later(on, part, dst, lambda c: m.send(c, _bytes(part), 1))


def _recv(m: Machine, after: Tensor, like: Tensor, group: Group, *, src: int) -> Tensor:
    on, edge = team(m, group, like.device), (src, group.rank or 0)
    header = torch.empty(2, dtype=torch.int64, device=like.device)
    issue(on, "recv", lambda c: m.recv(c, _bytes(header), 0), edge)
    count, width = header.tolist()
    y = torch.empty_like(like)
    fits = [count, width] == [like.numel(), like.element_size()]
    # What does not fit is taken off the edge, or the sender would wait for it to be.
    into = _bytes(y) if fits else torch.empty(count * width, dtype=torch.uint8, device=like.device)
    if count:
        issue(on, "recv", lambda c: m.recv(c, into, 0), edge)
    if not fits:
        raise MismatchError(
            f"recv: rank {src} of group '{group.name}' sends {count} elements of {width} bytes, like has "
            f"{like.numel()} of {like.element_size()}; pass a like of the message's shape and dtype"
        )
    return y


def _barrier(m: Machine, x: Tensor, group: Group) -> Tensor:
    _call(m, "barrier", x, group, m.barrier)
    synchronize(x.device)
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
