"""What the tests of nccl and hccl share: the doubles by name, how to plant faults in them, and what each rank runs."""

from __future__ import annotations

import ctypes
import importlib
import os
import traceback
from collections.abc import Sequence
from functools import cache
from types import ModuleType

from cases import CASES
from doubles import build

import fcomm
from fcomm.testing import check_case

DOUBLES = {
    "nccl": "nccl/libnccl.so.2",
    "nccl-2.21": "nccl-2.21/libnccl.so.2",
    "hccl": "hccl/libhccl.so",
    "hccl-split": "hccl-split/libhccl.so",
}
STATUS, DELAY, HANG, DEAF, ASYNC = 1, 2, 3, 4, 5


def module(double: str) -> ModuleType:
    return importlib.import_module(f"fcomm.backends.{double.split('-', maxsplit=1)[0]}")


def backend(double: str) -> fcomm.Backend:
    """The double's backend in this process."""
    opened: fcomm.Backend = module(double).open(library=build.path(DOUBLES[double]), device="cpu")
    return opened


@cache
def control(double: str) -> ctypes.CDLL:
    """The functions that a double has for tests."""
    lib = ctypes.CDLL(build.path(DOUBLES[double]))
    lib.double_fault.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    lib.double_calls.argtypes, lib.double_calls.restype = (ctypes.c_char_p,), ctypes.c_long
    return lib


def plant(double: str, symbol: str, action: int, value: int, nth: int = 1) -> None:
    """From now on, the nth call of symbol suffers."""
    control(double).double_fault(symbol.encode(), nth, action, value)


def calls(double: str, symbol: str) -> int:
    return int(control(double).double_calls(symbol.encode()))


def sized(size: int) -> list[str]:
    return [id for id, case in CASES.items() if size in case.sizes]


def check(
    world: fcomm.Group, double: str, ids: Sequence[str], transforms: Sequence[str], compiler: str | None = None
) -> list[str]:
    """Every case and transform on this rank against the oracle; what came out wrong."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    failures: list[str] = []
    on = backend(double)
    for id in ids:
        for transform in transforms:
            try:
                failures += check_case(CASES[id], on, world, [transform], compiler=compiler)
            except fcomm.FcommError:
                raise  # the group is out of step: what follows would fail too
            except Exception:
                failures.append(f"{id}: {transform}: {traceback.format_exc()}")
    return failures
