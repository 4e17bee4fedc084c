"""On each rank: every contestant once per round, in rotated order; times are the largest over the ranks."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

import fcomm
from fcomm.bench import compiled, report, rivals
from fcomm.bench.plan import DTYPES, Plan, Row
from fcomm.bench.programs import Program, build, count_wrong
from fcomm.bench.rivals import AbsentError, Call, Context
from fcomm.group import BACKENDS, Backend, Group
from fcomm.rendezvous import live


def on_this_rank(world: Group, plan: Plan) -> list[Row]:
    """Measure the whole plan together with the other ranks; the rows are the same on all of them."""
    for module in plan.modules:
        importlib.import_module(module)
    if plan.ranks != world.size:
        raise fcomm.FcommError(f"bench: the launcher started {world.size} ranks, the plan is for {plan.ranks}")
    backend, rows = BACKENDS[plan.backend], []
    steps = [(name, size) for name in plan.collectives for size in plan.sizes]
    with _context(world, plan) as context:
        for done, (name, size) in enumerate(steps):
            if plan.stream and world.rank == 0:
                report.progress(done, len(steps), f"{name} {report.short_size(size)}")
            row = _measure(name, size, plan, world, backend, context)
            rows.append(row)
            if plan.stream and world.rank == 0:
                report.progress(None, len(steps), "")
                report.stream_row(row, first=size == plan.sizes[0], last=size == plan.sizes[-1], rows=rows)
    return rows


@contextmanager
def _context(world: Group, plan: Plan) -> Iterator[Context]:
    """What the contestants need: torch.distributed on the world's own store, MPI's communicator."""
    comm: Any = None
    if "mpi" in plan.rivals:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.size != world.size:
            raise fcomm.FcommError(f"bench: MPI counts {comm.size} ranks, fcomm {world.size}; start both with mpirun")
    ours = {"c10d", "funcol"} & set(plan.rivals) and not dist.is_initialized()
    if ours:
        store = dist.PrefixStore("bench", live(world).store)
        dist.init_process_group("gloo", store=store, rank=world.rank or 0, world_size=world.size)
    try:
        yield Context(world.rank or 0, world.size, comm)
    finally:
        if ours:
            # A gloo group left behind aborts its process at exit.
            dist.destroy_process_group()


def _measure(name: str, size: int, plan: Plan, world: Group, backend: Backend, context: Context) -> Row:
    program = build(name, size, DTYPES[plan.dtype], plan.op, plan.root, world, backend)
    contestants, wrong, absent = {}, {}, {}
    with torch.no_grad():
        for contestant, prepare in _entries(plan, world, backend).items():
            try:
                call = prepare(program, context)
                contestants[contestant] = call
                if contestant not in rivals.MACHINE and not plan.compiled:
                    wrong[contestant] = _check(call, program, contestant == plan.ours, plan.check, context)
            except AbsentError as reason:
                absent[contestant] = str(reason)
                contestants.pop(contestant, None)
        if plan.compiled:
            calls, wrong = compiled.pairs(contestants, program)
            times = compiled.marginal(_rounds(calls, plan, world, backend))
        else:
            times = _rounds(contestants, plan, world, backend)
            # Check again at the end: what the timed calls left behind must not matter.
            wrong[plan.ours] += _check(contestants[plan.ours], program, True, 1, context)
    wrong = {c: int(sum(row)) for c, row in zip(wrong, _columns(world, list(wrong.values())), strict=True)}
    return Row(
        name,
        program.count * program.x.element_size(),
        program.count,
        plan.dtype,
        program.op,
        program.root,
        world.size,
        plan.ours,
        times,
        wrong,
        absent,
        plan.compiled,
    )


def _entries(plan: Plan, world: Group, backend: Backend) -> dict[str, Callable[[Program, Context], Any]]:
    """Our own call, and those that the plan names; a library without the collective is absent from the row."""
    entries: dict[str, Callable[[Program, Context], Any]]
    if plan.compiled:
        entries = {plan.ours: compiled.ours, "funcol": compiled.funcol}
        return {k: v for k, v in entries.items() if k == plan.ours or k in plan.rivals} | {"add": rivals.add}
    entries = {plan.ours: lambda p, c: lambda: p.call(p.x)}
    for rival in plan.rivals:
        table = rivals.TABLES.get(rival)
        entries[rival] = rivals.MACHINE[rival] if table is None else _from_table(rival, table)
    return entries


def _from_table(rival: str, table: dict[str, Callable[[Program, Context], Call]]) -> Callable[..., Call]:
    def prepare(program: Program, context: Context) -> Call:
        if program.name not in table:
            raise AbsentError(f"{rival} has no {program.name}")
        return table[program.name](program, context)

    return prepare


def _check(call: Call, program: Program, ours: bool, times: int, context: Context) -> int:
    """Number of wrong elements in this rank's results. A rival that works in place is right only at first."""
    wrong = 0
    for _ in range(times if ours else 1):
        try:
            got = call()
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            if ours:
                raise
            raise AbsentError(str(error).splitlines()[0][:120]) from error
        if ours or program.name not in rivals.ROOTED or context.rank == program.root:
            wrong += count_wrong(got, program.expected)
    return wrong


# --- time ---------------------------------------------------------------------------------------------------------


def _rounds(calls: dict[str, Call], plan: Plan, world: Group, backend: Backend) -> dict[str, list[float]]:
    names = list(calls)
    iters = dict(zip(names, _iterations(calls, plan, world, backend), strict=True))
    mine: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(plan.rounds):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                mine[name].append(_time(calls[name], iters[name], world, backend))
    finally:
        gc.enable()
    columns = iter(_columns(world, [t for name in names for t in mine[name]]))
    return {name: [max(next(columns)) for _ in mine[name]] for name in names}


def _time(call: Call, iters: int, world: Group, backend: Backend) -> float:
    """Microseconds per call on this rank. One untimed call comes first, to align the ranks."""
    fcomm.barrier(world, backend)
    call()
    start = perf_counter()
    for _ in range(iters):
        call()
    return (perf_counter() - start) / iters * 1e6


def _iterations(calls: dict[str, Call], plan: Plan, world: Group, backend: Backend) -> list[int]:
    if plan.iters:
        for call in calls.values():
            _time(call, max(1, plan.warmup), world, backend)
        return [plan.iters] * len(calls)
    # The slowest rank decides: iterations must be the same on all.
    trial = [_time(call, max(1, plan.warmup), world, backend) for call in calls.values()]
    return [max(1, min(2000, int(plan.round_s * 1e6 / max(row)))) for row in _columns(world, trial)]


def _columns(world: Group, numbers: Sequence[float]) -> list[tuple[float, ...]]:
    """For each number, the values that all ranks pass. It uses torch.distributed, outside the measured path."""
    if not numbers:
        return []
    mine = torch.tensor(list(numbers), dtype=torch.float64)
    rows = fcomm.all_gather(mine, world, fcomm.c10d, tiled=False)
    return list(zip(*rows.tolist(), strict=True))
