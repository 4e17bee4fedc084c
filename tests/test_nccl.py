"""Every collective through NCCL's own interface, on doubles of its library: values, derivatives, what is called."""

from __future__ import annotations

import pytest
from doubles import build
from matrix import FIRST
from vendors import (
    DOUBLES,
    all_dtypes,
    bools_of_any_byte,
    called,
    check,
    every_layout,
    messages,
    nan_wins,
    one_communicator,
    one_rank,
    sized,
    uneven_sizes_that_differ,
)

import fcomm
from fcomm.backends import library, nccl
from fcomm.testing import TRANSFORMS, run_ranks

DOUBLE, OLD = "nccl", "nccl-2.21"
# Three ranks distinguish a permutation from its inverse; these transforms reach every lowering in both directions.
FEW = ("forward", "vjp", "jvp", "vmap of grad")


def test_every_case_under_every_transform() -> None:
    run_ranks(check, 2, DOUBLE, sized(2), tuple(TRANSFORMS), timeout_s=400)


@pytest.mark.parametrize("double", [DOUBLE, OLD])
def test_every_case_on_three_ranks(double: str) -> None:
    run_ranks(check, 3, double, sized(3), FEW, timeout_s=400)


@pytest.mark.long
@pytest.mark.parametrize("double", [DOUBLE, OLD])
def test_every_case_under_every_transform_on_three_ranks(double: str) -> None:
    run_ranks(check, 3, double, sized(3), tuple(TRANSFORMS), timeout_s=500)


def test_one_rank_needs_no_communicator() -> None:
    run_ranks(one_rank, 1, DOUBLE)


def test_compiled() -> None:
    run_ranks(check, 2, DOUBLE, FIRST[::3], ("vjp",), "aot_eager", timeout_s=400)


@pytest.mark.long
@pytest.mark.parametrize(("compiler", "size"), [("aot_eager", 1), ("aot_eager", 3), ("inductor", 2)])
@pytest.mark.parametrize("fifth", range(5))
def test_every_case_compiled(fifth: int, compiler: str, size: int) -> None:
    run_ranks(check, size, DOUBLE, sized(size)[fifth::5], ("forward", "grad", "vjp", "jvp"), compiler, timeout_s=590)


@pytest.mark.long
@pytest.mark.parametrize("tenth", range(10))
def test_every_case_compiled_under_every_transform(tenth: int) -> None:
    run_ranks(check, 2, DOUBLE, sized(2)[tenth::10], tuple(TRANSFORMS), "aot_eager", timeout_s=590)


def test_every_dtype_and_reduction() -> None:
    run_ranks(all_dtypes, 3, DOUBLE)


def test_bools_of_any_byte() -> None:
    run_ranks(bools_of_any_byte, 2, DOUBLE)


def test_nan_wins_in_max_though_the_library_drops_it() -> None:
    run_ranks(nan_wins, 2, DOUBLE)


def test_every_layout() -> None:
    run_ranks(every_layout, 2, DOUBLE)


def test_which_symbols_collectives_call() -> None:
    """With test_ccall.py, which calls the others, every row of the table is called."""
    elsewhere = {
        *("ncclCommInitRank", "ncclCommSplit", "ncclCommShrink", "ncclCommRevoke", "ncclCommAbort"),
        *("ncclCommCount", "ncclCommCuDevice", "ncclCommUserRank", "ncclGetErrorString", "ncclGetLastError"),
        *("ncclMemAlloc", "ncclMemFree", "ncclCommRegister", "ncclCommDeregister"),
    }
    results = run_ranks(called, 3, DOUBLE, tuple(nccl.SYMBOLS), timeout_s=200)
    sums = {s: sum(r["counts"][s] for r in results) for s in nccl.SYMBOLS}
    assert {s for s, n in sums.items() if n == 0} == elsewhere
    assert [r["failures"] for r in results] == [[], [], []]
    # One of all ranks, and an edge to and from each neighbour.
    assert [r["live"] for r in results] == [3, 3, 3]
    assert [r["left"] for r in results] == [0, 0, 0]
    assert sums["ncclGetUniqueId"] == 1 + 3
    old = run_ranks(called, 2, OLD, ("ncclSend", "ncclGroupStart", "ncclGroupEnd"), timeout_s=200)
    assert all(r["counts"]["ncclGroupStart"] == r["counts"]["ncclGroupEnd"] > 10 for r in old)


def test_collectives_share_one_communicator_for_each_group() -> None:
    run_ranks(one_communicator, 2, DOUBLE)


def test_messages() -> None:
    run_ranks(messages, 3, DOUBLE, timeout_s=60)


def test_sizes_that_differ_raise_on_every_rank() -> None:
    run_ranks(uneven_sizes_that_differ, 2, DOUBLE)


def test_a_missing_library_is_an_error_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", lambda soname: None)
    missing = library.Search("libnccl-none.so.2", "FCOMM_NONE_LIB", (), (), nccl.SEARCH.hint)
    monkeypatch.setattr(nccl, "SEARCH", missing)
    with pytest.raises(fcomm.BackendUnavailableError, match=r"cannot load libnccl-none.so.2.*install nvidia-nccl"):
        nccl.open()
    assert build.path(DOUBLES[DOUBLE]) in nccl.open(build.path(DOUBLES[DOUBLE]), "cpu").name
