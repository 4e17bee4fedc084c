"""A compiled program makes the eager one's calls of collectives, in its order, whatever a rank does with the results.

Forward and backward: ranks whose graphs merged, moved, repeated or reordered calls differently would wait for each
other. notes/0013-ranks-that-differ.md.
"""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fcomm
import fcomm.registration
from fcomm import Backend, Group
from fcomm.group import BACKENDS, forget_group, register_backend, register_group
from fcomm.registration import RECORDS
from fcomm.testing import run_ranks

Program = Callable[[Tensor, Tensor], Any]


@contextmanager
def uncached() -> Iterator[None]:
    """Keep graphs that an earlier fcomm compiled from being loaded from disk."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


# --- random programs ----------------------------------------------------------------------------------------------

CALLS: tuple[Callable[[Tensor, Group, Backend], Tensor], ...] = (
    fcomm.all_reduce,
    lambda x, g, b: fcomm.all_reduce(x * 2, g, b, op="max"),
    fcomm.all_gather,
    fcomm.reduce_scatter,
    fcomm.all_to_all,
    lambda x, g, b: fcomm.broadcast(x.sin(), g, b),
    lambda x, g, b: fcomm.ppermute(x, g, b, perm=[(0, 1), (1, 0)]),
    lambda x, g, b: fcomm.recv(x, g, b, after=fcomm.send(x, g, b)),
)


def drawn(seed: int, use: int, group: Group, backend: Backend, *, ignore: bool) -> Program:
    """The calls depend only on seed; what is done with the results also depends on use."""
    draw = random.Random(seed)
    values, calls = [0, 1], []
    for k in range(draw.randint(2, 6)):
        calls.append((draw.choice(CALLS), draw.choice(values), draw.random() < 0.5))
        values += [k + 2] if draw.random() < 0.4 else []
    draw = random.Random(f"{seed} {use}")
    uses = [(k + 2, draw.random()) for k in range(len(calls))]
    draw.shuffle(uses)

    def program(x: Tensor, y: Tensor) -> Tensor:
        values = [x, y]
        for call, k, through_sin in calls:
            arg = values[k] if values[k].shape[0] % 2 == 0 else x
            values.append(call(arg.sin() if through_sin else arg, group, backend))
        loss = x.sum() * 0
        for k, how in uses:
            v = values[k]
            if how < 0.2 and ignore:
                continue
            if how < 0.4:
                loss = loss + (v * 0).sum()
            elif how < 0.7:
                loss = loss + v.sum()
            else:
                loss = loss + (v * loss).cos().sum()
        return loss

    return program


def compiled(fn: Program) -> Program:
    return torch.compile(fn, fullgraph=True)


def backward(fn: Program) -> Program:
    def both(x: Tensor, y: Tensor) -> Any:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = fn(x, y)
        loss.backward()
        return loss.detach(), x.grad, y.grad

    return both


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Group, Backend, list[Any]]]:
    """A group of two that has no processes, and a backend that records its calls and returns ones."""
    log: list[Any] = []

    def lowering(name: str) -> Callable[..., Tensor]:
        def call(*args: Any, **params: Any) -> Tensor:
            *xs, group = args
            log.append((name, [tuple(x.shape) for x in xs], params))
            return xs[0].new_ones(RECORDS[name].shape(*(x.shape for x in xs), group, **params))

        return call

    from torch._inductor.async_compile import AsyncCompile

    group = register_group(Group("two", (0, 1), 0))
    backend = register_backend(Backend("recorder", lowerings={n: lowering(n) for n in RECORDS if n != "axis_index"}))
    monkeypatch.setattr(fcomm.registration, "live", lambda *_: None)
    # Only the order matters here, and compiling the kernels between the calls is what takes time.
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: None)
    torch.compiler.reset()
    with uncached():
        yield group, backend, log
    del BACKENDS["recorder"]
    forget_group(group)
    torch.compiler.reset()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Group, Backend, list[Any]]]:
    with recording(monkeypatch) as recorded:
        yield recorded


def check_order(seed: int, group: Group, backend: Backend, log: list[Any]) -> None:
    def calls(fn: Program) -> list[Any]:
        log.clear()
        fn(torch.randn(4, 3), torch.randn(8, 3))
        return list(log)

    for use in (0, 1):
        ignoring = drawn(seed, use, group, backend, ignore=True)
        using = drawn(seed, use, group, backend, ignore=False)
        differentiated = torch.func.grad(using, (0, 1))
        assert calls(compiled(ignoring)) == calls(ignoring)
        assert calls(backward(compiled(using))) == calls(backward(using))
        assert calls(compiled(differentiated)) == calls(differentiated)


@pytest.mark.parametrize("seed", [1, pytest.param(17, marks=pytest.mark.long)])
def test_random_programs_keep_their_order(seed: int, recorder: tuple[Group, Backend, list[Any]]) -> None:
    check_order(seed, *recorder)


def in_part() -> None:
    """Something, such as opcheck, may have loaded half of Inductor before the first program is compiled."""
    importlib.import_module("torch._inductor.lowering")
    assert "torch._inductor.fx_passes.post_grad" not in sys.modules
    with pytest.MonkeyPatch.context() as monkeypatch, recording(monkeypatch) as recorded:
        check_order(17, *recorded)


def test_the_order_is_kept_whatever_is_loaded_first() -> None:
    program = "import test_order; test_order.in_part()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
def test_more_random_programs_keep_their_order(seed: int, recorder: tuple[Group, Backend, list[Any]]) -> None:
    check_order(seed, *recorder)


# --- in processes -------------------------------------------------------------------------------------------------


def differing(world: Group, name: str, chosen: tuple[str, ...]) -> list[str]:
    """Independent calls of all kinds and sizes; each rank uses different results, in a different order, or none."""
    backend, first = BACKENDS[name], world.rank == 0

    def results(x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            fcomm.all_reduce(x, world, backend),
            fcomm.all_gather(y * 2, world, backend),
            fcomm.all_reduce(x, world, backend),  # as the first: two calls all the same
            fcomm.broadcast(y.sin(), world, backend, src=1),
            fcomm.reduce_scatter(x, world, backend),
            fcomm.all_reduce(y, world, backend, op="max"),
        ]

    def ignoring(x: Tensor, y: Tensor) -> Any:
        a, b, c, d, e, f = results(x, y)
        return (b + d.sum() * c.sum(), a) if first else (c, a.sum() - f, e * 2)

    def using(x: Tensor, y: Tensor) -> Tensor:
        a, b, c, d, e, f = results(x, y)
        if first:
            return (a.sum() + c.sum()) + (b.sin().sum() + f.sum()) * d.sum() + e.sum()
        return f.cos().sum() + 0 * e.sum() + (d * d.sum()).sum() + 0 * c.sum() + b.sum() + a.sum()

    def zero(x: Tensor, y: Tensor) -> Tensor:
        return using(x, y) * (1.0 if first else 0.0)

    r = world.rank or 0
    x, y = torch.arange(8.0).reshape(4, 2) + r, torch.arange(6.0).sin() * (1 + r)
    programs: dict[str, tuple[Program, Program]] = {
        "forward": (ignoring, compiled(ignoring)),
        "backward": (backward(using), backward(compiled(using))),
        "backward of zero": (backward(zero), backward(compiled(zero))),
        "grad": (torch.func.grad(using, (0, 1)), compiled(torch.func.grad(using, (0, 1)))),
    }
    failures = []
    for what in chosen:
        eager, fast = programs[what]
        try:
            with uncached():
                torch.testing.assert_close(fast(x, y), eager(x, y))
        except AssertionError as error:
            failures.append(f"{what}: {error}")
    return failures


@pytest.mark.parametrize(
    ("backend", "programs"),
    [
        ("cpu", ("backward of zero",)),
        pytest.param("cpu", ("forward", "backward", "grad"), marks=pytest.mark.long),
        pytest.param("c10d", ("forward", "backward", "backward of zero", "grad"), marks=pytest.mark.long),
    ],
)
def test_ranks_that_use_results_differently_do_not_wait_for_each_other(backend: str, programs: tuple[str, ...]) -> None:
    run_ranks(differing, 2, backend, programs, timeout_s=200)
