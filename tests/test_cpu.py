"""The shared-memory backend in real processes: every case, dtype, op, layout and length, against the meaning.

Values must be equal, without a tolerance except for complex numbers, and all ranks must have the same bits.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from cases import CASES
from torch import Tensor

import fcomm
from fcomm.arithmetic import OPS, fold
from fcomm.backends import cpu as machine
from fcomm.backends.pool import native
from fcomm.dtypes import REDUCED
from fcomm.group import BACKENDS
from fcomm.rendezvous import live
from fcomm.testing import TRANSFORMS, check_case, run_ranks

pytestmark = pytest.mark.skipif(native is None, reason="the engine is not built; test_cpu_without.py covers that")

DTYPES = REDUCED


def differs(what: str, got: Tensor, expected: Tensor) -> list[str]:
    """One line if bits, shape, dtype or contiguity differ; NaN equals NaN, and zeros of either sign are equal."""
    if got.dtype != expected.dtype or got.shape != expected.shape or not got.is_contiguous():
        return [f"{what}: {got.dtype} {got.shape} {got.stride()} is not {expected.dtype} {expected.shape}"]
    wrong = differing(got.reshape(-1), expected.reshape(-1)).nonzero().reshape(-1)
    if not len(wrong):
        return []
    k = int(wrong[0])
    return [f"{what}: {len(wrong)} differ, at {k} {got.reshape(-1)[k]} is not {expected.reshape(-1)[k]}"]


def differing(got: Tensor, expected: Tensor) -> Tensor:
    if got.dtype.is_complex:
        # torch multiplies one addend by 1 + 0j, divides by n + 0j, and rounds a product's parts in its own order: a NaN
        # in one part spreads to both, and the last bit may differ.
        close = (got - expected).abs() <= torch.finfo(got.dtype).eps * 8 * expected.abs()
        return ~(close | (got == expected) | (got.isnan() & expected.isnan()))
    if got.dtype.is_floating_point:
        got, expected = got.double(), expected.double()
        return ~((got == expected) | (got.isnan() & expected.isnan()))
    return got != expected


# --- every case -------------------------------------------------------------------------------------------------------


def check(world: fcomm.Group, ids: list[str], transforms: tuple[str, ...], compiler: str | None = None) -> list[str]:
    failures = []
    for id in ids:
        for transform in transforms:
            try:
                failures += check_case(CASES[id], fcomm.cpu, world, [transform], compiler=compiler)
            except fcomm.FcommError:
                raise  # the group is out of step: what follows would fail too
            except Exception:
                failures.append(f"{id}: {transform}: {traceback.format_exc()}")
    return failures


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_case(size: int) -> None:
    transforms = tuple(TRANSFORMS) if size == 2 else ("forward", "vjp", "backward")
    run_ranks(check, size, [id for id, case in CASES.items() if size in case.sizes], transforms, timeout_s=300)


@pytest.mark.long
@pytest.mark.parametrize("size", [3, 4])
def test_every_case_under_every_transform(size: int) -> None:
    run_ranks(check, size, [id for id, case in CASES.items() if size in case.sizes], tuple(TRANSFORMS), timeout_s=900)


COMPILED = ("all_reduce-max", "all_gather-dim -1", "all_to_all-two dims", "send and recv-ring")


def test_compiled_cases() -> None:
    run_ranks(check, 2, list(COMPILED), ("forward", "vjp", "jvp of vjp"), "aot_eager", timeout_s=300)
    run_ranks(check, 2, ["all_reduce-max"], ("vjp",), "inductor", timeout_s=300)


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fifth", range(5))
def test_every_compiled_case(fifth: int, compiler: str) -> None:
    ids = [id for id, case in CASES.items() if 2 in case.sizes][fifth::5]
    run_ranks(check, 2, ids, ("forward", "grad", "jvp", "vmap of grad"), compiler, timeout_s=590)


# --- dtypes and ops ---------------------------------------------------------------------------------------------------


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers that show a wrong accumulation: large and small, negative, and NaN and infinity in the floats."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        bytes = torch.tensor([0, 0, 0, 1, 2, 255], dtype=torch.uint8)  # all except 0 are true
        return bytes[torch.randint(0, 6, shape, generator=generator)].view(torch.bool)
    if not (dtype.is_floating_point or dtype.is_complex):
        info = torch.iinfo(dtype)
        low, high = max(info.min, -(2**62)), min(info.max, 2**62)
        return torch.randint(low, high, shape, generator=generator).to(dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    x = x * torch.randint(-3, 4, shape, generator=generator).double().exp2()
    flat = x.reshape(-1)
    if len(flat) > 40:
        flat[seed % 7] = torch.nan
        if not dtype.is_complex:  # torch's inf / (n + 0j) is NaN
            flat[11 + seed % 5] = torch.inf
        flat[30] = -0.0 if seed % 2 else 0.0
    return x.to(dtype)


def has_meaning(op: str, dtype: torch.dtype) -> bool:
    if op in ("band", "bor", "bxor"):
        return not (dtype.is_floating_point or dtype.is_complex)
    return not (op in ("max", "min") and dtype.is_complex) and not (op == "mean" and dtype == torch.bool)


def check_dtypes(world: fcomm.Group, lengths: list[int]) -> list[str]:
    failures = []
    cells = refused = 0
    for dtype, op, length in product(DTYPES, OPS, lengths):
        xs = [values(dtype, (length,), 10 * r + length % 10) for r in range(world.size)]
        try:
            got = fcomm.all_reduce(xs[world.rank or 0], world, fcomm.cpu, op=op)
        except TypeError as error:
            refused += length == lengths[0]
            failures += [] if not has_meaning(op, dtype) and op in str(error) else [f"{dtype} {op}: {error}"]
            continue
        cells += length == lengths[0]
        failures += differs(f"all_reduce {dtype} {op} {length}", got, fold(xs, op))
        again = fcomm.all_reduce(xs[world.rank or 0], world, fcomm.cpu, op=op)
        failures += differs(f"second run of all_reduce {dtype} {op} {length}", again, got)
        # The same bits on every rank, including NaN's payload, so compare bytes.
        rows = fcomm.all_gather(got.view(torch.uint8) if length else got, world, fcomm.cpu, tiled=False)
        if length and not all(torch.equal(row, rows[0]) for row in rows):
            failures.append(f"all_reduce {dtype} {op} {length}: the ranks hold different bits")
        if op in ("sum", "mean"):
            split = xs[0].numel() // world.size * world.size
            part = fcomm.reduce_scatter(xs[world.rank or 0][:split], world, fcomm.cpu, op=op)
            mine = fold([x[:split] for x in xs], op).chunk(world.size)[world.rank or 0] if split else part
            failures += differs(f"reduce_scatter {dtype} {op} {length}", part, mine)
    if (cells, refused) != (len([1 for o, d in product(OPS, DTYPES) if has_meaning(o, d)]), 136 - cells):
        failures.append(f"{cells} cells right and {refused} refused, of {len(DTYPES) * len(OPS)}")
    return failures


@pytest.mark.parametrize("size", [2, 3])
def test_every_dtype_and_op(size: int) -> None:
    run_ranks(check_dtypes, size, [67, 20011], timeout_s=200)


# --- lengths ----------------------------------------------------------------------------------------------------------

KB = 1 << 10
# Lengths around the limits between one synchronisation and two, of a chunk, and of several chunks; and primes.
EDGES = sorted(
    {n + d for n in (0, 4 * KB, 16 * KB, 32 * KB, 64 * KB, 512 * KB, 1024 * KB) for d in (-1, 0, 1) if n + d >= 0}
    | {2, 3, 4, 5, 31, 1009, 300007}
)


def check_lengths(world: fcomm.Group, lengths: list[int]) -> list[str]:
    """Bytes of every length through every collective, back to back, then the same as int32 elements, then as blocks."""
    failures, n, rank = [], world.size, world.rank or 0
    for length in lengths:
        xs = [(torch.arange(length + r) * 7 + r * 13).to(torch.uint8)[r:] for r in range(n)]
        x = xs[rank]
        whole = torch.stack(xs)
        shift = [(r, (r + 1) % n) for r in range(n)]
        blocks = x[: length // n * n]
        sizes = [length // n + (r == n - 1) * (length % n) for r in range(n)]
        mine = x[: sizes[rank]]
        for name, got, expected in (
            ("all_reduce", fcomm.all_reduce(x, world, fcomm.cpu), fold(xs, "sum")),
            ("all_gather", fcomm.all_gather(x, world, fcomm.cpu, tiled=False), whole),
            ("ppermute", fcomm.ppermute(x, world, fcomm.cpu, perm=shift), xs[(rank - 1) % n]),
            ("broadcast", fcomm.broadcast(x, world, fcomm.cpu, src=n - 1), xs[n - 1]),
            (
                "all_to_all",
                fcomm.all_to_all(blocks, world, fcomm.cpu),
                torch.cat([y[: len(blocks)].chunk(n)[rank] for y in xs]) if len(blocks) else blocks,
            ),
            (
                "reduce_scatter uneven",
                fcomm.reduce_scatter(x, world, fcomm.cpu, sizes=sizes),
                fold(xs, "sum").split(sizes)[rank],
            ),
            (
                "all_gather uneven",
                fcomm.all_gather(mine, world, fcomm.cpu, sizes=sizes),
                torch.cat([y[:s] for y, s in zip(xs, sizes, strict=True)]),
            ),
            (
                "all_to_all uneven",
                fcomm.all_to_all(x, world, fcomm.cpu, send_sizes=sizes, recv_sizes=[sizes[rank]] * n),
                torch.cat([y.split(sizes)[rank] for y in xs]),
            ),
            ("gather", fcomm.gather(x, world, fcomm.cpu), torch.cat(xs) * (rank == 0)),
            (
                "scatter",
                fcomm.scatter(blocks, world, fcomm.cpu),
                xs[0][: len(blocks)].chunk(n)[rank] if len(blocks) else blocks,
            ),
            ("scan", fcomm.scan(x, world, fcomm.cpu, exclusive=True), exclusive(xs, rank)),
            ("recv", passed_on(x, world), xs[(rank - 1) % n]),
        ):
            failures += differs(f"{name} of {length} bytes", got, expected)[:1]
        if len(failures) > 5:
            break
    return [text[:300] for text in failures]


def exclusive(xs: list[Tensor], rank: int) -> Tensor:
    return fold(xs[:rank], "sum") if rank else torch.zeros_like(xs[0])


def passed_on(x: Tensor, world: fcomm.Group) -> Tensor:
    return fcomm.recv(torch.empty_like(x), world, fcomm.cpu, after=fcomm.send(x, world, fcomm.cpu))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_lengths_around_every_edge(size: int) -> None:
    run_ranks(check_lengths, size, EDGES if size == 2 else EDGES[::2], timeout_s=200)


def check_nothing_received(world: fcomm.Group) -> list[str]:
    """No rank sends to the last one, and blocks are so large that they may go straight into the others' results."""
    n, rank, length = world.size, world.rank or 0, 256 * KB
    send = [[0 if dst == n - 1 else length + src for dst in range(n)] for src in range(n)]
    received = [row[rank] for row in send]
    x = torch.full((sum(send[rank]),), rank + 1.0)
    expected = torch.cat([torch.full((received[src],), src + 1.0) for src in range(n)])
    failures = []
    for call in range(20):  # the first ones go either way
        y = fcomm.all_to_all(x, world, fcomm.cpu, send_sizes=send[rank], recv_sizes=received)
        failures += differs(f"call {call}", y, expected)[:1]
    return failures


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_receives_nothing(size: int) -> None:
    run_ranks(check_nothing_received, size)


def check_wrap(world: fcomm.Group, lengths: list[int]) -> list[str]:
    """The engine's 32-bit counter of rounds wraps in the middle of the test."""
    start = 2**32 - 40
    owner = live(world)
    owner.communicator("cpu", lambda: machine._open(world, start), machine._close)
    failures = check_lengths(world, lengths)
    handle = machine._communicator(world).handle
    wrapped = native.round(handle) & 0xFFFFFFFF
    return failures if wrapped < 2**31 else [*failures, f"the counter is {wrapped}, it did not wrap"]


@pytest.mark.parametrize("size", [2, 3])
def test_the_round_counter_wraps(size: int) -> None:
    run_ranks(check_wrap, size, [3, 40 * KB, 1024 * KB + 1], timeout_s=100)


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 2),
    "every other": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 8, -1),
    "offset": lambda x: x[1:, 1:],
    "flipped": lambda x: x.flip(1),
    "conjugate": lambda x: x.conj(),
    "negative": lambda x: torch.complex(x.real, x.imag).conj().imag.resolve_conj() if x.is_complex() else x._neg_view(),
    "0-d": lambda x: x[0, 0, 0],
    "empty": lambda x: x[:, :0],
    "channels last": lambda x: x[None].contiguous(memory_format=torch.channels_last)[0],
    "zeros without storage": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "one element, odd strides": lambda x: x.as_strided((1, 2, 1), (7, 1, 99)),
}


def check_layouts(world: fcomm.Group) -> list[str]:
    failures, n, rank = [], world.size, world.rank or 0
    for (name, layout), dtype in product(LAYOUTS.items(), (torch.float32, torch.complex64, torch.int16)):
        if name == "negative" and dtype == torch.int16:
            continue
        xs = [layout(values(dtype, (6, 8, 6), 3 + r)) for r in range(n)]
        plain = [
            x.new_zeros(x.shape) if x._is_zerotensor() else x.resolve_conj().resolve_neg().contiguous() for x in xs
        ]
        x = xs[rank]
        before = plain[rank].clone()
        got = {"all_reduce": fcomm.all_reduce(x, world, fcomm.cpu)}
        expected = {"all_reduce": fold(plain, "sum")}
        for dim in range(x.dim()):
            got[f"all_gather {dim}"] = fcomm.all_gather(x, world, fcomm.cpu, dim=dim)
            expected[f"all_gather {dim}"] = torch.cat(plain, dim)
            if x.shape[dim] % n == 0:
                got[f"reduce_scatter {dim}"] = fcomm.reduce_scatter(x, world, fcomm.cpu, dim=dim)
                expected[f"reduce_scatter {dim}"] = fold(plain, "sum").chunk(n, dim)[rank] if x.shape[dim] else before
        failures += [
            text
            for key, y in got.items()
            for text in differs(f"{key} of {name} {dtype}", y, expected[key].contiguous())
        ]
        if x._is_zerotensor():
            continue
        failures += differs(f"{name}: the argument was written", x.resolve_conj().resolve_neg().contiguous(), before)
    return failures


@pytest.mark.parametrize("size", [2, 3])
def test_strided_views_equal_their_contiguous_copies(size: int) -> None:
    run_ranks(check_layouts, size, timeout_s=100)


# --- groups -----------------------------------------------------------------------------------------------------------


def check_groups(world: fcomm.Group, rounds: int) -> list[str]:
    """Two sub-groups at once, and two groups of the same ranks interleaved, each with its own order of operations."""
    axes = fcomm.mesh(world, dp=2, tp=world.size // 2)
    twin = fcomm.subgroup(world, list(range(world.size))[::-1], name="twin")
    failures = []
    for k in range(rounds):
        x = torch.full((1 + 997 * (k % 5),), float(world.rank or 0) + k)
        everyone = sum(range(world.size)) + world.size * k
        dp, tp = fcomm.all_reduce(x, axes["dp"], fcomm.cpu), fcomm.all_reduce(x, axes["tp"], fcomm.cpu)
        across = fcomm.all_reduce(dp, axes["tp"], fcomm.cpu)
        failures += differs("dp then tp", across, torch.full_like(x, everyone))
        failures += differs("tp then dp", fcomm.all_reduce(tp, axes["dp"], fcomm.cpu), across)
        rows = fcomm.all_gather(x[:1], twin, fcomm.cpu)
        failures += differs("reversed ranks", rows, torch.arange(world.size - 1, -1, -1.0) + k)
        fcomm.all_reduce(x, world, fcomm.cpu)
    return failures[:3]


def test_groups_at_once_and_interleaved() -> None:
    run_ranks(check_groups, 4, 50, timeout_s=100)


def check_program(world: fcomm.Group, seed: int, steps: int) -> list[str]:
    """Random collectives back to back, of random lengths: slots are shared, so a late reader reads the next call."""
    draw = random.Random(seed)
    n, rank, failures = world.size, world.rank or 0, []
    xs = [torch.arange(8.0) + r for r in range(n)]
    for _ in range(steps):
        length = draw.choice([1, 8, 1000, 9000, 70000])
        xs = [(x.repeat(-(-length // len(x)))[:length] * 0.5 + r).contiguous() for r, x in enumerate(xs)]
        x, kind = xs[rank], draw.choice(["all_reduce", "ppermute", "broadcast", "reduce", "all_gather", "scan"])
        if kind == "all_reduce":
            xs, y = [fold(xs, "mean")] * n, fcomm.all_reduce(x, world, fcomm.cpu, op="mean")
        elif kind == "ppermute":
            by = draw.randrange(1, n) if n > 1 else 0
            y = fcomm.ppermute(x, world, fcomm.cpu, perm=[(r, (r + by) % n) for r in range(n)])
            xs = [xs[(r - by) % n] for r in range(n)]
        elif kind == "broadcast":
            src = draw.randrange(n)
            xs, y = [xs[src]] * n, fcomm.broadcast(x, world, fcomm.cpu, src=src)
        elif kind == "reduce":
            dst = draw.randrange(n)
            y = fcomm.reduce(x, world, fcomm.cpu, dst=dst, op="max")
            xs = [fold(xs, "max") if r == dst else torch.zeros_like(x) for r in range(n)]
        elif kind == "scan":
            y, xs = fcomm.scan(x, world, fcomm.cpu), [fold(xs[: r + 1], "sum") for r in range(n)]
            xs = [x / n for x in xs]
            y = y / n
        else:
            y, xs = fcomm.all_gather(x, world, fcomm.cpu), [torch.cat(xs)] * n
        failures += [text[:200] for text in differs(f"{kind} of {length}", y, xs[rank])]
        if failures:
            break
    return failures


@pytest.mark.parametrize("size", [2, 3, 4])
def test_random_programs_back_to_back(size: int) -> None:
    run_ranks(check_program, size, size, 300, timeout_s=100)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
def test_long_random_programs(size: int) -> None:
    for seed in range(5):
        run_ranks(check_program, size, 100 + seed, 5000, timeout_s=600)


def check_huge(world: fcomm.Group, backend_name: str, kind: str) -> list[Any]:
    backend = BACKENDS[backend_name]
    n, me = world.size, world.rank or 0
    count = 2**31 + 8
    x = torch.zeros(count // n if kind == "all_gather" else count, dtype=torch.uint8)
    length = len(x)
    marks = [0, length // 2 - 1, length // 2, length - 1]
    x[marks] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8) + 4 * me
    y = {
        "all_reduce": lambda: fcomm.all_reduce(x, world, backend),
        "all_gather": lambda: fcomm.all_gather(x, world, backend),
        "all_to_all": lambda: fcomm.all_to_all(x, world, backend, split_dim=0, concat_dim=0),
    }[kind]()
    # Rank p holds 1 + 4 p .. 4 + 4 p at the marks; each half has two of them.
    expected = {
        "all_reduce": {m: n * k + 4 * sum(range(n)) for k, m in enumerate(marks, 1)},
        "all_gather": {p * length + m: k + 4 * p for p in range(n) for k, m in enumerate(marks, 1)},
        "all_to_all": {p * length // 2 + m: k + 4 * p for p in range(n) for k, m in zip(
            (1 + 2 * me, 2 + 2 * me), (0, length // 2 - 1), strict=True)},
    }[kind]  # fmt: skip
    wrong = [f"{y[m]} at {m}, not {value}" for m, value in expected.items() if y[m] != value]
    others = int(y.count_nonzero()) - len(expected)
    return wrong + ([f"{others} more elements are not zero"] if others else [])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all"])
@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_more_than_two_to_the_31_elements(backend: str, kind: str) -> None:
    run_ranks(check_huge, 2, backend, kind, timeout_s=300)
