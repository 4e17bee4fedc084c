"""What a call on the shared-memory backend costs and keeps: pooled outputs, threads, descriptors, memory, the graph."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fcomm
from fcomm.backends import pool
from fcomm.backends.pool import POOLED_NBYTES, native
from fcomm.testing import run_ranks

pytestmark = pytest.mark.skipif(native is None, reason="the engine is not built; test_cpu_without.py covers that")

LARGE = POOLED_NBYTES  # elements of float32: four times the smallest pooled size


def in_use() -> int:
    gc.collect()
    return fcomm.memory_stats()["in_use_bytes"]


def large(world: fcomm.Group, value: float = 1.0) -> Tensor:
    return fcomm.all_reduce(torch.full((LARGE,), value), world, fcomm.cpu)


# --- the pool ---------------------------------------------------------------------------------------------------------


def check_lifetime(world: fcomm.Group) -> list[str]:
    failures, n = [], float(world.size)

    def expect(what: str, got: Any, expected: Any) -> None:
        if got != expected:
            failures.append(f"{what}: {got} is not {expected}")

    fcomm.empty_cache()
    expect("at the start", in_use(), 0)
    y = large(world)
    at = y.data_ptr()
    one = in_use()
    expect("one output is in use", one >= y.nbytes, True)
    view = y[3:5]
    del y
    expect("a view keeps it", (in_use(), view.tolist()), (one, [n, n]))
    other = large(world)
    expect("and keeps it from others", other.data_ptr() != at, True)
    del view, other
    expect("nothing is kept", in_use(), 0)
    expect("blocks come back", large(world).data_ptr() in (at, large(world).data_ptr()), True)

    # As a saved tensor of a graph, written in backward on an autograd thread.
    x = torch.ones(LARGE, requires_grad=True)
    loss = (fcomm.all_reduce(x, world, fcomm.cpu) ** 2).sum()
    expect("the graph keeps it", in_use() >= one, True)
    loss.backward()
    del loss
    expect("the gradient", x.grad is not None and x.grad[7].item(), 2 * n * n)
    x.grad = None
    expect("the graph gave it back", in_use(), 0)

    # Given back by another thread.
    held = [large(world)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    expect("another thread gave it back", in_use(), 0)

    # An ordinary tensor in every respect except resizing.
    y = large(world)
    for how, z in (
        ("deepcopy", copy.deepcopy(y)),
        ("pickle", pickle.loads(pickle.dumps(y))),
        ("save", saved_and_loaded(y)),
        ("numpy", torch.from_numpy(y.numpy().copy())),
        ("shared", y.clone().share_memory_()),
    ):
        expect(how, torch.equal(z, y) and z.data_ptr() != y.data_ptr(), True)
    expect("no base", (y._is_view(), y._base, y.requires_grad, y.is_leaf), (False, None, False, True))
    expect("aligned", y.data_ptr() % 64, 0)
    y.add_(1)
    y.requires_grad_().sum().backward()
    with torch.inference_mode():
        expect("inference", large(world).is_inference(), True)
    del y, z
    expect("nothing is kept at the end", in_use(), 0)

    for dtype in (torch.bool, torch.float8_e5m2, torch.complex64, torch.uint16):
        y = fcomm.broadcast(torch.ones(LARGE).to(dtype), world, fcomm.cpu)
        expect(
            f"{dtype}",
            (y.dtype, y.shape, bool((y.float() if dtype != torch.complex64 else y.real).all())),
            (dtype, (LARGE,), True),
        )
    del y
    expect("idle blocks are reported", fcomm.memory_stats()["idle_bytes"] > 0, True)
    pool.limit_cache(0)
    large(world)
    expect("none is kept beyond the limit", fcomm.memory_stats()["idle_bytes"], 0)
    pool.limit_cache(1 << 30)
    large(world)
    idle = fcomm.memory_stats()["idle_bytes"]
    expect("clearing says how much", (fcomm.empty_cache(), fcomm.memory_stats()["idle_bytes"]), (idle, 0))
    return failures  # fmt: skip


def saved_and_loaded(y: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)


def test_outputs_live_as_long_as_their_storage() -> None:
    run_ranks(check_lifetime, 2, timeout_s=100)


# --- the graph --------------------------------------------------------------------------------------------------------


def check_graph(world: fcomm.Group) -> list[str]:
    """Inductor's code calls the machine; the traced graph keeps the op; a result that nobody uses is still computed."""
    from torch._inductor.utils import run_and_get_code

    def program(x: Tensor) -> Tensor:
        fcomm.all_reduce(x * 3, world, fcomm.cpu)
        y = fcomm.all_reduce(x, world, fcomm.cpu)
        return fcomm.all_gather(y.sin(), world, fcomm.cpu, dim=0) + fcomm.all_reduce(x, world, fcomm.cpu).sum()

    x = torch.arange(4.0) + (world.rank or 0)
    compiled = torch.compile(program, fullgraph=True)
    before = native.round(handle(world))
    eager = program(x)
    eager_rounds = native.round(handle(world)) - before
    y, (code, *_) = run_and_get_code(compiled, x)
    before = native.round(handle(world))
    again = compiled(x)
    rounds = native.round(handle(world)) - before
    failures = []
    if not (torch.equal(y, eager) and torch.equal(again, eager)):
        failures.append(f"{y} {again} is not {eager}")
    if (code.count("= fcomm_all_reduce("), code.count("= fcomm_all_gather(")) not in ((3, 1), (2, 1)):
        failures.append(code)
    # Equal calls may be merged, unused ones may not be dropped.
    if rounds not in (eager_rounds, eager_rounds - 1):
        failures.append(f"{rounds} rounds in the graph, {eager_rounds} eager")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(x)
    seen = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fcomm::")}
    if seen not in ({"fcomm::all_reduce": n, "fcomm::all_gather": 1} for n in (2, 3)):
        failures.append(f"a profile of the graph shows {seen}")
    exported = torch.export.export(Module(program), (x,))
    called = [str(node.target) for node in exported.graph.nodes if "fcomm" in str(node.target)]
    if set(called) != {"fcomm.all_reduce.default", "fcomm.all_gather.default"}:
        failures.append(f"the exported graph calls {called}")
    if not torch.equal(exported.module()(x), eager):
        failures.append("the exported program differs")
    compiled_large = torch.compile(lambda x: large_sum(x, world), fullgraph=True)
    big = torch.ones(LARGE, requires_grad=True)
    compiled_large(big).backward()
    if big.grad is None or big.grad[0] != 2.0 * world.size**2:
        failures.append(f"{big.grad}")
    big.grad = None
    if in_use():
        failures.append(f"{in_use()} bytes are kept")
    return failures


def large_sum(x: Tensor, world: fcomm.Group) -> Tensor:
    return (fcomm.all_reduce(x, world, fcomm.cpu) ** 2).sum()


def handle(world: fcomm.Group) -> Any:
    from fcomm.backends import cpu

    return cpu._communicator(world).handle


class Module(torch.nn.Module):
    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        return self.program(x)


def test_compiled_graphs_call_the_machine_and_exported_ones_the_op() -> None:
    run_ranks(check_graph, 2, timeout_s=300)


def check_ignored(world: fcomm.Group) -> list[str]:
    """One rank ignores the result that another uses: the collective is in both graphs."""

    def program(x: Tensor) -> Tensor:
        y = fcomm.all_reduce(x, world, fcomm.cpu)
        return x + 1 if world.rank else x + y

    y = torch.compile(program, fullgraph=True)(torch.ones(3))
    return [] if torch.equal(y, torch.full((3,), 2.0 if world.rank else 1.0 + world.size)) else [f"{y}"]


def test_a_result_that_one_rank_ignores() -> None:
    run_ranks(check_ignored, 2, timeout_s=300)


# --- threads and leaks ------------------------------------------------------------------------------------------------


def check_threads(world: fcomm.Group, calls: int) -> list[str]:
    """Threads with their own groups run at once; threads on one group take turns, and never get each other's data."""
    wrong: list[str] = []
    groups = [fcomm.subgroup(world, range(world.size), name=f"thread {k}") for k in range(2)]

    def own_group(k: int) -> None:
        for step in range(calls):
            y = fcomm.all_reduce(torch.full((1 + 999 * (step % 3),), float(k + step)), groups[k], fcomm.cpu)
            if y[0] != world.size * (k + step):
                wrong.append(f"group {k}, step {step}: {y[0]}")

    def one_group(k: int) -> None:
        for _ in range(calls):
            y = fcomm.all_reduce(torch.full((5,), 1.0), world, fcomm.cpu)
            if not torch.equal(y, torch.full((5,), float(world.size))):
                wrong.append(f"{y}")

    for work in (own_group, one_group):
        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return wrong[:3]


def test_threads_take_turns() -> None:
    run_ranks(check_threads, 2, 500, timeout_s=100)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_leaks(world: fcomm.Group, calls: int) -> list[str]:
    x = torch.ones(2)

    def several(count: int) -> None:
        for _ in range(count // 4):
            fcomm.all_reduce(x, world, fcomm.cpu)
            fcomm.all_gather(x, world, fcomm.cpu)
            fcomm.barrier(world, fcomm.cpu)
            fcomm.recv(x, world, fcomm.cpu, after=fcomm.send(x, world, fcomm.cpu))

    def state() -> tuple[int, int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident_bytes()

    several(4000)
    fds, threads, resident = state()
    several(calls)
    fds_now, threads_now, resident_now = state()
    failures = []
    if (fds_now, threads_now) != (fds, threads):
        failures.append(f"descriptors {fds} -> {fds_now}, threads {threads} -> {threads_now}")
    if resident_now - resident > 1 << 20:
        failures.append(f"{resident_now - resident} bytes more after {calls} collectives")
    return failures


def test_no_leaks() -> None:
    run_ranks(check_leaks, 2, 20_000, timeout_s=200)


@pytest.mark.long
def test_no_leaks_over_a_million_collectives() -> None:
    run_ranks(check_leaks, 2, 1_000_000, timeout_s=1800)


# --- size of the shared region ----------------------------------------------------------------------------------------


def test_shared_memory_is_at_most_4_megabytes_a_rank() -> None:
    rings = 4 * (64 << 10) + 16384  # for an ordered pair; touched, and so allocated, when the pair first communicates
    for size in (2, 4, 8):
        assert native.region_bytes(size) <= size * (4 << 20) + size * size * rings
