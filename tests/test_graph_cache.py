"""Compiled graphs that worlds of other sizes, and other ranks, find on disk: each world and rank gets its own.

notes/0014-names-in-graphs.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

import fcomm
from fcomm import Group
from fcomm.testing import run_ranks


def compiled_in(world: Group, folder: str) -> list[str]:
    """Arguments have one shape in every world, on every rank; results have not. The second gradient likewise."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    n, rank, on = world.size, world.rank or 0, fcomm.c10d
    sizes = [1] * (n - 1) + [13 - n]

    def gathers(x: Tensor) -> Tensor:
        return fcomm.all_gather(x, world, on) * 2

    def scatters(x: Tensor) -> Tensor:
        return fcomm.reduce_scatter(x, world, on, sizes=sizes) * 2

    def gathers_backward(x: Tensor) -> Tensor:
        return fcomm.reduce_scatter(x, world, on).sin()

    def run(program: object, x: Tensor, y_shape: tuple[int, ...]) -> list[str]:
        x.requires_grad_()
        y = torch.compile(program, fullgraph=True)(x)  # type: ignore[call-overload]
        y.sum().backward()
        return [] if tuple(y.shape) == y_shape and x.grad.shape == x.shape else [f"{program}: {y.shape}"]  # type: ignore[union-attr]

    return [
        *run(gathers, torch.ones(2, 3), (2 * n, 3)),
        *run(scatters, torch.ones(12, 3), (sizes[rank], 3)),
        *run(gathers_backward, torch.ones(2 * n, 3), (2, 3)),
    ]


def test_worlds_of_two_sizes_and_all_their_ranks_share_a_cache(tmp_path: Path) -> None:
    for size in (2, 3):
        run_ranks(compiled_in, size, str(tmp_path), timeout_s=150)
