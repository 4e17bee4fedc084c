"""ragged_all_to_all: blocks of rows whose offsets and lengths are data, known only to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcomm.arithmetic import FLOAT8, check_op, fold
from fcomm.collectives import checks
from fcomm.collectives.exchange import all_to_all
from fcomm.dtypes import REDUCED, carrier
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.registration import apply, check_call, define


def ragged_all_to_all(
    operand: Tensor,
    output: Tensor,
    input_offsets: Tensor,
    send_sizes: Tensor,
    output_offsets: Tensor,
    recv_sizes: Tensor,
    group: Group,
    backend: Backend,
) -> Tensor:
    """Send rows of operand to each rank, into rows of that rank's output, as jax.lax.ragged_all_to_all does.

        rank 0  operand [a b b]  send_sizes [1 2]      [a c . .]
        rank 1  operand [c c d]  send_sizes [1 2]  ->  [b b . .]     (c d to itself: [b b c d])

    operand is [rows, ..], output [rows', ..] with the same trailing shape and dtype. The four others are integer
    tensors of shape (n,), n = group.size. This rank sends operand[input_offsets[r] :][: send_sizes[r]] to rank r, whose
    result has it from row output_offsets[r] of the receiver on; recv_sizes[r] rows come from rank r. The other rows of
    the result are those of output. Any dtype. Received slices must not overlap; sent slices may.
    vjp: operand: ragged_all_to_all backwards, summed where sent slices overlap; output: the cotangent, zero on received
    rows. Traffic: the rows sent.
    Raises ArgumentError if the shapes or dtypes do not fit; between processes also if a slice leaves its tensor, and
    MismatchError if send_sizes and recv_sizes of two ranks differ. Simulated ranks, which cannot raise depending on
    data, and a group of one read zeros outside operand, and drop rows outside output.
    """
    places = input_offsets, send_sizes, output_offsets, recv_sizes
    _check(operand, output, places, group, backend)
    # The sum of an offset and a size may overflow their dtype, and torch does not add uint16 to int64.
    input_offsets, send_sizes, output_offsets, recv_sizes = (v.to(torch.int64) for v in places)
    # Where each rank's rows land in this rank's result: the senders know it, this rank needs it.
    landing = all_to_all(output_offsets, group, backend)
    received = _inside(landing, recv_sizes, output.shape[0]).any(0)
    y = apply(
        "ragged_all_to_all",
        (operand, input_offsets, send_sizes, output_offsets, recv_sizes),
        group,
        backend,
        output.shape[0],
        operand.shape[0],
    )
    return _choose(received, y, output)


def _choose(received: Tensor, y: Tensor, output: Tensor) -> Tensor:
    """Rows of y where received, else of output. torch 2.11's where takes no unsigned integers, bits or float4."""
    if output.dtype in (torch.uint16, torch.uint32, torch.uint64):
        # By index, not viewed as signed integers: torch 2.11's vmap has no rule for view(dtype).
        rows = torch.arange(output.shape[0], device=output.device)
        return torch.cat([y, output])[torch.where(received, rows, rows + output.shape[0])]
    mask = _column(received, output)
    try:
        return torch.where(mask, y, output)
    except NotImplementedError:
        if output.dtype in REDUCED:
            raise
        carried = carrier(output.dtype)
        return torch.where(mask, y.view(carried), output.view(carried)).view(output.dtype)


def _check(operand: Tensor, output: Tensor, vectors: Sequence[Tensor], group: Group, backend: Backend) -> None:
    names = "operand", "output", "input_offsets", "send_sizes", "output_offsets", "recv_sizes"
    for name, x in zip(names, (operand, output, *vectors), strict=True):
        checks.is_tensor("ragged_all_to_all", name, x)
    # Check here too, since apply would refuse only after the landing places were sent.
    check_call("ragged_all_to_all", (operand, output, *vectors), group, backend)
    if operand.dim() < 1 or operand.shape[1:] != output.shape[1:] or operand.dtype != output.dtype:
        raise ArgumentError(
            f"ragged_all_to_all: operand is {tuple(operand.shape)} {operand.dtype}, output {tuple(output.shape)} "
            f"{output.dtype}; both have rows, and only their numbers of rows may differ"
        )
    for name, v in zip(names[2:], vectors, strict=True):
        if v.shape != (group.size,) or v.is_floating_point() or v.is_complex() or v.dtype == torch.bool:
            raise ArgumentError(
                f"ragged_all_to_all: {name} is {tuple(v.shape)} {v.dtype}; group '{group.name}' needs "
                f"({group.size},) integers, one for each rank"
            )


def _inside(offsets: Tensor, sizes: Tensor, rows: int) -> Tensor:
    """[n, rows] bool: whether row p lies in the slice of each offset and size. Also right for empty slices."""
    p = torch.arange(rows, device=offsets.device)
    return (p >= offsets[:, None]) & (p < (offsets + sizes)[:, None])


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.dim() - 1))


# The op itself is the linear core: rows of x are added into zeros. Because it adds and does not overwrite, it is closed
# under transposition: a row sent to two ranks gets back the sum of two cotangents.


def _spec(
    xs: list[Tensor],
    input_offsets: list[Tensor],
    send_sizes: list[Tensor],
    output_offsets: list[Tensor],
    recv_sizes: list[Tensor],
    rows: int,
    sent_rows: int,
) -> list[Tensor]:
    dtype = xs[0].dtype
    if dtype not in REDUCED:  # torch can neither add nor index these
        raw = [x.view(carrier(dtype)) for x in xs]
        ys = _spec(raw, input_offsets, send_sizes, output_offsets, recv_sizes, rows, sent_rows)
        return [y.view(dtype) for y in ys]
    ys = []
    zero = _neutral(dtype)
    for r in range(len(xs)):
        y = xs[r].new_full((rows, *xs[r].shape[1:]), zero)
        received = torch.zeros(rows, dtype=torch.bool, device=y.device)
        for s in range(len(xs)):
            # An additional zero row, read where the row of y is not in the slice from s.
            x = torch.cat([xs[s], xs[s].new_full((1, *xs[s].shape[1:]), zero)])
            start, size = output_offsets[s][r], send_sizes[s][r]
            p = torch.arange(rows, device=x.device)
            row = p - start + input_offsets[s][r]
            hit = (p >= start) & (p < start + size) & (row >= 0) & (row < xs[s].shape[0])
            y = fold([y, x[torch.where(hit, row, x.shape[0] - 1)]], "sum")
            received = received | hit
        ys.append(_choose(received, y, torch.zeros_like(y)) if dtype.is_floating_point or dtype.is_complex else y)
    return ys


def _neutral(dtype: torch.dtype) -> float | complex:
    """The number that leaves any other unchanged when added, including the sign of a zero."""
    return complex(-0.0, -0.0) if dtype.is_complex else -0.0 if dtype.is_floating_point else 0


def _vjp(
    ct: Tensor,
    group: Group,
    backend: Backend,
    input_offsets: Tensor,
    send_sizes: Tensor,
    output_offsets: Tensor,
    recv_sizes: Tensor,
    rows: int,
    sent_rows: int,
) -> Tensor:
    check_op("ragged_all_to_all", "sum", ct.dtype)  # rows sent twice get the sum of two cotangents
    back = all_to_all(output_offsets, group, backend), recv_sizes, all_to_all(input_offsets, group, backend), send_sizes
    return apply("ragged_all_to_all", (ct, *back), group, backend, sent_rows, rows)


# torch does not add these, or not their parts separately; the others it adds in place.
_FOLDED = (*FLOAT8, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128)


def _compose(
    x: Tensor,
    input_offsets: Tensor,
    send_sizes: Tensor,
    output_offsets: Tensor,
    recv_sizes: Tensor,
    group: Group,
    backend: Backend,
    rows: int,
    sent_rows: int,
) -> Tensor:
    """On a machine whose library takes its sizes from the host: one host synchronisation, then an uneven all_to_all."""
    if x.dtype not in REDUCED:
        vectors = input_offsets, send_sizes, output_offsets, recv_sizes
        return _compose(x.view(carrier(x.dtype)), *vectors, group, backend, rows, sent_rows).view(x.dtype)
    landing = all_to_all(output_offsets, group, backend)
    starts, sends, lands, recvs = torch.stack([input_offsets, send_sizes, landing, recv_sizes]).tolist()
    for what, offsets, lengths, limit in (("send", starts, sends, x.shape[0]), ("recv", lands, recvs, rows)):
        if any(o < 0 or d < 0 or o + d > limit for o, d in zip(offsets, lengths, strict=True) if d):
            raise ArgumentError(
                f"ragged_all_to_all: {what} offsets {offsets} with sizes {lengths} leave the {limit} rows there are; "
                f"correct them on group '{group.name}'"
            )
    packed = torch.cat([x[o : o + d] for o, d in zip(starts, sends, strict=True)])
    got = all_to_all(packed, group, backend, send_sizes=sends, recv_sizes=recvs)
    y = x.new_full((rows, *x.shape[1:]), _neutral(x.dtype))
    end = 0
    for o, d in sorted((o, d) for o, d in zip(lands, recvs, strict=True) if d) + [(rows, 0)]:
        if o > end:  # rows that no rank sent
            y.narrow(0, end, o - end).zero_()
        end = max(end, o + d)
    for block, o in zip(got.split(recvs), lands, strict=True):
        part = y.narrow(0, o, block.shape[0])
        part.copy_(fold([part, block], "sum")) if x.dtype in _FOLDED else part.add_(block)
    return y


def _batch(
    call: Callable[..., Tensor], size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[Tensor, int]:
    if all(d is None for d in in_dims[1:]):
        # The same rows for every example: the batch is one more trailing dimension.
        return call(tensors[0].movedim(in_dims[0] or 0, 1), *tensors[1:]), 1
    each = [[x] * size if d is None else list(x.unbind(d)) for x, d in zip(tensors, in_dims, strict=True)]
    return torch.stack([call(*example) for example in zip(*each, strict=True)]), 0


define(
    "ragged_all_to_all",
    aux=("input_offsets", "send_sizes", "output_offsets", "recv_sizes"),
    schema="SymInt rows, SymInt sent_rows",
    spec=_spec,
    shape=lambda x, a, b, c, d, group, rows, sent_rows: (rows, *x[1:]),
    vjp=_vjp,
    compose=_compose,
    batch=_batch,
    busbw=lambda n: (n - 1) / n,
)
