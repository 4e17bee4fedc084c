"""The runs that the demo compares: one process; ranks as processes; ranks simulated in one process."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fcomm
from fcomm.demo import report, text
from fcomm.demo.model import Model, dense_loss, init, parallel_loss, part
from fcomm.demo.train import Run, State, count_collectives, start, train, train_step
from fcomm.group import BACKENDS

SEED = 0


def train_dense(model: Model, steps: int, compiler: str, threads: int) -> Run:
    """One process, plain torch, on as many threads as the other run has ranks."""
    torch.set_num_threads(threads)
    step = train_step(partial(dense_loss, model=model))
    batches = text.batches(model.batch, model.sequence, SEED)
    return train(step, start(init(model, SEED)), batches, steps, report.progress("one process", steps), compiler)


def train_parallel(tp: fcomm.Group, model: Model, steps: int, compiler: str, backend_name: str) -> Run:
    """This rank's share of the same training."""
    backend, rank = BACKENDS[backend_name], tp.rank or 0
    loss = partial(parallel_loss, model=model, tp=tp, backend=backend)
    params = part(init(model, SEED), rank, tp.size)
    batches = text.batches(model.batch, model.sequence, SEED)
    counts = count_collectives(loss, params, *next(text.batches(model.batch, model.sequence, SEED)))
    run = train(
        train_step(loss), start(params), batches, steps, report.progress(where(tp), steps, show=rank == 0), compiler
    )
    run.forward, run.backward = counts
    return run


def train_simulated(ranks: int, model: Model, steps: int, compiler: str) -> Run:
    """All ranks in this process: the same loss, on stacked parameters."""
    tp = fcomm.axis("tp", ranks)
    loss = partial(parallel_loss, model=model, tp=tp, backend=fcomm.sim)
    parts = [part(init(model, SEED), rank, ranks) for rank in range(ranks)]
    state = start({name: torch.stack([p[name] for p in parts]) for name in parts[0]})
    state["step"] = torch.zeros(ranks)
    step = train_step(loss)

    def on_all_ranks(state: State, tokens: Tensor, target: Tensor) -> tuple[State, Tensor]:
        return fcomm.simulate(lambda state: step(state, tokens, target), tp)(state)

    batches = text.batches(model.batch, model.sequence, SEED)
    run = train(on_all_ranks, state, batches, steps, report.progress(where(tp), steps), compiler)
    run.forward, run.backward = count_collectives(loss, parts[0], *next(batches))
    return run


def where(tp: fcomm.Group) -> str:
    """The title of the parallel run."""
    return f"{tp.size} simulated ranks" if tp.simulated else f"{tp.size} processes"
