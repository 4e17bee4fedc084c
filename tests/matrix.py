"""The matrix collective x transform x (sim, c10d) x (eager, compiled): which cells tests check, why others are empty.

A test that checks cells calls record(). At the end of a run conftest.py writes the table to out/matrix.md; README.md
shows it, and test_readme.py compares. `python tests/matrix.py` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cases import CASES

from fcomm.testing import TRANSFORMS, Case, reason_to_leave_out

Cell = tuple[str, str, str, str]  # collective, transform, "sim" or "c10d", "eager" or "compiled"

PLACES = tuple((backend, how) for backend in ("sim", "c10d") for how in ("eager", "compiled"))
COLLECTIVES = tuple(dict.fromkeys(case.name for case in CASES.values()))
# What make test compiles for the first case of each collective: the kernels of the forward, of both derivatives and of
# a batch, one inside the other, and dual tensors; in processes, where tracing is the same, a third of them. make
# test-all compiles every case under every transform.
FIRST = tuple(next(case.id for case in CASES.values() if case.name == name) for name in COLLECTIVES)
SAMPLE = {
    "sim": ("forward", "grad", "jvp", "vmap", "vmap of grad", "forward mode"),
    "c10d": ("jvp", "vmap of grad"),
}


def record(
    record_property: Callable[[str, object], None],
    cases: Iterable[Case],
    backend: str,
    *,
    compiled: bool,
    transforms: Sequence[str] = tuple(TRANSFORMS),
) -> None:
    """Note the cells that a passing test has checked; pytest's record_property carries them out of xdist's workers."""
    how = "compiled" if compiled else "eager"
    record_property(
        "cells",
        [(case.name, t, backend, how) for case in cases for t in transforms if _reason(case, t, backend, how) is None],
    )


def _reason(case: Case, transform: str, backend: str, how: str) -> str | None:
    return reason_to_leave_out(case, transform, simulated=backend == "sim", compiled=how == "compiled")


def reason(cell: Cell) -> str | None:
    """Why no case of the collective fills the cell; None if one does."""
    collective, transform, backend, how = cell
    reasons = [_reason(case, transform, backend, how) for case in CASES.values() if case.name == collective]
    return None if None in reasons else reasons[0]


def all_cells() -> list[Cell]:
    return [(c, t, *place) for c in COLLECTIVES for t in TRANSFORMS for place in PLACES]


def table() -> str:
    """The matrix as markdown. A cell stands for four: simulated and in processes, eager and compiled."""
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"<sup>{notes.setdefault(text, len(notes) + 1)}</sup>"

    def cell(collective: str, transform: str) -> str:
        reasons = {place: reason((collective, transform, *place)) for place in PLACES}
        missing = [(place, text) for place, text in reasons.items() if text is not None]
        if len(missing) == len(PLACES):
            return "-" + note(missing[0][1] or "")
        texts = dict.fromkeys(text for _, text in missing)
        return "✓" + "".join(
            note(f"not {' and '.join(f'{how} on {backend}' for (backend, how), t in missing if t == text)}: {text}")
            for text in texts
        )

    rows = [f"| `{c}` | " + " | ".join(cell(c, t) for t in TRANSFORMS) + " |" for c in COLLECTIVES]
    head = "| | " + " | ".join(TRANSFORMS) + " |\n|---|" + ":-:|" * len(TRANSFORMS)
    counts = [reason(cell) is None for cell in all_cells()]
    empty = len(counts) - sum(counts)
    summary = f"{sum(counts)} cells are checked, {empty} are empty for the reason that their number gives."
    foot = "\n".join(f"{number}. {text}" for text, number in notes.items())
    return "\n".join([head, *rows, "", summary, "", foot])


if __name__ == "__main__":
    print(table())
