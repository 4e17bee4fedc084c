"""compat.lax over several groups, where JAX has several axis names, and over blocks of ranks, its axis_index_groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fcomm
from fcomm.compat import lax
from fcomm.errors import FcommError
from fcomm.testing import run_ranks

N = 4
AXIS = fcomm.axis("i", N)
HANDLES = (AXIS, fcomm.sim)


def on_axis(fn: Callable[..., Any], *args: Any) -> Any:
    return fcomm.simulate(fn, AXIS)(*args)


# --- several groups, where JAX has several axis names -------------------------------------------------------------

ROWS, COLUMNS = fcomm.axis("rows", 2), fcomm.axis("columns", 3)
BOTH = (ROWS, COLUMNS)
FLAT = fcomm.axis("flat", 6)

OVER_BOTH: dict[str, Callable[[Tensor, Any], Any]] = {
    "all_gather": lambda x, g: lax.all_gather(x, g, fcomm.sim),
    "all_gather axis=-1": lambda x, g: lax.all_gather(x, g, fcomm.sim, axis=-1),
    "all_gather tiled": lambda x, g: lax.all_gather(x, g, fcomm.sim, axis=1, tiled=True),
    "all_gather invarying": lambda x, g: lax.all_gather(x, g, fcomm.sim, axis=-1, to="invarying"),
    "psum_scatter": lambda x, g: lax.psum_scatter(x, g, fcomm.sim, scatter_dimension=-2),
    "psum_scatter tiled": lambda x, g: lax.psum_scatter(x, g, fcomm.sim, scatter_dimension=1, tiled=True),
    "all_to_all": lambda x, g: lax.all_to_all(x, g, fcomm.sim, 0, 1),
    "all_to_all one axis": lambda x, g: lax.all_to_all(x, g, fcomm.sim, 0, 0),
    "all_to_all tiled": lambda x, g: lax.all_to_all(x, g, fcomm.sim, -1, 0, tiled=True),
    "all_to_all tiled one axis": lambda x, g: lax.all_to_all(x, g, fcomm.sim, 1, 1, tiled=True),
    "pswapaxes": lambda x, g: lax.pswapaxes(x, g, fcomm.sim, 0),
    "ppermute": lambda x, g: lax.ppermute(x, g, fcomm.sim, [(0, 4), (4, 5), (5, 1), (2, 2)]),
    "pshuffle": lambda x, g: lax.pshuffle(x, g, fcomm.sim, [5, 3, 1, 0, 2, 4]),
    "pbroadcast": lambda x, g: lax.pbroadcast(x, g, fcomm.sim, 4),
    "psum": lambda x, g: lax.psum(x, g, fcomm.sim),
    "pmax": lambda x, g: lax.pmax(x, g, fcomm.sim),
    "axis_index": lambda x, g: x + lax.axis_index(g, fcomm.sim),
}


@pytest.mark.parametrize("name", OVER_BOTH)
def test_several_groups_are_one_group_of_all_their_ranks(name: str) -> None:
    call = OVER_BOTH[name]
    x = torch.randn(6, 6, 12, dtype=torch.float64)
    ct = torch.randn_like(fcomm.simulate(lambda x: call(x, FLAT), FLAT)(x))

    def value_and_vjp(group: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def rank(x: Tensor, ct: Tensor) -> tuple[Tensor, Tensor]:
            y, pull = torch.func.vjp(lambda x: call(x, group), x)
            return y, pull(ct)[0]

        return rank

    expected = fcomm.simulate(value_and_vjp(FLAT), FLAT)(x, ct)
    both = fcomm.simulate(fcomm.simulate(value_and_vjp(BOTH), COLUMNS), ROWS)
    got = both(x.unflatten(0, (2, 3)), ct.unflatten(0, (2, 3)))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.flatten(0, 1), e)


def test_several_groups_in_one_graph() -> None:
    torch.compiler.reset()
    x = torch.randn(2, 3, 6, 12)

    def rank(x: Tensor) -> list[Tensor]:
        return [call(x, BOTH) for call in OVER_BOTH.values()]

    program = fcomm.simulate(fcomm.simulate(rank, COLUMNS), ROWS)
    got = torch.compile(program, fullgraph=True, backend="aot_eager")(x)
    for g, e in zip(got, program(x), strict=True):
        torch.testing.assert_close(g, e)


def test_several_groups_refuse_what_does_not_fit() -> None:
    def on_both(call: Callable[[Tensor], Any]) -> None:
        fcomm.simulate(fcomm.simulate(call, COLUMNS), ROWS)(torch.zeros(2, 3, 4))

    with pytest.raises(ValueError, match=r"x.shape\[0\] is 4; the 6 ranks of groups \['rows', 'columns'\] need 6"):
        on_both(lambda x: lax.all_to_all(x, BOTH, fcomm.sim, 0, 0))
    with pytest.raises(ValueError, match="need a multiple of 6"):
        on_both(lambda x: lax.all_to_all(x, BOTH, fcomm.sim, 0, 0, tiled=True))
    with pytest.raises(ValueError, match="'rows and columns'"):
        on_both(lambda x: lax.ppermute(x, BOTH, fcomm.sim, [(0, 6)]))
    with pytest.raises(ValueError, match="pbroadcast: source is 6, not a rank of group 'rows and columns'"):
        on_both(lambda x: lax.pbroadcast(x, BOTH, fcomm.sim, 6))
    with pytest.raises(ValueError, match=r"psum_scatter: x.shape\[0\] is 4; the 6 ranks .* need a multiple of 6"):
        on_both(lambda x: lax.psum_scatter(x, BOTH, fcomm.sim, tiled=True))


def test_no_group_is_the_rank_alone_as_in_jax() -> None:
    x = torch.arange(3.0)
    for reduce in (lax.psum, lax.pmean, lax.pmax, lax.pmin, lax.all_gather, lax.psum_scatter, lax.pvary):
        assert torch.equal(reduce(x, (), fcomm.sim), x)
    assert lax.axis_index((), fcomm.sim).item() == 0
    assert lax.axis_index((), fcomm.sim).dtype == torch.int64
    assert lax.axis_size((), fcomm.sim) == 1
    for call in (
        lambda: lax.ppermute(x, (), fcomm.sim, []),
        lambda: lax.pbroadcast(x, (), fcomm.sim, 0),
        lambda: lax.all_to_all(x, (), fcomm.sim, 0, 0),
        lambda: lax.psum(x, (), fcomm.sim, axis_index_groups=[[0]]),
    ):
        with pytest.raises(ValueError, match="no group is given"):
            call()


def test_what_is_no_group_or_no_permutation_is_named_with_the_function() -> None:
    x = torch.arange(3.0)
    for name, call in (
        ("psum", lambda: lax.psum(x, "i", fcomm.sim)),
        ("axis_size", lambda: lax.axis_size("i", fcomm.sim)),
    ):
        with pytest.raises(TypeError, match=f"{name}: group is 'i'; pass a Group"):
            call()
    for perm, text in (
        (3, r"perm is 3; pass \(source, destination\) pairs"),
        ([1], r"perm is \[1\]; pass \(source, destination\) pairs"),
        ([(0, "b")], "a rank in perm is 'b'"),
    ):
        with pytest.raises(ValueError, match=f"ppermute: {text}"):
            lax.ppermute(x, fcomm.axis("i", 2), fcomm.sim, perm)


def test_a_group_named_twice_is_refused_as_in_jax() -> None:
    def on_both(call: Callable[[Tensor], Any]) -> None:
        fcomm.simulate(fcomm.simulate(call, COLUMNS), ROWS)(torch.zeros(2, 3, 12, 12))

    twice = (COLUMNS, ROWS, COLUMNS)
    for call in (
        lambda x: lax.psum(x, twice, fcomm.sim),
        lambda x: lax.pmax(x, twice, fcomm.sim),
        lambda x: lax.all_gather(x, twice, fcomm.sim),
        lambda x: lax.psum_scatter(x, twice, fcomm.sim, tiled=True),
        lambda x: lax.all_to_all(x, twice, fcomm.sim, 0, 0, tiled=True),
        lambda x: lax.pbroadcast(x, twice, fcomm.sim, 0),
        lambda x: lax.pvary(x, twice, fcomm.sim),
    ):
        with pytest.raises(ValueError, match=r"\['columns', 'rows', 'columns'\]; pass each once"):
            on_both(call)


@pytest.mark.parametrize("group", [None, "rows", {ROWS, COLUMNS}, (ROWS, "columns"), 0])
def test_what_is_no_group_and_no_sequence_of_groups_is_a_type_error(group: Any) -> None:
    """A set has no order, but the order of the groups determines that of the ranks."""
    with pytest.raises(TypeError, match="pass a Group, or a list or tuple of them"):
        lax.psum(torch.zeros(2), group, fcomm.sim)


# --- axis_index_groups --------------------------------------------------------------------------------------------

OF_BLOCKS: dict[str, Callable[..., Any]] = {
    "psum": lambda x, g, **b: lax.psum(x, g, fcomm.sim, **b),
    "psum of a number": lambda x, g, **b: x + lax.psum(3, g, fcomm.sim, **b),
    "pmean": lambda x, g, **b: lax.pmean(x, g, fcomm.sim, **b),
    "pmean of a number": lambda x, g, **b: x + lax.pmean(3, g, fcomm.sim, **b),
    "pmax": lambda x, g, **b: lax.pmax(x.round(), g, fcomm.sim, **b),
    "pmin": lambda x, g, **b: lax.pmin(x, g, fcomm.sim, **b),
    "all_gather": lambda x, g, **b: lax.all_gather(x, g, fcomm.sim, axis=-1, **b),
    "all_gather tiled": lambda x, g, **b: lax.all_gather(x, g, fcomm.sim, axis=1, tiled=True, **b),
    "psum_scatter": lambda x, g, **b: lax.psum_scatter(
        x[: g[-1].size if isinstance(g, tuple) else len(b["axis_index_groups"][0])], g, fcomm.sim, **b
    ),
    "psum_scatter tiled": lambda x, g, **b: lax.psum_scatter(x, g, fcomm.sim, scatter_dimension=-1, tiled=True, **b),
    "all_to_all tiled": lambda x, g, **b: lax.all_to_all(x, g, fcomm.sim, -1, 0, tiled=True, **b),
    "all_to_all tiled one axis": lambda x, g, **b: lax.all_to_all(x, g, fcomm.sim, 1, 1, tiled=True, **b),
}


@pytest.mark.parametrize("name", OF_BLOCKS)
@pytest.mark.parametrize(
    ("blocks", "axis"), [([[0, 1, 2], [3, 4, 5]], COLUMNS), ([[0, 3], [1, 4], [2, 5]], ROWS)], ids=["rows", "columns"]
)
def test_blocks_of_ranks_are_groups_of_their_own(name: str, blocks: list[list[int]], axis: fcomm.Group) -> None:
    call = OF_BLOCKS[name]
    x = torch.randn(6, 6, 12, dtype=torch.float64)

    def on_blocks(x: Tensor) -> Tensor:
        return call(x, FLAT, axis_index_groups=blocks)

    def on_axis_of_grid(x: Tensor) -> Tensor:
        return call(x, (axis,))

    def value_and_vjp(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def rank(x: Tensor, ct: Tensor) -> tuple[Tensor, Tensor]:
            y, pull = torch.func.vjp(call, x)
            return y, pull(ct)[0]

        return rank

    ct = torch.randn_like(fcomm.simulate(on_blocks, FLAT)(x))
    got = fcomm.simulate(value_and_vjp(on_blocks), FLAT)(x, ct)
    grid = fcomm.simulate(fcomm.simulate(value_and_vjp(on_axis_of_grid), COLUMNS), ROWS)
    expected = grid(x.unflatten(0, (2, 3)), ct.unflatten(0, (2, 3)))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e.flatten(0, 1))


def test_blocks_list_their_ranks_in_any_order() -> None:
    x = torch.arange(4.0)
    blocks = [[2, 0], [1, 3]]
    gathered = on_axis(lambda x: lax.all_gather(x, *HANDLES, axis_index_groups=blocks), x)
    assert gathered.tolist() == [[2, 0], [1, 3], [2, 0], [1, 3]]
    scattered = on_axis(lambda x: lax.psum_scatter(x, *HANDLES, axis_index_groups=blocks), gathered)
    assert scattered.tolist() == [0, 2, 4, 6]
    integers = on_axis(lambda x: lax.psum(x, *HANDLES, axis_index_groups=blocks), x.int())
    assert integers.dtype == torch.int32
    assert integers.tolist() == [2, 4, 2, 4]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_blocks_and_several_groups_take_unsigned_integers(dtype: torch.dtype) -> None:
    blocks: dict[str, Any] = {"axis_index_groups": [[2, 0], [1, 3]]}
    top = torch.iinfo(dtype).max  # the signed dtype of that width does not have it
    x = torch.tensor([[0, 1], [top, 2], [3, top], [4, 5]], dtype=dtype)

    def rows(call: Callable[[Tensor], Any]) -> Any:
        y = on_axis(call, x)
        assert y.dtype == dtype
        return y.tolist()

    assert rows(lambda x: lax.psum(x, *HANDLES, **blocks)) == [[3, 0], [3, 7], [3, 0], [3, 7]]
    assert rows(lambda x: lax.pmax(x, *HANDLES, **blocks)) == [[3, top], [top, 5]] * 2
    assert rows(lambda x: lax.pmin(x, *HANDLES, axis_index_groups=[[0, 1, 3], [2]])) == [
        [0, 1],
        [0, 1],
        [3, top],
        [0, 1],
    ]
    assert rows(lambda x: lax.all_gather(x, *HANDLES, tiled=True, **blocks)) == [[3, top, 0, 1], [top, 2, 4, 5]] * 2
    assert rows(lambda x: lax.psum_scatter(x, *HANDLES, **blocks)) == [0, 3, 3, 7]
    assert rows(lambda x: lax.all_to_all(x, *HANDLES, 0, 0, **blocks)) == [[top, 1], [top, 4], [3, 0], [2, 5]]

    def over_two(x: Tensor) -> Any:
        return lax.ppermute(x, (ROWS, COLUMNS), fcomm.sim, [(0, 5), (5, 1)])

    x = torch.tensor([[top, 1, 2], [3, 4, top - 1]], dtype=dtype)
    y = fcomm.simulate(fcomm.simulate(over_two, COLUMNS), ROWS)(x)
    assert y.dtype == dtype
    assert y.tolist() == [[0, top - 1, 0], [0, 0, top]]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: lax.all_gather(x, *HANDLES, tiled=True),
        lambda x: lax.all_gather(x, *HANDLES, tiled=True, axis_index_groups=[[0, 1], [2, 3]]),
        lambda x: lax.psum_scatter(x, *HANDLES),
        lambda x: lax.psum_scatter(x, *HANDLES, axis_index_groups=[[0, 1], [2, 3]]),
        lambda x: lax.all_to_all(x, *HANDLES, 0, 0),
        lambda x: lax.all_to_all(x, *HANDLES, 0, 0, tiled=True, axis_index_groups=[[0, 1], [2, 3]]),
        lambda x: lax.all_to_all(x, (*HANDLES[:1], ROWS), fcomm.sim, 0, 0),
        lambda x: lax.pswapaxes(x, *HANDLES, 0, axis_index_groups=[[0, 1], [2, 3]]),
    ],
)
def test_a_scalar_has_no_axis_to_cut(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"(axis|dim|scatter_dimension) is 0") as caught:
        on_axis(call, torch.zeros(N))
    assert isinstance(caught.value, FcommError)


@pytest.mark.parametrize("blocks", [[[0, 1], [2, 3]], [[0, 1, 3], [2]]])
def test_an_extremum_over_blocks_of_complex_numbers_says_so(blocks: list[list[int]]) -> None:
    with pytest.raises(TypeError, match="op 'max' needs an order"):
        on_axis(lambda x: lax.pmax(x, *HANDLES, axis_index_groups=blocks), torch.zeros(N, 2, dtype=torch.complex64))


UNEQUAL = [[0, 3, 1], [2]]

# pmean divides by the length of the first block, as in JAX.
REDUCED_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "psum": lambda rows: rows.sum(0),
    "pmean": lambda rows: rows.sum(0) / 3,
    "pmax": lambda rows: rows.amax(0),
    "pmin": lambda rows: rows.amin(0),
}


@pytest.mark.parametrize("name", REDUCED_BLOCKS)
def test_reductions_take_blocks_of_different_lengths(name: str) -> None:
    def call(x: Tensor) -> Tensor:
        return getattr(lax, name)(x, *HANDLES, axis_index_groups=UNEQUAL)

    def meaning(x: Tensor) -> Tensor:
        block_of = {r: block for block in UNEQUAL for r in block}
        return torch.stack([REDUCED_BLOCKS[name](x[block_of[r]]) for r in range(N)])

    x, ct, t = torch.randint(-2, 3, (3, N, 9)).double()  # with ties
    x[2, 0] = torch.nan  # which stays in its block
    torch.testing.assert_close(on_axis(call, x), meaning(x), equal_nan=True)
    x[2, 0] = 0
    got = on_axis(lambda x, ct: torch.func.vjp(call, x)[1](ct)[0], x, ct)
    torch.testing.assert_close(got, torch.func.vjp(meaning, x)[1](ct)[0])
    got = on_axis(lambda x, t: torch.func.jvp(call, (x,), (t,))[1], x, t)
    torch.testing.assert_close(got, torch.func.jvp(meaning, (x,), (t,))[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_mean_over_blocks_of_different_lengths_is_rounded_once(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x = torch.tensor([most, most, 1, most], dtype=dtype)  # whose sum has no number in dtype
    mean = on_axis(lambda x: lax.pmean(x, *HANDLES, axis_index_groups=UNEQUAL), x)
    assert mean.dtype == dtype
    assert mean.tolist() == [most, most, torch.tensor(1 / 3).to(dtype).item(), most]


def test_numbers_count_the_first_block() -> None:
    blocks: dict[str, Any] = {"axis_index_groups": UNEQUAL}
    assert lax.psum(2, *HANDLES, **blocks) == 6
    assert lax.pmean(2, *HANDLES, **blocks) == 2
    ones = torch.ones(N, dtype=torch.int32)
    assert on_axis(lambda x: lax.psum(x, *HANDLES, **blocks), ones).tolist() == [3, 3, 1, 3]
    mean = on_axis(lambda x: lax.pmean(x, *HANDLES, **blocks), ones)
    torch.testing.assert_close(mean, torch.tensor([1, 1, 1 / 3, 1]))


def blocks_in_processes(world: fcomm.Group) -> None:
    rank, backend = world.rank or 0, fcomm.c10d
    tp = fcomm.split(world, 2, name="tp")
    blocks = [[0, 1], [2, 3]]
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(rank))
    for call in (
        lambda g, **b: lax.psum(x, g, backend, **b),
        lambda g, **b: lax.all_gather(x, g, backend, **b),
        lambda g, **b: lax.psum_scatter(x, g, backend, tiled=True, **b),
        lambda g, **b: lax.all_to_all(x, g, backend, 1, 0, **b),
    ):
        torch.testing.assert_close(call(world, axis_index_groups=blocks), call(tp))
    unequal = lax.psum(torch.tensor(10.0**rank), world, backend, axis_index_groups=UNEQUAL)
    assert unequal.item() == (100 if rank == 2 else 1011)
    numbers = [torch.tensor(v) for v in ([0, 1], [1, 2], [2 * (tp.rank or 0)] * 2, [(tp.rank or 0) + 1] * 2)]
    operand = torch.arange(3.0) + 10 * rank
    got = lax.ragged_all_to_all(operand, torch.zeros(4), *numbers, world, backend, axis_index_groups=blocks)
    torch.testing.assert_close(got, lax.ragged_all_to_all(operand, torch.zeros(4), *numbers, tp, backend))


def test_blocks_in_processes() -> None:
    run_ranks(blocks_in_processes, 4)
