"""Every case and transform on torch.distributed in real processes: the values and derivatives of the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES
from matrix import COLLECTIVES, FIRST, SAMPLE, record
from torch import Tensor
from vendors import misread

import fcomm
from fcomm import Group
from fcomm.backends import processgroup
from fcomm.testing import TRANSFORMS, check_case, run_ranks

Record = Callable[[str, object], None]
ALL = tuple(TRANSFORMS)


def check(world: Group, ids: tuple[str, ...], transforms: tuple[str, ...], compiler: str | None = None) -> list[str]:
    return [f for id in ids for f in check_case(CASES[id], fcomm.c10d, world, transforms, compiler=compiler)]


def checked(
    record_property: Record,
    size: int,
    ids: tuple[str, ...],
    transforms: tuple[str, ...] = ALL,
    compiler: str | None = None,
    timeout_s: float = 300,
) -> None:
    """Check the cases in one start of the processes, and note the cells that were checked."""
    ids = tuple(id for id in ids if size in CASES[id].sizes)
    run_ranks(check, size, ids, transforms, compiler, timeout_s=timeout_s)
    record(record_property, [CASES[id] for id in ids], "c10d", compiled=compiler is not None, transforms=transforms)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_every_case_under_every_transform(size: int, record_property: Record) -> None:
    checked(record_property, size, tuple(CASES))


def over_edges(world: Group) -> list[str]:
    """send and recv as on devices, with a process group for each direction, opened by its first message."""
    processgroup._DIRECTED = ("cpu",)
    n, rank, failures = world.size, world.rank or 0, check(world, ("send and recv-ring",), ALL)
    for i in range(3):
        x = torch.full((100_000,), float(10 * i + rank))
        token = [fcomm.send(x, world, fcomm.c10d, dst=dst) for dst in range(n) if dst != rank]
        x.zero_()  # the caller's to write again
        for src in range(n):
            if src != rank:
                y = fcomm.recv(torch.zeros_like(x), world, fcomm.c10d, src=src, after=token[0])
                failures += [] if (y == 10 * i + src).all() else [f"message {i} from {src}: {y[:3]}"]
    return failures


def test_messages_over_edges() -> None:
    run_ranks(over_edges, 3)


def messages_misread(world: Group, directed: bool) -> list[str]:
    processgroup._DIRECTED = ("cpu",) if directed else ()
    return misread(world, fcomm.c10d)


@pytest.mark.parametrize("directed", [False, True])
def test_a_message_of_another_dtype_or_shape_is_refused(directed: bool) -> None:
    run_ranks(messages_misread, 3, directed)


def on_another_device(world: Group) -> list[str]:
    with pytest.raises(
        fcomm.FcommError, match="x is on device 'npu', and process groups are made here for cpu and cuda"
    ):
        processgroup.communicator(world, "npu")
    return []


def test_a_device_without_process_groups_is_refused() -> None:
    run_ranks(on_another_device, 2)


def test_compiled(record_property: Record) -> None:
    checked(record_property, 2, FIRST, SAMPLE["c10d"], "aot_eager")


@pytest.mark.long
def test_sample_compiled(record_property: Record) -> None:
    checked(record_property, 2, FIRST, SAMPLE["sim"], "aot_eager")


@pytest.mark.long
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("size", [2, 3])
def test_compiled_by_inductor(name: str, size: int, record_property: Record) -> None:
    ids = tuple(case.id for case in CASES.values() if case.name == name)
    checked(record_property, size, ids, ALL, "inductor", 580)


# --- programs that differ over the ranks --------------------------------------------------------------------------


def ignores_a_result(world: Group, compiler: str, ordered: bool) -> list[str]:
    """Rank 1 does not use the first result. Both ranks must communicate twice."""

    def program(x: Tensor) -> Tensor:
        total = fcomm.all_reduce(x, world, fcomm.c10d)
        gathered = fcomm.all_gather(total if ordered else x * 2, world, fcomm.c10d)
        unused = fcomm.all_reduce(gathered, world, fcomm.c10d)
        return gathered + (unused if ordered else total).sum() if world.rank == 0 else gathered

    x = torch.tensor([1.0 + (world.rank or 0)])
    with torch._inductor.config.patch(fx_graph_cache=False):  # graphs of an earlier fcomm have a different order
        y = torch.compile(program, fullgraph=True, backend=compiler)(x)
    expected = {(True, 0): [15.0, 15.0], (True, 1): [3.0, 3.0], (False, 0): [5.0, 7.0], (False, 1): [2.0, 4.0]}
    right = expected[ordered, world.rank or 0]
    return [] if y.tolist() == right else [f"{y} is not {right}"]


# Inductor's graphs of such programs: tests/test_order.py
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_result_that_one_rank_ignores_does_not_hang_a_compiled_program(compiler: str, ordered: bool) -> None:
    run_ranks(ignores_a_result, 2, compiler, ordered)


def differentiates_on_one_rank(world: Group, compiler: str | None) -> list[str]:
    """The rule for backward: a rank that ignores a result uses it times zero, and so takes part in its derivative."""

    def loss(x: Tensor) -> Tensor:
        y = fcomm.all_reduce(x * (2.0 + (world.rank or 0)), world, fcomm.c10d)
        return (y * y).sum() if world.rank == 0 else x.sum() + 0 * y.sum()

    x = torch.tensor([3.0])
    gradient = torch.func.grad(loss)
    if compiler is not None:
        gradient = torch.compile(gradient, fullgraph=True, backend=compiler)
    # y = 2 a + 3 b = 15 on both ranks; the total loss is y * y + b: its derivatives are 2 y 2 = 60 and 2 y 3 + 1 = 91.
    expected = [60.0] if world.rank == 0 else [91.0]
    got = gradient(x).tolist()
    return [] if got == expected else [f"{got} is not {expected}"]


@pytest.mark.parametrize("compiler", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_zero_use_lets_a_rank_ignore_a_result_that_another_differentiates(compiler: str | None) -> None:
    run_ranks(differentiates_on_one_rank, 2, compiler, timeout_s=300)  # Inductor compiles C++, twice


def one_element_of_stride_zero(world: Group) -> list[str]:
    x = torch.empty_strided((1,), (0,), dtype=torch.float64).fill_(1.0 + (world.rank or 0))
    y = fcomm.all_gather(x, world, fcomm.c10d)
    return [] if y.tolist() == [1.0, 2.0] else [str(y)]


def test_one_element_of_stride_zero() -> None:
    run_ranks(one_element_of_stride_zero, 2)
