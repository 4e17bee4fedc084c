"""Real NCCL on real GPUs. It runs by itself where there is one: a torch with CUDA brings libnccl."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fcomm
from fcomm.testing import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


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


def on_gpus(world: fcomm.Group, dtype: torch.dtype) -> list[str]:
    device, rank = torch.device("cuda", world.rank or 0), world.rank or 0
    torch.cuda.set_device(device)
    generator, failures = torch.Generator().manual_seed(0), []
    xs = torch.randn(world.size, 2 * world.size, 3, generator=generator).to(dtype)

    def differ(what: str, got: Tensor, want: Tensor) -> None:
        if not torch.allclose(got.cpu().float(), want.float(), rtol=1e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-5):
            failures.append(f"rank {rank}, {dtype}, {what}: {got} is not {want}")

    for name, fn in programs(world).items():
        leaves = xs.clone().requires_grad_()
        want = _simulated(name, world.size, leaves)
        (grads,) = torch.autograd.grad((want.float() ** 2).sum(), leaves)
        x = xs[rank].to(device).requires_grad_()

        def loss_and_grad(x: Tensor, fn: Callable[[Tensor], Tensor] = fn) -> tuple[Tensor, Tensor]:
            y = fn(x)
            return y, torch.autograd.grad((y.float() ** 2).sum(), x)[0]

        y, grad = loss_and_grad(x)
        differ(name, y, want[rank].detach())
        differ(f"{name} backward", grad, grads[rank])
        torch.compiler.reset()
        differ(f"{name} compiled", torch.compile(fn, fullgraph=True)(x), want[rank].detach())
        if name != "barrier":  # it waits on the host
            _capture(name, fn, x.detach(), want[rank].detach(), differ)
    return failures


def _capture(name: str, fn: Callable[[Tensor], Tensor], x: Tensor, want: Tensor, differ: Callable[..., None]) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn(x)
    torch.cuda.current_stream().wait_stream(side)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = fn(static)
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    differ(f"{name} captured and replayed", y, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_every_collective_and_gradient(size: int, dtype: torch.dtype) -> None:
    if size > torch.cuda.device_count():
        pytest.skip(f"{size} GPUs are needed")
    run_ranks(on_gpus, size, dtype, timeout_s=300)


def alone_on_real_nccl(world: fcomm.Group) -> list[str]:
    """One rank needs no communicator, so one is opened by hand: the config, the by-value id, a sum, the end."""
    import ctypes

    from fcomm.backends import nccl

    torch.cuda.set_device(0)
    lib, comm = nccl.load(), ctypes.c_void_p()
    nccl._connect(lib, comm, 1, nccl._make_id(lib), 0)
    while (code := nccl._poll(lib, comm)) in lib.codes.pending:
        pass
    x, y = torch.arange(8.0, device="cuda"), torch.zeros(8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    lib.call("ncclAllReduce", x.data_ptr(), y.data_ptr(), 8, nccl.DTYPES[x.dtype], nccl.OPS["sum"], comm, stream)
    while (code := nccl._poll(lib, comm)) in lib.codes.pending:
        pass
    torch.cuda.synchronize()
    nccl._abort(lib, comm)
    return [] if code == 0 and torch.equal(x, y) else [f"status {code}: {y}"]


def test_a_communicator_of_one_rank() -> None:
    run_ranks(alone_on_real_nccl, 1, timeout_s=120)
