"""The table as nccl-tests prints it, the comparison below it in lines that its parsers skip, JSON, CSV, progress."""

from __future__ import annotations

import csv
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fcomm.bench.plan import Plan, Row

# nccl-tests 2.19, src/util.cu: the widths of its columns. Our calls have no in-place form: its columns say N/A.
_COLUMNS = "# {:>10}  {:>12}  {:>8}  {:>6}  {:>6}  {:>7}  {:>6}  {:>6}  {:>6}  {:>7}  {:>6}  {:>6}  {:>6} "
_LINE = "{:12d}  {:12d}  {:>8}  {:>6}  {:>6}  {:>7}  {:>6}  {:>6}  {:>6}  {:>7}  {:>6}  {:>6}  {:>6}"
_HALVES = "# {:>10}  {:>12}  {:>8}  {:>6}  {:>6}           out-of-place                       in-place          "


def header(plan: Plan, sizes: Sequence[int]) -> str:
    """What nccl-tests prints before the first table."""
    iters = str(plan.iters) if plan.iters else f"as fit in {plan.round_s * 1e3:g} ms"
    lines = [
        f"# fcomm bench on backend {plan.backend}, torch {torch.__version__}, {platform.machine()}",
        f"# nThread 1 nRanks {plan.ranks} minBytes {sizes[0]} maxBytes {sizes[-1]} warmup iters: {plan.warmup} "
        f"iters: {iters}, {plan.rounds} rounds validation: {plan.check}",
        "#",
        "# Using devices",
        *(f"#  Rank {r:2d} on {socket.gethostname()} device cpu" for r in range(plan.ranks)),
        "#",
    ]
    return "\n".join(lines)


def stream_row(row: Row, *, first: bool, last: bool, rows: Sequence[Row]) -> None:
    """Print one row as soon as it is measured, with the head and foot of its table."""
    if first:
        print(table_head(row), flush=True)
    print(table_line(row), flush=True)
    if last:
        print(table_foot([r for r in rows if r.collective == row.collective]), flush=True)


def table_head(row: Row) -> str:
    """The three header lines of a collective's table."""
    what = "one call inside a compiled graph" if row.compiled else "out of place, every rank its own process"
    return "\n".join(
        [
            f"# Collective test starting: {row.collective}_perf ({what})",
            "#",
            _HALVES.format("", "", "", "", ""),
            _COLUMNS.format("size", "count", "type", "redop", "root", *("time", "algbw", "busbw", "#wrong") * 2),
            _COLUMNS.format("(B)", "(elements)", "", "", "", *("(us)", "(GB/s)", "(GB/s)", "") * 2),
        ]
    )


def table_line(row: Row) -> str:
    """One size, our own call."""
    algorithm, bus = row.bandwidth(row.ours)
    numbers = (fixed(row.time_us(row.ours), 7), fixed(algorithm, 6), fixed(bus, 6), row.wrong[row.ours])
    return _LINE.format(row.size, row.count, row.dtype, row.op, row.root, *numbers, *["N/A"] * 4)


def fixed(value: float, width: int) -> str:
    """A number in width characters, with as many decimals as fit, as nccl-tests prints it."""
    for decimals in (2, 1, 0):
        text = f"{value:.{decimals}f}"
        if len(text) <= width or decimals == 0:
            return text if len(text) <= width else f"{value:.0e}"
    raise AssertionError


def table_foot(rows: Sequence[Row]) -> str:
    """The comparison with the other contestants, and nccl-tests' last lines."""
    wrong = sum(row.wrong[row.ours] for row in rows)
    average = sum(row.bandwidth(row.ours)[1] for row in rows) / len(rows)
    lines = comparison(rows)
    lines += [
        f"# {'Out of bounds values':<20} : {wrong} {'FAILED' if wrong else 'OK'}",
        f"# {'Avg bus bandwidth':<20} : {average:g} ",
        "#",
        f"# Collective test concluded: {rows[0].collective}_perf",
        "#",
    ]
    return "\n".join(lines)


def comparison(rows: Sequence[Row]) -> list[str]:
    """Every contestant's time, and how many times ours it is; for a copy, the fraction of its rate that we reach."""
    others = contestants(rows)[1:]
    if not others:
        return ["#"]
    ours = rows[0].ours
    cells = [("size", f"{ours} us", "noise", *(c for o in others for c in (f"{o} us", _RATIO_NAMES.get(o, "x"))))]
    for row in rows:
        cells.append((short_size(row.size), fixed(row.time_us(ours), 8), f"{row.spread(ours):.0%}"))
        for other in others:
            if other in row.times_us:
                ratio = 1 / row.ratio(other) if other == "add" else row.ratio(other)
                mark = f"{ratio:.0%}" if other == "copy" else fixed(ratio, 6)
                cells[-1] += fixed(row.time_us(other), 8), mark + ("!" if row.wrong.get(other) else "")
            else:
                cells[-1] += "-", "-"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["#", "# compared in the same processes: x = its time / ours, median of the rounds' ratios"]
    lines += ["#   " + "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    reasons = {f"{c}: {why}" for row in rows for c, why in row.absent.items()}
    lines += [f"#   - {reason}" for reason in sorted(reasons)]
    lines += [f"#   ! wrong result: {c}" for c in others if any(row.wrong.get(c) for row in rows)]
    return [*lines, "#"]


def contestants(rows: Sequence[Row]) -> list[str]:
    """Ours first, then the others in one order everywhere."""
    present = {name for row in rows for name in (*row.times_us, *row.absent)}
    return [rows[0].ours, *(name for name in _OTHERS if name in present)]


_OTHERS = ("c10d", "funcol", "mpi", "copy", "add")
# How to read a ratio: for a copy, the fraction of its rate that we reach; for x + x, how many of them our call costs.
_RATIO_NAMES = {"copy": "of copy", "add": "in x + x"}


def short_size(nbytes: int) -> str:
    """65536 -> 64K."""
    for unit, scale in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if nbytes >= scale and nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return str(nbytes)


# --- files --------------------------------------------------------------------------------------------------------


def write_json(path: Path, plan: Plan, rows: Sequence[Row], start: float) -> None:
    """nccl-tests' keys; each result also names its collective and holds every contestant's rounds."""
    wrong = sum(row.wrong[row.ours] for row in rows)
    document: dict[str, Any] = {
        "version": 2,
        "start_time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start)),
        "args": sys.argv,
        "env": [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("FCOMM_", "OMP_", "TORCH"))],
        "config": {
            "nthreads": 1,
            "nranks": plan.ranks,
            "minimum_bytes": plan.sizes[0],
            "maximum_bytes": plan.sizes[-1],
            "warmup_iters": plan.warmup,
            "iterations": plan.iters,
            "rounds": plan.rounds,
            "validation": plan.check,
        },
        "devices": [{"rank": r, "hostname": socket.gethostname(), "device": "cpu"} for r in range(plan.ranks)],
        "results": [_result(row) for row in rows],
        "out_of_bounds": {"count": wrong, "okay": str(not wrong).lower()},
        "average_bus_bandwidth": {
            "bandwidth": sum(row.bandwidth(row.ours)[1] for row in rows) / len(rows),
            "okay": "unchecked",
        },
        "end_time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _result(row: Row) -> dict[str, Any]:
    algorithm, bus = row.bandwidth(row.ours)
    ours = {"time": row.time_us(row.ours), "alg_bw": algorithm, "bus_bw": bus, "nwrong": row.wrong[row.ours]}
    result = {"size": row.size, "count": row.count, "type": row.dtype, "redop": row.op, "root": str(row.root)}
    ratios = {c: row.ratio(c) for c in row.times_us if c != row.ours}
    return {**asdict(row), **result, "out_of_place": ours, "in_place": None, "ratios": ratios}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each size and contestant."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["collective", "size", "count", "type", "redop", "root", "ranks", "contestant"]
            + ["time_us", "algbw", "busbw", "spread", "nwrong", "ratio"]
        )
        for row in rows:
            for c in row.times_us:
                algorithm, bus = row.bandwidth(c)
                numbers = [row.time_us(c), algorithm, bus, row.spread(c), row.wrong.get(c, ""), row.ratio(c)]
                writer.writerow(
                    [row.collective, row.size, row.count, row.dtype, row.op, row.root, row.ranks, c, *numbers]
                )


# --- progress -----------------------------------------------------------------------------------------------------


def progress(done: int | None, total: int, label: str) -> None:
    """Draw a bar on stderr if that is a terminal; None removes it."""
    if not sys.stderr.isatty():
        return
    if done is None:
        text = "\r\x1b[K"
    else:
        filled = 30 * done // max(1, total)
        text = f"\r\x1b[K[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {label}"
    print(text, end="", file=sys.stderr, flush=True)
