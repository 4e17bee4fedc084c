"""hypothesis strategies for what collectives take: groups, dims, permutations, block sizes, and awkward tensors.

    @given(strategies.groups().flatmap(lambda g: st.tuples(st.just(g), strategies.perms(g.size))))
    def test_ppermute(group_and_perm): ...

Everything shrinks toward one rank, dimension 0, the empty permutation, and small contiguous tensors of zeros.
Importing this module needs hypothesis, which nothing else in fcomm does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fcomm.arithmetic import FLOAT8
from fcomm.group import Group, axis
from fcomm.testing.check import draw as draw_values

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("fcomm.testing.strategies needs hypothesis; pip install 'fcomm[test]'") from error

INTEGERS = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex128, torch.complex64)
DTYPES = (*FLOATS, *COMPLEX, torch.bool, *INTEGERS, *FLOAT8)
VALUES = ("normal", "ties", "zeros", "nan", "extremes")
LAYOUTS = ("contiguous", "transposed", "gaps", "offset", "expanded", "overlapping", "conjugate", "negative")


def sizes(smallest: int = 1, largest: int = 4) -> st.SearchStrategy[int]:
    """Numbers of ranks; 1 to 4, since two ranks hide an inverted permutation."""
    return st.integers(smallest, largest)


@st.composite
def groups(draw: st.DrawFn, name: str = "ranks", smallest: int = 1, largest: int = 4) -> Group:
    """Simulated groups of that name, fcomm.axis(name, size)."""
    return axis(name, draw(sizes(smallest, largest)))


def dims(ndim: int) -> st.SearchStrategy[int]:
    """Dimensions of a tensor of ndim >= 1 dimensions, counted from the front or from the end."""
    return st.sampled_from([*range(ndim), *range(-1, -ndim - 1, -1)])


@st.composite
def perms(draw: st.DrawFn, size: int, partial: bool = True) -> list[tuple[int, int]]:
    """(source, destination) pairs as fcomm.ppermute takes them; partial ones leave ranks out on either side."""
    count = draw(st.integers(0, size)) if partial else size
    sources = draw(st.permutations(range(size)))[:count]
    destinations = draw(st.permutations(range(size)))[:count]
    return list(zip(sources, destinations, strict=True))


@st.composite
def block_sizes(draw: st.DrawFn, size: int, longest: int = 3, smallest_total: int = 0) -> list[int]:
    """One block length for each rank, like `sizes` of all_gather and reduce_scatter; zeros occur."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=size, max_size=size))
    lengths[-1] += max(0, smallest_total - sum(lengths))
    return lengths


def send_matrices(size: int, longest: int = 3) -> st.SearchStrategy[list[list[int]]]:
    """Row s: the lengths that rank s sends to each rank, like `send_sizes` of all_to_all; rows and columns differ."""
    row = st.lists(st.integers(0, longest), min_size=size, max_size=size)
    return st.lists(row, min_size=size, max_size=size)


@st.composite
def routes(draw: st.DrawFn, size: int, sent_rows: int, longest: int = 2) -> tuple[int, tuple[Tensor, ...]]:
    """For ragged_all_to_all: the rows of output it needs, and input_offsets, send_sizes, output_offsets, recv_sizes.

    The four are [size, size] with the rank in the leading dimension. Sent slices may overlap, received ones do not;
    empty ones, and untouched rows between the others, occur.
    """
    longest = min(longest, sent_rows)
    sends = torch.tensor(draw(send_matrices(size, longest)), dtype=torch.int64).reshape(size, size)
    starts = torch.tensor(draw(send_matrices(size, max(0, sent_rows - longest))), dtype=torch.int64).reshape(size, size)
    gaps = torch.tensor(draw(send_matrices(size, 1)), dtype=torch.int64).reshape(size, size)
    # At a receiver (a column) the slices lie one after the other, each after its gap.
    landing = (gaps + sends).cumsum(0) - sends
    rows = int((gaps + sends).sum(0).max()) + draw(st.integers(0, 1))
    return rows, (starts, sends, landing, sends.T.contiguous())


def shapes(largest_ndim: int = 3, longest: int = 4, smallest_ndim: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes, 0-d and empty ones included."""
    return st.lists(st.integers(0, longest), min_size=smallest_ndim, max_size=largest_ndim).map(tuple)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int] | st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    values: Sequence[str] = VALUES,
    layouts: Sequence[str] = LAYOUTS,
) -> Tensor:
    """Tensors of a shape (or of shapes()), a dtype, a kind of values, and a layout.

    values: "normal"; "ties", few distinct values; "zeros", half of them exact zeros; "nan", NaN and infinities among
        normal ones; "extremes", the dtype's largest and smallest. Integers and bool have no NaN and get "ties".
    layouts: "transposed", "gaps" (every other element of a larger tensor), "offset" (into its storage), "expanded"
        (stride 0), "overlapping" (as_strided onto itself), "conjugate" (complex) and "negative" (real) with that bit
        set. A layout that the shape or dtype cannot have is "contiguous".
    """
    if shape is None or isinstance(shape, st.SearchStrategy):
        shape = draw(shapes() if shape is None else shape)
    dtype, kind = draw(st.sampled_from(list(dtypes))), draw(st.sampled_from(list(values)))
    x = valued(shape, kind, dtype, draw(st.integers(0, 2**16)))
    return in_layout(x, draw(st.sampled_from(list(layouts))))


def valued(shape: Sequence[int], values: str, dtype: torch.dtype, seed: int) -> Tensor:
    """A contiguous tensor of one of the kinds of VALUES, the same for the same seed."""
    numeric = dtype.is_floating_point or dtype.is_complex
    if values == "extremes" and dtype != torch.bool:
        info = torch.finfo(dtype) if numeric else torch.iinfo(dtype)
        # Half of a float's range, so that the difference of two is finite, but a sum not always.
        largest = info.max / 2 if numeric else info.max
        choice = draw_values(shape, "ties", torch.float64, seed)
        table = torch.tensor([info.min / 2 if numeric else info.min, 0, largest], dtype=dtype)
        # Gather the bytes, since indexing has no kernel for some dtypes.
        rows = table.view(torch.uint8).reshape(3, dtype.itemsize)[choice.long().reshape(-1)]
        return rows.reshape(-1).view(dtype).reshape(tuple(shape))
    if not numeric or values in ("ties", "zeros"):
        return draw_values(shape, values if numeric else "integers", _drawable(dtype), seed).to(dtype)
    x = draw_values(shape, "normal", _drawable(dtype), seed)
    if values == "nan":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)
        which = draw_values(shape, "ties", torch.float64, seed + 1).long()
        x = torch.where(draw_values(shape, "ties", torch.float64, seed + 2) == 0, special[which], x)
    return x.to(dtype)


def _drawable(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose random numbers are drawn: torch draws none of narrow and unsigned dtypes."""
    if dtype in FLOAT8:
        return torch.float32
    return torch.int64 if dtype in INTEGERS else dtype


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x in one of LAYOUTS: the same values, except that "expanded" and "overlapping" repeat some of them."""
    if layout == "transposed" and x.dim() > 1:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "gaps" and x.dim() > 0:
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
    if layout == "expanded" and x.numel():
        return x.reshape(-1)[0].expand(x.shape)
    if layout == "overlapping" and x.numel():
        return x.reshape(-1).as_strided(x.shape, [1] * x.dim()) if _fits(x) else x
    if layout == "conjugate" and x.dtype.is_complex:
        return x.conj().resolve_conj().conj()
    if layout == "negative" and x.dtype in (torch.float32, torch.float64):
        # The imaginary part of a conjugate view is the stored number with the negative bit set.
        return torch.view_as_complex(pad(-x[..., None], (1, 0))).conj().imag
    return x


def _fits(x: Tensor) -> bool:
    return sum(d - 1 for d in x.shape) < x.numel()
