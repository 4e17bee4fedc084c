"""What graphs contain: exactly the expected collectives, forward and backward, traced and exported, for any shape.

Most graphs here are traced on rank 1 of a group of 3 that has no processes: tracing communicates nothing.
"""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx

import fcomm
from fcomm.group import Group, register_group
from fcomm.testing import Case, run_ranks

RANKS = fcomm.axis("ranks", 3)
THREE = register_group(Group("nobody", (0, 1, 2), 1))


@cache
def one_rank() -> Group:
    return fcomm.init()


def trace(fn: Callable[..., Any]) -> Callable[..., torch.fx.GraphModule]:
    """Traced on fake tensors: nothing is computed, nothing communicated."""
    return make_fx(fn, tracing_mode="fake")


def collectives(graph: torch.fx.Graph) -> list[str]:
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [target.split(".")[1] for target in targets if target.startswith("fcomm.")]


# name or case: collectives of the forward, of the backward. A line for a collective holds for its other cases too.
EXPECTED: dict[str, tuple[str, str]] = {
    "all_reduce": ("all_reduce", "all_reduce"),
    "all_reduce-max": ("all_reduce", "all_reduce all_reduce"),
    "all_reduce-min": ("all_reduce", "all_reduce all_reduce"),
    "all_reduce-prod": ("all_reduce", "all_reduce all_gather axis_index"),
    "all_reduce-complex prod": ("all_reduce", "all_reduce all_gather axis_index"),
    "scan": ("scan", "scan"),
    "all_gather": ("all_gather", "reduce_scatter"),
    "reduce_scatter": ("reduce_scatter", "all_gather"),
    "reduce_scatter-max": ("all_to_all", "all_to_all"),
    "reduce_scatter-min untiled": ("all_to_all", "all_to_all"),
    "reduce_scatter-prod": ("all_to_all", "all_to_all"),
    "reduce_scatter-uneven max": ("all_to_all", "all_to_all"),
    "all_to_all": ("all_to_all", "all_to_all"),
    # offsets at the receiver; the rows; back: offsets there and here, the rows
    "ragged_all_to_all": ("all_to_all ragged_all_to_all", "all_to_all all_to_all ragged_all_to_all"),
    "ppermute": ("ppermute", "ppermute"),
    "broadcast": ("broadcast", "reduce"),
    "reduce": ("reduce", "broadcast"),
    "reduce-max": ("reduce", "broadcast broadcast all_reduce"),
    "reduce-prod": ("reduce", "broadcast all_gather axis_index"),
    "gather": ("gather", "scatter"),
    "scatter": ("scatter", "gather"),
    "send and recv": ("send recv", "send recv"),
    "pvary": ("pvary", "all_reduce_invariant"),
    "all_reduce_invariant": ("all_reduce_invariant", "pvary"),
    "all_gather_invariant": ("all_gather_invariant", "shard"),
    "shard": ("shard", "all_gather_invariant"),
    "barrier": ("barrier", "barrier"),
    "axis_index": ("axis_index", ""),
    "all_reduce_coalesced": ("all_reduce all_reduce", "all_reduce all_reduce"),
    "all_gather_coalesced": ("all_gather all_gather", "reduce_scatter reduce_scatter"),
    "reduce_scatter_coalesced": ("reduce_scatter reduce_scatter", "all_gather all_gather"),
}


def expected(case: Case) -> tuple[list[str], list[str]]:
    forward, backward = EXPECTED.get(case.id) or EXPECTED[case.name]
    return forward.split(), backward.split()


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.id)
def test_traced_graphs_hold_exactly_these_collectives(case: Case) -> None:
    x = torch.zeros(case.shape(3), dtype=case.dtype)
    aux = [a[THREE.rank] for a in case.aux(3)]

    def call(x: Tensor, *aux: Tensor) -> Tensor:
        return case.call(x, *aux, group=THREE, backend=fcomm.c10d)

    def pull(x: Tensor, *aux: Tensor) -> Tensor:
        y, back = vjp(lambda x: call(x, *aux), x)
        return back(torch.ones_like(y))[0]

    forward, backward = expected(case)
    assert collectives(trace(call)(x, *aux).graph) == forward
    if case.differentiable:
        assert collectives(trace(pull)(x, *aux).graph) == forward + backward
        tangent = trace(lambda x, *aux: jvp(lambda x: call(x, *aux), (x,), (x,))[1])(x, *aux)
        # The tangent may also need the collectives of a non-linear rule; those of the value are there in any case.
        assert Counter(collectives(tangent.graph)) >= Counter(forward)


class _Call(torch.nn.Module):
    def __init__(self, case: Case, group: Group) -> None:
        super().__init__()
        self.case, self.group = case, group

    def forward(self, x: Tensor, *aux: Tensor) -> Tensor:
        return self.case.call(x.clone(), *aux, group=self.group, backend=fcomm.c10d) * 1


@pytest.mark.parametrize("case", [c for c in CASES.values() if 1 in c.sizes], ids=lambda case: case.id)
def test_an_exported_program_is_saved_loaded_and_run(case: Case) -> None:
    x = torch.ones(case.shape(1), dtype=case.dtype)
    aux = tuple(a[0] for a in case.aux(1))
    module = _Call(case, one_rank())
    program = torch.export.export(module, (x, *aux))
    assert collectives(program.graph) == expected(case)[0]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert collectives(loaded.graph) == expected(case)[0]
    assert torch.equal(loaded.module()(x, *aux), module(x, *aux))


def test_an_exported_graph_names_the_axis_and_no_process() -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fcomm.all_reduce(x, THREE, fcomm.c10d)

    (node,) = (n for n in torch.export.export(Sum(), (torch.ones(2),)).graph.nodes if "fcomm" in str(n.target))
    assert node.args[1:] == (None, "sum", "nobody (3 ranks)", "c10d")


class Shift(torch.nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return fcomm.ppermute(x, self.group, fcomm.cpu, perm=[(0, 1), (1, 0)])


def export_on_rank_0(world: Group, path: str) -> None:
    program = torch.export.export(Shift(world), (torch.ones(4),))
    if world.rank == 0:
        torch.export.save(program, path)


def run_exported(world: Group, path: str) -> float:
    return float(torch.export.load(path).module()(torch.full((4,), float(world.rank or 0)))[0])


def test_a_permutation_exported_on_one_rank_runs_on_all(tmp_path: Path) -> None:
    path = str(tmp_path / "shift.pt2")
    run_ranks(export_on_rank_0, 2, path)
    assert run_ranks(run_exported, 2, path) == [1.0, 0.0]


@torch.fx.wrap
def doubled(x: Tensor) -> Tensor:
    return fcomm.all_reduce(2 * x, one_rank(), fcomm.cpu)


def test_symbolic_trace_takes_a_wrapped_function_and_is_told_so() -> None:
    with pytest.raises(
        TypeError, match=r"x is a Proxy of torch\.fx\.symbolic_trace.*or give torch\.fx\.wrap the function"
    ):
        torch.fx.symbolic_trace(lambda x: fcomm.all_gather(x, one_rank(), fcomm.cpu))
    traced = torch.fx.symbolic_trace(lambda x: doubled(x.sin()))
    assert torch.equal(traced(torch.ones(2)), 2 * torch.ones(2).sin())


def test_compiled_autograd_takes_a_graph_made_eagerly() -> None:
    x = torch.rand(3, 2, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        largest = fcomm.simulate(lambda x: fcomm.all_reduce(x.sin(), RANKS, fcomm.sim, op="max"), RANKS)
        return largest(x).sum()

    (wanted,) = torch.autograd.grad(loss(x), x)
    value = loss(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        value.backward()
    torch.testing.assert_close(x.grad, wanted)


def test_threads_simulate_the_same_axis_at_once() -> None:
    meet = threading.Barrier(3)

    def fn(x: Tensor) -> Tensor:
        meet.wait(timeout=20)
        return fcomm.all_reduce(x, RANKS, fcomm.sim)

    with ThreadPoolExecutor(3) as pool:
        g = fcomm.simulate(fn, RANKS)
        results = list(pool.map(lambda k: g(torch.full((3, 2), float(k))), range(3)))
    assert [y.unique().tolist() for y in results] == [[0.0], [3.0], [6.0]]


# --- any shape ----------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[Tensor, Group, fcomm.Backend], Tensor]] = {
    "all_reduce": lambda x, g, b: fcomm.all_reduce(x, g, b, op="max"),
    "scan": fcomm.scan,
    "all_gather": fcomm.all_gather,
    "reduce_scatter": fcomm.reduce_scatter,
    "all_to_all": lambda x, g, b: fcomm.all_to_all(x, g, b, concat_dim=1),
    "ppermute": lambda x, g, b: fcomm.ppermute(x, g, b, perm=[(r, (r + 1) % g.size) for r in range(g.size)]),
    "broadcast": fcomm.broadcast,
    "gather": fcomm.gather,
    "scatter": fcomm.scatter,
    "send and recv": lambda x, g, b: fcomm.recv(torch.zeros_like(x), g, b, after=fcomm.send(x, g, b)),
    "shard": lambda x, g, b: fcomm.shard(fcomm.all_reduce_invariant(x, g, b), g, b),
    "barrier": lambda x, g, b: fcomm.barrier(g, b, after=x),
    "coalesced": lambda x, g, b: fcomm.all_reduce_coalesced([x, x.sin()], g, b)[1],
}


def compilations(fn: Callable[..., Any], inputs: list[Tensor], *, mark: bool) -> int:
    """How often torch compiles fn for the inputs, whose results must be those of fn."""
    count = 0

    def backend(module: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, examples)

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=backend, dynamic=None if mark else True)
    for x in inputs:
        expected = fn(x)
        if mark:
            x = x.clone()
            torch._dynamo.mark_dynamic(x, x.dim() - 2)
        torch.testing.assert_close(compiled(x), expected)
    return count


def _recompiling(group: Group, backend: fcomm.Backend, families: Iterable[str]) -> list[str]:
    """The families that compile more than once for three shapes, value and gradient together."""
    failures = []
    for position, (name, call) in enumerate((name, FAMILIES[name]) for name in families):

        def both(x: Tensor, call: Any = call) -> tuple[Tensor, Tensor]:
            return call(x, group, backend), grad(lambda x: call(x, group, backend).sin().sum())(x)

        fn = fcomm.simulate(both, group) if group.simulated else both
        shapes = [(k * group.size, 5) for k in (2, 3, 7)]
        inputs = [torch.randn(group.size, *s) if group.simulated else torch.randn(s) for s in shapes]
        count = compilations(fn, inputs, mark=position % 2 == 0)
        failures += [f"{name}: compiled {count} times"] if count != 1 else []
    return failures


def test_shapes_do_not_recompile_on_an_axis() -> None:
    some = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    assert _recompiling(fcomm.axis("ranks", 2), fcomm.sim, some) == []


@pytest.mark.long
def test_shapes_do_not_recompile_on_an_axis_in_all_families() -> None:
    # Without "coalesced": torch's vmap of cat makes its lengths constants, as the next test shows.
    assert _recompiling(fcomm.axis("ranks", 2), fcomm.sim, [name for name in FAMILIES if name != "coalesced"]) == []


def test_vmap_of_cat_makes_its_lengths_constants() -> None:
    fn = torch.func.vmap(lambda x: torch.cat([x, x.sin()]))
    with pytest.raises(Exception, match="your code specialized it to be a constant"):
        compilations(fn, [torch.randn(2, k, 5) for k in (4, 6)], mark=True)


def _recompiling_in_processes(world: Group) -> list[str]:
    return _recompiling(world, fcomm.c10d, FAMILIES)


@pytest.mark.long
def test_shapes_do_not_recompile_in_processes() -> None:
    run_ranks(_recompiling_in_processes, 2, timeout_s=300)


def _lengths_read_in_a_graph(world: Group, compiler: str) -> list[str]:
    """A graph traced without knowing the ranks' lengths serves all lengths, and refuses those that do not fit x."""

    def fn(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        sizes = lengths.tolist()

        def loss(x: Tensor) -> tuple[Tensor, Tensor]:
            whole = fcomm.all_gather(x, world, fcomm.c10d, sizes=sizes)
            extrema = fcomm.reduce_scatter(whole.sin(), world, fcomm.c10d, sizes=sizes, op="max")
            own = fcomm.reduce_scatter(whole.cos(), world, fcomm.c10d, sizes=sizes)
            twice = torch.cat([whole * 2, whole])
            even = fcomm.all_to_all(fcomm.reduce_scatter(torch.cat([twice] * 2), world, fcomm.c10d), world, fcomm.c10d)
            return (extrema * own).sum() + (even**3).sum(), own

        return grad(loss, has_aux=True)(x)

    graphs = 0

    def backend(module: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(compiler)(module, examples)

    failures = []
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(fn, fullgraph=True, backend=backend, dynamic=True)
        for lengths in ([3, 4], [5, 7], [4, 4]):
            x = torch.arange(2.0 * lengths[world.rank or 0]).reshape(-1, 2) + (world.rank or 0)
            got, want = compiled(x, torch.tensor(lengths)), fn(x, torch.tensor(lengths))
            failures += [f"{g} is not {w}" for g, w in zip(got, want, strict=True) if not torch.allclose(g, w)]
        scatter = torch.compile(
            lambda x, lengths: fcomm.reduce_scatter(x, world, fcomm.c10d, sizes=lengths.tolist()),
            fullgraph=True, backend=compiler, dynamic=True,
        )  # fmt: skip
        scatter(torch.ones(8, 2), torch.tensor(lengths))
        with pytest.raises(RuntimeError, match=r"Eq\("):
            scatter(torch.ones(9, 2), torch.tensor(lengths))
        # A rank's own length: torch uses x's for it, and the ranks disagree.
        with pytest.raises(fcomm.MismatchError, match="pass different sizes"):
            compiled(x, torch.tensor(lengths) + 1)
    return failures + ([] if graphs == 1 else [f"compiled {graphs} times"])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_lengths_read_in_a_graph(compiler: str) -> None:
    run_ranks(_lengths_read_in_a_graph, 2, compiler, timeout_s=200)


# --- what the compiler must not do --------------------------------------------------------------------------------


def test_an_unused_collective_stays_in_the_graph() -> None:
    def fn(x: Tensor) -> Tensor:
        fcomm.all_reduce(x, THREE, fcomm.c10d)
        return x + 1

    module = trace(fn)(torch.zeros(3))
    module.graph.eliminate_dead_code()
    assert collectives(module.graph) == ["all_reduce"]


def _one_rank_ignores(world: Group, compiler: str) -> list[str]:
    """Rank 0 computes with the reduced value, the others discard it."""

    def fn(x: Tensor) -> Tensor:
        y = fcomm.all_reduce(x.sin(), world, fcomm.c10d)
        return y.cos() if world.rank == 0 else x.cos()

    compiled = torch.compile(fn, fullgraph=True, backend=compiler)
    x = torch.full((4,), 1.0 + world.rank)
    got = [compiled(x), compiled(x + 1)]  # a missing call would be paired with the next one
    sums = [sum(torch.sin(torch.tensor(1.0 + r + k)) for r in range(world.size)) for k in (0, 1)]
    want = [s.cos().expand(4) for s in sums] if world.rank == 0 else [x.cos(), (x + 1).cos()]
    return [] if all(torch.allclose(a, b) for a, b in zip(got, want, strict=True)) else [f"got {got}, want {want}"]


# Inductor's graphs of such programs: tests/test_order.py
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_result_that_one_rank_ignores_does_not_hang(compiler: str) -> None:
    run_ranks(_one_rank_ignores, 2, compiler, timeout_s=200)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_leaves_the_dtype_that_arrives(compiled: bool) -> None:
    group = fcomm.axis("ranks", 2)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return fcomm.all_reduce(x, group, fcomm.sim), fcomm.all_reduce(x @ x, group, fcomm.sim)

    f = fcomm.simulate(fn, group)
    f = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    x = torch.eye(2).expand(2, 2, 2).clone()
    plain, cast = f(x)
    assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
    assert plain.tolist() == cast.tolist() == (2 * x).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case_id", [case.id for case in CASES.values() if case.dtype == torch.float64])
def test_autocast_leaves_the_dtype_of_derivatives(case_id: str, dtype: torch.dtype) -> None:
    case, group = CASES[case_id], fcomm.axis("ranks", 2)

    def fn(x: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
        def call(x: Tensor) -> Tensor:
            return case.call(x, *aux, group=group, backend=fcomm.sim)

        with torch.autocast("cpu", torch.bfloat16):
            y, tangent = jvp(call, (x,), (x,))
            return y, tangent, vjp(call, x)[1](y)[0]

    x = torch.ones(2, *case.shape(2), dtype=dtype)
    results = fcomm.simulate(fn, group)(x, *(case.aux(2) if case.aux else ()))
    assert [v.dtype for v in results] == [dtype] * 3
