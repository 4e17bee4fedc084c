"""What is left behind: a group's shared memory, and growth of memory, descriptors and threads over many small calls."""

from __future__ import annotations

import os
import re
from pathlib import Path
from time import perf_counter

import torch

import fcomm
from fcomm.group import BACKENDS, Group

_CHUNK = 10_000


def on_this_rank(world: Group, backend_name: str, calls: int, limit_s: float) -> dict[str, float]:
    """all_reduce of 8 bytes, `calls` times or for limit_s seconds, whichever is first; return what grew meanwhile."""
    backend = BACKENDS[backend_name]
    x, go = torch.ones(2), torch.ones(())

    def go_on(begin: float) -> bool:
        for _ in range(_CHUNK):
            fcomm.all_reduce(x, world, backend)
        go.fill_(perf_counter() - begin < limit_s)  # rank 0's clock decides for all
        return bool(fcomm.broadcast(go, world, backend))

    # What the first use allocates for good is not growth, nor is what reading the usage allocates.
    go_on(perf_counter())
    _usage()
    before, begin, done = _usage(), perf_counter(), 0
    while done < calls:
        done += _CHUNK
        if not go_on(begin):
            break
    after = _usage()
    return {
        "calls": done,
        "seconds": perf_counter() - begin,
        "shared_mb": _shared_nbytes() / world.size / 2**20,
        **{f"{what}_growth": after[what] - before[what] for what in before},
    }


def _usage() -> dict[str, float]:
    status = Path("/proc/self/status").read_text()
    resident, threads = (int(re.search(rf"{k}:\s+(\d+)", status)[1]) for k in ("VmRSS", "Threads"))  # type: ignore[index]
    return {"memory_mb": resident / 1024, "descriptors": len(os.listdir("/proc/self/fd")), "threads": threads}


def _shared_nbytes() -> int:
    """Total length of the mappings of nameless memory that this package has made."""
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*memfd:fcomm", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return sum(int(end, 16) - int(start, 16) for start, end in found)
