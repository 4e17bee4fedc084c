"""fcomm.compat against the meaning of each function over explicit lists: simulated, in processes, compiled."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import pytest
import torch
from faces import FACES, GATHER, Face
from torch import Tensor
from torch.func import jvp, vjp, vmap

import fcomm
from fcomm.testing import run_ranks

SIZES = (1, 2, 3, 4)


def values(face: Face, n: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """xs, cotangents of the results, tangents of xs; one of each for every rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(face.name.encode()))

    def normal(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    xs = [normal(tuple(face.shape(n))) for _ in range(n)]
    return xs, [normal(y.shape) for y in face.meaning(xs)], [normal(x.shape) for x in xs]


def cotangents(face: Face, xs: list[Tensor], cts: list[Tensor]) -> list[Tensor]:
    """torch's own derivative of the meaning, or what the other project's source says."""
    if face.pull is not None:
        return face.pull(cts)
    leaves = [x.clone().requires_grad_() for x in xs]
    grads = torch.autograd.grad(face.meaning(leaves), leaves, cts, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]


def tangents(face: Face, xs: list[Tensor], ts: list[Tensor]) -> list[Tensor]:
    return jvp(lambda *xs: tuple(face.meaning(list(xs))), tuple(xs), tuple(ts))[1]


def on_rank(face: Face, group: fcomm.Group, backend: fcomm.Backend) -> Callable[[Tensor], Tensor]:
    return lambda x: face.call(x, group, backend)


def close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
def test_value_and_derivatives_simulated(face: Face) -> None:
    for n in SIZES:
        xs, cts, ts = values(face, n)
        group = fcomm.axis("compat", n)
        f = on_rank(face, group, fcomm.sim)
        x, ct, t = torch.stack(xs), torch.stack(cts), torch.stack(ts)
        close(fcomm.simulate(f, group)(x), torch.stack(face.meaning(xs)), f"value, {n} ranks")
        pull = fcomm.simulate(lambda x, ct: vjp(f, x)[1](ct)[0], group)
        close(pull(x, ct), torch.stack(cotangents(face, xs, cts)), f"vjp, {n} ranks")
        push = fcomm.simulate(lambda x, t: jvp(f, (x,), (t,))[1], group)
        close(push(x, t), torch.stack(list(tangents(face, xs, ts))), f"jvp, {n} ranks")
        batch = fcomm.simulate(vmap(f, in_dims=-1), group)(torch.stack((x, t), -1))
        expected = torch.stack([torch.stack(face.meaning(v)) for v in (xs, ts)], 1)
        close(batch, expected, f"vmap, {n} ranks")


def test_gather_simulated_is_zero_off_the_root() -> None:
    for n in SIZES:
        xs, _, _ = values(GATHER, n)
        group = fcomm.axis("compat", n)
        close(
            fcomm.simulate(on_rank(GATHER, group, fcomm.sim), group)(torch.stack(xs)),
            torch.stack(GATHER.meaning(xs)),
            "gather",
        )


ALL = tuple(FACES.values())
# A graph in real processes is the graph of a simulated axis with another group: one of every few is compiled there too.
SOME = ALL[::4]


def derivatives(
    faces: Sequence[Face], group: fcomm.Group, backend: fcomm.Backend
) -> Callable[[list[Tensor], list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """(value, cotangent of x) of every face, in one program."""

    def program(xs: list[Tensor], cts: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        results = []
        for face, x, ct in zip(faces, xs, cts, strict=True):
            y, pull = vjp(on_rank(face, group, backend), x)
            results.append((y, pull(ct)[0]))
        return results

    return program


def compare(faces: Sequence[Face], rank: int | None, n: int, results: list[tuple[Tensor, Tensor]], how: str) -> None:
    for face, (y, g) in zip(faces, results, strict=True):
        xs, cts, _ = values(face, n)
        for got, all_ranks in ((y, face.meaning(xs)), (g, cotangents(face, xs, cts))):
            expected = torch.stack(list(all_ranks)) if rank is None else all_ranks[rank]
            close(got, expected, f"{face.name}, {how}, {n} ranks")


@pytest.mark.parametrize("faces", [ALL[::2], pytest.param(ALL[1::2], marks=pytest.mark.long)], ids=["even", "odd"])
def test_in_one_compiled_graph_simulated(faces: Sequence[Face]) -> None:
    n = 3
    group = fcomm.axis("compat", n)
    drawn = [values(face, n) for face in faces]
    stacked = [[torch.stack(v[k]) for v in drawn] for k in (0, 1)]
    program = fcomm.simulate(derivatives(faces, group, fcomm.sim), group)
    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    compare(faces, None, n, compiled(*stacked), "compiled, simulated")


def in_processes(world: fcomm.Group, compiled: bool) -> None:
    n, rank = world.size, world.rank or 0

    def arguments(faces: Sequence[Face]) -> list[list[Tensor]]:
        drawn = [values(face, n) for face in faces]
        return [[v[k][rank] for v in drawn] for k in (0, 1)]

    xs, cts = arguments(ALL)
    compare(ALL, rank, n, derivatives(ALL, world, fcomm.c10d)(xs, cts), "eager, c10d")
    if compiled:
        program = torch.compile(derivatives(SOME, world, fcomm.c10d), fullgraph=True, backend="aot_eager")
        compare(SOME, rank, n, program(*arguments(SOME)), "compiled, c10d")
    for face, x, ct in zip(ALL, xs, cts, strict=True):
        leaf = x.clone().requires_grad_()
        face.call(leaf, world, fcomm.c10d).backward(ct)
        close(leaf.grad, cotangents(face, *values(face, n)[:2])[rank], f"{face.name}, backward")
    y = GATHER.call(values(GATHER, n)[0][rank], world, fcomm.c10d)
    close(y, GATHER.meaning(values(GATHER, n)[0])[rank], "gather")


@pytest.mark.parametrize(("size", "compiled"), [(2, True), (3, False)])
def test_all_in_processes(size: int, compiled: bool) -> None:
    run_ranks(in_processes, size, compiled, timeout_s=300)


@pytest.mark.parametrize("planted", ["value", "cotangent"])
def test_the_comparison_notices_a_wrong_face(planted: str) -> None:
    right = FACES["lax.ppermute"]
    wrong = Face(
        right.name,
        lambda x, g, b: FACES["lax.pshuffle"].call(x, g, b) if planted == "value" else right.call(x, g, b),
        right.shape,
        right.meaning,
        None if planted == "value" else lambda cts: [cts[r - 1] for r in range(len(cts))],
    )
    with pytest.raises(AssertionError, match="3 ranks"):
        test_value_and_derivatives_simulated(wrong)
