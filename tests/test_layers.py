"""Every layer against its dense counterpart: value and all gradients, simulated and in processes, under each transform,
and the collectives it issues, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import dense
import pytest
import torch
from dense import CASES, LayerCase
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fcomm
from fcomm.registration import RECORDS
from fcomm.testing import run_ranks

CELLS = [(name, n) for name, case in CASES.items() for n in case.sizes]
BACKENDS = ["cpu", "c10d"]

# Sums over a [D F] product are taken in a different order.
TOLERANCE = 1e-10


def program(case: LayerCase, group: fcomm.Group, backend: fcomm.Backend) -> Callable[..., list[Tensor]]:
    """One rank's part: (ct, *args) -> [y, cotangents of the float arguments]."""

    def one_rank(ct: Tensor, *args: Tensor) -> list[Tensor]:
        return dense.value_and_vjp(lambda *a: case.parallel(*a, group=group, backend=backend), args, ct)

    return one_rank


def differences(got: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> list[str]:
    failures = []
    for part, (a, b) in enumerate(zip(got, wanted, strict=True)):
        try:
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        except AssertionError as error:
            failures.append(f"{what}, {'y' if part == 0 else f'gradient {part - 1}'}: {error}")
    return failures


# --- simulated ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n"), CELLS)
def test_simulated(name: str, n: int) -> None:
    case, group = CASES[name], fcomm.axis("layer", n)
    wanted = dense.expected(case, n)
    got = fcomm.simulate(program(case, group, fcomm.sim), group)(wanted.ct, *wanted.args)
    assert not differences(got, wanted.results, name)


@pytest.mark.parametrize("name", CASES)
def test_jvp(name: str) -> None:
    case, n = CASES[name], 2
    group = fcomm.axis("layer", n)
    wholes = list(case.args(n))
    floats = dense.differentiable(wholes)
    tangents = [dense.draw(*wholes[i].shape, seed=50 + i) for i in floats]
    _, wanted = jvp(dense.of_floats(case.whole(n), wholes), tuple(wholes[i] for i in floats), tuple(tangents))

    def one_rank(args: list[Tensor], tangents: list[Tensor]) -> Tensor:
        fn = dense.of_floats(lambda *a: case.parallel(*a, group=group, backend=fcomm.sim), args)
        return jvp(fn, tuple(args[i] for i in floats), tuple(tangents))[1]

    parts = [dense.stack_parts(x, d, n) for x, d in zip(wholes, case.dims, strict=True)]
    got = fcomm.simulate(one_rank, group)(
        parts, [dense.stack_parts(t, case.dims[i], n) for i, t in zip(floats, tangents, strict=True)]
    )
    assert not differences([got], [dense.stack_parts(wanted, case.out, n)], name)


@pytest.mark.parametrize("name", [name for name in CASES if name != "moe_uneven"])
def test_vmap_over_an_ensemble_of_parameters(name: str) -> None:
    # moe_uneven is left out: its sizes belong to one choice of experts, and each member of an ensemble makes its own.
    case, n = CASES[name], 2
    group = fcomm.axis("layer", n)
    wholes = list(case.args(n))
    floats = dense.differentiable(wholes)
    members = [[x if (i in floats and i == 0) or i not in floats else x * scale for i, x in enumerate(wholes)]
               for scale in (1.0, 0.7, -1.2)]  # fmt: skip
    batched = [None if i not in floats else 0 for i in range(len(wholes))]
    stacked = [wholes[i] if d is None else torch.stack([m[i] for m in members]) for i, d in enumerate(batched)]

    def one_rank(*args: Tensor) -> Tensor:
        return vmap(lambda *a: case.parallel(*a, group=group, backend=fcomm.sim), in_dims=tuple(batched))(*args)

    parts = [
        dense.stack_parts(x, cut if cut is None or d is None else cut + 1, n)
        for x, cut, d in zip(stacked, case.dims, batched, strict=True)
    ]
    got = fcomm.simulate(one_rank, group)(*parts)
    wanted = torch.stack([dense.stack_parts(case.whole(n)(*m), case.out, n) for m in members], 1)
    assert not differences([got], [wanted], name)


def _compiled_simulated(name: str, n: int, compiler: str) -> None:
    case, group = CASES[name], fcomm.axis("layer", n)
    wanted = dense.expected(case, n)
    torch.compiler.reset()
    stacked = fcomm.simulate(program(case, group, fcomm.sim), group)
    got = torch.compile(stacked, fullgraph=True, backend=compiler)(wanted.ct, *wanted.args)
    assert not differences(got, wanted.results, f"{name}, {compiler}")


@pytest.mark.parametrize("name", ["mlp-sequence", "ulysses-heads", "ring-zigzag", "moe_capacity"])
def test_simulated_and_compiled(name: str) -> None:
    _compiled_simulated(name, 2, "aot_eager")


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_all_simulated_and_compiled(name: str) -> None:
    _compiled_simulated(name, 2, "aot_eager")


@pytest.mark.parametrize(
    "name", ["mlp-sequence", *(pytest.param(n, marks=pytest.mark.long) for n in CASES if n != "mlp-sequence")]
)
def test_simulated_and_compiled_by_inductor(name: str) -> None:
    _compiled_simulated(name, 3 if 3 in CASES[name].sizes else 2, "inductor")


# --- in processes -------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts calls of collectives, and the bytes that a rank sends in them, by nccl-tests' factors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nbytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("fcomm::")
        if name in RECORDS and RECORDS[name].busbw:
            self.calls[name] += 1
            size = fcomm.group.GROUPS[args[-2]].size
            self.nbytes += RECORDS[name].busbw(size) * max(args[0].nbytes, y.nbytes)
        return y


def measured(case: LayerCase, args: Sequence[Tensor], ct: Tensor, **handles: Any) -> tuple[Traffic, Traffic]:
    """What the layer communicates forward, and what its vjp does."""
    places = dense.differentiable(args)
    leaves = [x.clone().requires_grad_(i in places) for i, x in enumerate(args)]
    with Traffic() as forward:
        y = case.parallel(*leaves, **handles)
    with Traffic() as backward:
        torch.autograd.grad(y, [leaves[i] for i in places], ct)
    return forward, backward


def _rows(case: LayerCase, world: fcomm.Group) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    wanted = dense.expected(case, world.size)
    return wanted.ct[world.rank], *([x[world.rank] for x in xs] for xs in (wanted.args, wanted.results))


def _all_cases_on_rank(world: fcomm.Group, backend: str) -> list[str]:
    failures = []
    handles = {"group": world, "backend": getattr(fcomm, backend)}
    for name, case in CASES.items():
        if world.size not in case.sizes:
            continue
        ct, args, wanted = _rows(case, world)
        failures += differences(program(case, **handles)(ct, *args), wanted, f"{name} on {backend}")

        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
        y = checkpoint(lambda *a: case.parallel(*a, **handles), *leaves, use_reentrant=False)
        got = torch.autograd.grad(y, [x for x in leaves if x.requires_grad], ct)
        failures += differences([y, *got], wanted, f"{name} on {backend}, checkpoint")

        for traffic, counts, way in zip(measured(case, args, ct, **handles), (case.forward, case.backward),
                                        ("forward", "backward"), strict=True):  # fmt: skip
            textbook = {k: v for k, v in counts(world.size).items() if v}
            if traffic.calls != textbook:
                failures.append(f"{name} {way}: {dict(traffic.calls)} calls, the textbook has {textbook}")
    return failures


@pytest.mark.parametrize(("backend", "n"), [("cpu", 2), ("cpu", 3), ("c10d", 3)])
def test_in_processes(backend: str, n: int) -> None:
    run_ranks(_all_cases_on_rank, n, backend)


@pytest.mark.long
@pytest.mark.parametrize(("backend", "n"), [("cpu", 1), ("cpu", 4), ("c10d", 1), ("c10d", 2), ("c10d", 4)])
def test_in_other_numbers_of_processes(backend: str, n: int) -> None:
    run_ranks(_all_cases_on_rank, n, backend)


def _compiled_on_rank(world: fcomm.Group, backend: str, compiler: str, names: list[str]) -> list[str]:
    failures = []
    for name in names:
        case = CASES[name]
        ct, args, wanted = _rows(case, world)
        torch.compiler.reset()
        one_rank = program(case, world, getattr(fcomm, backend))
        got = torch.compile(one_rank, fullgraph=True, backend=compiler)(ct, *args)
        failures += differences(got, wanted, f"{name} on {backend}, {compiler}")
    return failures


# One of each technique; the long form below compiles them all.
SAMPLE = ["transformer_block-sequence", "cross_entropy-padded", "ulysses-lengths-causal", "moe_ragged", "gpipe"]


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_in_processes_and_compiled(backend: str) -> None:
    run_ranks(_compiled_on_rank, 2, backend, "aot_eager", SAMPLE, timeout_s=300)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_in_processes_and_compiled(backend: str) -> None:
    run_ranks(_compiled_on_rank, 2, backend, "aot_eager", list(CASES), timeout_s=500)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_processes_and_compiled_by_inductor(backend: str) -> None:
    run_ranks(_compiled_on_rank, 2, backend, "inductor", list(CASES), timeout_s=580)
