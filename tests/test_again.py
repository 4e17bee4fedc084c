"""The second call with equal arguments skips the checks that the first one passed; it must differ in nothing else.

So every case here follows a plain call with the same arguments, and is one in which the shortcut would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fcomm
from fcomm import registration
from fcomm.group import register_backend
from fcomm.testing import run_ranks


def values(rank: int) -> Tensor:
    return torch.arange(1.0, 7.0).reshape(2, 3) + 10 * rank


def complex_values(rank: int) -> Tensor:
    return torch.complex(values(rank), -values(rank) / 2)


LAZY: dict[str, Callable[[int], Tensor]] = {
    "strided": lambda rank: values(rank).t(),
    "conjugate": lambda rank: complex_values(rank).conj(),
    "imaginary part of a conjugate": lambda rank: complex_values(rank).conj().imag,
    "negative": lambda rank: values(rank)._neg_view(),
    "zeros without storage": lambda rank: torch._efficientzerotensor((2, 3)),
    "inference": lambda rank: _inference(values(rank)),
    "parameter": lambda rank: torch.nn.Parameter(values(rank)),
    "half": lambda rank: values(rank).half(),
}


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x + 0


def check_lazy(world: fcomm.Group, names: list[str], planted: bool) -> list[str]:
    failures = []
    for name in names:
        make = LAZY[name]
        for plain in (values(0), complex_values(0)):
            fcomm.all_reduce(plain, world, fcomm.cpu)
        if planted:
            forget_keys()
        expected = sum(_plain(make(rank)) for rank in range(world.size))
        with torch.no_grad():
            for time in ("first", "second"):
                y = fcomm.all_reduce(make(world.rank or 0), world, fcomm.cpu)
                if not torch.equal(y, expected) or not y.is_contiguous():
                    failures.append(f"{name}, {time} time: {y} is not {expected}")
    return failures


def _plain(x: Tensor) -> Tensor:
    if x._is_zerotensor():
        return torch.zeros(x.shape)
    return x.detach().clone().resolve_conj().resolve_neg().contiguous()


def forget_keys() -> None:
    """The planted fault: what torch knows about a tensor is not compared."""

    class Everything(set[int]):
        def __contains__(self, key: object) -> bool:
            return True

    for key, (group, backend, _, call) in list(registration._CALLS.items()):
        registration._CALLS[key] = (group, backend, Everything(), call)


@pytest.mark.parametrize("size", [2, 3])
def test_lazy_tensors_after_plain_ones(size: int) -> None:
    run_ranks(check_lazy, size, list(LAZY), False)


def test_the_check_finds_tensors_that_are_not_told_apart() -> None:
    with pytest.raises(AssertionError, match="conjugate"):
        run_ranks(check_lazy, 2, ["conjugate"], True)


class Seen(Tensor):
    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Seen.calls += "fcomm" in str(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class FunctionMode(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "fcomm" in str(func)
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "fcomm" in str(func)
        return func(*args, **(kwargs or {}))


def check_watched(world: fcomm.Group) -> list[str]:
    """Whatever observes calls must still see them."""
    failures, n, rank = [], world.size, world.rank or 0

    def call(x: Tensor) -> Tensor:
        return fcomm.all_reduce(x, world, fcomm.cpu)

    def expect(what: str, right: bool) -> None:
        if not right:
            failures.append(what)
        call(values(rank))

    x, total = values(rank), sum(values(r) for r in range(n))
    call(x)
    y = call(x.clone().requires_grad_())
    expect("a derivative", y.requires_grad)
    (batched,) = torch.autograd.grad(y, _leaf(y), torch.eye(6).reshape(6, 2, 3), is_grads_batched=True)
    expect("a batch of cotangents", torch.equal(batched, n * torch.eye(6).reshape(6, 2, 3)))
    expect("grad", torch.equal(torch.func.grad(lambda x: call(x).sum())(x), torch.full((2, 3), float(n))))
    expect("jvp", torch.equal(torch.func.jvp(call, (x,), (x,))[1], total))
    expect("vmap", torch.equal(torch.func.vmap(call)(x), total))
    with fwd.dual_level():
        expect("a dual tensor", torch.equal(fwd.unpack_dual(call(fwd.make_dual(x, x))).tangent, total))
    call(x.as_subclass(Seen))
    expect("a subclass", Seen.calls == 1)
    for mode in (FunctionMode(), DispatchMode()):
        with mode:
            call(x)
        expect(type(mode).__name__, mode.calls == 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x)
    expect("the profiler", any(event.key == "fcomm::all_reduce" for event in profile.key_averages()))
    traced = torch.jit.trace(lambda x: call(2 * x), (x,), check_trace=False)
    expect("torch.jit.trace", torch.equal(traced(10 * x), 20 * total))
    y = call(torch._to_functional_tensor(x))
    expect("a functional tensor", torch.equal(torch._from_functional_tensor(y), total))
    return failures


def _leaf(y: Tensor) -> Tensor:
    return y.grad_fn.next_functions[0][0].variable  # type: ignore[union-attr, no-any-return]


def test_watchers_after_plain_calls() -> None:
    run_ranks(check_watched, 2)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: values(0).to_sparse(), "layout"),
    "quantized": (lambda: torch.quantize_per_tensor(values(0), 0.1, 0, torch.quint8), "no meaning|quantized"),
    "meta": (lambda: values(0).to("meta"), "meta device"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "list": (lambda: [1.0, 2.0], "not a tensor"),
}


def check_refused(world: fcomm.Group) -> list[str]:
    failures = []
    fcomm.all_reduce(values(0), world, fcomm.cpu)
    for name, (make, text) in REFUSED.items():
        x = make()
        with pytest.raises(TypeError, match=text):
            fcomm.all_reduce(x, world, fcomm.cpu)
        if not torch.equal(fcomm.all_reduce(values(0), world, fcomm.cpu), world.size * values(0)):
            failures.append(f"after {name}")
    for group, backend in ((world, None), (None, fcomm.cpu), (world, fcomm.sim), ("world", fcomm.cpu)):
        with pytest.raises((TypeError, fcomm.FcommError), match="pass"):
            fcomm.all_reduce(values(0), group, backend)  # type: ignore[arg-type]
    return failures


def test_bad_input_after_plain_calls() -> None:
    run_ranks(check_refused, 2)


# --- names that change hands ------------------------------------------------------------------------------------------


def check_names(world: fcomm.Group) -> list[str]:
    failures = []
    for ranks in ([0, 1], [0, 1, 2], [1, 2]):
        if world.rank in ranks:
            group = fcomm.subgroup(world, ranks, name="pair")
            for time in ("first", "second"):
                y = fcomm.all_reduce(torch.ones(3), group, fcomm.cpu)
                if y[0] != len(ranks):
                    failures.append(f"{ranks}, {time} time: {y}")
            fcomm.close(group)
            try:
                fcomm.all_reduce(torch.ones(3), group, fcomm.cpu)
                failures.append(f"{ranks}: closed, and goes on")
            except fcomm.GroupClosedError:
                pass
        else:
            fcomm.subgroup(world, ranks, name="pair")
    return failures


def test_a_group_of_the_same_name() -> None:
    run_ranks(check_names, 3)


@contextmanager
def registered(name: str, lowering: Callable[..., Tensor], collective: str = "all_reduce") -> Iterator[fcomm.Backend]:
    try:
        yield register_backend(fcomm.Backend(name, lowerings={collective: lowering}))
    finally:
        del registration.BACKENDS[name]


def check_backends(world: fcomm.Group) -> list[str]:
    failures = []
    for k in (1.0, 2.0):
        with registered("again", lambda x, group, op, k=k: x * k) as backend:
            got = [fcomm.all_reduce(torch.ones(3), world, backend)[0].item() for _ in range(2)]
            if got != [k, k]:
                failures.append(f"the backend of {k} gave {got}")
    return failures


def test_a_backend_of_the_same_name() -> None:
    run_ranks(check_backends, 2)


# --- equal, but not the same ------------------------------------------------------------------------------------------

fcomm.define(
    "sign_of",
    schema="float k",
    spec=lambda xs, k: [torch.full_like(x, math.copysign(1.0, k)) for x in xs],
    shape=lambda s, group, k: s,
    vjp=None,
    jvp=None,
)


def check_zeros(world: fcomm.Group) -> list[str]:
    def lowering(x: Tensor, group: fcomm.Group, k: float) -> Tensor:
        return torch.full_like(x, math.copysign(1.0, k))

    with registered("signs", lowering, "sign_of") as backend:
        got = [fcomm.apply("sign_of", torch.ones(1), world, backend, k).item() for k in (0.0, -0.0, 0.0)]
        graph = [torch.ops.fcomm.sign_of(torch.ones(1), None, k, world.name, "signs").item() for k in (0.0, -0.0, 0.0)]
    return [f"{got}, {graph}"] if (got, graph) != ([1, -1, 1], [1, -1, 1]) else []


def test_minus_zero_is_not_zero() -> None:
    run_ranks(check_zeros, 2)
