"""The handles fcomm.nccl and fcomm.hccl. Their tables are loaded at the first call, to keep `import fcomm` fast."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from fcomm.group import Backend, Lowering, register_backend

_COLLECTIVES = (
    "all_reduce", "scan", "reduce", "reduce_scatter", "all_gather", "all_to_all", "ppermute",
    "broadcast", "gather", "scatter", "send", "recv", "barrier",
)  # fmt: skip


def _first(name: str, collective: str, *args: Any, **params: Any) -> Tensor:
    table = _TABLES[name]
    table.update(import_module(f"fcomm.backends.{name}").lowerings())
    return table[collective](*args, **params)


_TABLES: dict[str, dict[str, Lowering]] = {
    name: {collective: partial(_first, name, collective) for collective in _COLLECTIVES} for name in ("nccl", "hccl")
}

# Each looks for its library at the first collective of a group of several ranks.
nccl = register_backend(Backend("nccl", devices=("cuda",), lowerings=_TABLES["nccl"]))
hccl = register_backend(Backend("hccl", devices=("npu",), lowerings=_TABLES["hccl"]))
