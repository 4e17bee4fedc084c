"""Random programs without end: python tests/fuzz.py --minutes 20 --workers 2, or make fuzz MINUTES=20.

Every worker draws batches of programs from its own seeds and compares them with plain torch, simulated, compiled, and
in real processes. It prints the number of programs of each kind, exits 1 if one differed, and then prints the smallest
such program that hypothesis found, as an expression, with what differs; --seed repeats a batch.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import programs
import torch
from hypothesis import HealthCheck, given, seed, settings
from programs import Program, is_clear
from test_programs import INTEGER_PROGRAMS, compiled_differences, differences, process_differences

import fcomm
from fcomm.testing import run_ranks

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def _each(name: str, strategy: Any, examples: int, check: Callable[[Program], list[str]]) -> Callable[[int], Counter]:
    def batch(number: int) -> Counter:
        count: Counter = Counter()

        @seed(number)
        @given(strategy)
        @settings(QUIET, max_examples=examples)
        def draw(program: Program) -> None:
            if is_clear(program, program.input()):
                count[name] += 1
                found = check(program)
                assert not found, "\n".join([*found, repr(program)])

        draw()
        return count

    return batch


def _in_processes(number: int, backends: Sequence[str]) -> Counter:
    """A batch of programs in one run of 2, 3 or 4 processes."""
    size, backend = 2 + number % 3, backends[number // 3 % len(backends)]
    drawn: list[Program] = []

    @seed(number)
    @given(programs.programs(meshes=((size,),)))
    @settings(QUIET, max_examples=60)
    def collect(program: Program) -> None:
        if is_clear(program, program.input()):
            drawn.append(program)

    collect()
    run_ranks(process_differences, size, drawn, backend)
    return Counter({f"{backend}, {size} processes": len(drawn)})


BATCHES: Sequence[Callable[[int], Counter]] = (
    _each("simulated", programs.programs(), 60, differences),
    _each("integers", INTEGER_PROGRAMS, 60, differences),
    _each("compiled", programs.programs(longest=4), 3, compiled_differences),
)


def _work(first: int, until: float, backends: Sequence[str], results: Any) -> None:
    torch.set_num_threads(1)
    number = first
    while time.monotonic() < until:
        for batch in (*BATCHES, partial(_in_processes, backends=backends)):
            try:
                results.put((number, batch(number), ""))
            except BaseException:
                results.put((number, Counter(), traceback.format_exc()))
        number += 1


def main() -> int:
    """Run the workers; return 1 if any program differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**9 % 10**6 * 1000)
    here = [name for name in ("c10d", "cpu") if hasattr(fcomm, name)]
    parser.add_argument("--backends", nargs="+", default=here, help="of the programs in processes")
    options = parser.parse_args()
    context = mp.get_context("spawn")
    results = context.Queue()
    until = time.monotonic() + 60 * options.minutes
    workers = [
        context.Process(target=_work, args=(options.seed + 10**6 * k, until, options.backends, results))
        for k in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    total, failures, shown = Counter(), [], time.monotonic()
    while any(worker.is_alive() for worker in workers) or not results.empty():
        try:
            number, count, failure = results.get(timeout=1)
        except Exception:
            continue
        total += count
        if failure:
            failures.append(failure)
            print(f"--- seed {number}\n{failure}", flush=True)
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(
                f"{max(0, until - shown) / 60:5.1f} minutes left, {total.total()} programs, {dict(total)}", flush=True
            )
    print(f"{total.total()} programs, {len(failures)} failing batches, seed {options.seed}: {dict(total)}")
    return 1 if failures or not total else 0


if __name__ == "__main__":
    sys.exit(main())
