"""Real text that every machine has: the source of Python's own standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def standard_library() -> Tensor:
    """All modules of the library's top directory, one after the other, as a vector of byte values."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batches(batch: int, sequence: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, target), each [batch, sequence]; target is the next byte. One seed gives the same batches."""
    text = standard_library()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - sequence - 1, (batch, 1), generator=generator)
        window = text[starts + torch.arange(sequence + 1)].long()
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()
