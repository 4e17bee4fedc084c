"""Every layer against its dense counterpart: value and all gradients, simulated, in processes, compiled, counted."""

from __future__ import annotations

from typing import Any

import dense
import pytest
import torch
from torch import Tensor

import fcomm
from fcomm.testing import run_ranks

CASES = dense.CASES
CELLS = [(name, n) for name, case in CASES.items() for n in case.sizes]


def program(case: dense.LayerCase, group: fcomm.Group, backend: fcomm.Backend) -> Any:
    """One rank's part: (ct, *args) -> [y, cotangents of the float arguments]."""

    def one_rank(ct: Tensor, *args: Tensor) -> list[Tensor]:
        return dense.value_and_vjp(lambda *a: case.parallel(*a, group=group, backend=backend), args, ct)

    return one_rank


def differences(got: Any, wanted: Any, what: str) -> list[str]:
    failures = []
    for part, (a, b) in enumerate(zip(got, wanted, strict=True)):
        try:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        except AssertionError as error:
            failures.append(f"{what}, {'y' if part == 0 else f'gradient {part - 1}'}: {error}")
    return failures


@pytest.mark.parametrize(("name", "n"), CELLS)
def test_simulated(name: str, n: int) -> None:
    case, group = CASES[name], fcomm.axis("layer", n)
    wanted = dense.expected(case, n)
    got = fcomm.simulate(program(case, group, fcomm.sim), group)(wanted.ct, *wanted.args)
    assert not differences(got, wanted.results, name)


def _all_cases_on_rank(world: fcomm.Group, backend: str) -> list[str]:
    failures = []
    for name, case in CASES.items():
        if world.size in case.sizes:
            wanted = dense.expected(case, world.size)
            one_rank = program(case, world, getattr(fcomm, backend))
            got = one_rank(wanted.ct[world.rank], *(x[world.rank] for x in wanted.args))
            failures += differences(got, [x[world.rank] for x in wanted.results], f"{name} on {backend}")
    return failures


@pytest.mark.parametrize("backend", [name for name in ("cpu", "c10d") if hasattr(fcomm, name)])
@pytest.mark.parametrize("n", [2, 3])
def test_in_processes(backend: str, n: int) -> None:
    run_ranks(_all_cases_on_rank, n, backend)
