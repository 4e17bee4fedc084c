"""Random programs of collectives and torch operations, each step with two independent meanings.

A program is a shape, a dtype, and a list of steps. `on_rank` runs it on one rank with fcomm's functions; `plain` runs
it once on the stack of all ranks' values, using only torch and not fcomm's specs. A program prints as the expression
that makes it again.

A mesh of one axis has values [n, *shape], one of two axes [n0, n1, *shape]; each step communicates along one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import steps
import torch
from hypothesis import strategies as st
from torch import Tensor

import fcomm
from fcomm.testing import strategies


@dataclass(frozen=True)
class Step:
    """One operation: a row of steps.KINDS, the axis of the mesh, and the options."""

    name: str
    axis: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """What on_rank and plain run; seed determines the values, which are of a kind in strategies.VALUES."""

    mesh: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: str
    seed: int
    steps: tuple[Step, ...]

    def input(self, offset: int = 0) -> Tensor:
        """All ranks' values; a different offset gives different ones."""
        return strategies.valued((*self.mesh, *self.shape), self.values, self.dtype, self.seed + offset)


def on_rank(program: Program, groups: Sequence[fcomm.Group], backend: fcomm.Backend) -> Callable[[Tensor], Tensor]:
    """The program as a function of one rank's value."""

    def fn(x: Tensor) -> Tensor:
        history = [x]
        for step in program.steps:
            if step.name in steps.COMBINE:
                y = steps.COMBINE[step.name](history[-1], history[step.options["with"]])
            else:
                y = steps.KINDS[step.name].on_rank(history[-1], groups[step.axis], backend, **step.options)
            history.append(y)
        return history[-1]

    return fn


def plain(program: Program, x: Tensor, watch: Callable[[Step, Tensor], None] | None = None) -> Tensor:
    """The program on the stack of all ranks' values; watch sees each step and its input."""
    history = [x]
    for step in program.steps:
        if watch is not None:
            watch(step, history[-1])
        if step.name in steps.COMBINE:
            y = steps.COMBINE[step.name](history[-1], history[step.options["with"]])
        else:
            kind = steps.KINDS[step.name]
            y = _along(lambda x, k=kind, s=step: k.plain(x, **s.options), history[-1], step.axis, len(program.mesh))
        history.append(y)
    return history[-1]


def _along(fn: Callable[[Tensor], Tensor], x: Tensor, axis: int, depth: int) -> Tensor:
    """fn over the ranks of one axis, for each rank of the other."""
    if depth == 1:
        return fn(x)
    return torch.stack([fn(row) for row in x.unbind(1 - axis)], 1 - axis)


def is_clear(program: Program, x: Tensor) -> bool:
    """Whether rounding cannot decide which rank attains a maximum: if values are not exact, the largest leads clearly.

    Also false if a value, or a derivative, is so large that differences are lost.
    """
    clear = True
    exact = program.values == "ties"

    def watch(step: Step, given: Tensor) -> None:
        nonlocal clear, exact
        if not (given.is_floating_point() or given.is_complex()):
            return
        if not given.isfinite().all() or (given.numel() and given.abs().max() > 1e4):
            clear = False
        if step.options.get("op") in ("max", "min") and not exact and given.shape[step.axis] > 1:
            ranked = given.sort(step.axis).values
            best = ranked.diff(dim=step.axis).select(step.axis, -1 if step.options["op"] == "max" else 0)
            clear = clear and bool((best > 1e-6).all())
        if step.name not in steps.COMBINE:
            exact = exact and steps.KINDS[step.name].exact and step.options.get("op") != "mean"

    y = plain(program, x, watch)
    numeric = y.is_floating_point() or y.is_complex()
    return clear and not (numeric and y.numel() and not bool((y.abs() < 1e4).all()))


MESHES = ((1,), (2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (1, 3), (4, 1))
FLAT = ((2,), (3,), (4,))


@st.composite
def programs(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float64, torch.complex128),
    meshes: Sequence[tuple[int, ...]] = MESHES,
    longest: int = 6,
) -> Program:
    """Programs of up to `longest` drawn steps, the first of them a collective."""
    mesh = draw(st.sampled_from(list(meshes)))
    dtype = draw(st.sampled_from(list(dtypes)))
    shape = draw(strategies.shapes(3, 4).filter(lambda s: reduce(int.__mul__, s, 1) <= steps.LARGEST))
    numeric = dtype.is_floating_point or dtype.is_complex
    values = draw(st.sampled_from(["normal", "ties", "zeros"])) if numeric else "ties"
    program = Program(mesh, shape, dtype, values, draw(st.integers(0, 999)), ())
    drawn: list[Step] = []
    shapes = [shape]
    for position in range(draw(st.integers(min(3, longest), longest))):
        step = _step(draw, program, shapes, collective=position == 0)
        drawn.append(step)
        program = Program(mesh, shape, dtype, values, program.seed, tuple(drawn))
        result = plain(program, program.input())
        shapes.append(tuple(result.shape[len(mesh) :]))
        if numeric and result.numel() and not float(result.abs().max()) < 30:
            drawn.append(Step("squash"))
            shapes.append(shapes[-1])
            program = Program(mesh, shape, dtype, values, program.seed, tuple(drawn))
    return program


def _step(draw: st.DrawFn, program: Program, shapes: list[tuple[int, ...]], collective: bool) -> Step:
    axis = draw(st.integers(0, len(program.mesh) - 1))
    shape, size = shapes[-1], program.mesh[axis]
    names = [
        name
        for name, kind in steps.KINDS.items()
        if kind.fits(shape, size, program.dtype) and not (collective and kind.local)
    ]
    earlier = [k for k, s in enumerate(shapes[:-1]) if s == shape]
    if earlier and not collective and program.dtype != torch.bool:
        names += steps.COMBINE
    name = draw(st.sampled_from(names))
    if name in steps.COMBINE:
        return Step(name, axis, {"with": draw(st.sampled_from(earlier))})
    return Step(name, axis, steps.KINDS[name].options(draw, shape, size, program.dtype))
