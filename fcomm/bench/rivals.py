"""The contestants we are compared with: the same collective by other libraries, and two operations without a library.

Each contestant is a table {collective: prepare}; prepare(program, context) does once what a careful user would do once
(allocate the output, view it as numpy) and returns the call that is timed. Buffers are reused if the library allows it,
which favours it: our own results are new tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fcomm.bench.programs import Program

Call = Callable[[], Any]


@dataclass(frozen=True)
class Context:
    """rank and size of the world; comm: MPI's communicator, if MPI takes part."""

    rank: int
    size: int
    comm: Any = None

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def previous(self) -> int:
        return (self.rank - 1) % self.size


class AbsentError(Exception):
    """Why a contestant is missing from a row."""


# --- torch.distributed --------------------------------------------------------------------------------------------

_C10D_OPS = {"sum": "SUM", "prod": "PRODUCT", "max": "MAX", "min": "MIN", "band": "BAND", "bor": "BOR", "bxor": "BXOR"}


def _c10d_op(p: Program) -> Any:
    if p.op not in _C10D_OPS:
        raise AbsentError(f"gloo has no {p.op}")
    return getattr(dist.ReduceOp, _C10D_OPS[p.op])


def _in_place(p: Program, call: Callable[[Tensor], Any]) -> Call:
    y = p.x.clone()

    def run() -> Tensor:
        call(y)
        return y

    return run


def _into(p: Program, call: Callable[[Tensor, Tensor], Any]) -> Call:
    y, x = torch.empty_like(p.expected), p.x

    def run() -> Tensor:
        call(y, x)
        return y

    return run


def _c10d_ring(p: Program, c: Context) -> Call:
    def exchange(y: Tensor, x: Tensor) -> None:
        work = dist.isend(x, c.next)
        dist.recv(y, c.previous)
        if work is not None:
            work.wait()

    return _into(p, exchange)


def _blocks(y: Tensor, c: Context) -> list[Tensor]:
    return list(y.chunk(c.size))


def _c10d_gather(p: Program, c: Context) -> Call:
    def gather(y: Tensor, x: Tensor) -> None:
        dist.gather(x, _blocks(y, c) if c.rank == p.root else None, p.root)

    return _into(p, gather)


def _c10d_scatter(p: Program, c: Context) -> Call:
    def scatter(y: Tensor, x: Tensor) -> None:
        dist.scatter(y, _blocks(x, c) if c.rank == p.root else None, p.root)

    return _into(p, scatter)


def _c10d_all_reduce(p: Program, c: Context) -> Call:
    op = _c10d_op(p)
    return _in_place(p, lambda y: dist.all_reduce(y, op))


def _c10d_reduce(p: Program, c: Context) -> Call:
    op = _c10d_op(p)
    return _in_place(p, lambda y: dist.reduce(y, p.root, op))


def _c10d_all_gather(p: Program, c: Context) -> Call:
    # The names of these two changed in torch 2.13.
    return _into(p, getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)


def _c10d_reduce_scatter(p: Program, c: Context) -> Call:
    op, call = _c10d_op(p), getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return _into(p, lambda y, x: call(y, x, op))


C10D: dict[str, Callable[[Program, Context], Call]] = {
    "all_reduce": _c10d_all_reduce,
    "all_reduce_invariant": _c10d_all_reduce,
    "all_gather": _c10d_all_gather,
    "all_gather_invariant": _c10d_all_gather,
    "reduce_scatter": _c10d_reduce_scatter,
    "all_to_all": lambda p, c: _into(p, dist.all_to_all_single),
    "ppermute": _c10d_ring,
    "send": _c10d_ring,
    "broadcast": lambda p, c: _in_place(p, lambda y: dist.broadcast(y, p.root)),
    "reduce": _c10d_reduce,
    "gather": _c10d_gather,
    "scatter": _c10d_scatter,
}

# --- torch's functional collectives, with their wait -----------------------------------------------------------------


def functional() -> Any:
    """The module, which takes a while to import."""
    import torch.distributed._functional_collectives as funcol

    return funcol


def torch_world() -> Any:
    """torch.distributed's own world, which uses gloo here."""
    return dist.group.WORLD


def funcol_op(p: Program) -> str:
    """The reduction by funcol's name."""
    _c10d_op(p)  # funcol lacks what gloo lacks
    return {"prod": "product"}.get(p.op, p.op)


def _waited(start: Callable[[], Any]) -> Call:
    wait = functional().wait_tensor
    return lambda: wait(start())


def _funcol_all_reduce(p: Program, c: Context) -> Call:
    call, x, op, world = functional().all_reduce, p.x, funcol_op(p), torch_world()
    return _waited(lambda: call(x, op, world))


def _funcol_all_gather(p: Program, c: Context) -> Call:
    # The name changed in torch 2.13.
    call = getattr(functional(), "all_gather_single", None) or functional().all_gather_tensor
    x, world = p.x, torch_world()
    return _waited(lambda: call(x, 0, world))


def _funcol_reduce_scatter(p: Program, c: Context) -> Call:
    call = getattr(functional(), "reduce_scatter_single", None) or functional().reduce_scatter_tensor
    x, op, world = p.x, funcol_op(p), torch_world()
    return _waited(lambda: call(x, op, 0, world))


def _funcol_all_to_all(p: Program, c: Context) -> Call:
    call, x, world = functional().all_to_all_single, p.x, torch_world()
    return _waited(lambda: call(x, None, None, world))


def _funcol_broadcast(p: Program, c: Context) -> Call:
    call, x, root, world = functional().broadcast, p.x, p.root, torch_world()
    return _waited(lambda: call(x, root, world))


def _funcol_ppermute(p: Program, c: Context) -> Call:
    call, x, world = functional().permute_tensor, p.x, torch_world()
    destinations = [(r + 1) % c.size for r in range(c.size)]
    return _waited(lambda: call(x, destinations, world))


FUNCOL: dict[str, Callable[[Program, Context], Call]] = {
    "all_reduce": _funcol_all_reduce,
    "all_reduce_invariant": _funcol_all_reduce,
    "all_gather": _funcol_all_gather,
    "all_gather_invariant": _funcol_all_gather,
    "reduce_scatter": _funcol_reduce_scatter,
    "all_to_all": _funcol_all_to_all,
    "broadcast": _funcol_broadcast,
    "ppermute": _funcol_ppermute,
}

# --- MPI through mpi4py, on numpy buffers -----------------------------------------------------------------------------

_MPI_OPS = {"sum": "SUM", "prod": "PROD", "max": "MAX", "min": "MIN", "band": "BAND", "bor": "BOR", "bxor": "BXOR"}


def _mpi(p: Program, call: Callable[[Any, Any], Any], *, in_place: bool = False) -> Call:
    """call(x, y) on numpy views; with in_place y starts as x."""
    if p.x.dtype in (torch.float16, torch.bfloat16):
        raise AbsentError(f"MPI has no {p.x.dtype}")
    y = p.x.clone() if in_place else torch.zeros_like(p.expected)
    send, receive = p.x.numpy(), y.numpy()

    def run() -> Tensor:
        call(send, receive)
        return y

    return run


def _mpi_op(p: Program) -> Any:
    from mpi4py import MPI

    if p.op not in _MPI_OPS:
        raise AbsentError(f"MPI has no {p.op}")
    return getattr(MPI, _MPI_OPS[p.op])


def _mpi_all_reduce(p: Program, c: Context) -> Call:
    op = _mpi_op(p)
    return _mpi(p, lambda x, y: c.comm.Allreduce(x, y, op))


def _mpi_reduce(p: Program, c: Context) -> Call:
    op = _mpi_op(p)
    return _mpi(p, lambda x, y: c.comm.Reduce(x, y, op, p.root))


def _mpi_reduce_scatter(p: Program, c: Context) -> Call:
    op = _mpi_op(p)
    return _mpi(p, lambda x, y: c.comm.Reduce_scatter_block(x, y, op))


def _mpi_scan(p: Program, c: Context) -> Call:
    op = _mpi_op(p)
    return _mpi(p, lambda x, y: c.comm.Scan(x, y, op))


def _mpi_ring(p: Program, c: Context) -> Call:
    return _mpi(p, lambda x, y: c.comm.Sendrecv(x, c.next, 0, y, c.previous, 0))


MPI: dict[str, Callable[[Program, Context], Call]] = {
    "all_reduce": _mpi_all_reduce,
    "all_reduce_invariant": _mpi_all_reduce,
    "all_gather": lambda p, c: _mpi(p, c.comm.Allgather),
    "all_gather_invariant": lambda p, c: _mpi(p, c.comm.Allgather),
    "reduce_scatter": _mpi_reduce_scatter,
    "all_to_all": lambda p, c: _mpi(p, c.comm.Alltoall),
    "ppermute": _mpi_ring,
    "send": _mpi_ring,
    "broadcast": lambda p, c: _mpi(p, lambda x, y: c.comm.Bcast(y, p.root), in_place=True),
    "reduce": _mpi_reduce,
    "gather": lambda p, c: _mpi(p, lambda x, y: c.comm.Gather(x, y, p.root)),
    "scatter": lambda p, c: _mpi(p, lambda x, y: c.comm.Scatter(x, y, p.root)),
    "scan": _mpi_scan,
}

# --- no library: what the machine can do ------------------------------------------------------------------------------


def copy(p: Program, c: Context) -> Call:
    """The size's bytes copied into reused memory, by every rank at once: what any collective of that size must do."""
    source = torch.ones(p.count, dtype=p.x.dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def add(p: Program, c: Context) -> Call:
    """x + x of 8 bytes: the unit of call cost."""
    x = torch.ones(2)
    return lambda: x + x


# Of these only the root has a result, so rivals are checked there only; ours must be zeros on the other ranks.
ROOTED = ("reduce", "gather")

TABLES: dict[str, dict[str, Callable[[Program, Context], Call]]] = {"c10d": C10D, "funcol": FUNCOL, "mpi": MPI}
MACHINE: dict[str, Callable[[Program, Context], Call]] = {"copy": copy, "add": add}
