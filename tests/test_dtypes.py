"""17 dtypes x 8 ops on torch.distributed: right to the bit, or a typed error; and every strided view."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import vendors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fcomm
from fcomm import Group
from fcomm.arithmetic import FLOAT8, OPS, fold
from fcomm.dtypes import CODES, REDUCED
from fcomm.testing import run_ranks
from fcomm.testing.strategies import DTYPES

OUT = Path(__file__).parent.parent / "out"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bits of any dtype, to be compared: 0.0 is not -0.0, but all NaNs are equal: their signs vary."""
    real = torch.view_as_real(x) if x.is_complex() else x
    if real.is_floating_point():
        wide = real.to(torch.float64)
        real = torch.where(wide.isnan(), torch.nan, wide)
    return real.contiguous().view(BITS[real.element_size()])


def values(dtype: torch.dtype, rank: int) -> Tensor:
    """Integers that wrap, floats with NaN and infinity on one rank, ties and signed zeros; 15 elements, an odd number.

    Complex ones are finite: torch's own kernels differ, vectorised and not, in which part of a product becomes NaN.
    """
    generator = torch.Generator().manual_seed(rank)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(-(2**62), 2**62, (3, 5), generator=generator).to(dtype)
    x = torch.randn(3, 5, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    x[0, :3] = torch.tensor([0.0, -0.0, 1.0])
    if rank == 1 and not dtype.is_complex:
        x[0, 3:] = torch.tensor([float("nan"), float("inf")])
    return x.to(dtype)


def same(x: Tensor, y: Tensor, op: str) -> bool:
    if op == "prod" and x.is_complex():
        # How torch's product of complex numbers rounds depends on the place in the tensor, vectorised or not.
        return torch.allclose(x, y, rtol=8 * torch.finfo(x.dtype).eps, atol=0)
    return torch.equal(bits(x), bits(y))


def matrix(world: Group) -> dict[str, str]:
    cells = {}
    n, rank = world.size, world.rank or 0
    for dtype in DTYPES:
        xs = [values(dtype, r) for r in range(n)]
        for op in OPS:
            cell = f"{str(dtype).removeprefix('torch.')} {op}"
            try:
                y = fcomm.all_reduce(xs[rank], world, fcomm.c10d, op=op)
            except TypeError as error:
                named = all(word in str(error) for word in ("all_reduce", f"'{op}'", str(dtype), " backend"))
                cells[cell] = f"TypeError: {error}" if named else f"wrong: error names too little: {error}"
                continue
            z = fcomm.reduce(xs[rank], world, fcomm.c10d, op=op, dst=n - 1)
            expected = fold(xs, op)
            off_root = expected if rank == n - 1 else torch.zeros_like(expected)
            right = same(y, expected, op) and same(z, off_root, op)
            if op not in ("band", "bor", "bxor"):
                rows = [torch.stack([x] * n) for x in xs]
                w = fcomm.reduce_scatter(rows[rank], world, fcomm.c10d, op=op, tiled=False)
                right = right and same(w, expected, op)
            cells[cell] = "right" if right and y.dtype == dtype else f"wrong: {y} is not {expected}"
    return cells


def write(cells: dict[str, str]) -> None:
    OUT.mkdir(exist_ok=True)
    right = sum(text == "right" for text in cells.values())
    lines = [
        f"{right} of {len(cells)} pairs of dtype and op are right on c10d (gloo alone has 59); the others raise.",
        "",
    ]
    lines += ["| | " + " | ".join(OPS) + " |", "|---|" + ":-:|" * len(OPS)]
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        marks = ["✓" if cells[f"{name} {op}"] == "right" else "TypeError" for op in OPS]
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    (OUT / "dtypes.md").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("size", [2, 3])
def test_17_dtypes_by_8_ops_are_right_to_the_bit_or_raise_by_name(size: int) -> None:
    results = run_ranks(matrix, size)
    assert len(results[0]) == 17 * 8
    wrong = [f"rank {r}: {cell}: {text}" for r, cells in enumerate(results) for cell, text in cells.items()]
    wrong = [text for text in wrong if ": wrong" in text]
    assert not wrong, "\n".join(wrong)
    assert all(cells == results[0] for cells in results)
    right = [cell for cell, text in results[0].items() if text == "right"]
    # What raises: bits of floats (24), order of complex numbers (4), mean of bool (1).
    assert len(right) == 17 * 8 - 29
    write(results[0])


OF_PARTS: dict[str, Any] = {
    "all_reduce": fcomm.all_reduce,
    "all_reduce mean": lambda x, g, b: fcomm.all_reduce(x, g, b, op="mean"),
    "reduce mean": lambda x, g, b: fcomm.reduce(x, g, b, op="mean"),
    "reduce_scatter": lambda x, g, b: fcomm.reduce_scatter(x.repeat(g.size), g, b),
    "reduce_scatter mean": lambda x, g, b: fcomm.reduce_scatter(x.repeat(g.size), g, b, op="mean"),
    "scan": fcomm.scan,
    "vjp": lambda x, g, b: torch.func.vjp(lambda y: fcomm.all_reduce(y, g, b, op="mean"), x)[1](x)[0],
    "vjp of the invariant": lambda x, g, b: torch.func.vjp(
        lambda y: fcomm.all_reduce_invariant(y, g, b, op="mean"), x[:1]
    )[1](torch.full((1,), complex(torch.inf, 1), dtype=x.dtype))[0],
    "ragged_all_to_all": lambda x, g, b: fcomm.ragged_all_to_all(
        x, torch.zeros(g.size, dtype=x.dtype), *ragged_numbers(x, g, b), g, b
    ),
}


def ragged_numbers(x: Tensor, group: Group, backend: fcomm.Backend) -> list[Tensor]:
    """Every rank sends its first row to the row of its number."""
    one = torch.ones(group.size, dtype=torch.int64)
    return [0 * one, one, fcomm.axis_index(group, backend) * one, one]


def parts(size: int) -> Tensor:
    """Complex numbers of which one part is infinite or NaN, and the other is finite."""
    inf, nan = torch.inf, torch.nan
    columns = [(inf, 0), (0, -inf), (nan, 1), (2, nan), (3, 4), (inf, -1), (-0.0, inf)]
    numbers = torch.tensor(columns, dtype=torch.float64)
    return torch.view_as_complex(torch.stack([numbers.roll(r, 0) for r in range(size)]))


def by_parts(world: Group, x: Tensor) -> dict[str, dict[str, Tensor]]:
    backends = {"cpu": fcomm.cpu, "c10d": fcomm.c10d}
    return {
        b: {name: call(x[world.rank or 0], world, of) for name, call in OF_PARTS.items()} for b, of in backends.items()
    }


@pytest.mark.parametrize("size", [2, 3])
def test_complex_numbers_are_added_and_divided_by_their_parts(size: int) -> None:
    """torch's own sum of inf and 1j is inf+nanj: it multiplies one of the two by 1."""
    x = parts(size)
    axis = fcomm.axis(f"parts of {size}", size)
    simulated = {
        name: fcomm.simulate(lambda x, call=call: call(x, axis, fcomm.sim), axis)(x) for name, call in OF_PARTS.items()
    }
    total = torch.view_as_real(x).sum(0)
    assert torch.equal(bits(torch.view_as_real(simulated["all_reduce"])), bits(total.expand(size, -1, -1)))
    assert torch.equal(
        bits(torch.view_as_real(simulated["all_reduce mean"])), bits((total / size).expand(size, -1, -1))
    )
    assert torch.equal(bits(simulated["ragged_all_to_all"]), bits(x[:, 0].expand(size, -1)))
    for rank, on_backends in enumerate(run_ranks(by_parts, size, x)):
        for backend, got in on_backends.items():
            for name, y in got.items():
                assert torch.equal(bits(y), bits(simulated[name][rank])), (backend, name, y, simulated[name][rank])


def zeros_with_signs(group: Group, backend: fcomm.Backend, x: Tensor) -> Tensor:
    """Every rank's first row lands in the row of its number; another row comes from nowhere."""
    place = ragged_numbers(x, group, backend)

    def core(x: Tensor) -> Tensor:
        return fcomm.ragged_all_to_all(x, torch.ones(group.size + 1, dtype=x.dtype), *place, group, backend)

    y, pull = torch.func.vjp(core, x)
    return torch.cat([y, pull(torch.full_like(y, -0.0))[0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_rows_that_move_keep_the_sign_of_their_zeros(dtype: torch.dtype) -> None:
    x = torch.tensor([[-0.0, 3, 4], [0.0, 1, 2]], dtype=torch.float64).to(dtype)
    axis = fcomm.axis("signs", 2)
    simulated = fcomm.simulate(partial(zeros_with_signs, axis, fcomm.sim), axis)(x)
    # The received rows and output's own, then the cotangent: of x[0], sent to both ranks, and of the rows not sent.
    expected = torch.tensor([-0.0, 0, 1, -0.0, 0, 0], dtype=torch.float64)
    for row in simulated:
        assert torch.equal(bits(row.real if dtype.is_complex else row), bits(expected.to(row.real.dtype)))
    for rank, y in enumerate(run_ranks(zeros_with_signs_here, 2, x)):
        assert torch.equal(bits(y), bits(simulated[rank]))


def zeros_with_signs_here(world: Group, x: Tensor) -> Tensor:
    return zeros_with_signs(world, fcomm.c10d, x[world.rank or 0])


def moved(world: Group) -> list[str]:
    failures = []
    n, rank = world.size, world.rank or 0
    for dtype in DTYPES:
        xs = [values(dtype, r)[: n * (3 // n)] for r in range(n)]
        x = xs[rank]
        results = {
            "all_gather": (fcomm.all_gather(x, world, fcomm.c10d), torch.cat(xs)),
            "broadcast": (fcomm.broadcast(x, world, fcomm.c10d, src=1), xs[1]),
            "ppermute": (
                fcomm.ppermute(x, world, fcomm.c10d, perm=[(0, 1)]),
                xs[0] if rank == 1 else x.new_zeros(x.shape),
            ),
            "all_to_all": (fcomm.all_to_all(x, world, fcomm.c10d), torch.cat([y.chunk(n)[rank] for y in xs])),
            "scatter": (fcomm.scatter(x, world, fcomm.c10d, src=1), xs[1].chunk(n)[rank]),
        }
        failures += [
            f"{name} of {dtype}: {y} is not {expected}"
            for name, (y, expected) in results.items()
            if y.dtype != dtype or not torch.equal(bits(y), bits(expected))
        ]
    return failures


def test_every_dtype_moves() -> None:
    run_ranks(moved, 2)
    run_ranks(moved, 3)


# --- dtypes that only move ----------------------------------------------------------------------------------------

ONLY_MOVED = [
    d for d in CODES if d not in REDUCED and not str(d).startswith(("torch.int", "torch.uint", "torch.q"))
]  # torch cannot copy int1 .. uint7, and quantized tensors carry a scale
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SIX = [torch.arange(6, dtype=torch.int64) + 6 * r + 1 for r in range(3)]


def raw(x: Tensor) -> Tensor:
    return x.view(RAW[x.element_size()])


def moves(x: Tensor, group: Group, on: fcomm.Backend) -> dict[str, Tensor]:
    """Everything that moves x, [6], on two ranks."""
    one = torch.ones(2, dtype=torch.int64)
    places = 2 * one, one, 3 * one + fcomm.axis_index(group, on), one
    return {
        "all_gather": fcomm.all_gather(x, group, on),
        "all_gather untiled": fcomm.all_gather(x, group, on, tiled=False, dim=1),
        "all_gather uneven": fcomm.all_gather(x, group, on, sizes=[6, 6]),
        "all_to_all": fcomm.all_to_all(x, group, on),
        "all_to_all uneven": fcomm.all_to_all(x, group, on, send_sizes=[[2, 4], [4, 2]]),
        "ppermute": fcomm.ppermute(x, group, on, perm=[(0, 1)]),
        "broadcast": fcomm.broadcast(x, group, on, src=1),
        "gather": fcomm.gather(x.view(2, 3), group, on, dst=1, dim=1),
        "scatter": fcomm.scatter(x.view(2, 3).T, group, on, src=1, dim=1),
        "recv": fcomm.recv(x, group, on, after=fcomm.send(x, group, on)),
        "ragged_all_to_all": fcomm.ragged_all_to_all(x, x, *places, group, on),
        "barrier": fcomm.barrier(group, on, after=x),
        "pvary": fcomm.pvary(x, group, on),
        "shard": fcomm.shard(x, group, on),
        "all_gather_invariant": fcomm.all_gather_invariant(x, group, on),
        "all_gather_coalesced": fcomm.all_gather_coalesced([x, x[:2]], group, on)[1],
    }


def only_moved(world: Group, name: str) -> list[str]:
    failures, on, rank = [], vendors.backend(name) if name in vendors.DOUBLES else getattr(fcomm, name), world.rank or 0
    for dtype in ONLY_MOVED:
        i = SIX[rank].to(RAW[dtype.itemsize])
        results = moves(i.view(dtype), world, on)
        for what, expected in moves(i, world, on).items():
            y = results[what]
            if y.dtype != dtype or not torch.equal(raw(y), expected):
                failures.append(f"{what} of {dtype} on {name}: {raw(y)} is not {expected}")
    if name == "cpu":
        x = SIX[0].to(torch.uint8)
        mine = x.view((torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)[rank])
        with pytest.raises(fcomm.MismatchError, match=r"all_gather\(float8_e5m2fnuz\[6\].*"):
            fcomm.all_gather(mine, world, on)
    return failures


@pytest.mark.parametrize("backend", ["cpu", "c10d", "nccl", "hccl"])
def test_every_other_dtype_moves(backend: str) -> None:
    assert {torch.float8_e8m0fnu, torch.complex32, torch.bits16} < set(ONLY_MOVED)
    run_ranks(only_moved, 2, backend)


def test_every_other_dtype_moves_on_a_simulated_axis() -> None:
    axis = fcomm.axis("i", 2)
    unsigned = {torch.uint16, torch.uint32, torch.uint64}  # reduced, but torch has few kernels for them
    # torch.cat lacks kernels for some layouts of float4; torch 2.11's vmap neither selects bits nor views them.
    missing = {torch.float4_e2m1fn_x2}
    if torch.__version__.startswith("2.11."):
        missing |= {d for d in ONLY_MOVED if str(d).startswith("torch.bits")}
    for dtype in {*ONLY_MOVED, *unsigned} - missing:
        xs = torch.stack(SIX[:2]).to(RAW[dtype.itemsize])
        results, expected = (fcomm.simulate(lambda x: moves(x, axis, fcomm.sim), axis)(x) for x in (xs.view(dtype), xs))
        for what, y in results.items():
            assert y.dtype == dtype, what
            assert torch.equal(raw(y), expected[what]), (what, dtype)


DERIVED = {
    **{f"all_reduce {op}": partial(fcomm.all_reduce, op=op) for op in ("sum", "mean", "max", "min", "prod")},
    **{f"reduce {op}": partial(fcomm.reduce, op=op, dst=1) for op in ("sum", "mean", "max", "min", "prod")},
    **{f"reduce_scatter {op}": partial(fcomm.reduce_scatter, op=op) for op in ("sum", "mean", "max", "min", "prod")},
    "all_reduce_invariant mean": partial(fcomm.all_reduce_invariant, op="mean"),
    "scan": fcomm.scan,
}
# All results are exact in float8.
EIGHTHS = torch.tensor([[1.0, 2.0, 0.0, -4.0, 0.5, 1.0], [2.0, 2.0, 4.0, -4.0, 0.0, -1.0]])


def derivatives(x: Tensor, group: Group, on: fcomm.Backend) -> dict[str, Tensor]:
    results = {}
    for name, collective in DERIVED.items():
        y, pull = torch.func.vjp(lambda x, call=collective: call(x, group, on), x)
        results[f"vjp of {name}"] = pull(torch.ones(y.shape).to(y.dtype))[0]
        results[f"jvp of {name}"] = torch.func.jvp(lambda x, call=collective: call(x, group, on), (x,), (x,))[1]
    return results


def differ(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    return [
        f"{name} in {dtype}: {got[name]} is not {y}"
        for name, y in expected.items()
        if got[name].dtype != dtype or not torch.equal(got[name].float(), y)
    ]


def derived(world: Group) -> list[str]:
    x, failures = EIGHTHS[world.rank or 0], []
    for on in (fcomm.cpu, fcomm.c10d):
        expected = derivatives(x, world, on)
        for dtype in FLOAT8:
            failures += differ(derivatives(x.to(dtype), world, on), expected, dtype)
    return failures


def test_derivatives_in_float8_are_those_in_float32() -> None:
    axis = fcomm.axis("i", 2)
    on_axis = fcomm.simulate(lambda x: derivatives(x, axis, fcomm.sim), axis)
    for dtype in FLOAT8:
        assert not differ(on_axis(EIGHTHS.to(dtype)), on_axis(EIGHTHS), dtype)
    run_ranks(derived, 2)


PLACES = (torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64)
OPERANDS = torch.arange(600.0).reshape(2, 300)


def routed(x: Tensor, group: Group, on: fcomm.Backend) -> Tensor:
    """Rows 200 r to 200 r + 99 of both ranks' x at rank r, by offsets of each dtype: 200 + 100 is not a uint8."""
    starts, sizes = torch.tensor([0, 200]), torch.tensor([100, 100])
    lands = (200 * fcomm.axis_index(group, on)).expand(2)
    output = torch.full_like(x, -1)
    ys = []
    for dtype in PLACES:
        places = (v.to(dtype) for v in (starts, sizes, lands, sizes))
        ys.append(fcomm.ragged_all_to_all(x, output, *places, group, on))
    return torch.stack(ys)


def expected_of_routed(rank: int) -> Tensor:
    rows = OPERANDS[:, 200 * rank : 200 * rank + 100]
    return torch.cat([rows[0], torch.full((100,), -1.0), rows[1]]).expand(len(PLACES), 300)


def routed_in_processes(world: Group) -> list[str]:
    rank = world.rank or 0
    return [
        f"on {on.name}"
        for on in (fcomm.cpu, fcomm.c10d)
        if not torch.equal(routed(OPERANDS[rank], world, on), expected_of_routed(rank))
    ]


def test_places_of_ragged_rows_are_integers_of_any_dtype() -> None:
    axis = fcomm.axis("i", 2)
    got = fcomm.simulate(lambda x: routed(x, axis, fcomm.sim), axis)(OPERANDS)
    assert torch.equal(got, torch.stack([expected_of_routed(rank) for rank in range(2)]))
    run_ranks(routed_in_processes, 2)


REDUCTIONS: dict[str, Any] = {
    "all_reduce": fcomm.all_reduce,
    "all_reduce_invariant": fcomm.all_reduce_invariant,
    "scan": fcomm.scan,
    "reduce": fcomm.reduce,
    "reduce_scatter": fcomm.reduce_scatter,
    "all_reduce_coalesced": lambda x, g, b, **op: fcomm.all_reduce_coalesced([torch.ones(2), x], g, b, **op),
    "reduce_scatter_coalesced": lambda x, g, b, **op: fcomm.reduce_scatter_coalesced([torch.ones(2), x], g, b, **op),
}


def refused(group: Group, on: fcomm.Backend, x: Tensor) -> None:
    for name, call in REDUCTIONS.items():
        ops = {"scan": ["sum"], "all_reduce_invariant": ["sum", "mean"]}.get(name, ["sum", "mean", "prod", "max"])
        for op in ops:
            with pytest.raises(TypeError, match=f"op '{op}' has no meaning for {x.dtype} on any backend") as raised:
                call(x, group, on, op=op)
            assert str(raised.value).startswith(f"{name}: ")


def reduced_nowhere(world: Group) -> list[str]:
    for dtype in ONLY_MOVED:
        # Only one rank calls: it is refused before anything is sent.
        for on in (fcomm.cpu, fcomm.c10d) if world.rank == 0 else ():
            refused(world, on, torch.zeros(6, dtype=RAW[dtype.itemsize]).view(dtype))
    for on in (fcomm.cpu, fcomm.c10d):
        assert fcomm.all_reduce(torch.ones(2), world, on).tolist() == [2, 2]
    x = torch.ones(6, dtype=torch.complex32, requires_grad=True)
    y = fcomm.all_gather(x, world, fcomm.c10d)
    with pytest.raises(TypeError, match=r"op 'sum' has no meaning for torch.complex32 .* such as torch.complex64"):
        y.backward(torch.ones_like(y))
    return []


def test_no_other_dtype_is_reduced() -> None:
    run_ranks(reduced_nowhere, 2)
    axis = fcomm.axis("i", 2)
    for dtype in ONLY_MOVED:
        fcomm.simulate(lambda x: refused(axis, fcomm.sim, x) or x, axis)(
            torch.zeros(2, 6, dtype=RAW[dtype.itemsize]).view(dtype)
        )


def test_codes_are_one_for_each_dtype_and_the_same_everywhere() -> None:
    assert len(set(CODES.values())) == len(CODES)
    assert all(0 <= code < 2**31 for code in CODES.values())
    assert CODES[torch.float8_e8m0fnu] == 1335247145


# --- layouts ------------------------------------------------------------------------------------------------------


def views(rank: int) -> dict[str, Tensor]:
    """Views [4, 2, 2, 2] over memory that is not only theirs."""
    base = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    z = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(rank + 9), dtype=torch.complex128)
    return {
        "contiguous": base[:, :2, :2, :2].clone(),
        "narrowed": base[:, :2, :2, :2],
        "storage offset": base.view(-1)[7:39].view(4, 2, 2, 2),
        "transposed": base[:2, :2, :4, :2].transpose(0, 2),
        "stepped": base[:, ::2, 1::2, ::3],
        "expanded": base[:, :1, :1, :1].expand(4, 2, 2, 2),
        "all expanded": base[0, 0, 0, 0].expand(4, 2, 2, 2),
        "channels last": base[:, :2, :2, :2].contiguous(memory_format=torch.channels_last),
        "overlapping": base.as_strided((4, 2, 2, 2), (1, 1, 1, 1), 3),
        "flipped": base[:, :2, :2, :2].flip(0, 2),
        "negative bit": z.conj().imag,
        "imaginary part": z.imag,
        "conjugate bit": z.conj(),
        "conjugate bit, transposed": z.conj().transpose(1, 3),
    }


CALLS: dict[str, Any] = {
    "all_reduce": fcomm.all_reduce,
    "all_reduce prod": lambda x, g, b: fcomm.all_reduce(x, g, b, op="prod"),
    "scan": fcomm.scan,
    "all_gather": lambda x, g, b: fcomm.all_gather(x, g, b, dim=1),
    "all_gather uneven": lambda x, g, b: fcomm.all_gather(x, g, b, sizes=[4] * g.size),
    "reduce_scatter": lambda x, g, b: fcomm.reduce_scatter(x, g, b, dim=0),
    "reduce_scatter untiled": lambda x, g, b: fcomm.reduce_scatter(x, g, b, dim=1, tiled=False),
    "all_to_all": lambda x, g, b: fcomm.all_to_all(x, g, b, split_dim=0, concat_dim=2),
    "all_to_all untiled": lambda x, g, b: fcomm.all_to_all(x, g, b, split_dim=2, concat_dim=1, tiled=False),
    "ppermute": lambda x, g, b: fcomm.ppermute(x, g, b, perm=[(0, 1), (1, 0)]),
    "broadcast": lambda x, g, b: fcomm.broadcast(x, g, b, src=1),
    "reduce": lambda x, g, b: fcomm.reduce(x, g, b, dst=1),
    "gather": lambda x, g, b: fcomm.gather(x, g, b, dim=3),
    "scatter": lambda x, g, b: fcomm.scatter(x, g, b, dim=1),
    "pvary": fcomm.pvary,
    "all_reduce_invariant": fcomm.all_reduce_invariant,
    "all_gather_invariant": fcomm.all_gather_invariant,
    "shard": lambda x, g, b: fcomm.shard(x, g, b, dim=2),
    "barrier": lambda x, g, b: fcomm.barrier(g, b, after=x),
    "send and recv": lambda x, g, b: fcomm.recv(x, g, b, after=fcomm.send(x, g, b)),
    "all_reduce_coalesced": lambda x, g, b: torch.cat(fcomm.all_reduce_coalesced([x, x[0]], g, b)[:1]),
}


def laid_out(world: Group) -> list[str]:
    failures = []
    for layout, x in views(world.rank or 0).items():
        plain = x.resolve_conj().resolve_neg().contiguous().clone()
        before = bits(plain).clone()
        for name, call in CALLS.items():
            y, expected = call(x, world, fcomm.c10d), call(plain, world, fcomm.c10d)
            if not torch.equal(bits(y), bits(expected)) or not y.is_contiguous() or y.is_neg() or y.is_conj():
                failures.append(f"{name} of {layout}: {y} is not {expected}")
            if not torch.equal(bits(x.resolve_conj().resolve_neg()), before):
                failures.append(f"{name} wrote into its {layout} argument")
    for shape in ((), (0,), (0, 3), (4, 0)):
        x = torch.ones(shape)
        for name, y, expected in (
            ("all_reduce", fcomm.all_reduce(x, world, fcomm.c10d), x * 2),
            ("all_gather", fcomm.all_gather(x, world, fcomm.c10d, tiled=False), x.expand(2, *shape)),
            ("broadcast", fcomm.broadcast(x, world, fcomm.c10d), x),
            ("ppermute", fcomm.ppermute(x, world, fcomm.c10d, perm=[(0, 1), (1, 0)]), x),
            ("send and recv", fcomm.recv(x, world, fcomm.c10d, after=fcomm.send(x, world, fcomm.c10d)), x),
        ):
            if y.shape != expected.shape or not torch.equal(y, expected):
                failures.append(f"{name} of shape {shape}: {y}")
    return failures


def test_every_view_equals_its_contiguous_copy() -> None:
    run_ranks(laid_out, 2)


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """Two ranks' values in one storage, with any strides: overlapping, expanded, permuted, offset."""
    shape = (2, *draw(st.lists(st.sampled_from([0, 2, 4]), min_size=2, max_size=3)))
    strides = draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.integers(0, 5))
    room = offset + sum(max(d - 1, 0) * s for d, s in zip(shape, strides, strict=True)) + 1
    dtype = draw(st.sampled_from([torch.float32, torch.int16, torch.complex64]))
    x = torch.arange(room).to(dtype).as_strided(shape, strides, offset)
    if dtype.is_complex:
        x = draw(st.sampled_from([x, x.conj(), (x * (1 + 2j)).conj().imag]))
    return x


@given(
    strided(),
    st.sampled_from(
        sorted(
            set(CALLS) - {"all_reduce_coalesced", "reduce_scatter untiled", "all_to_all untiled", "all_gather uneven"}
        )
    ),
)
@settings(max_examples=300, deadline=None, database=None)
def test_random_views_on_a_simulated_axis(x: Tensor, name: str) -> None:
    axis = fcomm.axis("i", 2)
    dims = {"gather": 3, "all_to_all": 2, "shard": 2}
    if x.dim() - 1 <= dims.get(name, 1):
        return
    plain = x.resolve_conj().resolve_neg().contiguous().clone()
    y, expected = (fcomm.simulate(lambda x: CALLS[name](x, axis, fcomm.sim), axis)(v) for v in (x, plain))
    assert torch.equal(y.resolve_conj().resolve_neg(), expected)


# --- large --------------------------------------------------------------------------------------------------------


def large(world: Group) -> list[str]:
    count = 2**31 + 8
    places = [0, 2**31 - 1, 2**31, count - 1]
    rank = world.rank or 0
    x = torch.full((count,), rank + 1, dtype=torch.uint8)
    failures = []
    for name, call, expected in (
        ("all_reduce", lambda: fcomm.all_reduce(x, world, fcomm.c10d), 3),
        ("broadcast", lambda: fcomm.broadcast(x, world, fcomm.c10d, src=1), 2),
        ("ppermute", lambda: fcomm.ppermute(x, world, fcomm.c10d, perm=[(0, 1), (1, 0)]), 2 - rank),
    ):
        y = call()
        got = [int(y[p]) for p in places]
        if y.numel() != count or got != [expected] * 4:
            failures.append(f"{name}: {y.numel()} elements, {got}")
        del y
    return failures


@pytest.mark.long
def test_more_than_2_to_the_31_elements() -> None:
    run_ranks(large, 2, timeout_s=400)
