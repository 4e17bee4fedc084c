"""What all tests share: building the doubles, and the time that survivors have to report.

It also writes the cells of the matrix (tests/matrix.py) that a run has checked to out/matrix.md.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from doubles import build
from matrix import SAMPLE, Cell, all_cells, reason, table

from fcomm import launch

CHECKED: set[Cell] = set()
LACKING: list[Cell] = []
OUT = Path(__file__).parent.parent / "out"

# Otherwise each rank of each compiling test imports it again, which takes longer than most of these tests.
launch._PRELOAD += ["torch._dynamo", "torch._inductor.compile_fx"]


def pytest_configure(config: pytest.Config) -> None:
    """Build the doubles here, once: a rank that had to do it would keep others waiting, and use up its test's time."""
    if not hasattr(config, "workerinput") and not config.option.collectonly and build.compiler() is not None:
        with suppress(subprocess.CalledProcessError):  # their own tests will report it
            build.directory()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give ranks time to find out that another has failed, and to write it down, even on a busy machine."""
    monkeypatch.setattr(launch, "_GRACE_S", 20.0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for key, value in report.user_properties:
            if key == "cells":
                CHECKED.update(map(tuple, value))  # type: ignore[arg-type]  # pairs come back from workers as lists


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not CHECKED:
        return
    expected = {cell for cell in all_cells() if reason(cell) is None}
    missing = sorted(expected - CHECKED)
    OUT.mkdir(exist_ok=True)
    lines = [f"{len(expected & CHECKED)} of {len(expected)} cells were checked by this run.", "", table(), ""]
    lines += [f"- not in this run: {' '.join(cell)}" for cell in missing]
    (OUT / "matrix.md").write_text("\n".join(lines) + "\n")
    whole = session.config.args == session.config.getini("testpaths") and not session.config.option.keyword
    if session.config.option.markexpr:
        missing = [cell for cell in missing if cell[3] != "compiled" or cell[1] in SAMPLE[cell[2]]]
    if whole and missing:
        LACKING.extend(missing)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CHECKED:
        terminalreporter.write_line(f"matrix: {len(CHECKED)} cells checked, see out/matrix.md")
    if LACKING:
        terminalreporter.write_line(
            f"matrix: {len(LACKING)} cells that this run should check were not: {LACKING[:3]} .."
        )
