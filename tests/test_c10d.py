"""Every case and transform on torch.distributed in real processes: the values and derivatives of the oracle."""

from __future__ import annotations

import traceback

import pytest
from cases import CASES

import fcomm
from fcomm.testing import TRANSFORMS, check_case, run_ranks


def check(world: fcomm.Group, ids: list[str], transforms: tuple[str, ...], compiler: str | None = None) -> list[str]:
    failures = []
    for id in ids:
        for transform in transforms:
            try:
                failures += check_case(CASES[id], fcomm.c10d, world, [transform], compiler=compiler)
            except fcomm.FcommError:
                raise  # the group is out of step: what follows would fail too
            except Exception:
                failures.append(f"{id}: {transform}: {traceback.format_exc()}")
    return failures


def sized(size: int) -> list[str]:
    return [id for id, case in CASES.items() if size in case.sizes]


@pytest.mark.parametrize("size", [2, 3])
def test_every_case_under_every_transform(size: int) -> None:
    run_ranks(check, size, sized(size), tuple(TRANSFORMS), timeout_s=300)
