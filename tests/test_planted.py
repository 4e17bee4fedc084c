"""Wrong rules, planted one at a time under other names: the checkers that pass every collective must catch each.

Every fault is a change of one field of a correct record, and the correct record passes the same check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fcomm
from fcomm.collectives.exchange import pairs
from fcomm.collectives.reductions import other_ranks_product
from fcomm.registration import RECORDS, Record
from fcomm.testing import TRANSFORMS, Case, check_case, check_collective

FIELDS = ("schema", "spec", "shape", "vjp", "jvp", "dims", "nonlinear", "replicated", "compose", "batch", "dtype")


def _variant(name: str, of: str, **changed: Any) -> Record:
    """Another name for a collective, composed of it on real machines, with some fields changed."""
    source = RECORDS[of]
    # `compose` gets static parameters by keyword; lists come as tuples there and as lists in torch's calls.
    fields = {key: getattr(source, key) for key in FIELDS}
    fields["compose"] = lambda x, group, backend, **params: fcomm.apply(of, x, group, backend, *params.values())
    if not source.nonlinear(**dict.fromkeys(source.params)):
        fields["nonlinear"] = None
    return fcomm.define(name, **{**fields, **changed})


@dataclass(frozen=True)
class Fault:
    """A changed field, and the call that shows it. caught_by: words of the report, names of transforms among them."""

    name: str
    of: str
    changed: dict[str, Any]
    caught_by: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    values: str = "normal"
    dtype: torch.dtype = torch.float64
    size: int = 3


def _write_into(ct: torch.Tensor, group: fcomm.Group, backend: fcomm.Backend, op: str) -> torch.Tensor:
    y = fcomm.all_reduce(ct, group, backend)
    with torch.no_grad():
        ct.copy_(torch.zeros_like(ct))
    return y


SHIFT = {"perm": [0, 1, 1, 2, 2, 0]}
CONCAT = {"split_dim": 0, "concat_dim": 1, "tiled": True, "send_sizes": None, "recv_sizes": None}
PROD = {"op": "prod"}
MAX = {"op": "max"}

FAULTS = [
    Fault(
        "factor", "all_reduce",
        {"vjp": lambda ct, group, backend, op, **xy: 2 * fcomm.all_reduce(ct, group, backend)},
        ("vjp", "grad", "hessian", "vmap of grad"),
    ),
    Fault(
        "missing reduction", "all_reduce",
        {"vjp": lambda ct, group, backend, op, **xy: ct.clone()},
        ("vjp", "grad"),
    ),
    Fault(
        "swapped dim", "all_to_all",
        {"vjp": lambda ct, group, backend, split_dim, concat_dim, tiled, send_sizes, recv_sizes: fcomm.all_to_all(
            ct, group, backend, split_dim=concat_dim, concat_dim=concat_dim)},
        ("vjp",), CONCAT,
    ),
    Fault(
        "dim zero", "reduce_scatter",
        {"vjp": lambda ct, group, backend, dim, op, tiled, sizes: fcomm.all_gather(ct, group, backend, dim=0)},
        ("vjp",), {"dim": 1, "op": "sum", "tiled": True, "sizes": None},
    ),
    Fault(
        "uninverted permutation", "ppermute",
        {"vjp": lambda ct, group, backend, perm: fcomm.ppermute(ct, group, backend, perm=pairs(perm))},
        ("vjp", "grad"), SHIFT,
    ),
    Fault("unshifted batch dim", "all_gather", {"dims": ()}, ("vmap",), {"dim": 1, "tiled": True, "sizes": None}),
    Fault(
        "batch dim at the end", "all_gather",
        {"batch": lambda call, size, in_dims, tensors: (
            call(tensors[0].movedim(in_dims[0], -1)), tensors[0].dim() - 2)},
        ("vmap",), {"dim": 0, "tiled": True, "sizes": None},
    ),
    Fault(
        "jvp off by a factor", "scan",
        {"jvp": lambda t, group, backend, op, exclusive, reverse: 2 * fcomm.scan(t, group, backend, reverse=reverse)},
        ("jvp", "jacfwd", "vmap of jvp"), {"op": "sum", "exclusive": False, "reverse": False},
    ),
    Fault(
        "jvp without a term", "all_reduce",
        {"jvp": lambda t, group, backend, op, x, y: t * other_ranks_product(x, group, backend)},
        ("jvp",), PROD, "zeros",
    ),
    Fault(
        "not twice differentiable", "all_reduce",
        {"vjp": lambda ct, group, backend, op, x, y: fcomm.all_reduce(ct, group, backend)
            * other_ranks_product(x.detach(), group, backend)},
        ("hessian", "vjp of vjp", "jvp of vjp"), PROD, "zeros",
    ),
    Fault(
        "quotient at a zero", "all_reduce",
        {"vjp": lambda ct, group, backend, op, x, y: fcomm.all_reduce(ct, group, backend) * y / x},
        ("vjp",), PROD, "zeros",
    ),
    Fault(
        "ties not shared", "all_reduce",
        {"vjp": lambda ct, group, backend, op, x, y: fcomm.all_reduce(ct, group, backend) * (x == y)},
        ("vjp",), MAX, "ties",
    ),
    Fault(
        "not conjugated", "all_reduce",
        {"vjp": lambda ct, group, backend, op, x, y: fcomm.all_reduce(ct, group, backend)
            * other_ranks_product(x, group, backend)},
        ("vjp",), PROD, "normal", torch.complex128,
    ),
    Fault("cotangent written into", "all_reduce", {"vjp": _write_into, "nonlinear": None, "jvp": "linear"},
          ("accept the mutated Tensor",)),
    Fault(
        "shape of one block", "all_gather", {"shape": lambda s, group, dim, tiled, sizes: s},
        ("shape rule",), {"dim": 0, "tiled": True, "sizes": None},
    ),
    Fault("dtype", "barrier", {"dtype": torch.int64}, ("shape rule",)),
    Fault(
        "root elsewhere", "broadcast",
        {"vjp": lambda ct, group, backend, src: fcomm.reduce(ct, group, backend, dst=0)},
        ("vjp",), {"src": 2},
    ),
    Fault(
        "literal where invariant", "all_reduce_invariant",
        {"vjp": lambda ct, group, backend, op: fcomm.all_reduce(ct, group, backend)},
        ("vjp", "grad"), {"op": "sum"},
    ),
]  # fmt: skip


def _check(record: Record, fault: Fault) -> None:
    check_collective(
        record, fcomm.sim, fault.size, params=fault.params, values=fault.values, dtype=fault.dtype,
        shape=(fault.size, fault.size),
    )  # fmt: skip


RIGHT = {fault.of: _variant(f"right_{fault.of}", fault.of) for fault in {f.of: f for f in FAULTS}.values()}
WRONG = {fault.name: _variant(f"wrong_{fault.name.replace(' ', '_')}", fault.of, **fault.changed) for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_wrong_rule_is_caught_and_the_right_one_passes(fault: Fault) -> None:
    _check(RIGHT[fault.of], fault)
    with pytest.raises(AssertionError) as caught:
        _check(WRONG[fault.name], fault)
    for words in fault.caught_by:
        assert (f": {words}, eager" if words in TRANSFORMS else words) in str(caught.value)


def _call(record: Record, params: tuple[Any, ...]) -> Callable[..., torch.Tensor]:
    return lambda x, group, backend: fcomm.apply(record.name, x, group, backend, *params)


IN_PROCESSES = {
    "factor": ("backward", "double backward"),
    "uninverted permutation": ("backward", "double backward"),
    "jvp off by a factor": ("forward mode",),
    "cotangent written into": ("backward, eager, raised AssertionError: a cotangent was written into",),
}


def _on_rank(world: fcomm.Group) -> dict[str, tuple[list[str], list[str]]]:
    """What the checker reports for the correct and the wrong records on this rank."""
    said = {}
    for name in IN_PROCESSES:
        fault = next(f for f in FAULTS if f.name == name)
        calls = (_call(record, tuple(fault.params.values()) or ("sum",)) for record in (RIGHT[fault.of], WRONG[name]))
        cases = (Case(name, "", call, lambda size: (2, 3)) for call in calls)
        some = ("backward", "double backward", "forward mode")
        said[name] = tuple(check_case(case, fcomm.c10d, world, some) for case in cases)
    return said


def test_wrong_rules_are_caught_in_processes() -> None:
    """Around simulate, backward() differentiates the meaning; in processes it runs the rule, on the cotangent given."""
    for said in fcomm.run(_on_rank, 3):
        for name, caught_by in IN_PROCESSES.items():
            right, wrong = said[name]
            assert right == []
            for words in caught_by:
                assert (f": {words}, eager" if words in TRANSFORMS else words) in "\n".join(wrong)
