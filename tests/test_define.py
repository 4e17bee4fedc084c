"""define: what it refuses, the error texts, and that it then registers nothing; a collective of two tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fcomm
from fcomm.errors import FcommError
from fcomm.registration import RECORDS
from fcomm.testing import Case, check_case, check_collective, run_ranks

RIGHT: dict[str, Any] = {
    "schema": "int dim",
    "dims": ("dim",),
    "spec": lambda xs, dim: [sum(x.flip(dim) for x in xs)] * len(xs),
    "shape": lambda s, group, dim: s,
    "vjp": lambda ct, group, backend, dim: fcomm.all_reduce(ct, group, backend).flip(dim),
    "compose": lambda x, group, backend, dim: fcomm.all_reduce(x, group, backend).flip(dim),
}

MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("two words", {}, "name is 'two words'; pass a Python identifier"),
    ("_private", {}, "name is '_private'; pass a Python identifier"),
    ("lambda", {}, "name is 'lambda'; pass a Python identifier"),
    ("all_reduce", {}, r"'all_reduce' is defined already, by fcomm.collectives.reductions; choose another name"),
    ("wrong_1", {"schema": "itn dim"}, "schema has the entry 'itn dim'; write a type and a name, such as 'int dim'"),
    ("wrong_0", {"schema": 3}, "schema is 3; pass a string such as 'int dim, bool tiled'"),
    ("wrong_2", {"schema": "dim"}, "schema has the entry 'dim'; write a type and a name"),
    (
        "wrong_3",
        {"schema": "int dim=0"},
        "schema has the default 'int dim=0'; defaults belong into the public function",
    ),
    ("wrong_4", {"schema": "int dim, bool dim"}, "schema has the name 'dim', which is taken already"),
    ("wrong_5", {"schema": "int dim, str group"}, "schema has the name 'group', which is taken already"),
    ("wrong_6", {"schema": "int dim, int x"}, "schema has the name 'x', which is taken already"),
    ("wrong_7", {"schema": "Tensor dim"}, "types are int, SymInt, float, bool and str"),
    ("wrong_8", {"dims": ("dim", "axis")}, "dims names 'axis', which schema 'int dim' does not declare as 'int axis'"),
    ("wrong_9", {"schema": "bool dim"}, "dims names 'dim', which schema 'bool dim' does not declare as 'int dim'"),
    ("wrong_10", {"inputs": ("x", "x")}, "inputs has the name 'x', which is taken already"),
    ("wrong_11", {"aux": ("y",)}, "aux has the name 'y', which is taken already"),
    ("wrong_12", {"replicated": ("z",)}, "replicated names 'z'; choose among 'x', the argument, and 'y', the result"),
    ("wrong_13", {"jvp": "linaer"}, "jvp is 'linaer'; pass 'linear', a function, or None"),
    ("wrong_14", {"vjp": None}, "vjp is None but jvp is not; give both, or jvp=None"),
    ("wrong_15", {"spec": None}, "spec is None; pass a function"),
    ("wrong_16", {"shape": (2, 3)}, r"shape is \(2, 3\); pass a function"),
    ("wrong_17", {"spec": lambda xs: xs}, r"spec takes \(xs\) and is called as spec\(x, dim=\): got an unexpected"),
    ("wrong_18", {"shape": lambda s, dim: s}, r"shape takes \(s, dim\) and is called as shape\(x, group, dim=\)"),
    ("wrong_19", {"vjp": lambda ct, group, dim: ct}, r"vjp takes .* is called as vjp\(ct, group, backend, dim=\)"),
    ("wrong_20", {"jvp": lambda t, dim: t}, r"jvp takes .* called as jvp\(tangent of x, group, backend, dim=\)"),
    (
        "wrong_21",
        {"nonlinear": lambda dim: True},
        r"vjp takes .* called as vjp\(ct, group, backend, x=, y=, dim=\): got an unexpected keyword argument 'x'",
    ),
    ("wrong_22", {"nonlinear": lambda: True}, r"called as nonlinear\(dim=\)|vjp takes"),
    ("wrong_23", {"compose": lambda x, group: x}, r"called as compose\(x, group, backend, dim=\)"),
    ("wrong_24", {"batch": lambda call: call}, r"called as batch\(call, size, in_dims, tensors\)"),
    ("wrong_25", {"dtype": "int64"}, "dtype is 'int64'; pass a torch.dtype"),
    ("wrong_26", {"aux": ("mask",)}, r"spec takes .* is called as spec\(x, mask, dim=\)"),
    ("wrong_27", {"shape_of": ("y",)}, r"shape_of names 'y', which is not among inputs \('x',\); add it there"),
    ("wrong_28", {"shape_of": ("x",), "nonlinear": lambda dim: True}, "both nonlinear and shape_of are given"),
    ("wrong_29", {"shape_of": ("x",)}, r"vjp takes .* is called as vjp\(ct, group, backend, x=, dim=\)"),
]


@pytest.mark.parametrize(("name", "change", "text"), MALFORMED, ids=[f"{name}" for name, _, _ in MALFORMED])
def test_a_malformed_record_is_refused_and_leaves_nothing(name: str, change: dict[str, Any], text: str) -> None:
    before = dict(RECORDS)
    with pytest.raises(FcommError, match=text) as caught:
        fcomm.define(name, **{**RIGHT, **change})
    assert str(caught.value).startswith("define: ")
    assert before == RECORDS
    if name.isidentifier() and name not in before:
        assert not hasattr(torch.ops.fcomm, name)


@pytest.mark.parametrize("field", ["spec", "shape", "vjp"])
def test_a_rule_cannot_be_forgotten(field: str) -> None:
    with pytest.raises(TypeError, match=f"required keyword-only argument: '{field}'"):
        fcomm.define("forgotten", **{k: v for k, v in RIGHT.items() if k != field})
    assert "forgotten" not in RECORDS
    assert not hasattr(torch.ops.fcomm, "forgotten")


def test_a_refused_name_can_still_be_defined_and_then_only_once() -> None:
    with pytest.raises(FcommError):
        fcomm.define("second_try", **{**RIGHT, "dims": ("axis",)})
    record = fcomm.define("second_try", **RIGHT)
    check_collective(record, fcomm.sim, 3, transforms=("forward", "vjp"))
    with pytest.raises(FcommError, match="'second_try' is defined already, by test_define"):
        fcomm.define("second_try", **RIGHT)
    assert RECORDS["second_try"] is record


# --- a collective of one's own: the mean of the masked values, with two tensors and hand-written non-linear rules ---


def masked_mean(x: Tensor, mask: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    """Mean of x over those ranks whose mask is 1, elementwise; zero where there is none."""
    # Expanded, since vmap moves its dimension to the front of each tensor: they must not need to be broadcast.
    return fcomm.apply("masked_mean", (x, mask.expand_as(x)), group, backend)


def _share(mask: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    return mask / fcomm.all_reduce(mask, group, backend).clamp(min=1)


def _spec(xs: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    mask = torch.stack(masks)
    return [(torch.stack(xs) * mask).sum(0) / mask.sum(0).clamp(min=1)] * len(xs)


fcomm.define(
    "masked_mean",
    aux=("mask",),
    spec=_spec,
    shape=lambda x, mask, group: x,
    vjp=lambda ct, group, backend, mask: fcomm.all_reduce(ct, group, backend) * _share(mask, group, backend),
    compose=lambda x, mask, group, backend: fcomm.all_reduce(x * _share(mask, group, backend), group, backend),
)


def _masks(size: int) -> tuple[Tensor, ...]:
    """In column 0 no rank takes part, in column 1 all do, in column 2 every other rank."""
    return (torch.stack([torch.tensor([0.0, 1.0, float(r % 2)], dtype=torch.float64) for r in range(size)]),)


MASKED_MEAN = Case("masked_mean", "", masked_mean, lambda size: (2, 3), aux=_masks)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_collective_of_two_tensors(size: int) -> None:
    assert not check_case(MASKED_MEAN, fcomm.sim, fcomm.axis("ranks", size))


def test_its_numbers() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)
    group = fcomm.axis("ranks", 2)
    y = fcomm.simulate(lambda x, m: masked_mean(x, m, group, fcomm.sim), group)(x, *_masks(2))
    assert y.tolist() == [[0.0, 11.0, 30.0]] * 2


def _checked(world: fcomm.Group, compiler: str | None) -> list[str]:
    return check_case(MASKED_MEAN, fcomm.c10d, world, compiler=compiler)


@pytest.mark.parametrize(
    ("size", "compiler"), [(2, None), (3, None), pytest.param(2, "aot_eager", marks=pytest.mark.long)]
)
def test_it_in_processes(size: int, compiler: str | None) -> None:
    run_ranks(_checked, size, compiler, timeout_s=300)


def test_it_compiled() -> None:
    some = ("forward", "grad", "jvp", "vmap of grad", "vjp of vjp")
    assert not check_case(MASKED_MEAN, fcomm.sim, fcomm.axis("ranks", 3), some, compiler="aot_eager")


def test_a_node_of_the_graph_is_named_by_its_collective() -> None:
    world = fcomm.init(name="alone")
    x = torch.ones(3, requires_grad=True)
    assert "grad_fn=<MaskedMeanBackward>" in str(masked_mean(x, torch.ones(3), world, fcomm.c10d))
    fcomm.close(world)
