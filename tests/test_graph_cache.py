"""Compiled graphs left on disk by worlds of other sizes, and by other ranks: each world and rank gets its own.

notes/0014-names-in-graphs.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fcomm
import fcomm.registration
from fcomm import Group
from fcomm.group import BACKENDS, Backend, forget_group, register_backend, register_group
from fcomm.registration import RECORDS


def lowering(name: str) -> Callable[..., Tensor]:
    return lambda x, group, **params: x.new_ones(RECORDS[name].shape(x.shape, group, **params))


def check_world(group: Group, backend: Backend) -> None:
    """Arguments have one shape in every world and on every rank; results and the second gradient do not."""
    n, rank = group.size, group.rank or 0
    sizes = [1] * (n - 1) + [13 - n]

    def gathers(x: Tensor) -> Tensor:
        return fcomm.all_gather(x, group, backend)

    def scatters(x: Tensor) -> Tensor:
        return fcomm.reduce_scatter(x, group, backend, sizes=sizes)

    def gathers_in_backward(x: Tensor) -> Tensor:
        return fcomm.reduce_scatter(x, group, backend)

    for program, rows, result in (
        (gathers, 2, 2 * n),
        (scatters, 12, sizes[rank]),
        (gathers_in_backward, 2 * n, 2),
    ):
        x = torch.ones(rows, 3, requires_grad=True)
        y = torch.compile(program, fullgraph=True)(x)
        y.sum().backward()
        assert y.shape == (result, 3)
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_worlds_of_two_sizes_and_all_their_ranks_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fcomm.registration, "live", lambda *_: None)  # the groups have no processes
    names: Any = ("all_gather", "reduce_scatter")
    backend = register_backend(Backend("ones", lowerings={name: lowering(name) for name in names}))
    try:
        for size, rank in ((2, 0), (2, 1), (3, 0)):
            torch.compiler.reset()  # memory is this process's own; the disk is shared
            group = register_group(Group("everybody", tuple(range(size)), rank))
            check_world(group, backend)
            forget_group(group)
    finally:
        del BACKENDS["ones"]
        torch.compiler.reset()
