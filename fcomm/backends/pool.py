"""Outputs of the shared-memory backend: small ones are torch's, large ones come from the engine's pool of blocks.

A fresh 64 MB tensor costs six times the collective that fills it, in page faults. A block of the pool keeps its pages;
it goes back when the storage dies, that is with the last tensor, view or saved tensor that shares it, on any thread.
"""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor

try:
    native: Any = import_module("fcomm._native")
    why_no_native = ""
except ImportError as error:  # no compiler was there when fcomm was installed
    native, why_no_native = None, str(error)

# Below it glibc recycles memory by itself. A block of the pool costs half a microsecond more than torch's, and a peer
# may write into it.
POOLED_NBYTES = 64 << 10

# DLPack's kinds (DLDataTypeCode in dlpack.h) of the dtypes that torch takes over by it. Others come as bytes.
_KINDS = {
    **dict.fromkeys((torch.int8, torch.int16, torch.int32, torch.int64), 0),
    torch.uint8: 1,
    **dict.fromkeys((torch.float16, torch.float32, torch.float64), 2),
    torch.bfloat16: 4,
    **dict.fromkeys((torch.complex64, torch.complex128), 5),
    torch.bool: 6,
}
# FCOMM_MAX_DIMS and FCOMM_MAX_RANKS in csrc/fcomm.h
MAX_DIMS, MAX_RANKS = 16, 240


def pooled(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of that shape and like's dtype; its storage cannot be resized."""
    width, kind = like.itemsize, _KINDS.get(like.dtype)
    nbytes = prod(shape) * width
    if kind is not None and len(shape) <= MAX_DIMS:
        return torch.from_dlpack(native.pool_take(nbytes, kind, 8 * width, shape))
    block = torch.from_dlpack(native.pool_take(nbytes, 1, 8, (nbytes,)))
    # Not block.view(..): a view would have a base, and autograd would watch writes through it.
    whole: Tensor = torch.empty(0, dtype=like.dtype).set_(block.untyped_storage(), 0, shape, ())
    return whole


def memory_stats() -> dict[str, int]:
    """The pool of large outputs of fcomm.cpu in this process: bytes in use, idle, and the limit on idle ones.

    Keys: in_use_bytes, idle_bytes, limit_bytes, blocks_in_use; hits and misses count requests since the start.
    Empty where the engine is not built.
    """
    return dict(native.pool_stats()) if native else {}


def empty_cache() -> int:
    """Give the pool's idle blocks back to the system; the result is how many bytes that freed."""
    return int(native.pool_clear()) if native else 0


def limit_cache(idle_nbytes: int) -> None:
    """Keep at most that many idle bytes in the pool; blocks that come back beyond it go to the system."""
    if native:
        native.pool_set_limit(idle_nbytes)
