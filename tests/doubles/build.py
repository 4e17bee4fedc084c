"""Builds the doubles: python tests/doubles/build.py prints where they are."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread")
_HIDDEN = ("-fvisibility=hidden",)

# Directory and file of each double -> how it is built.
DOUBLES = {
    "nccl/libnccl.so.2": ("nccl.cpp", "-DDOUBLE_VERSION=23203", *_HIDDEN),
    "nccl-device/libnccl.so.2": ("nccl.cpp", "-DDOUBLE_VERSION=23203", "-DDOUBLE_DEVICE", *_HIDDEN),
    "nccl-2.21/libnccl.so.2": ("nccl.cpp", "-DDOUBLE_VERSION=22105", *_HIDDEN),
    "hccl/libhccl.so": ("hccl.cpp", *_HIDDEN),
    "hccl-split/libhccl.so": ("hccl.cpp", "-DDOUBLE_PART=1"),
    "hccl-split/libhcomm.so": ("hccl.cpp", "-DDOUBLE_PART=2"),
}


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


@cache
def directory() -> Path:
    """Where the doubles of these sources are; built at first use, then kept."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("the doubles need a C++ compiler: install g++")
    sources = [(HERE / name).read_bytes() for name in ("core.hpp", "nccl.cpp", "hccl.cpp", "build.py")]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    # Not in the checkout: a library is refused where others may write, and a checkout may be shared.
    to = Path(tempfile.gettempdir()) / f"fcomm-doubles-{os.getuid()}-{digest}"
    if to.is_dir() and to.stat().st_uid == os.getuid():
        return to
    making = Path(tempfile.mkdtemp(prefix="fcomm-doubles-"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda double: _compile(cxx, making / double, *DOUBLES[double]), DOUBLES))
    try:
        making.rename(to)
    except OSError:  # another process was faster
        shutil.rmtree(making)
    return to


def _compile(cxx: str, to: Path, source: str, *flags: str) -> None:
    to.parent.mkdir(mode=0o700, exist_ok=True)
    subprocess.run([cxx, *_FLAGS, *flags, str(HERE / source), "-o", str(to)], check=True)
    to.chmod(0o700)


def path(double: str) -> str:
    """Absolute path of one of DOUBLES."""
    return str(directory() / double)


if __name__ == "__main__":
    print(directory())
