"""What the demo shows: progress while it runs, the table of losses, the figures, the picture."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fcomm.demo.train import Run

TOLERANCE = 1e-4


def progress(title: str, steps: int, *, show: bool = True) -> Callable[[int, float], None]:
    """A function that shows each step's loss: on one line of a terminal, or in about ten lines of a file."""
    terminal, begin = sys.stdout.isatty(), time.perf_counter()
    if show:
        print(f"{title}: compiling the train step ...", end="" if terminal else "\n", flush=True)

    def report(step: int, loss: float) -> None:
        if not show or not (terminal or step in (1, steps) or step % max(1, steps // 10) == 0):
            return
        filled = 24 * step // steps
        bar = "#" * filled + "." * (24 - filled)
        line = f"{title}: [{bar}] step {step}/{steps}  loss {loss:.4f}  {time.perf_counter() - begin:.0f} s"
        print(f"\r\x1b[K{line}" if terminal else line, end="\n" if step == steps or not terminal else "", flush=True)

    return report


def differences(dense: Run, parallel: Run) -> list[float]:
    """Relative difference of the losses, step by step."""
    return [abs(d - p) / abs(d) for d, p in zip(dense.losses, parallel.losses, strict=True)]


def table(dense: Run, parallel: Run, where: str) -> str:
    """The losses of both runs, step by step."""
    lines = [f"\n{'step':>6}{'one process':>14}{where:>24}{'difference':>14}"]
    for number, (d, p, e) in enumerate(
        zip(dense.losses, parallel.losses, differences(dense, parallel), strict=True), start=1
    ):
        lines.append(f"{number:>6}{d:>14.6f}{p:>24.6f}{e:>14.1e}")
    return "\n".join(lines)


def summary(dense: Run, parallel: Run, where: str, tokens: int) -> str:
    """The figures that matter, below the table."""
    worst = max(differences(dense, parallel))
    rows = [
        ("largest relative difference", f"{worst:.1e}", f"limit {TOLERANCE:.0e}"),
        ("graph breaks", f"{dense.graph_breaks + parallel.graph_breaks}", f"the train step is {parallel.graphs} graph"),
        ("collectives per step, forward", str(parallel.forward.total()), _listed(parallel.forward)),
        ("collectives per step, backward", str(parallel.backward.total()), _listed(parallel.backward)),
        ("tokens per second, one process", f"{dense.tokens_per_second(tokens):,.0f}", ""),
        (f"tokens per second, {where}", f"{parallel.tokens_per_second(tokens):,.0f}", ""),
    ]
    return "\n" + "\n".join(f"{name:<44}{value:>10}  {note}" for name, value, note in rows)


def _listed(calls: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(calls.items()))


def passed(dense: Run, parallel: Run) -> bool:
    """Whether the two runs train alike."""
    # Written so that NaN fails.
    same = all(e <= TOLERANCE for e in differences(dense, parallel))
    return same and dense.graph_breaks + parallel.graph_breaks == 0


def draw(dense: Run, parallel: Run, where: str, path: Path) -> str:
    """Write the picture of the losses; return what was done, in a sentence."""
    if importlib.util.find_spec("matplotlib") is None:
        return 'no picture: matplotlib is not installed (pip install "fcomm[plot]")'
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(dense.losses) + 1)
    figure, (losses, difference) = pyplot.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    losses.plot(steps, dense.losses, color="#D55E00", linewidth=5, alpha=0.35, label="one process")
    losses.plot(steps, parallel.losses, color="#0072B2", linewidth=1.5, label=where)
    losses.set_ylabel("loss, nats per byte")
    losses.legend(frameon=False)
    difference.plot(steps, [max(e, 1e-9) for e in differences(dense, parallel)], color="#0072B2")
    difference.axhline(TOLERANCE, color="#555555", linestyle="--", linewidth=1)
    difference.text(1, TOLERANCE, "limit", va="bottom", color="#555555")
    difference.set_yscale("log")
    difference.set_ylim(top=10 * TOLERANCE)
    difference.set_ylabel("relative difference")
    difference.set_xlabel("step")
    difference.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, difference):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"picture: {path}"
