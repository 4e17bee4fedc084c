"""Real NCCL on real GPUs. It runs automatically if there is one: a torch with CUDA brings libnccl.

If there are more ranks than GPUs, ranks share one. NCCL refuses two ranks of one host on one GPU, so each then claims
to be a host of its own (NCCL_HOSTID), and they connect over the loopback interface.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import CASES
from matrix import FIRST
from torch import Tensor
from vendors import (
    REAL,
    all_dtypes,
    bools_of_any_byte,
    check,
    every_layout,
    messages,
    nan_wins,
    sized,
    uneven_sizes_that_differ,
)

import fcomm
from fcomm.backends import nccl
from fcomm.backends.machine import Comm
from fcomm.testing import TRANSFORMS, check_case, run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PARTS = 6  # for several workers at once
FEW = ("forward", "vjp", "jvp", "vmap of grad")


def on_gpu(world: fcomm.Group, fn: Callable[..., Any], *args: Any, default: bool = False) -> Any:
    """fn(world, *args) on this rank's GPU; default: new tensors are made there."""
    rank, gpus = world.rank or 0, torch.cuda.device_count()
    if world.size > gpus:
        os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    torch.cuda.set_device(rank % gpus)
    if default:
        torch.set_default_device("cuda")
    return fn(world, *args)


def with_default(world: fcomm.Group, fn: Callable[..., Any], *args: Any) -> Any:
    return on_gpu(world, fn, *args, default=True)


# --- every case, as on the doubles ---


@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_under_every_transform(part: int) -> None:
    run_ranks(on_gpu, 2, check, REAL, sized(2)[part::PARTS], tuple(TRANSFORMS), timeout_s=500)


def test_every_case_on_three_ranks() -> None:
    # A coalesced case has a part in float32, and NCCL adds three floats in its own order.
    ids = [id for id in sized(3) if "coalesced" not in id]
    run_ranks(on_gpu, 3, check, REAL, ids, FEW, timeout_s=500)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler: str) -> None:
    run_ranks(on_gpu, 2, check, REAL, FIRST, ("vjp",), compiler, timeout_s=500)


@pytest.mark.parametrize(
    "fn",
    [all_dtypes, bools_of_any_byte, nan_wins, every_layout, messages, uneven_sizes_that_differ],
    ids=lambda fn: fn.__name__,
)
def test_like_the_doubles(fn: Callable[..., Any]) -> None:
    run_ranks(with_default, 2, fn, REAL)


def through_torch(world: fcomm.Group, ids: Sequence[str]) -> list[str]:
    failures = [f for id in ids for f in check_case(CASES[id], fcomm.c10d, world, FEW, device="cuda")]
    x = torch.full((1 << 20,), float(world.rank or 0), device="cuda")
    token = fcomm.send(x, world, fcomm.c10d)
    x.zero_()  # the caller's to write again
    y = fcomm.recv(torch.empty_like(x), world, fcomm.c10d, after=token)
    return failures + ([] if (y == 1 - (world.rank or 0)).all() else [f"a long message: {y}"])


def test_every_case_through_torch_distributed() -> None:
    run_ranks(on_gpu, 2, through_torch, sized(2), timeout_s=500)


def test_simulated() -> None:
    axis = fcomm.axis("simulated", 3)
    failures = [f for case in CASES.values() for f in check_case(case, fcomm.sim, axis, device="cuda")]
    assert not failures, "\n".join(failures)


# --- what only a device has: streams, capture ---


def programs(group: fcomm.Group) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every collective as a function of one [2 * size, 3] tensor."""
    on, n = fcomm.nccl, group.size
    shift = [(r, (r + 1) % n) for r in range(n)]
    return {
        "all_reduce": lambda x: fcomm.all_reduce(x, group, on),
        "all_reduce max": lambda x: fcomm.all_reduce(x, group, on, op="max"),
        "all_gather": lambda x: fcomm.all_gather(x, group, on, dim=1),
        "reduce_scatter": lambda x: fcomm.reduce_scatter(x, group, on),
        "all_to_all": lambda x: fcomm.all_to_all(x, group, on),
        "ppermute": lambda x: fcomm.ppermute(x, group, on, perm=shift),
        "broadcast": lambda x: fcomm.broadcast(x, group, on),
        "reduce": lambda x: fcomm.reduce(x, group, on),
        "gather": lambda x: fcomm.gather(x, group, on),
        "scatter": lambda x: fcomm.scatter(x, group, on),
        "scan": lambda x: fcomm.scan(x, group, on),
        "barrier": lambda x: fcomm.barrier(group, on, after=x),
    }


def _simulated(name: str, n: int, xs: Tensor) -> Tensor:
    """The same program on simulated ranks: the values, and the gradient of the sum of squares."""
    axis = fcomm.axis("simulated", n)
    on = fcomm.bind(axis, fcomm.sim)
    shift = [(r, (r + 1) % n) for r in range(n)]
    options = {"all_reduce max": {"op": "max"}, "all_gather": {"dim": 1}, "ppermute": {"perm": shift}}
    fn = getattr(on, name.split(maxsplit=1)[0])
    if name == "barrier":
        return xs
    y: Tensor = fcomm.simulate(lambda x: fn(x, **options.get(name, {})), axis)(xs)
    return y


def values_gradients_and_graphs(world: fcomm.Group, dtype: torch.dtype) -> list[str]:
    rank, failures = world.rank or 0, []
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(world.size, 2 * world.size, 3, generator=generator).to(dtype)

    def differ(what: str, got: Tensor, want: Tensor) -> None:
        if not torch.allclose(got.cpu().float(), want.float(), rtol=1e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-5):
            failures.append(f"rank {rank}, {dtype}, {what}: {got} is not {want}")

    for name, fn in programs(world).items():
        leaves = xs.clone().requires_grad_()
        want = _simulated(name, world.size, leaves)
        (grads,) = torch.autograd.grad((want.float() ** 2).sum(), leaves)
        x = xs[rank].cuda().requires_grad_()

        def value_and_grad(x: Tensor, fn: Callable[[Tensor], Tensor] = fn) -> tuple[Tensor, Tensor]:
            y = fn(x)
            return y, torch.autograd.grad((y.float() ** 2).sum(), x)[0]

        y, grad = value_and_grad(x)
        differ(name, y, want[rank].detach())
        differ(f"{name} backward", grad, grads[rank])
        torch.compiler.reset()
        differ(f"{name} compiled", torch.compile(fn, fullgraph=True)(x), want[rank].detach())
        y, grad = _on_a_side_stream(value_and_grad, x)
        differ(f"{name} on a side stream", y, want[rank].detach())
        differ(f"{name} backward on a side stream", grad, grads[rank])
        if name != "barrier":  # it waits on the host
            y, grad = _captured(value_and_grad, x)
            differ(f"{name} captured and replayed", y, want[rank].detach())
            differ(f"{name} backward captured and replayed", grad, grads[rank])
    return failures


def _on_a_side_stream(fn: Callable[..., Any], x: Tensor) -> Any:
    """fn of a tensor that is still being made there when fn is called."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        y = fn((x + 0).detach().requires_grad_())
    side.synchronize()
    return y


def _captured(fn: Callable[..., Any], x: Tensor) -> Any:
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x).requires_grad_()
    _on_a_side_stream(fn, static)  # a first call does things that cannot be captured
    with torch.cuda.graph(graph):
        y = fn(static)
    with torch.no_grad():
        static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_every_collective_and_gradient(size: int, dtype: torch.dtype) -> None:
    run_ranks(on_gpu, size, values_gradients_and_graphs, dtype, timeout_s=300)


# --- a communicator of one rank: a group of one opens none, so it is opened by hand ---


def every_native(world: fcomm.Group) -> list[str]:
    lib, handle, machine = nccl.load(), ctypes.c_void_p(), nccl._machine("nccl", nccl.load)

    def settle() -> None:
        while (code := nccl._poll(lib, handle)) in lib.codes.pending:
            time.sleep(1e-4)
        assert code == 0, code

    nccl._connect(lib, handle, 1, nccl._make_id(lib), 0)
    settle()
    x = torch.arange(1.0, 9.0)
    natives: dict[str, Callable[[Comm, Tensor], None]] = {
        **{f"all_reduce {op}": lambda c, y, op=op: machine.all_reduce(c, x, y, op) for op in nccl.OPS},
        "reduce": lambda c, y: machine.reduce(c, x, y, "sum", 0),
        "reduce_scatter": lambda c, y: machine.reduce_scatter(c, x, y, "sum"),
        "all_gather": lambda c, y: machine.all_gather(c, x, y),
        "all_to_all": lambda c, y: machine.all_to_all(c, x, y),
        "exchange": lambda c, y: machine.exchange(c, x, [8], y, [8]),
        "permute": lambda c, y: machine.permute(c, x, y, 0, 0),
        "broadcast": lambda c, y: machine.broadcast(c, x, y, 0),
        "gather": lambda c, y: machine.gather(c, x, y, 0),
        "scatter": lambda c, y: machine.scatter(c, x, y, 0),
    }
    failures = []
    for name, native in natives.items():
        # Once at once, once from a captured graph.
        for how in ("called", "captured"):
            y, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
            if how == "called":
                native(Comm(lib, handle, torch.cuda.current_stream().cuda_stream, 0, 1), y)
            else:
                with torch.cuda.graph(graph):
                    native(Comm(lib, handle, torch.cuda.current_stream().cuda_stream, 0, 1), y)
                graph.replay()
            settle()
            torch.cuda.synchronize()
            failures += [] if torch.equal(x, y) else [f"{name}, {how}: {y}"]
    nccl._finalize(lib, handle, settle)
    nccl._destroy(lib, handle)
    return failures


def test_a_communicator_of_one_rank() -> None:
    run_ranks(with_default, 1, every_native)


# --- failure ---


def a_rank_that_does_not_come(world: fcomm.Group) -> list[str]:
    group = fcomm.subgroup(world, range(world.size), name="late", timeout_s=4.0)
    x = torch.ones(4)
    fcomm.all_reduce(x, group, fcomm.nccl)
    started = time.monotonic()
    if world.rank == 0:
        fcomm.all_reduce(x, group, fcomm.nccl)
        torch.cuda.synchronize()  # endless, if nobody aborts the communicator
    fcomm.barrier(world, fcomm.c10d, after=torch.empty(0, device="cpu"))
    time.sleep(2)  # until the watching thread has seen it here too
    with pytest.raises(fcomm.CollectiveTimeoutError, match=r"deadline of 4\.0 s on the device"):
        fcomm.all_reduce(x, group, fcomm.nccl)
    waited = time.monotonic() - started
    with pytest.raises(fcomm.GroupPoisonedError):
        fcomm.all_reduce(x, group, fcomm.nccl)
    fcomm.close(group)
    again = fcomm.subgroup(world, range(world.size), name="again")
    y = fcomm.all_reduce(x, again, fcomm.nccl)
    failures = [] if y.tolist() == [world.size] * 4 else [f"afterwards: {y}"]
    return failures + ([] if waited < 14 else [f"it took {waited:.1f} s"])


def test_a_rank_that_does_not_come_is_a_timeout_on_all() -> None:
    run_ranks(with_default, 2, a_rank_that_does_not_come, timeout_s=120)
