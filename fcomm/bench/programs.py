"""A record -> its call on known values, and what the result must be.

Sizes follow nccl-tests: the larger one of a rank's input and output (all_gather: the whole output,
reduce_scatter: the whole input). Values are small integers: every sum is exact in every type and order.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fcomm
from fcomm.group import Backend, Group
from fcomm.record import Record, default_params
from fcomm.registration import RECORDS


@dataclass(frozen=True)
class Program:
    """One collective on one size: x of this rank, the public call, and the expected result.

    count: elements of the size that the table names.  op, root: as the table prints them, "none" and -1 without.
    """

    name: str
    x: Tensor
    count: int
    op: str
    root: int
    call: Callable[[Tensor], Tensor]
    expected: Tensor


def build(name: str, nbytes: int, dtype: torch.dtype, op: str, root: int, group: Group, backend: Backend) -> Program:
    """The program of a record on nbytes, or a little less: whole elements, in equal blocks where it has blocks."""
    record, rank, n = RECORDS[name], group.rank or 0, group.size
    elements = max(1, nbytes // dtype.itemsize)
    chosen = {"op": op, "src": root, "dst": root, "perm": [(r, (r + 1) % n) for r in range(n)]}
    whole = _SEVERAL_TENSORS.get(name, _one_tensor)
    count, length, call, meaning = whole(record, elements, group, backend, chosen)
    xs = [_values(name, length, dtype, op, r) for r in range(n)]
    return Program(
        name,
        xs[rank],
        count,
        op if "op" in record.params else "none",
        root if {"src", "dst"} & set(record.params) and name != "send" else -1,
        call,
        meaning(xs)[rank],
    )


# Elements of the size, length of x, the call, and what it means over the list of all ranks' x.
Parts = tuple[int, int, Callable[[Tensor], Tensor], Callable[[list[Tensor]], Sequence[Tensor]]]


def _in_blocks(elements: int, size: int) -> int:
    return max(size, elements // size * size)


def _one_tensor(record: Record, elements: int, group: Group, backend: Backend, chosen: dict[str, Any]) -> Parts:
    """Any collective that takes x and options."""
    if record.tensors != ("x",):
        raise fcomm.FcommError(
            f"bench: {record.name} takes the tensors {', '.join(record.tensors)}; the benchmark fills x only"
        )
    function = getattr(fcomm, record.name, None)
    defaults = {k: p.default for k, p in inspect.signature(function).parameters.items()} if function else {}
    chosen = {k: v for k, v in chosen.items() if k in record.params}
    params = {k: chosen.get(k, defaults.get(k, d)) for k, d in default_params(record).items()}
    params = {k: [r for pair in v for r in pair] if k == "perm" else v for k, v in params.items()}
    options = {k: v for k, v in chosen.items() if v != defaults.get(k)}
    values = tuple(params.values())

    def call(x: Tensor) -> Tensor:
        if function is None:
            return fcomm.apply(record.name, x, group, backend, *values)
        return function(x, group, backend, **options)  # type: ignore[no-any-return]

    # A collective with a dim cuts that dim into blocks, or joins blocks along it.
    count = _in_blocks(elements, group.size) if record.dims else elements
    (grown,) = record.shape((count,), group, **params)
    length = count // group.size if grown > count else count
    return count, length, call, lambda xs: record.spec(xs, **params)


def _ring(record: Record, elements: int, group: Group, backend: Backend, chosen: dict[str, Any]) -> Parts:
    """send to the next rank and recv from the previous one, nccl-tests' sendrecv."""

    def call(x: Tensor) -> Tensor:
        return fcomm.recv(x, group, backend, after=fcomm.send(x, group, backend))

    return elements, elements, call, lambda xs: [xs[-1], *xs[:-1]]


def _even_ragged(record: Record, elements: int, group: Group, backend: Backend, chosen: dict[str, Any]) -> Parts:
    """Equal slices to every rank, side by side at the receiver: all_to_all, by offsets and sizes."""
    n, count = group.size, _in_blocks(elements, group.size)
    rows = count // n
    starts, sizes = torch.arange(n) * rows, torch.full((n,), rows)
    landing = torch.full((n,), rows * (group.rank or 0))

    def call(x: Tensor) -> Tensor:
        return fcomm.ragged_all_to_all(x, torch.empty_like(x), starts, sizes, landing, sizes, group, backend)

    return count, count, call, lambda xs: [torch.cat([x.chunk(n)[r] for x in xs]) for r in range(n)]


_SEVERAL_TENSORS: dict[str, Callable[[Record, int, Group, Backend, dict[str, Any]], Parts]] = {
    "send": _ring,
    "ragged_all_to_all": _even_ragged,
}


def _values(name: str, length: int, dtype: torch.dtype, op: str, rank: int) -> Tensor:
    low, high = (1, 3) if op == "prod" else (0, 2) if dtype == torch.bool else (0, 7)
    if dtype.is_signed and op != "prod":
        low, high = -3, 4
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + rank)
    return torch.randint(low, high, (length,), generator=generator, dtype=torch.int8).to(dtype)


def count_wrong(got: Tensor, expected: Tensor) -> int:
    """Elements of got that are not expected's, up to the rounding of one division."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return max(got.numel(), expected.numel(), 1)
    if not (got.is_floating_point() or got.is_complex()):
        return int((got != expected).sum())
    epsilon = torch.finfo(got.dtype).eps
    return int((~torch.isclose(got, expected, rtol=2 * epsilon, atol=0.0)).sum())
