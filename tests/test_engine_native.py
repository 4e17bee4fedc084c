"""The engine's own tests (tests/native), built with the system's compiler: plain, and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fcomm
from fcomm import arithmetic
from fcomm.testing import run_ranks
from fcomm.testing.strategies import DTYPES

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "fcomm" / "csrc"
NATIVE = ROOT / "tests" / "native"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
FLAGS = ("-std=c++20", *WARNINGS, "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-pthread", "-DFCOMM_TESTING")
SUITES = ("kernels", "choices", "pool", "rings", "failures", "collectives")
VARIANTS = {
    "plain": ("-O1",),
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
    "aarch64": ("-O1", "-static"),
}
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def engine_sources() -> list[Path]:
    return [path for path in sorted(ENGINE.glob("*.cpp")) if path.name != "binding.cpp"]


def _compile(compiler: str | None, source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """The object file of source, made anew if any source or header is newer."""
    target = folder / f"{source.parent.name}-{source.stem}.o"
    inputs = [
        source,
        *(path for place in (ENGINE, NATIVE) for path in place.iterdir() if path.suffix in (".h", ".inc")),
    ]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        # The kernels are tested as they are shipped, vectorised, except under a sanitizer.
        speed = ("-O3",) if source == ENGINE / "kernels.cpp" and "-g" not in flags else ()
        made = folder / f"{target.stem}.{os.getpid()}.o"
        command = [compiler, *FLAGS, *flags, *speed, f"-I{ENGINE}", "-c", source, "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        made.replace(target)
    return target


def build(variant: str, program: str = "main") -> Path:
    """Path of a test program: "main" for the suites, "speed" for the table of times."""
    folder = ROOT / "build" / f"native-{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    compiler = CROSS_COMPILER if variant == "aarch64" else COMPILER
    others = {"main", "speed"} - {program}
    sources = engine_sources() + [path for path in sorted(NATIVE.glob("*.cpp")) if path.stem not in others]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(compiler, source, folder, VARIANTS[variant]), sources))
    target = folder / program
    made = folder / f"{program}.{os.getpid()}"
    subprocess.run([compiler, *FLAGS, *VARIANTS[variant], "-o", made, *objects], check=True, timeout=300)
    made.replace(target)
    return target


def run(program: Path, *suites: str, timeout_s: float = 300, under: Sequence[str] = ()) -> str:
    done = subprocess.run([*under, program, *suites], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, (
        f"{program} {' '.join(suites)} ended with {done.returncode}\n{done.stderr}{done.stdout}"
    )
    return done.stdout


def test_engine_alone() -> None:
    out = run(build("plain"), *SUITES)
    assert [line.split(":")[0] for line in out.splitlines()] == sorted(SUITES)


def bits_of(x: Tensor) -> Tensor:
    """x's bits as integers, with all NaNs made the same: nothing defines which of two NaNs an addition keeps.

    Zeros of complex numbers are not distinguished either: torch.add multiplies by 1 + 0j, which turns some -0 into +0.
    """
    real = torch.view_as_real(x) + 0.0 if x.is_complex() else x
    if not real.is_floating_point():
        return real
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize]
    return torch.where(real.float().isnan(), -1, real.contiguous().view(width))


def awkward(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Numbers of similar size, small integers that tie, large ones that overflow, infinities and NaN.

    No infinite complex numbers: torch.add multiplies them by 1 + 0j, and inf + inf becomes NaN; ours stays inf.
    """
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(count, generator=g) < 0.5
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(-(2**62), 2**62, (count,), generator=g).to(dtype)
    x = torch.randn(count, 2, generator=g, dtype=torch.float64)
    x[::7] = x[::7].round()
    x[3::50] *= 1e5
    x[5::101], x[6::103] = 1.0 if dtype.is_complex else torch.inf, torch.nan
    return (torch.view_as_complex(x) if dtype.is_complex else x[:, 0]).to(dtype)


def differences_from_fold(world: fcomm.Group, count: int) -> list[str]:
    wrong = []
    for dtype in DTYPES:
        for op in arithmetic.OPS:
            try:
                arithmetic.check_op("all_reduce", op, dtype)
            except TypeError:
                continue
            xs = [awkward(dtype, count, rank) for rank in range(world.size)]
            y = fcomm.all_reduce(xs[world.rank or 0], world, fcomm.cpu, op=op)
            if not torch.equal(bits_of(y), bits_of(arithmetic.fold(xs, op))):
                wrong.append(f"{op} of {dtype}")
    return wrong


@pytest.mark.parametrize("size", [2, 3])
def test_engine_equals_fold_bit_for_bit(size: int) -> None:
    # Whole vectors: torch's complex product rounds differently in the remainder.
    run_ranks(differences_from_fold, size, 20032)


@pytest.mark.long
def test_engine_stress() -> None:
    assert "stress: ok" in run(build("plain"), "stress", timeout_s=600)


@pytest.mark.long
def test_engine_under_address_and_undefined_behaviour_sanitizers() -> None:
    run(build("address"), *SUITES, timeout_s=900)


@pytest.mark.long
def test_engine_under_thread_sanitizer() -> None:
    run(build("thread"), *SUITES, timeout_s=900)


@pytest.mark.long
@pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)), reason=f"no {CROSS_COMPILER}, {EMULATOR}"
)
def test_engine_on_aarch64() -> None:
    run(build("aarch64"), *SUITES, timeout_s=900, under=[EMULATOR])


# What tests/test_cpu.py does in processes with every collective, dtype and layout, except compiling and long runs.
UNDER_PYTHON = ("every_case", "dtype", "edge", "wraps", "strided", "interleaved", "back_to_back", "storage", "threads")


@pytest.mark.long
def test_module_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """The module as Python uses it: a copy of the package whose _native is built with the sanitizers."""
    package = tmp_path / "fcomm"
    shutil.copytree(ROOT / "fcomm", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "csrc"))
    flags = [flag for flag in (*FLAGS, *VARIANTS["address"]) if flag != "-DFCOMM_TESTING"]
    include = ["-DPy_LIMITED_API=0x030b0000", f"-I{sysconfig.get_paths()['include']}"]
    sources = [*engine_sources(), ENGINE / "binding.cpp"]
    command = [COMPILER, *flags, *include, "-shared", "-o", package / "_native.abi3.so", *sources]
    subprocess.run(command, check=True, timeout=300)
    # The interpreter is built without sanitizers, so their runtime must be loaded first, with what it intercepts, C++'s
    # throw. What Python itself never frees is not a leak.
    runtime = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    }
    where = subprocess.run(
        [sys.executable, "-c", "import fcomm._native; print(fcomm._native.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert where.stdout.strip() == str(package / "_native.abi3.so")
    names = [ROOT / "tests" / name for name in ("test_cpu.py", "test_cpu_calls.py")]
    chosen = ["-m", "not long", "-k", " or ".join(UNDER_PYTHON), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
