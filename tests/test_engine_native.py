"""The engine's own tests (tests/native), built with the system's compiler: plain, and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "fcomm" / "csrc"
NATIVE = ROOT / "tests" / "native"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
FLAGS = ("-std=c++20", *WARNINGS, "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-pthread", "-DFCOMM_TESTING")
SUITES = ("kernels", "pool", "rings", "failures", "collectives")
VARIANTS = {
    "plain": ("-O1",),
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def engine_sources() -> list[Path]:
    return [path for path in sorted(ENGINE.glob("*.cpp")) if path.name != "binding.cpp"]


def _compile(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """The object file of source, made anew if any source or header is newer."""
    target = folder / f"{source.parent.name}-{source.stem}.o"
    inputs = [
        source,
        *(path for place in (ENGINE, NATIVE) for path in place.iterdir() if path.suffix in (".h", ".inc")),
    ]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        # The kernels are tested as they are shipped: vectorised, except where a sanitizer wants to look.
        speed = ("-O3",) if source == ENGINE / "kernels.cpp" and "-g" not in flags else ()
        made = folder / f"{target.stem}.{os.getpid()}.o"
        command = [COMPILER, *FLAGS, *flags, *speed, f"-I{ENGINE}", "-c", source, "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        made.replace(target)
    return target


def build(variant: str, program: str = "main") -> Path:
    """Path of a test program: "main" for the suites, "speed" for the table of times."""
    folder = ROOT / "build" / f"native-{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    others = {"main", "speed"} - {program}
    sources = engine_sources() + [path for path in sorted(NATIVE.glob("*.cpp")) if path.stem not in others]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder, VARIANTS[variant]), sources))
    target = folder / program
    made = folder / f"{program}.{os.getpid()}"
    subprocess.run([COMPILER, *FLAGS, *VARIANTS[variant], "-o", made, *objects], check=True, timeout=300)
    made.replace(target)
    return target


def run(program: Path, *suites: str, timeout_s: float = 300) -> str:
    done = subprocess.run([program, *suites], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, (
        f"{program} {' '.join(suites)} ended with {done.returncode}\n{done.stderr}{done.stdout}"
    )
    return done.stdout


def test_engine_alone() -> None:
    out = run(build("plain"), *SUITES)
    assert [line.split(":")[0] for line in out.splitlines()] == sorted(SUITES)


@pytest.mark.long
def test_engine_under_address_and_undefined_behaviour_sanitizers() -> None:
    run(build("address"), *SUITES, timeout_s=900)


@pytest.mark.long
def test_engine_under_thread_sanitizer() -> None:
    run(build("thread"), *SUITES, timeout_s=900)
