"""Outputs of the shared-memory backend: small ones are torch's, large ones come from the engine's pool of blocks.

In page faults, a fresh 64 MB tensor costs six times as much as the collective that fills it. A block of the pool keeps
its pages. It goes back when its storage dies, with the last tensor, view or saved tensor that shares it, on any thread.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fcomm.registration import tensor_of_capsule

try:
    native: Any = import_module("fcomm._native")
    why_no_native = ""
except ImportError as error:  # there was no compiler when fcomm was installed
    native, why_no_native = None, str(error)

# Below this glibc recycles memory by itself. A block of the pool costs half a microsecond more than torch's, but a peer
# may write into it.
POOLED_NBYTES = 64 << 10

# DLPack's kind (DLDataTypeCode in dlpack.h) and bits of the dtypes that torch imports through it. Others come as bytes.
_FORMS = {
    dtype: (kind, 8 * dtype.itemsize)
    for kind, dtypes in (
        (0, (torch.int8, torch.int16, torch.int32, torch.int64)),
        (1, (torch.uint8,)),
        (2, (torch.float16, torch.float32, torch.float64)),
        (4, (torch.bfloat16,)),
        (5, (torch.complex64, torch.complex128)),
        (6, (torch.bool,)),
    )
    for dtype in dtypes
}
# FCOMM_MAX_DIMS and FCOMM_MAX_RANKS in csrc/fcomm.h
MAX_DIMS, MAX_RANKS = 16, 240


def pooled(shape: tuple[int, ...], nbytes: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor of that shape, which takes nbytes; its storage cannot be resized."""
    form = _FORMS.get(dtype)
    if form is not None and len(shape) <= MAX_DIMS:
        return tensor_of_capsule(native.pool_take(nbytes, *form, shape))
    block = tensor_of_capsule(native.pool_take(nbytes, *_FORMS[torch.uint8], (nbytes,)))
    # Not block.view(..): a view has a base, and autograd would track writes through it.
    whole: Tensor = torch.empty(0, dtype=dtype).set_(block.untyped_storage(), 0, shape, ())
    return whole


def memory_stats() -> dict[str, int]:
    """The pool of large outputs of fcomm.cpu in this process: bytes in use, idle, and the limit on idle ones.

    Keys: in_use_bytes, idle_bytes, limit_bytes, blocks_in_use; hits and misses count requests since the start.
    Empty where the engine is not built.
    """
    return dict(native.pool_stats()) if native else {}


def empty_cache() -> int:
    """Give the pool's idle blocks back to the system; return how many bytes that freed."""
    return int(native.pool_clear()) if native else 0


def limit_cache(idle_nbytes: int) -> None:
    """Keep at most that many idle bytes in the pool; blocks returned beyond that go to the system."""
    if native:
        native.pool_set_limit(idle_nbytes)
