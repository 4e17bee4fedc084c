"""torch's opcheck, all four of its tests, for every registered collective: on one rank, and on two at once.

On a simulated axis an op has no kernel of its own, only a batching rule: test_matrix.py and test_programs.py test that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import library

import fcomm
from fcomm import collectives
from fcomm.registration import RECORDS, Record

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
NAMES = tuple(name for name in RECORDS if name in collectives.__all__)  # other tests define more

# If op is a parameter, also "prod": it saves x and y, and its rules are not linear.
VARIANTS = tuple(
    (name, op)
    for name in NAMES
    for op in (("sum", "prod") if name in ("all_reduce", "reduce") else ("sum",))
)  # fmt: skip


def arguments(record: Record, group: fcomm.Group, op: str) -> tuple[Any, ...]:
    """A call of the op itself: tensors, no index, static parameters, the names of the handles."""
    n = group.size
    values: dict[str, Any] = {
        "op": op, "dim": 0, "tiled": True, "sizes": None, "send_sizes": None, "recv_sizes": None, "exclusive": False,
        "reverse": False, "split_dim": 0, "concat_dim": 1, "src": 0, "dst": 0, "derivative": 0,
        "rows": 2 * n, "sent_rows": 2 * n,
        "perm": [v for r in range(n) for v in (r, (r + 1) % n)],
    }  # fmt: skip
    if record.name in ("send", "recv"):
        values["dst"] = values["src"] = 1 - group.rank if n > 1 else 0
    generator = torch.Generator().manual_seed(group.rank)
    inputs = [
        torch.randn(2 * n, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in record.inputs
    ]  # fmt: skip
    # ragged_all_to_all: one row to each rank, after the row of the previous rank.
    routes = (torch.arange(n), torch.ones(n, dtype=torch.int64), torch.full((n,), group.rank), torch.ones(n).long())
    return (*inputs, *routes[: len(record.aux)], None, *(values[p] for p in record.params), group.key, "c10d")


def report(name: str, op: str, group: fcomm.Group) -> list[str]:
    """The tests of opcheck that did not succeed."""
    record = RECORDS[name]
    said = library.opcheck(
        getattr(torch.ops.fcomm, name).default, arguments(record, group, op), test_utils=TESTS, raise_exception=False
    )
    assert set(said) == set(TESTS), "opcheck left a test out"
    return [f"{name}, {op}: {test}: {result}" for test, result in said.items() if result != "SUCCESS"]


@cache
def _one_rank() -> fcomm.Group:
    return fcomm.init()


@pytest.mark.parametrize(("name", "op"), VARIANTS)
def test_on_one_rank(name: str, op: str) -> None:
    assert report(name, op, _one_rank()) == []


# A lone send leaves its message to whatever comes next; the pair is compiled and differentiated in test_matrix.py.
TOGETHER = [variant for variant in VARIANTS if variant[0] not in ("send", "recv")]


def _on_two_ranks(world: fcomm.Group) -> list[str]:
    return [text for name, op in TOGETHER for text in report(name, op, world)]


def test_on_two_ranks() -> None:
    fcomm.testing.run_ranks(_on_two_ranks, 2, timeout_s=300)


def test_a_wrong_fake_kernel_is_found() -> None:
    """The check is not vacuous: it finds a shape rule that differs from the kernel's result."""
    source = RECORDS["barrier"]
    fcomm.define("misshapen", spec=source.spec, shape=lambda s, group: (*s, 1), vjp=source.vjp)
    assert [text.split(":")[1] for text in report("misshapen", "sum", _one_rank())][:1] == [" test_faketensor"]
