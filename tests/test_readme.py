"""README.md: its programs run, its tables match the code. `python tests/test_readme.py` rewrites the tables."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import matrix
import pytest

import fcomm
from fcomm import collectives

README = Path(__file__).parent.parent / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def collectives_table() -> str:
    """One row for each public function: its options, its docstring's first sentence, and its derivative."""
    rows = ["| collective | options | meaning | vjp |", "|---|---|---|---|"]
    for name in collectives.__all__:
        function = getattr(fcomm, name)
        doc = inspect.getdoc(function) or ""
        options = [
            f"`{p.name}={p.default!r}`" if p.default is not p.empty else f"`{p.name}`"
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        meaning = re.split(r"\.(?:\s|$)", doc)[0]
        derivative = vjp(doc) or ("" if name == "axis_size" else "that of the collectives it is composed of")
        rows.append(f"| `{name}` | {' '.join(options)} | {meaning} | {derivative} |")
    return "\n".join(rows)


def vjp(doc: str) -> str:
    """The docstring's line on the derivative, without the sentences after it."""
    found = re.search(r"vjp: (.*?)(?:\. Traffic|\.\n|\. [A-Z]|\n *Raises|$)", doc.replace("\n    ", " "), re.DOTALL)
    return " ".join(found[1].split()).rstrip(".") if found else ""


TABLES = {"collectives": collectives_table, "matrix": matrix.table}


def section(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", text, re.DOTALL)
    assert found, f"README.md has no section {name}"
    return found


def written(text: str) -> str:
    for name, table in TABLES.items():
        found = section(text, name)
        text = text[: found.start()] + table() + "\n" + text[found.end() :]
    return text


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_runs(program: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(README.parent)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", TABLES)
def test_table_is_up_to_date(name: str) -> None:
    found = section(README.read_text(), name)[0].strip()
    assert found == TABLES[name]().strip(), "run python tests/test_readme.py"


def test_every_record_has_a_public_function() -> None:
    # In a process of its own: other tests define collectives.
    check = "from fcomm import collectives, registration; assert {*registration.RECORDS} <= {*collectives.__all__}"
    subprocess.run([sys.executable, "-c", check], timeout=120, check=True)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
