"""Which dtypes are reduced, and a number for every dtype of torch, the same in all processes and versions."""

from __future__ import annotations

import zlib

import torch

# In the order of fcomm_dtype in csrc/fcomm.h. All others can only be moved: torch has no arithmetic for them or, for
# complex32, too little (no division, no product over a dimension).
REDUCED = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def _codes() -> dict[torch.dtype, int]:
    codes = {dtype: code for code, dtype in enumerate(REDUCED)}
    # Other versions of torch have more dtypes or fewer, so the number is made from the name and is the same in all that
    # have it. 31 bits, for the engine's messages; a test checks that none is among the first 17.
    for dtype in vars(torch).values():
        if isinstance(dtype, torch.dtype) and dtype not in codes:
            codes[dtype] = zlib.crc32(str(dtype).encode()) >> 1
    return codes


CODES = _codes()
_NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in CODES.items()}


def name(code: int) -> str:
    """The name of the dtype of that code, which another process may have sent."""
    return _NAMES.get(code, f"a dtype unknown to torch {torch.__version__} ")  # a shape follows, in brackets


def carrier(dtype: torch.dtype) -> torch.dtype:
    """A dtype of the same width that torch can add and index, for one that can only be moved."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
