"""Random programs of collectives and torch operations: values and derivatives against plain torch on stacked values.

`make fuzz MINUTES=20` draws such programs for longer. A failure prints its program as an expression; calling
`differences` on it shows the failure again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import programs
import pytest
import steps
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from programs import Program, Step, is_clear, on_rank, plain
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

import fcomm
from fcomm.group import BACKENDS
from fcomm.testing import run_ranks, strategies

QUICK = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
AXES = ("outer", "inner")
INTEGER_PROGRAMS = programs.programs(dtypes=(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool))


def _weigh(y: Tensor, w: Tensor) -> Tensor:
    """A loss with derivatives of every order, which differ from rank to rank and from element to element."""
    y, w = (torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in (y, w))
    return (y * w).sin().sum()


def _simulated(program: Program, fn: Callable[..., Any]) -> Callable[..., Any]:
    for group in reversed(_groups(program)):
        fn = fcomm.simulate(fn, group)
    return fn


def _groups(program: Program) -> list[fcomm.Group]:
    return [fcomm.axis(name, size) for name, size in zip(AXES, program.mesh, strict=False)]


def _unlike(got: Tensor, expected: Tensor, what: str) -> list[str]:
    scale = float(expected.abs().max()) if expected.numel() and expected.is_floating_point() else 1.0
    try:
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9 * max(scale, 1.0))
    except AssertionError as error:
        return [f"{what}: {error}"]
    return []


def differences(program: Program) -> list[str]:
    """Everything in which the simulated program differs from the plain one."""
    f, x = on_rank(program, _groups(program), fcomm.sim), program.input()
    y = plain(program, x)
    failures = _unlike(_simulated(program, f)(x), y, "forward") + _batches(program, f)
    if not (x.is_floating_point() or x.is_complex()):
        return failures
    w, t = (strategies.valued(v.shape, "normal", v.dtype, program.seed + k) for k, v in ((1, y), (2, x)))

    def gradient(x: Tensor, w: Tensor) -> Tensor:
        return grad(lambda x: _weigh(f(x), w))(x)

    plain_gradient = grad(lambda x: _weigh(plain(program, x), w))
    rows: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
        "grad": (lambda x, w, t: gradient(x, w), lambda: plain_gradient(x)),
        "jvp": (lambda x, w, t: jvp(f, (x,), (t,))[1], lambda: jvp(lambda x: plain(program, x), (x,), (t,))[1]),
        "jvp of grad": (
            lambda x, w, t: jvp(lambda x: gradient(x, w), (x,), (t,))[1],
            lambda: jvp(plain_gradient, (x,), (t,))[1],
        ),
        "vjp of grad": (
            lambda x, w, t: vjp(lambda x: gradient(x, w), x)[1](t)[0],
            lambda: vjp(plain_gradient, x)[1](t)[0],
        ),
    }
    for name, (one_rank, oracle) in rows.items():
        failures += _unlike(_simulated(program, one_rank)(x, w, t), oracle(), name)
    leaf = x.clone().requires_grad_()
    # Around simulate, torch sees that an empty permutation gives a constant; here it must count as a function of x.
    (around,) = torch.autograd.grad(_simulated(program, f)(leaf) + 0 * leaf.sum(), leaf, w)
    return failures + _unlike(around, vjp(lambda x: plain(program, x), x)[1](w)[0], "backward around simulate")


def _batches(program: Program, f: Callable[[Tensor], Tensor]) -> list[str]:
    """vmap inside and around, with the examples in any dimension."""
    examples = [program.input(), program.input(7)]
    if not is_clear(program, examples[1]):
        return []
    expected = torch.stack([plain(program, e) for e in examples])
    depth, dim = len(program.mesh), program.seed % (len(program.shape) + 1)
    x = torch.stack(examples, depth + dim)
    inside = _simulated(program, vmap(f, in_dims=dim))(x).movedim(depth, 0)
    around = vmap(_simulated(program, f), in_dims=depth + dim)(x)
    return _unlike(inside, expected, "vmap inside simulate") + _unlike(around, expected, "vmap around simulate")


def compiled_differences(program: Program) -> list[str]:
    """The same for the compiled program: its value, and its gradient taken inside the compiled function."""
    f, x = on_rank(program, _groups(program), fcomm.sim), program.input()
    y = plain(program, x)
    w = strategies.valued(y.shape, "normal", y.dtype, program.seed + 1)

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return f(x), grad(lambda x: _weigh(f(x), w))(x)

    torch.compiler.reset()
    got = torch.compile(_simulated(program, both), fullgraph=True, backend="aot_eager")(x, w)
    expected = y, grad(lambda x: _weigh(plain(program, x), w))(x)
    names = "compiled forward", "compiled grad"
    return [text for part in zip(got, expected, names, strict=True) for text in _unlike(*part)]


def process_differences(world: fcomm.Group, drawn: Sequence[Program], backend: str) -> list[str]:
    """The same on this rank of a live group: value, backward, jvp, and jvp of grad of each program."""
    failures = []
    for program in drawn:
        try:
            failures += _differences_on_rank(world, program, backend)
        except Exception as error:
            error.add_note(repr(program))
            raise
    return failures


def _differences_on_rank(world: fcomm.Group, program: Program, backend: str) -> list[str]:
    rows, f = program.input(), on_rank(program, [world], BACKENDS[backend])
    ys = plain(program, rows)
    ws, ts = (strategies.valued(v.shape, "normal", v.dtype, program.seed + k) for k, v in ((1, ys), (2, rows)))
    x, w, t = (v[world.rank].clone() for v in (rows, ws, ts))
    leaf = x.clone().requires_grad_()
    got = {
        "forward": f(x),
        "backward": torch.autograd.grad(f(leaf), leaf, w)[0],
        "jvp": jvp(f, (x,), (t,))[1],
        "jvp of grad": jvp(grad(lambda x: _weigh(f(x), w)), (x,), (t,))[1],
    }
    expected = {
        "forward": ys,
        "backward": vjp(lambda x: plain(program, x), rows)[1](ws)[0],
        "jvp": jvp(lambda x: plain(program, x), (rows,), (ts,))[1],
        "jvp of grad": jvp(grad(lambda x: _weigh(plain(program, x), ws)), (rows,), (ts,))[1],
    }
    return [
        f"{text}\n{program}"
        for name in got
        for text in _unlike(got[name], expected[name][world.rank], f"{backend}, {name}")
    ]


def assert_same(program: Program) -> None:
    assume(is_clear(program, program.input()))
    assert not differences(program), "\n".join([*differences(program), repr(program)])


@given(programs.programs())
@settings(QUICK, max_examples=60)
def test_simulated_programs_are_plain_torch(program: Program) -> None:
    assert_same(program)


@given(INTEGER_PROGRAMS)
@settings(QUICK, max_examples=60)
def test_programs_on_integers(program: Program) -> None:
    assert_same(program)


@given(programs.programs(longest=4))
@settings(QUICK, max_examples=5)
def test_compiled_programs_are_plain_torch(program: Program) -> None:
    assume(is_clear(program, program.input()))
    assert not compiled_differences(program), "\n".join([*compiled_differences(program), repr(program)])


@given(programs.programs())
@settings(QUICK, max_examples=2000)
@pytest.mark.long
def test_many_simulated_programs_are_plain_torch(program: Program) -> None:
    assert_same(program)


@given(programs.programs(longest=4))
@settings(QUICK, max_examples=100)
@pytest.mark.long
def test_many_compiled_programs_are_plain_torch(program: Program) -> None:
    assume(is_clear(program, program.input()))
    assert not compiled_differences(program), "\n".join([*compiled_differences(program), repr(program)])


def _collected(size: int, count: int) -> list[Program]:
    """`count` clear programs for one axis of that size."""
    found: list[Program] = []

    @given(programs.programs(meshes=((size,),)))
    @settings(QUICK, max_examples=count)
    def collect(program: Program) -> None:
        if is_clear(program, program.input()):
            found.append(program)

    collect()
    return found


@pytest.mark.parametrize("backend", [name for name in ("c10d", "cpu") if hasattr(fcomm, name)])
@pytest.mark.parametrize("size", [2, 3])
def test_programs_in_processes_are_plain_torch(backend: str, size: int) -> None:
    run_ranks(process_differences, size, _collected(size, 25), backend)


def test_every_public_collective_is_a_step() -> None:
    calls = " ".join(steps.KINDS)
    for name in fcomm.collectives.__all__:
        assert name in calls or name in ("axis_size", "recv"), f"no program uses {name}"


@given(st.data())
@settings(QUICK, max_examples=30)
def test_a_printed_program_is_the_program(data: st.DataObject) -> None:
    program = data.draw(programs.programs())
    assert eval(repr(program), {"Program": Program, "Step": Step, "torch": torch}) == program


def test_a_wrong_step_is_found() -> None:
    """The oracle is not vacuous: if it rolls the other way, the value and every derivative differ."""
    program = Program((3,), (2,), torch.float64, "normal", 1, (Step("send and recv"), Step("square")))
    assert not differences(program)
    right = steps.KINDS["send and recv"]
    steps.KINDS["send and recv"] = steps.Kind(right.on_rank, lambda x: x.roll(-1, 0))
    try:
        found = "\n".join(differences(program))
    finally:
        steps.KINDS["send and recv"] = right
    for what in ("forward", "grad", "jvp", "jvp of grad", "vjp of grad", "backward around", "vmap inside"):
        assert f"{what}" in found
