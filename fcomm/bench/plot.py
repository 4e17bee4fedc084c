"""The picture: for each collective, the rivals' time over ours, and bus bandwidth, against size, on log axes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fcomm.bench.plan import Row
from fcomm.bench.report import contestants, short_size

# One colour for each contestant in every picture (Okabe and Ito's, which colour-blind readers tell apart).
_OURS = "#0072B2"
_COLOURS = {"c10d": "#D55E00", "funcol": "#CC79A7", "mpi": "#009E73", "copy": "#555555", "add": "#E69F00"}
_COLUMNS = 4


def require() -> None:
    """Raise before a long run whose picture could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('--plot needs matplotlib; pip install "fcomm[plot]"')


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture of all rows; the file's ending chooses its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    tables: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row.collective}, {row.ranks} ranks, {row.dtype}" + (", in a compiled graph" if row.compiled else "")
        tables.setdefault(title, []).append(row)
    across = min(_COLUMNS, len(tables))
    down = -(-len(tables) // across)
    figure, axes = pyplot.subplots(
        2 * down, across, figsize=(1 + 3.6 * across, 6.2 * down), squeeze=False, sharex=True, layout="constrained"
    )
    for place in range(across * down):
        ratio, bandwidth = axes[2 * (place // across), place % across], axes[2 * (place // across) + 1, place % across]
        if place >= len(tables):
            ratio.set_axis_off()
            bandwidth.set_axis_off()
            continue
        title, table = list(tables.items())[place]
        ratio.set_title(title, fontsize=10)
        _ratios(ratio, table)
        _bandwidths(bandwidth, table)
        if place % across == 0:
            ratio.set_ylabel("time / our time")
            bandwidth.set_ylabel("bus bandwidth, GB/s")
    used = {c: None for row in rows for c in contestants([row]) if any(c in r.times_us for r in rows)}
    handles = [
        Line2D([], [], color=_COLOURS.get(c, _OURS), marker="o", linestyle="--" if c == "copy" else "-", label=c)
        for c in used
        if c != "add"
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ratios(axes: Any, table: Sequence[Row]) -> None:
    axes.axhline(1, color=_OURS, linewidth=1)
    for name in contestants(table)[1:]:
        points = [(row.size, row.ratio(name)) for row in table if name in row.times_us and name != "add"]
        _line(axes, points, name)
    _scales(axes, table)


def _bandwidths(axes: Any, table: Sequence[Row]) -> None:
    for name in contestants(table):
        if name != "add":
            # A copy has no bus bandwidth: it just moves its bytes, which is what algorithm bandwidth counts.
            points = [(row.size, row.bandwidth(name)[name != "copy"]) for row in table if name in row.times_us]
            _line(axes, points, name)
    _scales(axes, table)
    axes.set_xlabel("size")


def _line(axes: Any, points: Sequence[tuple[int, float]], name: str) -> None:
    if points:
        style = "--" if name == "copy" else "-"
        axes.plot(*zip(*points, strict=True), style, color=_COLOURS.get(name, _OURS), marker="o", markersize=4)


def _scales(axes: Any, table: Sequence[Row]) -> None:
    sizes = sorted({row.size for row in table})
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sizes if len(sizes) <= 6 else sizes[:: -(-len(sizes) // 6)]
    axes.set_xticks(ticks, [short_size(size) for size in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
