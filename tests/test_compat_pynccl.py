"""PyNcclCommunicator as vLLM's test_pynccl.py and users of its weight transfer call it, on the CPU and on doubles."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from vendors import backend

import fcomm
from fcomm.compat import pynccl
from fcomm.compat.fastvideo import StatelessProcessGroup
from fcomm.compat.pynccl import PyNcclCommunicator
from fcomm.testing import run_ranks


def collectives(world: fcomm.Group, double: str | None) -> None:
    n, rank = world.size, world.rank or 0
    comm = PyNcclCommunicator(world, "cpu", backend=None if double is None else backend(double))
    assert (comm.rank, comm.world_size, comm.available, comm.disabled) == (rank, n, True, False)
    x = torch.arange(2.0 * n).reshape(n, 2) + 10 * rank
    every = [torch.arange(2.0 * n).reshape(n, 2) + 10 * r for r in range(n)]
    total = torch.stack(every).sum(0)

    for stream in (None, torch.cpu.Stream()):
        got = comm.all_reduce(x, stream=stream)
        assert got is not None
        assert torch.equal(got, total)
    out = torch.empty(2 * n)
    assert comm.all_reduce(x, dist.ReduceOp.MAX, out_tensor=out) is out
    assert torch.equal(out, every[-1].reshape(-1))
    for shape in ((n * n, 2), (n, n, 2), (2 * n * n,)):
        out = torch.empty(shape)
        comm.all_gather(out, x)
        assert torch.equal(out, torch.cat(every).reshape(shape))
    for op, folded in ((dist.ReduceOp.SUM, total), (dist.ReduceOp.MIN, every[0])):
        out = torch.empty(2)
        comm.reduce_scatter(out, x, op)
        assert torch.equal(out, folded[rank])

    sizes = [r + 1 for r in range(n)]
    rows = torch.full((rank + 1, 3), rank + 1.0)
    out = torch.empty(sum(sizes), 3)
    comm.all_gatherv(out, rows, sizes=sizes)
    assert torch.equal(out, torch.cat([torch.full((s, 3), float(s)) for s in sizes]))
    part = torch.empty(rank + 1, 3)
    comm.reduce_scatterv(part, out, sizes=sizes)
    assert torch.equal(part, n * rows)

    # vLLM's sums in a fixed order: reduced to one rank, and sent out from there.
    kept = out if rank == n - 1 else torch.full_like(out, -1)
    comm.reduce(kept, out, root=n - 1)
    part.zero_()
    comm.scatter(part, kept, sizes, root=n - 1)
    assert torch.equal(part, n * rows)
    if rank != n - 1:
        assert torch.equal(kept, torch.full_like(out, -1))
    short = [0, *sizes[1:]]
    comm.scatter(part, n * out[1:], short, root=n - 1)  # rank 0 takes no part

    # A weight that the trainer sends: it is written to, though it requires grad.
    weight = torch.nn.Parameter(torch.full((2, 2), float(rank)))
    comm.broadcast(weight, src=n - 1)
    assert weight.requires_grad
    assert weight.tolist() == [[n - 1.0] * 2] * 2

    comm.group_start()
    comm.send(x, dst=(rank + 1) % n)
    comm.recv(out := torch.empty(2 * n), src=(rank - 1) % n)
    comm.group_end()
    assert torch.equal(out, every[rank - 1].reshape(-1))

    # One batch, whose receives come first in the list.
    ops = [(dist.irecv, torch.empty(2), rank - 1), (dist.isend, x[0], rank + 1), (dist.isend, x[1], rank + 1)]
    ops.append((dist.irecv, torch.empty(2), rank - 1))
    comm.batch_isend_irecv([SimpleNamespace(op=op, tensor=t, group_peer=peer % n) for op, t, peer in ops])
    assert torch.equal(torch.stack([ops[0][1], ops[3][1]]), every[rank - 1][:2])

    with pytest.raises(ValueError, match=r"reduceOp is a tensor; pass .* out_tensor="):
        comm.all_reduce(x, out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scatter: the output has 1 elements"):
        comm.scatter(torch.empty(1), torch.ones(sum(sizes), 3), sizes, root=rank)
    with pytest.raises(ValueError, match=f"all_gather: the output has 3 elements .* it needs {2 * n * n}"):
        comm.all_gather(torch.empty(3), x)
    comm.destroy()
    assert not comm.available
    assert comm.all_reduce(x) is None
    comm.broadcast(x, src=0)
    comm.send(x, dst=rank)
    assert torch.equal(x, every[rank])


@pytest.mark.parametrize(("size", "double"), [(2, None), (3, None), (2, "nccl")])
def test_collectives(size: int, double: str | None) -> None:
    run_ranks(collectives, size, double)


def groups_of_parts(world: fcomm.Group, ports: tuple[int, int]) -> None:
    """Two communicators at once, of all ranks and of some, each with its own store; and one of a ProcessGroup."""
    rank = world.rank or 0
    pg = StatelessProcessGroup.create("127.0.0.1", ports[0], rank, 3)
    groups: list[Any] = [pg]
    if rank < 2:
        groups.append(StatelessProcessGroup.create("127.0.0.1", ports[1], rank, 2))
    x = torch.tensor([rank])
    for group in groups:
        x = PyNcclCommunicator(group, device="cpu").all_reduce(x)
        group.barrier()
    assert x.item() == (3 if rank == 2 else 6)
    for group in groups:
        group.close()
    store = dist.PrefixStore("pynccl", fcomm.rendezvous.live(world).store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    y = PyNcclCommunicator(dist.group.WORLD, torch.device("cpu")).all_reduce(torch.tensor(1.0))
    assert y is not None
    assert y.item() == 3
    fcomm.close()
    dist.destroy_process_group()


def test_groups_of_parts() -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = tuple(listener.getsockname()[1] for listener in listeners)
    for listener in listeners:
        listener.close()
    run_ranks(groups_of_parts, 3, ports)


def test_one_rank_is_disabled() -> None:
    alone = fcomm.stateless_group("127.0.0.1", 0, 0, 1, name="alone")
    comm = PyNcclCommunicator(alone, "cpu")
    assert (comm.available, comm.disabled) == (False, True)
    assert comm.all_reduce(torch.ones(1)) is None
    fcomm.close(alone)
    assert pynccl.PyHcclCommunicator is PyNcclCommunicator
