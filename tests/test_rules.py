"""Derivative rules in numbers: what each rank must get, written out; and in processes, against explicit lists of ranks.

The loss is the sum of all ranks' losses, sum(ct * y) with a ct of each rank, so a row of `pulled` is what the x of that
rank gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

import fcomm
from fcomm.testing import run_ranks

INF, NAN = float("inf"), float("nan")


def stack(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def pulled(fn: Callable[..., Tensor], x: Tensor, ct: Tensor) -> Tensor:
    """vjp of fn(x, group, backend) by the rule, on every rank of a simulated axis."""
    group = fcomm.axis("ranks", len(x))
    return fcomm.simulate(lambda x, ct: vjp(lambda x: fn(x, group, fcomm.sim), x)[1](ct)[0], group)(x, ct)


def pushed(fn: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    group = fcomm.axis("ranks", len(x))
    return fcomm.simulate(lambda x, t: jvp(lambda x: fn(x, group, fcomm.sim), (x,), (t,))[1], group)(x, t)


def twice(fn: Callable[..., Tensor], x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    """The derivative along t of pulled, by the rules of its parts."""
    group = fcomm.axis("ranks", len(x))

    def pull(x: Tensor, ct: Tensor) -> Tensor:
        return vjp(lambda x: fn(x, group, fcomm.sim), x)[1](ct)[0]

    return fcomm.simulate(lambda x, ct, t: jvp(lambda x: pull(x, ct), (x,), (t,))[1], group)(x, ct, t)


def reduced(op: str) -> Callable[..., Tensor]:
    return lambda x, group, backend: fcomm.all_reduce(x, group, backend, op=op)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=0, equal_nan=True)


# --- ties ---------------------------------------------------------------------------------------------------------

TIES = [  # op, x of the ranks, ct of the ranks, cotangent of x
    ("max", [1, 1], [10, 20], [15, 15]),
    ("max", [1, 2], [10, 20], [0, 30]),
    ("max", [2, 1, 2], [1, 2, 3], [3, 0, 3]),
    ("max", [5, 5, 5], [1, 1, 1], [1, 1, 1]),
    ("max", [0, 3, 3, 3], [1, 2, 4, 8], [0, 5, 5, 5]),
    ("max", [0.0, -0.0], [1, 1], [1, 1]),
    ("max", [INF, INF, 1], [1, 1, 1], [1.5, 1.5, 0]),
    ("max", [-INF, -INF, -INF], [1, 1, 1], [1, 1, 1]),
    ("min", [2, 1, 1, 4], [1, 2, 4, 8], [0, 7.5, 7.5, 0]),
    ("min", [-INF, 0], [1, 1], [2, 0]),
    ("max", [NAN, 1], [1, 2], [3, 0]),
    ("max", [1, NAN, NAN], [1, 2, 3], [0, 3, 3]),
    ("min", [NAN, NAN, NAN, NAN], [1, 1, 1, 1], [1, 1, 1, 1]),
    ("max", [NAN, INF], [1, 1], [2, 0]),
]


@pytest.mark.parametrize(("op", "x", "ct", "expected"), TIES)
def test_ties_share_equally_and_nan_attains_nan(op: str, x: list, ct: list, expected: list) -> None:
    assert same(pulled(reduced(op), stack(*x), stack(*ct)), stack(*expected))
    for root in range(len(x)):  # other ranks' cotangents are ignored: ct[root] instead of the sum
        got = pulled(lambda x, g, b: fcomm.reduce(x, g, b, dst=root, op=op), stack(*x), stack(*ct))
        assert same(got, stack(*expected) / sum(ct) * ct[root])


def test_ties_share_tangents_too() -> None:
    assert same(pushed(reduced("max"), stack(2, 1, 2), stack(1, 10, 100)), stack(50.5, 50.5, 50.5))
    assert same(pushed(reduced("min"), stack(NAN, 1, NAN, 2), stack(1, 10, 3, 100)), stack(2, 2, 2, 2))


def test_ties_are_shared_over_blocks_as_well() -> None:
    """reduce_scatter max: block 0 is [1, 3], block 1 is [2, 2]."""
    x, ct = stack([1, 2], [3, 2]), stack([10], [20])
    got = pulled(lambda x, g, b: fcomm.reduce_scatter(x, g, b, op="max"), x, ct)
    assert same(got, stack([0, 10], [10, 10]))


# --- products -----------------------------------------------------------------------------------------------------

PRODUCTS = [  # x, ct, cotangent of x: sum(ct) times the product of the others
    ([2, 3], [1, 1], [6, 4]),
    ([0, 3], [1, 0], [3, 0]),
    ([0, 0], [1, 1], [0, 0]),
    ([2, 0, 4], [1, 1, 1], [0, 24, 0]),
    ([0, 0, 4], [1, 1, 1], [0, 0, 0]),
    ([0, 0, 0], [1, 1, 1], [0, 0, 0]),
    ([1, 2, 3, 4], [1, 0, 0, 1], [48, 24, 16, 12]),
    ([0, 2, 3, 4], [1, 0, 0, 0], [24, 0, 0, 0]),
]


@pytest.mark.parametrize(("x", "ct", "expected"), PRODUCTS)
def test_products_at_zeros(x: list, ct: list, expected: list) -> None:
    assert same(pulled(reduced("prod"), stack(*x), stack(*ct)), stack(*expected))


def test_products_are_twice_differentiable_at_zeros() -> None:
    ones, t = stack(1, 0, 0), stack(1, 10, 100)
    # y = abc; the gradient is (bc, ac, ab); along t it moves by (10c + 100b, c + 100a, b + 10a).
    for a, b, c in ((0, 2, 3), (0, 0, 3), (0, 0, 0), (1, 2, 3)):
        expected = stack(10 * c + 100 * b, c + 100 * a, b + 10 * a)
        assert same(twice(reduced("prod"), stack(a, b, c), ones, t), expected)
        got = twice(lambda x, g, k: fcomm.reduce(x, g, k, dst=1, op="prod"), stack(a, b, c), stack(0, 1, 0), t)
        assert same(got, expected)


# --- complex numbers ----------------------------------------------------------------------------------------------


def test_cotangents_of_a_complex_product_are_conjugated() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j, 2j], dtype=torch.complex128)
    ct = torch.tensor([1, 1j, 0], dtype=torch.complex128)
    others = torch.tensor([(3 - 1j) * 2j, (1 + 2j) * 2j, (1 + 2j) * (3 - 1j)], dtype=torch.complex128)
    assert torch.allclose(pulled(reduced("prod"), x, ct), others.conj() * (1 + 1j))


def test_cotangents_of_complex_linear_collectives_are_not() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    ct = torch.tensor([1j, 2], dtype=torch.complex128)
    assert pulled(reduced("sum"), x, ct).tolist() == [2 + 1j, 2 + 1j]
    assert pulled(reduced("mean"), x, ct).tolist() == [1 + 0.5j, 1 + 0.5j]
    assert pulled(lambda x, g, b: fcomm.broadcast(x, g, b, src=1), x, ct).tolist() == [0, 2 + 1j]
    # A conjugate on the way: |sum|^2 has the gradient 2 * sum.
    group = fcomm.axis("ranks", 2)

    def loss(x: Tensor) -> Tensor:
        y = fcomm.all_reduce(x, group, fcomm.sim)
        return (y * y.conj()).real

    got = fcomm.simulate(grad(loss), group)(x)
    assert got.tolist() == [2 * 2 * (4 + 1j)] * 2  # the losses of both ranks


# --- roots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_cotangent_of_a_broadcast_reaches_its_root_and_only_it(size: int) -> None:
    x, ct = torch.arange(1.0, size + 1, dtype=torch.float64), 10 ** torch.arange(size, dtype=torch.float64)
    for src in range(size):
        got = pulled(lambda x, g, b: fcomm.broadcast(x, g, b, src=src), x, ct)
        assert got.tolist() == [ct.sum() if r == src else 0 for r in range(size)]
        got = pulled(lambda x, g, b: fcomm.reduce(x, g, b, dst=src), x, ct)
        assert got.tolist() == [ct[src]] * size


def test_gather_and_scatter_ignore_what_is_off_the_root() -> None:
    x, ct = stack([1, 2], [3, 4], [5, 6]), torch.arange(18.0, dtype=torch.float64).reshape(3, 6)
    assert pulled(lambda x, g, b: fcomm.gather(x, g, b, dst=1), x, ct).tolist() == [[6, 7], [8, 9], [10, 11]]
    x, ct = ct, stack([1, 2], [3, 4], [5, 6])
    got = pulled(lambda x, g, b: fcomm.scatter(x, g, b, src=2), x, ct)
    assert got.tolist() == [[0] * 6, [0] * 6, [1, 2, 3, 4, 5, 6]]


# --- what has no derivative ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn", [lambda x: fcomm.all_reduce(x, G, fcomm.sim, op="bor"), lambda x: fcomm.all_gather(x, G, fcomm.sim)]
)
def test_integers_have_no_derivative(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([[1], [2], [4]])
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require gradients"):
        fcomm.simulate(lambda x: vjp(fn, x)[1](fn(x))[0], G)(x)
    with pytest.raises(ValueError, match="Expected primal to be floating point or complex"):
        fcomm.simulate(lambda x: jvp(fn, (x,), (x,))[1], G)(x)


def test_a_record_without_rules_raises_by_name() -> None:
    fcomm.define("rounded", spec=lambda xs: [sum(xs).round()] * len(xs), shape=lambda s, group: s, vjp=None, jvp=None)

    def rounded(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Tensor:
        return fcomm.apply("rounded", x, group, backend)

    for derivative in (pulled, pushed):
        with pytest.raises(fcomm.FcommError, match="rounded: it has no derivative; detach its argument"):
            derivative(rounded, stack(1.4, 2.2), stack(1, 1))


G = fcomm.axis("ranks", 3)


def test_operations_without_a_derivative_raise_by_name() -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    for op in ("band", "bor", "bxor"):
        with pytest.raises(
            TypeError,
            match=f"op '{op}' is defined on integers and bool, on every backend, but x is torch.float64",
        ):
            pulled(reduced(op), x, x)
    for op in ("max", "min"):
        with pytest.raises(TypeError, match=f"op '{op}' needs an order, on every backend, but x is torch.complex128"):
            pulled(reduced(op), x.to(torch.complex128), x.to(torch.complex128))


def test_the_index_of_a_rank_is_a_constant() -> None:
    got = pulled(lambda x, g, b: x * fcomm.axis_index(g, b), stack(1, 1, 1), stack(1, 1, 1))
    assert got.tolist() == [0, 1, 2]
    assert not fcomm.simulate(lambda x: fcomm.axis_index(G, fcomm.sim), G)(stack(1, 1, 1)).requires_grad


def test_axis_index_is_where_the_arguments_are() -> None:
    x = torch.empty(3, device="meta")
    assert fcomm.simulate(lambda x: x * fcomm.axis_index(G, fcomm.sim), G)(x).device == x.device


# --- in processes, against autograd over explicit lists of the ranks' tensors -----------------------------------------

SEND = [[1, 2, 0, 1], [0, 1, 3, 0], [2, 0, 1, 1], [1, 1, 0, 2]]
LENGTHS = [2, 0, 3, 1]


def _values(size: int, shape: Callable[[int], tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape(r), generator=generator, dtype=torch.float64) for r in range(size)]


def _cut(x: Tensor, lengths: list[int], dim: int) -> list[Tensor]:
    return list(x.split(lengths, dim))


def _uneven_all_to_all(xs: list[Tensor]) -> list[Tensor]:
    n = len(xs)
    blocks = [_cut(x, SEND[s][:n], 1) for s, x in enumerate(xs)]
    return [torch.cat([blocks[s][r] for s in range(n)], 1) for r in range(n)]


def _only(r: int, root: int, y: Tensor) -> Tensor:
    return y if r == root else torch.zeros_like(y)


# name: (shape of rank r's x among n, the call on a rank, what it means for the list of all ranks' x)
EXPLICIT: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., list[Tensor]]]] = {
    "uneven all_gather": (
        lambda r, n: (2, LENGTHS[r]),
        lambda x, g, b: fcomm.all_gather(x, g, b, dim=1, sizes=LENGTHS[: g.size]),
        lambda xs: [torch.cat(xs, 1)] * len(xs),
    ),
    "uneven reduce_scatter": (
        lambda r, n: (sum(LENGTHS[:n]), 2),
        lambda x, g, b: fcomm.reduce_scatter(x, g, b, sizes=LENGTHS[: g.size]),
        lambda xs: _cut(sum(xs[1:], xs[0]), LENGTHS[: len(xs)], 0),
    ),
    "uneven reduce_scatter max": (
        lambda r, n: (2, sum(LENGTHS[:n])),
        lambda x, g, b: fcomm.reduce_scatter(x, g, b, dim=1, op="max", sizes=LENGTHS[: g.size]),
        lambda xs: _cut(torch.stack(xs).amax(0), LENGTHS[: len(xs)], 1),
    ),
    "uneven all_to_all": (
        lambda r, n: (2, sum(SEND[r][:n])),
        lambda x, g, b: fcomm.all_to_all(
            x, g, b, split_dim=1, concat_dim=1, send_sizes=SEND[g.rank][: g.size],
            recv_sizes=[SEND[s][g.rank] for s in range(g.size)],
        ),
        _uneven_all_to_all,
    ),
    "uneven all_to_all of two dims": (
        lambda r, n: (LENGTHS[r], sum(LENGTHS[:n])),
        lambda x, g, b: fcomm.all_to_all(
            x, g, b, split_dim=1, concat_dim=0, send_sizes=LENGTHS[: g.size], recv_sizes=LENGTHS[: g.size]
        ),
        lambda xs: [torch.cat([_cut(x, LENGTHS[: len(xs)], 1)[r] for x in xs]) for r in range(len(xs))],
    ),
    "broadcast": (
        lambda r, n: (2, 3),
        lambda x, g, b: fcomm.broadcast(x, g, b, src=1),
        lambda xs: [xs[1]] * len(xs),
    ),
    "reduce prod": (
        lambda r, n: (2, 3),
        lambda x, g, b: fcomm.reduce(x, g, b, dst=1, op="prod"),
        lambda xs: [_only(r, 1, torch.stack(xs).prod(0)) for r in range(len(xs))],
    ),
    "gather": (
        lambda r, n: (2, 3),
        lambda x, g, b: fcomm.gather(x, g, b, dst=g.size - 1, dim=1),
        lambda xs: [_only(r, len(xs) - 1, torch.cat(xs, 1)) for r in range(len(xs))],
    ),
    "scatter": (
        lambda r, n: (2 * n, 3),
        lambda x, g, b: fcomm.scatter(x, g, b, src=1),
        lambda xs: list(xs[1].chunk(len(xs))),
    ),
    "send and recv": (
        lambda r, n: (2, 3),
        lambda x, g, b: fcomm.recv(torch.zeros_like(x), g, b, after=fcomm.send(x, g, b)),
        lambda xs: [xs[r - 1] for r in range(len(xs))],
    ),
    "partial ppermute": (
        lambda r, n: (2, 3),
        lambda x, g, b: fcomm.ppermute(x, g, b, perm=[(0, 0), (1, g.size - 1)] if g.size > 2 else [(1, 0)]),
        lambda xs: [xs[0], torch.zeros_like(xs[0]), *([torch.zeros_like(xs[0])] * (len(xs) - 3)), xs[1]]
        if len(xs) > 2 else [xs[1], torch.zeros_like(xs[0])],
    ),
}  # fmt: skip


def _like_explicit_lists(world: fcomm.Group, compiler: str | None) -> list[str]:
    """Value, gradient and second derivative of sum(sin(weight * y)) over all ranks; returns what differs."""
    failures = []
    for seed, (name, (shape, call, meaning)) in enumerate(EXPLICIT.items()):
        n, me = world.size, world.rank
        xs = [x.requires_grad_() for x in _values(n, lambda r: shape(r, n), seed)]
        ys = meaning(xs)
        ws = [_values(1, lambda r, y=y: tuple(y.shape), 100 + seed)[0] + r for r, y in enumerate(ys)]
        # A rank that is ignored still has a derivative, zero.
        loss = sum((w * y).sin().sum() for w, y in zip(ws, ys, strict=True)) + sum((0 * x * x).sum() for x in xs)
        gs = torch.autograd.grad(loss, xs, create_graph=True)
        ts = _values(n, lambda r: shape(r, n), 200 + seed)
        hs = torch.autograd.grad(sum((g * t).sum() for g, t in zip(gs, ts, strict=True)), xs)

        def gradient(x: Tensor, w: Tensor, call: Any = call) -> Tensor:
            return grad(lambda x: (w * call(x, world, fcomm.c10d)).sin().sum())(x)

        def everything(x: Tensor, w: Tensor, t: Tensor, call: Any = call, gradient: Any = gradient) -> Any:
            return call(x, world, fcomm.c10d), gradient(x, w), vjp(lambda x: gradient(x, w), x)[1](t)[0]

        if compiler is not None:
            torch.compiler.reset()
            everything = torch.compile(everything, fullgraph=True, backend=compiler)
        got = everything(xs[me].detach(), ws[me].detach(), ts[me])
        expected = ys[me], gs[me], hs[me]
        for what, a, b in zip(("value", "gradient", "second derivative"), got, expected, strict=True):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-10, atol=1e-10):
                failures.append(f"{name}, {what}: got {a}, expected {b}")
    return failures


LONG = [pytest.param(size, "aot_eager", marks=pytest.mark.long) for size in (2, 3, 4)]


@pytest.mark.parametrize(("size", "compiler"), [(2, None), (3, None), (4, None), *LONG])
def test_rules_in_processes_are_autograd_of_explicit_lists(size: int, compiler: str | None) -> None:
    run_ranks(_like_explicit_lists, size, compiler, timeout_s=400)
