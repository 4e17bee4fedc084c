"""Every collective through every transform on simulated ranks, eager and compiled, against autograd of the meaning.

The same in processes is in test_c10d.py and test_cpu.py, on the vendors' lowerings in test_nccl.py and test_hccl.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import CASES
from matrix import FIRST, SAMPLE, record

import fcomm
from fcomm.testing import TRANSFORMS, check_case

Record = Callable[[str, object], None]


def check(
    case_id: str,
    size: int,
    record_property: Record,
    transforms: tuple[str, ...] = tuple(TRANSFORMS),
    compiler: str | None = None,
) -> None:
    case = CASES[case_id]
    failures = check_case(case, fcomm.sim, fcomm.axis(case.name, size), transforms, compiler=compiler)
    assert not failures, "\n".join(failures)
    record(record_property, [case], "sim", compiled=compiler is not None, transforms=transforms)


@pytest.mark.parametrize(("case_id", "size"), [(c.id, n) for c in CASES.values() for n in c.sizes])
def test_eager(case_id: str, size: int, record_property: Record) -> None:
    check(case_id, size, record_property)


# Three ranks: with two, a permutation is its own inverse.
@pytest.mark.parametrize("case_id", FIRST)
def test_sample_compiled(case_id: str, record_property: Record) -> None:
    check(case_id, 3, record_property, SAMPLE["sim"], "aot_eager")


@pytest.mark.long
@pytest.mark.parametrize("case_id", CASES)
def test_compiled(case_id: str, record_property: Record) -> None:
    check(case_id, 3, record_property, compiler="aot_eager")


@pytest.mark.long
@pytest.mark.parametrize(("case_id", "size"), [(c.id, n) for c in CASES.values() for n in c.sizes])
def test_compiled_by_inductor(case_id: str, size: int, record_property: Record) -> None:
    check(case_id, size, record_property, compiler="inductor")
