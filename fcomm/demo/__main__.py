"""python -m fcomm.demo: train the model twice, compare, and report the outcome by the exit status.

The ranks are processes that this one starts or, under torchrun, MPI or Slurm, that the launcher has started. With
--backend sim they are all simulated in this process, by the same functions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fcomm
from fcomm.bootstrap import launcher_place
from fcomm.demo import report
from fcomm.demo.model import Model, init
from fcomm.demo.runs import SEED, train_dense, train_parallel, train_simulated
from fcomm.group import BACKENDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 if both runs train alike, 1 if not, 2 for a wrong command line."""
    options, parser = _options(argv)
    launched = launcher_place(os.environ) is not None
    world = fcomm.init(timeout_s=600) if launched else None
    ranks = world.size if world is not None else options.ranks
    model = Model(**options.model)
    try:
        model.check_ranks(ranks)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    steps, show = options.steps, world is None or world.rank == 0

    if show:
        parameters = sum(p.numel() for p in init(model, SEED).values())
        print(f"A byte-level transformer of {parameters:,} parameters, on the source of Python's standard library.")
        dense = train_dense(model, steps, options.compiler, threads=min(ranks, os.cpu_count() or 1))
    if options.backend == "sim":
        parallel = train_simulated(ranks, model, steps, options.compiler)
    elif world is not None:
        torch.set_num_threads(1)
        parallel = train_parallel(world, model, steps, options.compiler, options.backend)
        fcomm.close()
    else:
        parallel = fcomm.run(train_parallel, ranks, model, steps, options.compiler, options.backend, timeout_s=600)[0]
    if not show:
        return 0
    title = f"{ranks} ranks on {options.backend}"
    print(report.table(dense, parallel, title))
    print(report.summary(dense, parallel, title, model.batch * model.sequence))
    print(report.draw(dense, parallel, title, options.plot))
    if not report.passed(dense, parallel):
        print("FAILED: the two runs are not one training", file=sys.stderr)
        return 1
    print("passed: the parallel run is the one-process run")
    return 0


def _options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m fcomm.demo",
        description="Train a small byte-level language model twice from one seed: on one process in plain torch, and "
        "on several with tensor and sequence parallelism by fcomm. The losses must agree.",
        epilog="torchrun --nproc-per-node 2 -m fcomm.demo runs it on torchrun's processes.",
        allow_abbrev=False,
    )
    backends = [name for name, b in BACKENDS.items() if not b.devices or "cpu" in b.devices]
    parser.add_argument("--backend", choices=backends, default="cpu", help="of the ranks, whose tensors are on the CPU")
    parser.add_argument("--ranks", type=int, default=2, help="1, 2, 3, 4, 6 or 12 (2)")
    parser.add_argument("--steps", type=int, default=50, help="steps of training (50)")
    parser.add_argument("--plot", type=Path, default=Path("fcomm-demo.png"), help="the picture (fcomm-demo.png)")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile (inductor)")
    parser.add_argument("--tiny", action="store_true", help="a much smaller model, for a quick look")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; pass at least 1")
    options.model = {"width": 48, "hidden": 48, "sequence": 24, "batch": 2, "blocks": 1} if options.tiny else {}
    return options, parser


if __name__ == "__main__":
    sys.exit(main())
