"""What the tests of nccl and hccl share: the doubles by name, how to plant faults in them, and what each rank runs."""

from __future__ import annotations

import ctypes
import importlib
import os
import traceback
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import pytest
import torch
from cases import CASES
from doubles import build

import fcomm
from fcomm.arithmetic import FOLDED_OPS, OPS, check_op, fold
from fcomm.testing import check_case
from fcomm.testing.strategies import DTYPES

DOUBLES = {
    "nccl": "nccl/libnccl.so.2",
    "nccl-device": "nccl-device/libnccl.so.2",
    "nccl-2.21": "nccl-2.21/libnccl.so.2",
    "hccl": "hccl/libhccl.so",
    "hccl-split": "hccl-split/libhccl.so",
}
REAL = "nccl-real"  # instead of a double's name: NVIDIA's library, on GPUs
STATUS, DELAY, HANG, DEAF, ASYNC = 1, 2, 3, 4, 5


def module(double: str) -> ModuleType:
    return importlib.import_module(f"fcomm.backends.{double.split('-', maxsplit=1)[0]}")


def backend(double: str) -> fcomm.Backend:
    """The double's backend in this process."""
    if double == REAL:
        return fcomm.nccl
    opened: fcomm.Backend = module(double).open(library=build.path(DOUBLES[double]), device="cpu")
    return opened


@cache
def control(double: str) -> ctypes.CDLL:
    """The double's functions for tests."""
    lib = ctypes.CDLL(build.path(DOUBLES[double]))
    lib.double_fault.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    lib.double_calls.argtypes, lib.double_calls.restype = (ctypes.c_char_p,), ctypes.c_long
    if double == "nccl-device":
        lib.double_issued.restype = ctypes.c_long
        lib.double_reached.argtypes = (ctypes.c_void_p, ctypes.c_long)
    return lib


def plant(double: str, symbol: str, action: int, value: int, nth: int = 1) -> None:
    """Make the nth call of symbol from now on suffer the action."""
    control(double).double_fault(symbol.encode(), nth, action, value)


def calls(double: str, symbol: str) -> int:
    return int(control(double).double_calls(symbol.encode()))


def sized(size: int) -> list[str]:
    return [id for id, case in CASES.items() if size in case.sizes]


def check(
    world: fcomm.Group, double: str, ids: Sequence[str], transforms: Sequence[str], compiler: str | None = None
) -> list[str]:
    """Check every case and transform on this rank against the oracle; return what was wrong.

    compiler: takes all transforms of a case as one program.
    """
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    failures: list[str] = []
    on, device = backend(double), "cuda" if double == REAL else "cpu"
    for id in ids:
        for some in [transforms] if compiler else [[transform] for transform in transforms]:
            try:
                failures += check_case(CASES[id], on, world, some, compiler=compiler, device=device)
            except fcomm.FcommError:
                raise  # the group is out of step: what follows would fail too
            except Exception:
                failures.append(f"{id}: {', '.join(some)}: {traceback.format_exc()}")
    return failures


# --- what else a rank runs: each returns what came out wrong ---


def one_rank(world: fcomm.Group, double: str) -> list[str]:
    failures = check(world, double, sized(1), ("forward", "vjp"))
    return [*failures, *(["a communicator was opened"] if control(double).double_live() else [])]


def all_dtypes(world: fcomm.Group, double: str) -> list[str]:
    """Every dtype and reduction, and movement of every dtype, against the arithmetic over all ranks' values."""
    on, failures, right = backend(double), [], 0
    for dtype in DTYPES:
        base = torch.tensor([[0, 1, 2, 3, 1], [2, 0, 1, 3, 0], [1, 2, 0, 3, 1]])[: world.size]
        xs = [(row % 2 if dtype == torch.bool else row).to(torch.float32).to(dtype) for row in base]
        mine = xs[world.rank or 0]
        raw = [x.view(torch.uint8) for x in (fcomm.all_gather(mine, world, on), torch.cat(xs))]
        failures += [] if torch.equal(*raw) else [f"all_gather {dtype}"]
        for op in OPS:
            try:
                check_op("all_reduce", op, dtype)
            except TypeError:
                continue
            want, zeros = fold(xs, op), torch.zeros_like(mine)
            rooted = want if world.rank == 0 else zeros
            results = (fcomm.all_reduce(mine, world, on, op=op), want), (fcomm.reduce(mine, world, on, op=op), rooted)
            for y, expected in results:
                right += 1
                if not torch.equal(y.view(torch.uint8), expected.view(torch.uint8)):
                    failures.append(f"{op} {dtype}: {y} is not {expected}")
    assert right > 200, right
    return failures


def bools_of_any_byte(world: fcomm.Group, double: str) -> list[str]:
    """torch takes every byte except 0 for True, and a view or a foreign buffer may contain any byte."""
    on, rank, failures = backend(double), world.rank or 0, []
    xs = [torch.tensor(row, dtype=torch.uint8).view(torch.bool) for row in ([255, 0, 2, 0], [0, 0, 1, 4])]
    for op in (op for op in OPS if op != "mean"):
        want = fold(xs, op)
        results = {
            "all_reduce": (fcomm.all_reduce(xs[rank], world, on, op=op), want),
            "reduce": (fcomm.reduce(xs[rank], world, on, op=op), want if rank == 0 else torch.zeros_like(want)),
        }
        if op in FOLDED_OPS:
            uneven = fcomm.reduce_scatter(xs[rank], world, on, op=op, sizes=[1, 3])
            results |= {
                "reduce_scatter": (fcomm.reduce_scatter(xs[rank], world, on, op=op), want.chunk(2)[rank]),
                "uneven reduce_scatter": (uneven, want.split([1, 3])[rank]),
            }
        failures += [f"{op} {name}: {y}" for name, (y, z) in results.items() if y.tolist() != z.tolist()]
    return failures


def nan_wins(world: fcomm.Group, double: str) -> list[str]:
    x = torch.tensor([1.0, float("nan") if world.rank == 1 else 2.0, float(world.rank or 0)])
    y = fcomm.all_reduce(x, world, backend(double), op="max")
    return [] if y[1].isnan() and y[0] == 1 and y[2] == world.size - 1 else [f"{y}"]


def every_layout(world: fcomm.Group, double: str) -> list[str]:
    """Views whose contents are not what their address and length suggest."""
    on, n, base = backend(double), world.size, torch.arange(24.0).reshape(4, 6) + 1
    views = {
        "strided": base[:, ::2],
        "transposed": base.T,
        "expanded": base[:1].expand(4, 6),
        "offset": base[1:],
        "negative bit": torch._neg_view(base),
        "conjugate bit": torch.complex(base, base).conj(),
    }
    if double != REAL:
        views["off its alignment"] = torch.frombuffer(bytearray(range(33)), dtype=torch.float32, offset=1, count=7)
    failures = []
    for name, x in views.items():
        before = x.clone()
        y = fcomm.all_reduce(x, world, on)
        failures += [] if torch.equal(y, before * n) and y.is_contiguous() else [f"{name}: {y}"]
        failures += [] if torch.equal(fcomm.broadcast(x, world, on, src=n - 1), before) else [f"{name}: broadcast"]
        failures += [] if torch.equal(x, before) else [f"{name} was written"]
    return failures


def called(world: fcomm.Group, double: str, symbols: tuple[str, ...]) -> dict[str, object]:
    failures = check(world, double, sized(world.size), ("forward",))
    fcomm.reduce(torch.ones(2), world, backend(double))
    live = control(double).double_live()
    fcomm.close(world)
    counts = {symbol: calls(double, symbol) for symbol in symbols}
    return {"counts": counts, "live": live, "left": control(double).double_live(), "failures": failures}


def uneven_natives(world: fcomm.Group, double: str, symbols: tuple[str, str]) -> list[object]:
    """Blocks of lengths 0, 1, 2, .. gathered and folded by the library's own calls, for the dtypes that it takes."""
    on, n, rank, failures = backend(double), world.size, world.rank or 0, []
    sizes, before = list(range(n)), [calls(double, symbol) for symbol in symbols]
    dtypes = (torch.float32, torch.int16, torch.complex64)
    for dtype in dtypes:
        blocks = [torch.arange(2 * d).to(dtype).reshape(2, d) + r for r, d in enumerate(sizes)]
        y = fcomm.all_gather(blocks[rank], world, on, dim=1, sizes=sizes)
        failures += [] if torch.equal(y, torch.cat(blocks, 1)) else [f"all_gather of {dtype}: {y}"]
        wholes = [torch.cat(blocks, 1) * (r + 1) for r in range(n)]
        y = fcomm.reduce_scatter(wholes[rank], world, on, dim=1, sizes=sizes)
        expected = torch.stack(wholes).sum(0).to(dtype).split(sizes, 1)[rank]
        failures += [] if torch.equal(y, expected) else [f"reduce_scatter of {dtype}: {y}, not {expected}"]
        fcomm.all_gather(blocks[0], world, on, dim=1, sizes=[0] * n)
    made = [calls(double, symbol) - b for symbol, b in zip(symbols, before, strict=True)]
    return failures + ([] if made == [len(dtypes)] * 2 else [f"native calls: {made}"])


def one_communicator(world: fcomm.Group, double: str) -> list[object]:
    on, x, seen = backend(double), torch.arange(4.0), []
    rows = fcomm.axis_index(world, on).new_zeros(world.size)
    for _ in range(3):
        fcomm.all_reduce(x, world, on)
        fcomm.all_gather(x, world, on)
        fcomm.all_to_all(x[: world.size], world, on)
        fcomm.ppermute(x, world, on, perm=[(0, 1), (1, 0)])
        fcomm.barrier(world, on)
        seen.append(control(double).double_live())
    again = fcomm.subgroup(world, range(world.size), name="again")
    fcomm.all_reduce(x, again, on)
    seen.append(control(double).double_live())
    fcomm.close(again)
    seen.append(control(double).double_live())
    return [f"{rows} {seen}"] if seen != [1, 1, 1, 2, 1] else []


def messages(world: fcomm.Group, double: str) -> list[str]:
    """Long messages in a ring in which every rank sends before it receives; then one of an unexpected size."""
    on, rank, failures = backend(double), world.rank or 0, []
    for i in range(3):
        x = torch.full((100_000,), float(10 * i + rank))
        got = fcomm.recv(torch.zeros_like(x), world, on, after=fcomm.send(x, world, on))
        x.zero_()  # the caller's to write again
        want = float(10 * i + (rank - 1) % world.size)
        failures += [] if (got == want).all() else [f"message {i}: {got[:3]}, not {want}"]
    token = fcomm.send(torch.ones(3), world, on)
    with pytest.raises(fcomm.MismatchError, match=r"sends 3 elements of 4 bytes, like of rank \d has 2 of 8"):
        fcomm.recv(torch.zeros(2, dtype=torch.float64), world, on, after=token)
    failures += misread(world, on)
    # The edge is still in step.
    y = fcomm.recv(torch.zeros(2), world, on, after=fcomm.send(torch.full((2,), float(rank)), world, on))
    return failures + ([] if y[0] == (rank - 1) % world.size else [f"after a mismatch: {y}"])


def misread(world: fcomm.Group, on: fcomm.Backend) -> list[str]:
    """Messages with as many bytes as expected but a different dtype or shape: refused, and the edge stays in step."""
    x, source, rank = torch.arange(4.0), ((world.rank or 0) - 1) % world.size, world.rank
    many = x.view(*[1] * 17, 2, 2)
    pairs = (
        (x, x.to(torch.int32), "float32[4] is sent, int32[4] expected"),
        (x, x.view(2, 2), "float32[4] is sent, float32[2, 2] expected"),
        (x[:0], x.view(2, 2)[:, :0], "float32[0] is sent, float32[2, 0] expected"),
        (x.to(torch.float8_e5m2), x.to(torch.float8_e8m0fnu), "float8_e5m2[4] is sent, float8_e8m0fnu[4] expected"),
        (many, many.view(*[1] * 17, 4, 1), f"float32[{'1, ' * 16}...] is sent, float32[{'1, ' * 16}...] expected"),
    )
    failures = []
    for sent, like, text in pairs:
        with pytest.raises(fcomm.MismatchError) as raised:
            fcomm.recv(like, world, on, after=fcomm.send(sent, world, on).to(like.dtype))
        count, width, n, w = sent.numel(), sent.element_size(), like.numel(), like.element_size()
        whole = (
            f"recv: the ranks of group 'world' disagree: rank {source} sends {count} elements of {width} bytes, "
            f"like of rank {rank} has {n} of {w}: {text}; pass a like of the message's shape and dtype"
        )
        failures += [] if str(raised.value) == whole else [f"{raised.value}\n{whole}"]
    got = fcomm.recv(many, world, on, after=fcomm.send(many, world, on))
    return failures + ([] if torch.equal(got, many) else [f"of 19 dims: {got}"])


def uneven_sizes_that_differ(world: fcomm.Group, double: str) -> list[str]:
    on, rank = backend(double), world.rank or 0
    with pytest.raises(fcomm.MismatchError, match=r"pass different sizes: \[\[1, 2\], \[2, 2\]\]") as raised:
        fcomm.all_gather(torch.ones(1 + rank), world, on, sizes=[1 + rank, 2])
    assert (raised.value.op, raised.value.group, raised.value.rank) == ("all_gather", "world", rank)
    with pytest.raises(fcomm.MismatchError, match="rank 0 sends 2 to rank 1, which expects 3"):
        fcomm.all_to_all(
            torch.ones(3 + rank), world, on, send_sizes=[1 + rank, 2], recv_sizes=[1, 2] if rank == 0 else [3, 2]
        )
    y = fcomm.all_reduce(torch.ones(1), world, on)
    return [] if y.item() == world.size else [f"afterwards: {y}"]
