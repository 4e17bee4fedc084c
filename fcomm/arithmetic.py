"""What "sum", "mean", "max", ... mean on every dtype: the arithmetic shared by specs and composed lowerings.

All folds go in rank order, ((x0 + x1) + x2) + ..., so every rank and every run gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from fcomm.dtypes import REDUCED
from fcomm.errors import ArgumentError

LINEAR_OPS = ("sum", "mean")
FOLDED_OPS = (*LINEAR_OPS, "max", "min", "prod")
BIT_OPS = ("band", "bor", "bxor")
OPS = (*FOLDED_OPS, *BIT_OPS)

_REDUCED = frozenset(REDUCED)  # every reduction looks here
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32} | dict.fromkeys(FLOAT8, torch.float32)
# torch has almost no kernels for these; addition, multiplication and bit operations are the same on the signed type.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

_FOLD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "prod": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def check_op(name: str, op: str, dtype: torch.dtype, allowed: Sequence[str] = OPS) -> None:
    """Raise if op is unknown (ArgumentError) or has no meaning for dtype (TypeError, naming both)."""
    if op not in allowed:
        raise ArgumentError(f"{name}: op is {op!r}; choose one of {', '.join(allowed)}")
    if dtype not in _REDUCED:
        to = torch.complex64 if dtype.is_complex else torch.float32 if dtype.is_floating_point else torch.uint8
        raise TypeError(
            f"{name}: op '{op}' has no meaning for {dtype} on any backend, it can be moved only; reduce a tensor of a "
            f"dtype with arithmetic, such as {to}"
        )
    if op in ("sum", "prod"):  # all other dtypes have these
        return
    if op in BIT_OPS and (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(
            f"{name}: op '{op}' is defined on integers and bool, on every backend, but x is {dtype}; choose another op"
        )
    if op in ("max", "min") and dtype.is_complex:
        raise TypeError(
            f"{name}: op '{op}' needs an order, on every backend, but x is {dtype}; "
            "reduce torch.view_as_real(x) or x.abs()"
        )
    if op == "mean" and dtype == torch.bool:
        raise TypeError(f"{name}: op 'mean' has no meaning for {dtype} on any backend; convert x to a float dtype")


def fold(xs: Sequence[Tensor], op: str) -> Tensor:
    """op over equally shaped tensors, in order; the result has their dtype and never aliases them.

    float16, bfloat16 and float8 accumulate in float32 and round once. Integers wrap around; integer means truncate
    toward zero. bool: sum and max are "or", prod and min are "and". max and min give NaN where any input is NaN.
    Complex sums and means are taken by real and imaginary parts.
    """
    dtype = xs[0].dtype
    if dtype in _WIDE:
        return fold([x.to(_WIDE[dtype]) for x in xs], op).to(dtype)
    if dtype in _SIGNED:
        return _fold_unsigned(xs, op)
    if op in ("max", "min") and dtype.is_floating_point:
        return _extremum(torch.stack(list(xs)), op)
    if dtype.is_complex and op in LINEAR_OPS:
        return torch.view_as_complex(fold([_parts(x) for x in xs], op))
    total = reduce(_FOLD[op], xs) if len(xs) > 1 else xs[0].clone()
    return divide(total, len(xs)) if op == "mean" else total


def _extremum(rows: Tensor, op: str) -> Tensor:
    """amax or amin over dim 0, whose derivative ties share equally, NaNs too; torch.amax's derivative is NaN at NaN."""
    nan = rows.isnan()
    worst = -torch.inf if op == "max" else torch.inf
    numbers = torch.where(nan, worst, rows)
    extremum = numbers.amax(0) if op == "max" else numbers.amin(0)
    total, count = torch.where(nan, rows, 0).sum(0), nan.sum(0)
    # torch.add computes total / k: compiled, the vjp of the jvp of a product or quotient fails, or crashes in Inductor.
    mean = total
    for k in range(2, len(rows) + 1):
        mean = torch.where(count == k, torch.add(total, total, alpha=1 / k - 1), mean)
    return torch.where(nan.any(0), mean, extremum)


def _parts(x: Tensor) -> Tensor:
    """Real and imaginary part: torch.add first multiplies a complex number by 1 + 0j, which turns infinity into NaN."""
    return torch.view_as_real(x.resolve_conj())


def divide(total: Tensor, size: int) -> Tensor:
    """total / size: complex numbers by parts, integers rounded toward zero, float8 by way of float32."""
    if total.dtype in FLOAT8:
        return divide(total.to(torch.float32), size).to(total.dtype)
    if total.dtype.is_complex:
        return torch.view_as_complex(_parts(total) / size)
    if total.dtype.is_floating_point:
        return total / size
    return torch.div(total, size, rounding_mode="trunc")


def _fold_unsigned(xs: Sequence[Tensor], op: str) -> Tensor:
    dtype = xs[0].dtype
    signed = _SIGNED[dtype]  # converting to it and back keeps the bits; view(dtype) has no batching rule in torch 2.11
    if op == "mean":
        return _unsigned_quotient(fold([x.to(signed) for x in xs], "sum"), len(xs)).to(dtype)
    if op in ("max", "min"):
        # Flipping the top bit maps unsigned order onto signed order, and back.
        top = torch.iinfo(signed).min
        return (fold([x.to(signed) ^ top for x in xs], op) ^ top).to(dtype)
    return fold([x.to(signed) for x in xs], op).to(dtype)


def _unsigned_quotient(x: Tensor, divisor: int) -> Tensor:
    """x // divisor, where the signed tensor x holds the bits of an unsigned number (Hacker's Delight, section 9-3)."""
    if divisor == 1:
        return x
    half = (x >> 1) & torch.iinfo(x.dtype).max
    quotient = torch.div(half, divisor, rounding_mode="trunc") << 1
    rest = x - quotient * divisor
    # rest is an unsigned number below 2 * divisor + 1, small enough to be read as signed.
    return quotient + (rest >= divisor).to(x.dtype)


def ties(x: Tensor, y: Tensor) -> Tensor:
    """1 where x attains the extremum y, else 0, in x's dtype (float32 for float8). NaN attains NaN."""
    return ((x == y) | (x.isnan() & y.isnan())).to(torch.float32 if x.dtype in FLOAT8 else x.dtype)


def product_of_others(rows: Tensor, own: Tensor) -> Tensor:
    """Product of the rows where the mask `own` is False; exact, and twice differentiable, at zeros.

    rows: [n, ..]; own broadcasts against it. The quotient prod / x would be 0/0 where x is 0.
    """
    others = torch.where(own, torch.ones((), dtype=rows.dtype, device=rows.device), rows)
    if rows.dtype in FLOAT8:  # torch has no product of these
        others = others.to(torch.float32)
    # Under autocast torch's product of a half type stays in float32.
    return others.prod(0).to(rows.dtype)
