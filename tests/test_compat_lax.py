"""What JAX's own tests of its collectives check (pmap_test.py, shard_map_test.py), restated for compat.lax."""

from __future__ import annotations

import inspect
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import fcomm
from fcomm.compat import lax
from fcomm.errors import FcommError

N = 4
AXIS = fcomm.axis("i", N)
HANDLES = (AXIS, fcomm.sim)


def on_axis(fn: Callable[..., Any], *args: Any) -> Any:
    return fcomm.simulate(fn, AXIS)(*args)


# JAX 0.10's signatures. What follows the axis name is kept; the axis name becomes group and backend.
SIGNATURES = {
    "psum": "(x, axis_name, *, axis_index_groups=None)",
    "pmean": "(x, axis_name, *, axis_index_groups=None)",
    "pmax": "(x, axis_name, *, axis_index_groups=None)",
    "pmin": "(x, axis_name, *, axis_index_groups=None)",
    "pargmax": "(x, axis_name)",
    "pargmin": "(x, axis_name)",
    "pbroadcast": "(x, axis_name, source)",
    "ppermute": "(x, axis_name, perm)",
    "pshuffle": "(x, axis_name, perm)",
    "pswapaxes": "(x, axis_name, axis, *, axis_index_groups=None)",
    "all_to_all": "(x, axis_name, split_axis, concat_axis, *, axis_index_groups=None, tiled=False)",
    "ragged_all_to_all": "(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name, "
    "*, axis_index_groups=None)",
    "all_gather": "(x, axis_name, *, axis_index_groups=None, axis=0, tiled=False, to='varying')",
    "psum_scatter": "(x, axis_name, *, scatter_dimension=0, axis_index_groups=None, tiled=False)",
    "axis_index": "(axis_name)",
    "axis_size": "(axis_name)",
    "pvary": "(x, axis_name)",
    "pcast": "(x, axis_name, *, to)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_jaxs(name: str) -> None:
    found = inspect.signature(getattr(lax, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert text == SIGNATURES[name].replace("axis_name", "group, backend")


def test_a_python_number_is_multiplied_without_communication() -> None:
    assert lax.psum(1, *HANDLES) == N
    assert lax.psum(2.5, *HANDLES) == 10.0
    assert type(lax.psum(1, *HANDLES)) is int
    assert lax.psum(True, *HANDLES) == N
    assert lax.psum(1j, *HANDLES) == 4j
    assert lax.pmean(3, *HANDLES) == 3.0
    assert lax.pmax(7, *HANDLES) == 7
    assert lax.axis_size(*HANDLES) == N


def test_a_number_in_a_graph_needs_no_collective() -> None:
    x = torch.arange(4.0)
    torch.testing.assert_close(on_axis(lambda x: x / lax.psum(1, *HANDLES), x), x / 4)


def test_a_value_that_all_ranks_share() -> None:
    shared = torch.ones(3)
    y = on_axis(lambda x: x + lax.psum(shared, *HANDLES), torch.zeros(N, 3))
    assert torch.equal(y, torch.full((N, 3), 4.0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_integers(dtype: torch.dtype) -> None:
    x = torch.tensor([1, 2, 3, 5], dtype=dtype)
    total = on_axis(lambda x: lax.psum(x, *HANDLES), x)
    assert total.dtype == dtype
    assert total.tolist() == [11] * N
    mean = on_axis(lambda x: lax.pmean(x, *HANDLES), x)
    assert mean.dtype == torch.get_default_dtype()
    assert mean.tolist() == [2.75] * N
    assert on_axis(lambda x: lax.pmax(x, *HANDLES), x).tolist() == [5] * N


def test_bool_is_summed_as_int32() -> None:
    x = torch.tensor([True, False, True, True])
    total = on_axis(lambda x: lax.psum(x, *HANDLES), x)
    assert total.dtype == torch.int32
    assert total.tolist() == [3] * N
    assert on_axis(lambda x: lax.pmean(x, *HANDLES), x).tolist() == [0.75] * N
    assert on_axis(lambda x: lax.pmin(x, *HANDLES), x).tolist() == [False] * N


def test_complex() -> None:
    x = torch.randn(N, 2, dtype=torch.complex128)
    torch.testing.assert_close(on_axis(lambda x: lax.psum(x, *HANDLES), x), x.sum(0).expand(N, 2))
    torch.testing.assert_close(on_axis(lambda x: lax.pmean(x, *HANDLES), x), x.mean(0).expand(N, 2))


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, [x]),
        lambda x: {"b": x, "a": (x, None)},
        lambda x: Point(x, {"k": x}),
        lambda x: OrderedDict(k=x),
        lambda x: [],
        lambda x: None,
    ],
)
def test_trees_keep_their_shape(wrap: Callable[[Tensor], Any]) -> None:
    seen = []

    def fn(x: Tensor) -> Tensor:
        for name, args in (("psum", ()), ("all_gather", ()), ("ppermute", ([(0, 1)],)), ("pbroadcast", (2,))):
            seen.append(getattr(lax, name)(wrap(x), *HANDLES, *args))
        return x

    on_axis(fn, torch.randn(N, 2))
    expected = wrap(torch.zeros(2))
    for tree in seen:
        assert type(tree) is type(expected)
        if isinstance(tree, dict):
            assert list(tree) == list(expected)
        elif isinstance(tree, tuple | list):
            assert len(tree) == len(expected)


def test_untiled_all_to_all_has_numpys_shape() -> None:
    """np.insert(np.delete(x.shape, split_axis), concat_axis, axis_size), for every pair of axes."""
    for split in range(3):
        for concat in range(3):
            shape = [2, 3, 5]
            shape[split] = N
            expected = [d for k, d in enumerate(shape) if k != split]
            expected.insert(concat, N)
            y = on_axis(lambda x: lax.all_to_all(x, *HANDLES, split, concat), torch.randn(N, *shape))
            assert list(y.shape) == [N, *expected]


def test_all_to_all_is_its_own_inverse_with_axes_swapped() -> None:
    x = torch.randn(N, N, 3, 2)
    there = on_axis(lambda x: lax.all_to_all(x, *HANDLES, 0, 2), x)
    assert torch.equal(on_axis(lambda x: lax.all_to_all(x, *HANDLES, 2, 0), there), x)


def test_pswapaxes_transposes_the_ranks() -> None:
    x = torch.randn(N, N)
    assert torch.equal(on_axis(lambda x: lax.pswapaxes(x, *HANDLES, 0), x), x.T)


def test_ppermute_leaves_zeros_where_nothing_arrives() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert on_axis(lambda x: lax.ppermute(x, *HANDLES, [(0, 1), (3, 0)]), x).tolist() == [4.0, 1.0, 0.0, 0.0]
    assert on_axis(lambda x: lax.pshuffle(x, *HANDLES, [3, 0, 1, 2]), x).tolist() == [4.0, 1.0, 2.0, 3.0]


def test_gradient_of_ppermute_goes_backwards() -> None:
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    perm = [(0, 1), (1, 2), (2, 3)]
    g = on_axis(lambda x, w: grad(lambda x: w * lax.ppermute(x, *HANDLES, perm))(x), torch.ones(N), weights)
    assert g.tolist() == [10.0, 100.0, 1000.0, 0.0]


def test_all_gather_options() -> None:
    x = torch.randn(N, 2, 3)
    assert on_axis(lambda x: lax.all_gather(x, *HANDLES), x).shape == (N, N, 2, 3)
    assert on_axis(lambda x: lax.all_gather(x, *HANDLES, axis=-1), x).shape == (N, 2, 3, N)
    assert on_axis(lambda x: lax.all_gather(x, *HANDLES, axis=1, tiled=True), x).shape == (N, 2, 12)
    assert on_axis(lambda x: lax.all_gather(1.0, *HANDLES) + x.sum(), x).shape == (N, N)


def test_argmax_is_the_first_rank_that_holds_it() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, 0.0], [2.0, -1.0]])
    assert on_axis(lambda x: lax.pargmax(x, *HANDLES), x)[0].tolist() == [1, 0]
    assert on_axis(lambda x: lax.pargmin(x, *HANDLES), x)[0].tolist() == [0, 3]


def test_ragged_all_to_all_as_in_jaxs_documentation() -> None:
    axis = fcomm.axis("i", 2)
    rows = {
        "operand": [[1, 2, 2], [3, 4, 0]],
        "output": [[0] * 4, [0] * 4],
        "input_offsets": [[0, 1], [0, 1]],
        "send_sizes": [[1, 2], [1, 1]],
        "output_offsets": [[0, 0], [1, 2]],
        "recv_sizes": [[1, 1], [2, 1]],
    }
    fn = fcomm.simulate(lambda *a: lax.ragged_all_to_all(*a, axis, fcomm.sim), axis)
    assert fn(*(torch.tensor(v) for v in rows.values())).tolist() == [[1, 3, 0, 0], [2, 2, 4, 0]]


def test_two_axes() -> None:
    dp, tp = fcomm.axis("dp", 2), fcomm.axis("tp", 3)
    both = (dp, tp)

    def run(fn: Callable[[Tensor], Any], x: Tensor) -> Any:
        return fcomm.simulate(fcomm.simulate(fn, tp), dp)(x)

    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(run(lambda x: lax.psum(x, both, fcomm.sim), x), x.sum((0, 1)).expand(2, 3, 4))
    torch.testing.assert_close(run(lambda x: lax.pmean(x, both, fcomm.sim), x), x.mean((0, 1)).expand(2, 3, 4))
    torch.testing.assert_close(run(lambda x: lax.pmax(x, both, fcomm.sim), x), x.amax((0, 1)).expand(2, 3, 4))
    index = run(lambda x: x.sum() * 0 + lax.axis_index(both, fcomm.sim), x)
    assert index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert lax.axis_size(both, fcomm.sim) == 6


def test_under_vmap_and_compiled() -> None:
    x = torch.randn(N, 5, 3)
    batched = fcomm.simulate(vmap(lambda x: lax.psum({"a": x}, *HANDLES)["a"]), AXIS)
    torch.testing.assert_close(batched(x), x.sum(0).expand_as(x))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(batched, fullgraph=True, backend="aot_eager")(x), x.sum(0).expand_as(x))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: lax.psum(x, *HANDLES, axis_index_groups=[[0, 1], [2, 2]]), "put each rank of 0 .. 3 into one block"),
        (lambda x: lax.psum(x, *HANDLES, axis_index_groups=[[0, 1, 2, 3], []]), "no block empty"),
        (lambda x: lax.psum(x, *HANDLES, axis_index_groups=4), "axis_index_groups is 4; put each rank of 0 .. 3 into"),
        (lambda x: lax.pmean(x, *HANDLES, axis_index_groups=[0, 1, 2, 3]), "put each rank of 0 .. 3 into one block"),
        (lambda x: lax.all_gather(x, *HANDLES, axis_index_groups=[[0, 1, 2], [3]]), "all of a length"),
        (lambda x: lax.all_to_all(x, *HANDLES, 0, 0, axis_index_groups=[[0, 1, 2], [3]]), "all of a length"),
        (lambda x: lax.psum_scatter(x, *HANDLES, axis_index_groups=[[0, 1, 2], [3]]), "all of a length"),
        (lambda x: lax.all_to_all(x, *HANDLES, 0, 0, axis_index_groups=[[0]]), "all_to_all: axis_index_groups is"),
        (lambda x: lax.psum_scatter(x, *HANDLES, axis_index_groups=[[0, 1], [2, 3]]), "does not fit blocks of 2 ranks"),
        (
            lambda x: lax.all_gather(x, *HANDLES, axis_index_groups=[[0, 1, 2, 3]], to="invarying"),
            "use a group of those",
        ),
        (lambda x: lax.all_to_all(x, *HANDLES, 0, 0), r"all_to_all: x.shape\[0\] is 6"),
        (lambda x: lax.all_to_all(x, *HANDLES, 0, 0, tiled=True), "not divisible by group 'i' of size 4"),
        (lambda x: lax.psum_scatter(x, *HANDLES), r"reduce_scatter: x.shape\[0\] is 6"),
        (lambda x: lax.all_gather(x, *HANDLES, axis=3), "all_gather: axis is 3"),
        (lambda x: lax.all_gather(x, *HANDLES, axis=2, axis_index_groups=[[0, 1], [2, 3]]), "all_gather: axis is 2"),
        (lambda x: lax.all_to_all(x, *HANDLES, 1, 0, axis_index_groups=[[0, 1], [2, 3]]), "split_axis is 1"),
        (lambda x: lax.all_to_all(x, (AXIS, fcomm.axis("j", 3)), fcomm.sim, 0, 1), "concat_axis is 1"),
        (lambda x: lax.psum_scatter(x, *HANDLES, scatter_dimension=1, axis_index_groups=[[0, 1], [2, 3]]), "sion is 1"),
        (lambda x: lax.all_gather(x, *HANDLES, to="elsewhere"), "to is 'elsewhere'"),
        (lambda x: lax.ppermute(x, *HANDLES, [(0, 1), (1, 1)]), "destination 1 twice"),
        (lambda x: lax.pshuffle(x, *HANDLES, [0, 0, 1, 2]), "does not represent a permutation"),
        (lambda x: lax.pbroadcast(x, *HANDLES, 4), "pbroadcast: source is 4"),
        (lambda x: lax.ppermute(x, *HANDLES, [(0.5, 1)]), "a rank in perm is 0.5"),
        (lambda x: lax.pshuffle(x, *HANDLES, [1.0, 0.0]), "a rank in perm is 1.0"),
        (lambda x: lax.psum(x, *HANDLES, axis_index_groups=[[0, 1], [2, 3.5]]), "put each rank of 0 .. 3 into one"),
        (lambda x: lax.pmax(2, *HANDLES, axis_index_groups=[[0, 1]]), "pmax: axis_index_groups is"),
        (lambda x: lax.pcast(x, *HANDLES, to="reduced"), "to is 'reduced'"),
        (lambda x: lax.ragged_all_to_all(x, x, *[torch.ones(3, dtype=int)] * 4, *HANDLES), "input_offsets has shape"),
    ],
)
def test_bad_arguments_are_value_errors_as_in_jax(call: Callable[[Tensor], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        on_axis(call, torch.zeros(N, 6))
    assert isinstance(caught.value, FcommError)


@pytest.mark.parametrize("blocks", [None, [[0, 1], [2, 3]]])
def test_psum_scatter_of_bool_is_refused_as_in_jax(blocks: Any) -> None:
    """psum counts the true elements; "or" would not be a sum."""
    with pytest.raises(TypeError, match=r"pass x.to\(torch.int32\)"):
        on_axis(lambda x: lax.psum_scatter(x, *HANDLES, axis_index_groups=blocks), torch.ones(N, N, dtype=torch.bool))


def test_a_missing_axis_says_so() -> None:
    with pytest.raises(FcommError, match="simulated axis"):
        lax.psum(torch.ones(2), *HANDLES)


# --- arguments as JAX's tests write them --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pairs",
    [
        lambda p: zip(*p, strict=True),
        lambda p: ((s, d) for s, d in zip(*p, strict=True)),
        lambda p: [list(pair) for pair in zip(*p, strict=True)],
        lambda p: torch.tensor(p).T.numpy(),
    ],
    ids=["zip", "generator", "lists", "array"],
)
def test_pairs_of_ppermute_in_any_iterable(pairs: Callable[[Any], Any]) -> None:
    x = torch.arange(4.0)
    y = on_axis(lambda x: lax.ppermute((x, 2 * x), *HANDLES, pairs(([0, 1, 2, 3], [1, 2, 3, 0]))), x)
    assert torch.equal(y[0], x.roll(1))
    assert torch.equal(y[1], 2 * x.roll(1))


def test_numpy_integers_are_integers() -> None:
    x, one = torch.randn(N, N, N), torch.tensor(1).numpy()[()]
    for call in (
        lambda x, k: lax.all_gather(x, *HANDLES, axis=k),
        lambda x, k: lax.all_gather(x, *HANDLES, axis=k, axis_index_groups=[[0, 1], [2, 3]]),
        lambda x, k: lax.psum_scatter(x, *HANDLES, scatter_dimension=k),
        lambda x, k: lax.all_to_all(x, *HANDLES, k, -k),
        lambda x, k: lax.all_to_all(x, *HANDLES, k, -k, axis_index_groups=[[0, 1, 2, 3]]),
        lambda x, k: lax.pswapaxes(x, *HANDLES, k),
        lambda x, k: lax.pbroadcast(x, *HANDLES, k),
        lambda x, k: lax.pshuffle(x, *HANDLES, [k, 0 * k, 3 * k, 2 * k]),
        lambda x, k: fcomm.ppermute(x, *HANDLES, perm=[(k, 0 * k)]),
    ):
        assert torch.equal(on_axis(lambda x: call(x, one), x), on_axis(lambda x: call(x, 1), x))


@pytest.mark.parametrize("name", ["input_offsets", "send_sizes", "output_offsets", "recv_sizes"])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.zeros(4), "must be integer type"),
        (torch.zeros(1, 4, dtype=torch.int64), r"must be rank 1 with positive dimension size, but got shape \(1, 4\)"),
        (torch.zeros(0, dtype=torch.int64), r"must be rank 1 with positive dimension size, but got shape \(0,\)"),
        (torch.zeros(3, dtype=torch.int64), "has shape .3,.; group 'i' of size 4 needs one number for each slice"),
    ],
)
def test_numbers_of_ragged_all_to_all_are_checked_by_name(name: str, wrong: Tensor, text: str) -> None:
    numbers = dict.fromkeys(("input_offsets", "send_sizes", "output_offsets", "recv_sizes"), torch.zeros(4).long())
    numbers[name] = wrong
    with pytest.raises(ValueError, match=f"ragged_all_to_all:? {name} {text}"):
        on_axis(lambda x: lax.ragged_all_to_all(x, torch.zeros(5), *numbers.values(), *HANDLES), torch.zeros(4, 5))
