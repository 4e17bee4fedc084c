"""make bench: the standard table. What the package promises, measured alongside its competitors, met or not."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch

import fcomm
from fcomm.bench import endurance, launch, plot, report
from fcomm.bench.plan import Plan, Row, machines

K, M = 2**10, 2**20
_MOVERS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

Results = dict[str, list[Row]]


def plans(backend: str, *, with_mpi: bool) -> dict[str, Plan]:
    """The measurements; each is a separate run."""
    two = Plan(_MOVERS, (1 * K, 64 * K, 1 * M, 16 * M, 64 * M), backend, rivals=("c10d", "copy"))
    two = replace(two, rivals=("c10d", "mpi", "copy")) if with_mpi else two
    only = replace(two, collectives=("all_reduce",))
    return {
        "2 ranks, float": two,
        "2 ranks, bfloat16": replace(only, sizes=(16 * M, 64 * M), dtype="bfloat16", rivals=("c10d",)),
        "8 bytes, eager": replace(only, sizes=(8,), rivals=("funcol", "add"), rounds=15),
        "8 bytes, compiled": replace(only, sizes=(8,), rivals=("funcol",), compiled=True, rounds=15),
        "4 ranks on this machine": replace(only, sizes=(8, 64 * M), ranks=4, rivals=("c10d",)),
    }


@dataclass(frozen=True)
class Target:
    """A promise. values: one figure per round; their median counts.  at_least: a lower bound, else an upper one."""

    what: str
    limit: float
    values: Callable[[Results], list[float]]
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _times_slower(part: str, name: str, size: int, rival: str) -> Callable[[Results], list[float]]:
    def values(results: Results) -> list[float]:
        row = next(row for row in results[part] if row.collective == name and row.size == size)
        ours = row.times_us[row.ours]
        return [t / o for t, o in zip(row.times_us.get(rival, []), ours, strict=False)]

    return values


def _inverse(values: Callable[[Results], list[float]]) -> Callable[[Results], list[float]]:
    return lambda results: [1 / value for value in values(results)]


def targets() -> list[Target]:
    """Every promise, in the order of the table."""
    main = "2 ranks, float"
    found = [
        Target(f"{name} {report.short_size(size)}, gloo / ours", limit, _times_slower(main, name, size, "c10d"))
        for sizes, limit in (((16 * M, 64 * M), 5.0), ((64 * K, 1 * M), 10.0))
        for name in _MOVERS
        for size in sizes
    ]
    copy = _inverse(_times_slower(main, "all_reduce", 64 * M, "copy"))
    found.append(Target("all_reduce 64M, ours / copy by all ranks at once", 1.3, copy, at_least=False))
    for size, limit in ((64 * K, 2.0), (1 * M, 1.5), (64 * M, 2.0)):
        what = f"all_reduce {report.short_size(size)}, MPI through mpi4py / ours"
        found.append(Target(what, limit, _times_slower(main, "all_reduce", size, "mpi")))
    for size in (16 * M, 64 * M):
        half = _times_slower("2 ranks, bfloat16", "all_reduce", size, "c10d")
        found.append(Target(f"all_reduce {report.short_size(size)} bfloat16, gloo / ours", 5.0, half))
    for part, cost in (("8 bytes, eager", 6.0), ("8 bytes, compiled", 5.0)):
        how = part.split(", ")[1]
        adds = _inverse(_times_slower(part, "all_reduce", 8, "add"))
        found.append(Target(f"all_reduce 8 B {how}, ours / eager x + x", cost, adds, at_least=False))
        funcol = _times_slower(part, "all_reduce", 8, "funcol")
        found.append(Target(f"all_reduce 8 B {how}, funcol / ours", 20.0, funcol))
    for size, limit in ((8, 10.0), (64 * M, 4.0)):
        four = _times_slower("4 ranks on this machine", "all_reduce", size, "c10d")
        found.append(Target(f"all_reduce {report.short_size(size)}, 4 ranks, gloo / ours", limit, four))
    return found


def verdicts(found: Sequence[Target], results: Results) -> list[str]:
    """The table of promises, as markdown."""
    lines = ["| what | target | median | middle half of the rounds | met |", "|---|---|---|---|---|"]
    for target in found:
        values = target.values(results)
        bound = f"{'at least' if target.at_least else 'at most'} {target.limit:g}"
        if not values:
            lines.append(f"| {target.what} | {bound} | not measured | | no |")
            continue
        low, _, high = quantiles(values, n=4, method="inclusive")
        met = "yes" if target.met(median(values)) else "**no**"
        lines.append(f"| {target.what} | {bound} | {median(values):.3g} | {low:.3g} .. {high:.3g} | {met} |")
    return lines


def _lasting(rank: dict[str, float]) -> list[str]:
    grew = rank["memory_mb_growth"] < 1 and rank["descriptors_growth"] <= 0 and rank["threads_growth"] <= 0
    growth = f"{rank['memory_mb_growth']:.2f} MB, {rank['descriptors_growth']:+g} descriptors, "
    return [
        f"| shared memory of a group of 2, per rank | at most 4 MB | {rank['shared_mb']:.2f} MB | | "
        f"{'yes' if 0 < rank['shared_mb'] <= 4 else '**no**'} |",
        f"| growth over {rank['calls']:.0f} all_reduce of 8 B | none | {growth}{rank['threads_growth']:+g} threads | | "
        f"{'yes' if grew and rank['calls'] >= 10**6 else '**no**'} |",
    ]


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{model[1] if model else platform.machine()}, {cores} cores, Linux {platform.release()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; load {load:.1f} before the first run"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything, write OUT.md and OUT.png; 1 if a result was wrong. Missed targets are in the table only."""
    parser = argparse.ArgumentParser(prog="python -m fcomm.bench.standard", description=__doc__)
    parser.add_argument("out", type=Path, help="where the table goes; the picture lies beside it, as .png")
    parser.add_argument("--backend", choices=machines(), default="cpu", help="measured backend (cpu)")
    parser.add_argument("--calls", type=int, default=10**6, help="calls of the run that looks for growth (1000000)")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of every run; the standard has 9 or 15")
    options = parser.parse_args(argv)
    no_mpi = launch.why_no_mpi()
    machine, start = _machine(), time.time()
    results: Results = {}
    for part, plan in plans(options.backend, with_mpi=no_mpi is None).items():
        print(f"# {part}", flush=True)
        results[part] = launch.collect(replace(plan, rounds=options.rounds or plan.rounds))
    print("# growth", flush=True)
    last = fcomm.run(endurance.on_this_rank, 2, options.backend, options.calls, 60.0)[0]
    table = verdicts(targets(), results) + _lasting(last)
    options.out.write_text(_page(table, results, machine, no_mpi, start, options.out))
    plot.draw(results["2 ranks, float"], options.out.with_suffix(".png"))
    print("\n".join(table))
    print(f"written: {options.out}, {options.out.with_suffix('.png')}, in {time.time() - start:.0f} s")
    return 1 if any(row.wrong[row.ours] for rows in results.values() for row in rows) else 0


def _page(table: list[str], results: Results, machine: str, no_mpi: str | None, start: float, out: Path) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(start))
    spreads = [row.spread(row.ours) for rows in results.values() for row in rows]
    lines = [
        "# The standard table",
        "",
        f"Written by `make bench` (`python -m fcomm.bench.standard {out}`), {when}, in {time.time() - start:.0f} s.",
        "",
        f"{machine}.",
        "",
        "Contestants of one run are measured in the same processes, once per round, in an order that rotates; a time "
        "is the largest over the ranks, a figure the median over the rounds. Noise, the distance of the quartiles of "
        f"our own times over their median: {median(spreads):.0%} in the middle row, {max(spreads):.0%} in the worst.",
        *([] if no_mpi is None else ["", f"MPI was not measured: {no_mpi}."]),
        "",
        *table,
        "",
        f"![time of the others over ours, and bus bandwidth, against size]({out.with_suffix('.png').name})",
    ]
    for part, rows in results.items():
        lines += ["", f"## {part}"]
        for name in dict.fromkeys(row.collective for row in rows):
            some = [row for row in rows if row.collective == name]
            body = [report.table_head(some[0]), *map(report.table_line, some), report.table_foot(some)]
            lines += ["", "```", *(line.rstrip() for line in "\n".join(body).splitlines()), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
