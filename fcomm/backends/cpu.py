"""cpu: ranks of one host over shared memory, by the engine in fcomm/csrc; figures in notes/0041-benchmark-table.md.

Every collective that moves or folds blocks is one call of the engine, which reads blocks along any dim in place. The
fingerprint of a call (shape, dtype, options) is published beside its flag, so if ranks ask for different things, all of
them raise. A group that the engine cannot serve, because it spans hosts, goes through torch.distributed and says so
once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fcomm.arithmetic import OPS
from fcomm.backends.c10d import c10d
from fcomm.backends.pool import MAX_DIMS, POOLED_NBYTES, native, pooled, why_no_native
from fcomm.backends.rows import BOTH_OR_NONE, kind
from fcomm.backends.shm_failure import INVALID, MISMATCH, SYSTEM, failure, poisoned
from fcomm.backends.shm_opening import open_region, why_not_shared
from fcomm.collectives.exchange import pairs
from fcomm.dtypes import CODES
from fcomm.dtypes import name as name_of
from fcomm.errors import FcommError
from fcomm.group import Backend, Group, Lowering, register_backend
from fcomm.rendezvous import live


@dataclass
class _Communicator:
    """A group's engine handle; None if torch.distributed serves it. failed: the text of the error that broke it."""

    group: Group
    handle: Any
    failed: str = ""


# By group name, so that a call finds its communicator in one look-up; the group's Live record owns them.
_OPEN: dict[str, _Communicator] = {}


def _communicator(group: Group) -> _Communicator:
    found = _OPEN.get(group.name)
    if found is not None and found.group is group:
        return found
    return live(group).communicator("cpu", lambda: _open(group), _close)


def _open(group: Group, first_round: int = 0) -> _Communicator:
    owner = live(group)
    reason = why_not_shared(owner, native.ABI if native else 0)
    if reason is not None:
        detail = f" ({why_no_native})" if native is None else ""
        warnings.warn(
            f"fcomm.cpu: group '{group.name}' goes through torch.distributed, many times slower: {reason}{detail}"
            + ("; install a C++ compiler and reinstall fcomm" if native is None else ""),
            stacklevel=2,
        )
    handle = None if reason is not None else open_region(owner, native, first_round)
    _OPEN[group.name] = _Communicator(group, handle)
    return _OPEN[group.name]


def _close(communicator: _Communicator) -> None:
    _OPEN.pop(communicator.group.name, None)
    if communicator.handle is not None:
        native.close(communicator.handle)


def _lowering(name: str, call: Callable[..., tuple[int, Tensor]]) -> Lowering:
    """The lowering that makes one call of the engine and raises what its status says."""
    elsewhere = c10d.lowerings[name]

    def lowering(x: Tensor, group: Group, **options: Any) -> Tensor:
        c = _OPEN.get(group.name)
        if c is None or c.group is not group:
            c = _communicator(group)
        if c.handle is None:
            return elsewhere(x, group, **options)
        status, y = call(x, group, c.handle, **options)
        if status:
            raise _error(status, name, x, c, options)
        return y

    return lowering


def _error(status: int, name: str, x: Tensor, c: _Communicator, options: Mapping[str, Any]) -> FcommError:
    if c.failed:
        return poisoned(name, c.group, c.failed)
    named = "".join(f", {k}={v!r}" for k, v in options.items() if v is not None)
    asked = f"{name}({name_of(CODES[x.dtype])}{list(x.shape)}{named})"
    error = failure(status, name, c.group, native, c.handle, asked)
    if status not in (INVALID, SYSTEM):
        c.failed = f"{type(error).__name__}: {error}"
    return error


# dtype: (its number, which is the engine's own if the dtype can be reduced, and its size in bytes)
_CODES = {dtype: (code, dtype.itemsize) for dtype, code in CODES.items()}
_FLOAT8 = CODES[torch.float8_e4m3fn]  # the first; the other float8 types follow it
_OPS = {op: code for code, op in enumerate(OPS)}  # in the order of fcomm_op in csrc/fcomm.h


# A lowering below takes x, the group, the engine's handle and the options, and returns the engine's status and y.
# tag: the hash of what the engine cannot see. Only ints are hashed: hashes of None or strings differ among processes.


# A plan is what follows from shapes alone, and is remembered: a program makes the same few calls again and again, and
# working out a plan would take longer than a small call.
_remembered = lru_cache(maxsize=4096)


def _new(shape: tuple[int, ...], like: Tensor, width: int) -> Tensor:
    nbytes = prod(shape) * width
    if nbytes >= POOLED_NBYTES:
        return pooled(shape, nbytes, like.dtype)
    # Pass the lengths one by one: torch takes 0.7 us longer to read a tuple of them.
    return like.new_empty(*shape) if shape else like.new_empty(())


def _blocks(shape: Sequence[int], dim: int, width: int, count: int) -> tuple[int, int]:
    """The engine's blocks: `count` equal ones along dim of a contiguous tensor of that shape."""
    return prod(shape[:dim]), shape[dim] // count * prod(shape[dim + 1 :]) * width


def _uneven(shape: Sequence[int], dim: int, width: int, sizes: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    inner = prod(shape[dim + 1 :]) * width
    return prod(shape[:dim]), tuple(d * inner for d in sizes)


def _with(shape: Sequence[int], dim: int, length: int) -> tuple[int, ...]:
    return (*shape[:dim], length, *shape[dim + 1 :])


Called = tuple[int, Tensor]

# --- reductions ---------------------------------------------------------------------------------------------------


def _widened(call: Callable[..., Called], x: Tensor, group: Group, handle: Any, **options: Any) -> Called:
    """Fold float8 in float32 and let torch round it: torch's versions differ in how they round numbers out of range."""
    status, y = call(x.float(), group, handle, **options, narrow=_CODES[x.dtype][0])
    return status, y.to(x.dtype)


def _all_reduce(x: Tensor, group: Group, *, op: str, narrow: int = 0) -> Tensor:
    # The whole lowering in one function: another function would add a tenth to the cost of a small call.
    c = _OPEN.get(group.name)
    if c is None or c.group is not group:
        c = _communicator(group)
    if c.handle is None:
        return c10d.lowerings["all_reduce"](x, group, op=op)
    code, width = _CODES[x.dtype]
    if code >= _FLOAT8:
        return _all_reduce(x.float(), group, op=op, narrow=code).to(x.dtype)
    count = x.numel()
    nbytes = count * width
    y = torch.empty_like(x) if nbytes < POOLED_NBYTES else pooled(x.shape, nbytes, x.dtype)
    status = native.all_reduce(x.data_ptr(), y.data_ptr(), count, code, _OPS[op], hash(x.shape) ^ narrow, c.handle)
    if status:
        raise _error(status, "all_reduce", x, c, {"op": op})
    return y


def _scan(x: Tensor, group: Group, handle: Any, *, op: str, exclusive: bool, reverse: bool, narrow: int = 0) -> Called:
    code, width = _CODES[x.dtype]
    if code >= _FLOAT8:
        return _widened(_scan, x, group, handle, op=op, exclusive=exclusive, reverse=reverse)
    y = _new(x.shape, x, width)
    pointers = x.data_ptr(), y.data_ptr()
    return native.scan(*pointers, x.numel(), code, _OPS[op], exclusive, reverse, hash(x.shape) ^ narrow, handle), y


def _reduce(x: Tensor, group: Group, handle: Any, *, dst: int, op: str, narrow: int = 0) -> Called:
    code, width = _CODES[x.dtype]
    if code >= _FLOAT8:
        return _widened(_reduce, x, group, handle, dst=dst, op=op)
    y = _new(x.shape, x, width) if group.rank == dst else torch.zeros_like(x)
    pointers = x.data_ptr(), y.data_ptr()
    return native.reduce(*pointers, x.numel(), code, _OPS[op], dst, hash(x.shape) ^ narrow, handle), y


def _reduce_scatter(
    x: Tensor,
    group: Group,
    handle: Any,
    *,
    dim: int,
    op: str,
    tiled: bool,
    sizes: tuple[int, ...] | None,
    narrow: int = 0,
) -> Called:
    code, width = _CODES[x.dtype]
    if code >= _FLOAT8:
        return _widened(_reduce_scatter, x, group, handle, dim=dim, op=op, tiled=tiled, sizes=sizes)
    shape, blocks, tag = _reduce_scatter_plan(x.shape, width, group.size, group.rank or 0, dim, tiled, sizes)
    y = _new(shape, x, width)
    return native.reduce_scatter(x.data_ptr(), blocks, y.data_ptr(), code, _OPS[op], tag ^ narrow, handle), y


@_remembered
def _reduce_scatter_plan(
    s: tuple[int, ...], width: int, n: int, rank: int, dim: int, tiled: bool, sizes: tuple[int, ...] | None
) -> tuple[tuple[int, ...], Any, int]:
    tag = hash((s, dim, tiled, sizes or ()))
    if sizes is not None:
        return _with(s, dim, sizes[rank]), _uneven(s, dim, width, sizes), tag
    shape = _with(s, dim, s[dim] // n) if tiled else (*s[:dim], *s[dim + 1 :])
    return shape, _blocks(s, dim, width, n), tag


# --- the whole and its blocks -------------------------------------------------------------------------------------


def _all_gather(
    x: Tensor, group: Group, handle: Any, *, dim: int, tiled: bool, sizes: tuple[int, ...] | None
) -> Called:
    code, width = _CODES[x.dtype]
    shape, blocks, tag = _all_gather_plan(x.shape, code, width, group.size, dim, tiled, sizes)
    y = _new(shape, x, width)
    return native.all_gather(x.data_ptr(), y.data_ptr(), blocks, tag, handle), y


@_remembered
def _all_gather_plan(
    s: tuple[int, ...], code: int, width: int, n: int, dim: int, tiled: bool, sizes: tuple[int, ...] | None
) -> tuple[tuple[int, ...], Any, int]:
    if sizes is not None:
        shape = _with(s, dim, sum(sizes))
    else:
        shape = _with(s, dim, s[dim] * n) if tiled else (*s[:dim], n, *s[dim:])
    blocks = _blocks(shape, dim, width, n) if sizes is None else _uneven(shape, dim, width, sizes)
    return shape, blocks, hash((shape, code, dim, tiled, sizes or ()))


def _all_to_all(
    x: Tensor,
    group: Group,
    handle: Any,
    *,
    split_dim: int,
    concat_dim: int,
    tiled: bool,
    send_sizes: tuple[int, ...] | None,
    recv_sizes: tuple[int, ...] | None,
) -> Called:
    code, width = _CODES[x.dtype]
    shape, sent, received, tag = _all_to_all_plan(
        x.shape, code, width, group.size, group.rank or 0, split_dim, concat_dim, tiled, send_sizes, recv_sizes
    )
    y = _new(shape, x, width)
    # Uneven: if split_dim is concat_dim, each rank has its own sizes, and the engine compares them pair by pair.
    return native.all_to_all(x.data_ptr(), sent, y.data_ptr(), received, send_sizes is not None, tag, handle), y


@_remembered
def _all_to_all_plan(
    s: tuple[int, ...],
    code: int,
    width: int,
    n: int,
    rank: int,
    split_dim: int,
    concat_dim: int,
    tiled: bool,
    send_sizes: tuple[int, ...] | None,
    recv_sizes: tuple[int, ...] | None,
) -> tuple[tuple[int, ...], Any, Any, int]:
    tag: Any = (code, split_dim, concat_dim, tiled)
    if send_sizes is None or recv_sizes is None:
        block = [*s]
        block[split_dim : split_dim + 1] = [s[split_dim] // n] if tiled else []
        shape = [*block]
        shape[concat_dim : concat_dim + tiled] = [block[concat_dim] * n if tiled else n]
        sent, received = _blocks(s, split_dim, width, n), _blocks(shape, concat_dim, width, n)
        return tuple(shape), sent, received, hash((*tag, s))
    shape = [*s]
    shape[split_dim], shape[concat_dim] = send_sizes[rank], sum(recv_sizes)
    tag = (*tag, *(d for k, d in enumerate(s) if k not in (split_dim, concat_dim)))
    if split_dim != concat_dim:
        tag = (*tag, send_sizes, recv_sizes)
    uneven = _uneven(s, split_dim, width, send_sizes), _uneven(shape, concat_dim, width, recv_sizes)
    return tuple(shape), *uneven, hash(tag)


def _ppermute(x: Tensor, group: Group, handle: Any, *, perm: tuple[int, ...]) -> Called:
    code, width = _CODES[x.dtype]
    y = _new(x.shape, x, width)
    edges, tag = _edges(perm, group.rank), hash((x.shape, code, perm))
    return native.permute(x.data_ptr(), y.data_ptr(), x.nbytes, *edges, tag, handle), y


@_remembered
def _edges(perm: tuple[int, ...], rank: int | None) -> tuple[int, int]:
    """The rank that sends to rank, and the one that rank sends to; -1 for none."""
    sources, destinations = ([edge[k] for edge in pairs(perm) if edge[1 - k] == rank] for k in (0, 1))
    return (*sources, -1)[0], (*destinations, -1)[0]


def _broadcast(x: Tensor, group: Group, handle: Any, *, src: int) -> Called:
    code, width = _CODES[x.dtype]
    y = _new(x.shape, x, width)
    return native.broadcast(x.data_ptr(), y.data_ptr(), x.nbytes, src, hash((x.shape, code)), handle), y


def _gather(x: Tensor, group: Group, handle: Any, *, dst: int, dim: int) -> Called:
    code, width = _CODES[x.dtype]
    shape = _with(x.shape, dim, x.shape[dim] * group.size)
    y = _new(shape, x, width) if group.rank == dst else torch.zeros(shape, dtype=x.dtype)
    blocks = _blocks(shape, dim, width, group.size)
    return native.gather(x.data_ptr(), y.data_ptr(), blocks, dst, hash((x.shape, code, dim)), handle), y


def _scatter(x: Tensor, group: Group, handle: Any, *, src: int, dim: int) -> Called:
    code, width = _CODES[x.dtype]
    y = _new(_with(x.shape, dim, x.shape[dim] // group.size), x, width)
    blocks = _blocks(x.shape, dim, width, group.size)
    return native.scatter(x.data_ptr(), blocks, y.data_ptr(), src, hash((x.shape, code, dim)), handle), y


# --- one edge, and none -------------------------------------------------------------------------------------------

# A message's signature is its dtype and shape, of which the engine carries MAX_DIMS lengths.


def _folded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with more dimensions than a signature holds: its first lengths, and a negative number for the others."""
    rest = shape[MAX_DIMS - 1 :]
    return *shape[: MAX_DIMS - 1], ~(hash(rest) & (2**63 - 1))


def _shown(dims: Sequence[int]) -> str:
    """The shape of a signature, or as much as it holds."""
    lengths = [str(d) for d in dims]
    return f"[{', '.join([*lengths[:-1], '...'] if dims and dims[-1] < 0 else lengths)}]"


def _signature(x: Tensor, derivative: int) -> tuple[int, tuple[int, ...]]:
    """What the engine compares of a message: the dtype's code, with the derivative in the bits above, and the shape."""
    shape = tuple(x.shape)
    code = _CODES[x.dtype][0] | derivative % 2**23 << 8
    return code, shape if len(shape) <= MAX_DIMS else _folded(shape)


def _send(x: Tensor, group: Group, handle: Any, *, dst: int, derivative: int) -> Called:
    return native.send(x.data_ptr(), x.nbytes, _signature(x, derivative), dst, handle), torch.empty(0, dtype=x.dtype)


def _recv(after: Tensor, like: Tensor, group: Group, *, src: int, derivative: int) -> Tensor:
    c = _communicator(group)
    if c.handle is None:
        return c10d.lowerings["recv"](after, like, group, src=src, derivative=derivative)
    y = _new(like.shape, like, like.element_size())
    status, *sent = native.recv(y.data_ptr(), like.nbytes, _signature(like, derivative), src, c.handle)
    if status:
        # Only here are both sides known.
        words = {}
        if status == MISMATCH and sent[0] >= 0:
            words["sent"] = f"{name_of(sent[0] & 255)}{_shown(sent[1])}"
            if sent[0] >> 8 != derivative:
                words["sent"] = f"{kind(sent[0] >> 8)}, {words['sent']}"
                words["expected"] = f"{kind(derivative)}: {BOTH_OR_NONE}"
        raise _error(status, "recv", like, c, {"src": src, **words})
    return y


def _barrier(x: Tensor, group: Group, handle: Any) -> Called:
    return native.barrier(0, handle), x.clone()


_CALLS: dict[str, Callable[..., Called]] = {
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
    "barrier": _barrier,
}
cpu = register_backend(
    Backend(
        "cpu",
        ("cpu",),
        {
            "all_reduce": _all_reduce,
            **{name: _lowering(name, call) for name, call in _CALLS.items()},
            "recv": _recv,
        },
    )
)
