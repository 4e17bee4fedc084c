"""The cost of one call inside a compiled graph: a chain of 16, minus the graph without them, divided by 16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fcomm.bench.programs import Program, count_wrong
from fcomm.bench.rivals import AbsentError, Call, Context, funcol_op, functional, torch_world

CHAIN = 16

Graph = Callable[[Tensor], Tensor]


def ours(p: Program, c: Context) -> Graph:
    """One public call, to be chained."""
    return p.call


def funcol(p: Program, c: Context) -> Graph:
    """One functional collective of torch and its wait, to be chained."""
    if p.name != "all_reduce":
        raise AbsentError("the compiled comparison has funcol's all_reduce only")
    wait, all_reduce = functional().wait_tensor, functional().all_reduce
    op, group = funcol_op(p), torch_world()
    return lambda x: wait(all_reduce(x, op, group))


def check_shape(program: Program) -> None:
    """Only a collective that keeps x's shape can be chained."""
    if program.expected.shape != program.x.shape:
        raise ValueError(
            f"--compiled chains calls, and {program.name} changes the shape of x; "
            "choose a collective that keeps it, such as all_reduce, all_to_all, ppermute or broadcast"
        )


def pairs(contestants: dict[str, Graph], program: Program) -> tuple[dict[str, Call], dict[str, int]]:
    """{contestant: the chained graph, contestant + "/without": the graph without}, compiled; and wrong counts."""
    calls: dict[str, Call] = {}
    wrong: dict[str, int] = {}
    for name, call in contestants.items():
        if name == "add":
            calls[name] = call  # type: ignore[assignment]  # eager: it takes no argument
            continue
        chained, without = _compile(call, CHAIN), _compile(call, 0)
        x = program.x
        calls[name], calls[f"{name}/without"] = _bind(chained, x), _bind(without, x)
        eager = x * 0.5
        for _ in range(CHAIN):
            eager = call(eager)
        wrong[name] = count_wrong(chained(x), eager)
    return calls, wrong


def _compile(call: Graph, length: int) -> Graph:
    def graph(x: Tensor) -> Tensor:
        x = x * 0.5
        for _ in range(length):
            x = call(x)
        return x

    return torch.compile(graph, fullgraph=True, dynamic=False)


def _bind(graph: Graph, x: Tensor) -> Call:
    return lambda: graph(x)


def marginal(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Per round: (with the chain - without) / its length."""
    return {
        name: [(t - w) / CHAIN for t, w in zip(times[name], times[f"{name}/without"], strict=True)]
        if f"{name}/without" in times
        else times[name]
        for name in times
        if not name.endswith("/without")
    }
