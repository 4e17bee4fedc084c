"""Training as a pure function: (parameters, batch) -> (new parameters, loss), compiled as one graph without breaks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fcomm.registration import compiler_counters

Params = Mapping[str, Tensor]
Loss = Callable[[Params, Tensor, Tensor], Tensor]
# {"params": .., "mean": .., "square": ..}, each a value per parameter, and "step".
State = dict[str, Any]


def start(params: Params) -> State:
    """The state before the first step."""
    mean, square = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    return {"params": dict(params), "mean": mean, "square": square, "step": torch.zeros(())}


def train_step(loss: Loss, rate: float = 1e-3) -> Callable[[State, Tensor, Tensor], tuple[State, Tensor]]:
    """One step of Adam. It does not mention ranks: the communication for the gradient is in loss's derivative."""

    def step(state: State, tokens: Tensor, target: Tensor) -> tuple[State, Tensor]:
        grads, value = torch.func.grad_and_value(loss)(state["params"], tokens, target)
        count = state["step"] + 1
        mean = {k: 0.9 * m + 0.1 * grads[k] for k, m in state["mean"].items()}
        square = {k: 0.99 * s + 0.01 * grads[k] ** 2 for k, s in state["square"].items()}
        params = {
            k: p - rate * (mean[k] / (1 - 0.9**count)) / ((square[k] / (1 - 0.99**count)).sqrt() + 1e-8)
            for k, p in state["params"].items()
        }
        return {"params": params, "mean": mean, "square": square, "step": count}, value

    return step


@dataclass
class Run:
    """The course of a training run. seconds: of each step; the first one compiles. graphs: should be 1."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    graph_breaks: int = 0
    graphs: int = 0
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)

    def tokens_per_second(self, tokens: int) -> float:
        """The rate for steps of that many tokens, without compilation."""
        return tokens / median(self.seconds[1:] or self.seconds)


def train(
    step: Callable[..., tuple[State, Tensor]],
    state: State,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    report: Callable[[int, float], None],
    compiler: str = "inductor",
) -> Run:
    """Compile the step and run it; report(number of the step, its loss) after each one."""
    torch.compiler.reset()
    counters = compiler_counters()
    counters.clear()
    run, compiled = Run(), torch.compile(step, fullgraph=True, backend=compiler)
    for number in range(1, steps + 1):
        tokens, target = next(batches)
        begin = time.perf_counter()
        state, loss = compiled(state, tokens, target)
        # Simulated ranks return one loss each, all equal.
        run.losses.append(loss.reshape(-1)[0].item())
        run.seconds.append(time.perf_counter() - begin)
        report(number, run.losses[-1])
    run.graph_breaks = sum(counters["graph_break"].values())
    run.graphs = counters["stats"]["unique_graphs"]
    return run


def count_collectives(loss: Loss, params: Params, tokens: Tensor, target: Tensor) -> tuple[Counter[str], Counter[str]]:
    """How often each collective is in the traced loss, and how often its derivative adds it. Communicates nothing."""
    forward = _calls(make_fx(loss, tracing_mode="fake")(params, tokens, target))
    both = _calls(make_fx(torch.func.grad(loss), tracing_mode="fake")(params, tokens, target))
    return forward, both - forward


# What a rank does alone.
_LOCAL = {"pvary", "shard", "axis_index"}


def _calls(graph: torch.fx.GraphModule) -> Counter[str]:
    targets = (str(node.target).split(".") for node in graph.graph.nodes if node.op == "call_function")
    return Counter(t[1] for t in targets if t[0] == "fcomm" and t[1] not in _LOCAL)
