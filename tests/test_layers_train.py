"""Worked models: gradients on a mesh of axes, and training that follows that on one device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.utils._python_dispatch import TorchDispatchMode

import fcomm
from fcomm import layers
from fcomm.testing import run_ranks

BACKENDS = ["cpu", "c10d"]
FIRST_AND_LONG = [*BACKENDS[:1], *(pytest.param(name, marks=pytest.mark.long) for name in BACKENDS[1:])]
STEPS = 50

Params = dict[str, Tensor]


def trained(loss: Callable[..., Tensor], params: Params, batches: list[Any], rate: float = 0.01) -> Tensor:
    """The loss at each step of Adam; loss(params, *batch)."""
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    square = {name: torch.zeros_like(p) for name, p in params.items()}
    course = []
    for step, batch in enumerate(batches, 1):
        gradient, value = grad_and_value(loss)(params, *batch)
        course.append(value)
        for name, g in gradient.items():
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.99 * square[name] + 0.01 * g * g
            update = (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.99**step)).sqrt() + 1e-6)
            params = params | {name: params[name] - rate * update}
    return torch.stack(course)


def over(axes: dict[str, fcomm.Group], fn: Callable[..., Any]) -> Any:
    """fn() on every rank of simulated axes; results have one leading dimension per axis."""
    for axis in reversed(axes.values()):
        fn = fcomm.simulate(fn, axis)
    return fn()


def simulated_axes(**sizes: int) -> dict[str, fcomm.Group]:
    return {name: fcomm.axis(name, size) for name, size in sizes.items()}


# --- GPT under dp x sp x tp ---------------------------------------------------------------------------------------

MODEL = layers.GPT(vocab=32, length=8, blocks=2, width=16, heads=4, key_heads=2, hidden=32)


def text(step: int) -> tuple[Tensor, Tensor]:
    """A learnable text: each token is a function of the last one, with noise."""
    start = dense.integers(8, 1, high=MODEL.vocab, seed=step)
    noise = dense.integers(8, MODEL.length + 1, high=2, seed=1000 + step)
    rows = (start * 5 ** torch.arange(MODEL.length + 1) + noise) % MODEL.vocab
    return rows[:, :-1], rows[:, 1:]


TEXT = [text(step) for step in range(STEPS)]
PARAMS = layers.init_params(MODEL, dtype=torch.float64)


def gpt_gradient(axes: dict[str, fcomm.Group], backend: fcomm.Backend) -> Params:
    own = partial(layers.own_tokens, dp=axes["dp"], sp=axes["sp"], backend=backend)
    params = layers.cut(PARAMS, MODEL, axes["tp"], backend)
    return grad(layers.gpt_loss)(params, own(TEXT[0][0]), own(TEXT[0][1]), MODEL, **axes, backend=backend)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (4, 2, 1)])
def test_gradient_of_gpt_on_a_mesh(sizes: tuple[int, int, int]) -> None:
    axes = simulated_axes(**dict(zip(("dp", "sp", "tp"), sizes, strict=True)))
    wanted = grad(dense.gpt)(PARAMS, *TEXT[0], MODEL)
    got = over(axes, lambda: gpt_gradient(axes, fcomm.sim))
    for name, dim in MODEL.tp_dims().items():
        rows = dense.stack_parts(wanted[name], dim, sizes[2]).expand(*sizes, *got[name].shape[3:])
        torch.testing.assert_close(got[name], rows, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# One block fewer: fifty steps take a while on a simulated mesh.
SMALL = replace(MODEL, blocks=1)
SMALL_PARAMS = layers.init_params(SMALL)


def gpt_course(axes: dict[str, fcomm.Group], backend: fcomm.Backend) -> Tensor:
    own = partial(layers.own_tokens, dp=axes["dp"], sp=axes["sp"], backend=backend)
    params = layers.cut(SMALL_PARAMS, SMALL, axes["tp"], backend)
    loss = partial(layers.gpt_loss, model=SMALL, **axes, backend=backend)
    return trained(loss, params, [(own(x), own(y)) for x, y in TEXT])


@cache
def dense_gpt_course() -> Tensor:
    return trained(partial(dense.gpt, model=SMALL), SMALL_PARAMS, TEXT)


def assert_same_course(got: Tensor, wanted: Tensor) -> None:
    assert wanted[-5:].mean() < 0.8 * wanted[:5].mean(), f"nothing was learned: {wanted[::7]}"
    torch.testing.assert_close(got, wanted.expand_as(got), rtol=1e-5, atol=0)


@pytest.mark.long  # make test trains it in processes (below) and takes its gradient on three axes (above)
def test_training_of_gpt_on_dp_and_tp() -> None:
    axes = simulated_axes(dp=2, sp=1, tp=2)
    assert_same_course(over(axes, lambda: gpt_course(axes, fcomm.sim)), dense_gpt_course())


def _gpt_on_rank(world: fcomm.Group, backend: str, sizes: dict[str, int]) -> Tensor:
    return gpt_course(fcomm.mesh(world, **sizes), getattr(fcomm, backend))


@pytest.mark.parametrize("backend", FIRST_AND_LONG)
def test_training_of_gpt_in_processes(backend: str) -> None:
    courses = run_ranks(_gpt_on_rank, 4, backend, {"dp": 2, "sp": 1, "tp": 2})
    assert_same_course(torch.stack(courses), dense_gpt_course())


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_of_gpt_on_three_axes_in_processes(backend: str) -> None:
    courses = run_ranks(_gpt_on_rank, 8, backend, {"dp": 2, "sp": 2, "tp": 2}, timeout_s=500)
    assert_same_course(torch.stack(courses), dense_gpt_course())


def _compiled_gpt_on_rank(world: fcomm.Group, backend: str, compiler: str) -> list[str]:
    """Loss and gradient as one graph; the test of the gradient itself is above."""
    axes, handle = fcomm.mesh(world, dp=1, sp=1, tp=world.size), getattr(fcomm, backend)
    own = partial(layers.own_tokens, dp=axes["dp"], sp=axes["sp"], backend=handle)
    params = layers.cut(PARAMS, MODEL, axes["tp"], handle)
    step = grad_and_value(partial(layers.gpt_loss, model=MODEL, **axes, backend=handle))
    batch = (own(TEXT[0][0]), own(TEXT[0][1]))
    got, value = torch.compile(step, fullgraph=True, backend=compiler)(params, *batch)
    wanted, dense_value = grad_and_value(dense.gpt)(PARAMS, *TEXT[0], MODEL)
    torch.testing.assert_close(value, dense_value, rtol=1e-10, atol=1e-10)
    for name, dim in MODEL.tp_dims().items():
        part = dense.stack_parts(wanted[name], dim, world.size)[world.rank]
        torch.testing.assert_close(got[name], part, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    return []


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_gpt_as_one_graph_in_processes(compiler: str) -> None:
    run_ranks(_compiled_gpt_on_rank, 2, BACKENDS[0], compiler, timeout_s=500)


# --- experts ------------------------------------------------------------------------------------------------------

EXPERTS, WIDTH, TOKENS = 4, 8, 12


MOE_SHAPES = {"router": (EXPERTS, WIDTH), "up": (EXPERTS, 6, WIDTH), "down": (EXPERTS, WIDTH, 6), "out": (5, WIDTH)}
MOE = {name: dense.draw(*shape, seed=i).float() for i, (name, shape) in enumerate(MOE_SHAPES.items())}


def points(step: int) -> tuple[Tensor, Tensor]:
    x = dense.draw(TOKENS, WIDTH, seed=step, scale=1.0).float()
    return x, (x[:, :5] + x[:, 3:]).argmax(1)


POINTS = [points(step) for step in range(STEPS)]


def moe_course(ep: fcomm.Group, backend: fcomm.Backend, layer: Callable[..., Tensor]) -> Tensor:
    """Each rank its own tokens and experts; router and output layer are replicated."""
    params = MOE | {name: fcomm.shard(MOE[name], ep, backend) for name in ("up", "down")}

    def loss(params: Params, x: Tensor, label: Tensor) -> Tensor:
        weight, expert = layers.route(x, params["router"], ep, backend, k=2)
        y = x + layer(x, weight, expert, params["up"], params["down"], ep, backend)
        (out,) = layers.replicate([params["out"]], ep, backend)
        return fcomm.all_reduce_invariant(F.cross_entropy(y @ out.T, label), ep, backend, op="mean")

    return trained(loss, params, [tuple(fcomm.shard(v, ep, backend) for v in batch) for batch in POINTS], rate=0.02)


@cache
def dense_moe_course() -> Tensor:
    def loss(p: Params, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy((x + dense.moe(x, p["router"], p["up"], p["down"])) @ p["out"].T, label)

    return trained(loss, MOE, POINTS, rate=0.02)


LAYERS = {"capacity": partial(layers.moe_capacity, capacity=TOKENS), "ragged": layers.moe_ragged}


@pytest.mark.parametrize("name", ["ragged", pytest.param("capacity", marks=pytest.mark.long)])
def test_training_of_experts(name: str) -> None:
    ep = fcomm.axis("ep", 2)
    got = fcomm.simulate(lambda: moe_course(ep, fcomm.sim, LAYERS[name]), ep)()
    assert_same_course(got, dense_moe_course())


@pytest.mark.parametrize("name", LAYERS)
def test_half_tokens_and_a_float32_router(name: str) -> None:
    ep = fcomm.axis("ep", 2)
    p = {k: v.float() for k, v in MOE.items()}
    x = POINTS[0][0].bfloat16()

    def run(x: Tensor) -> Tensor:
        weight, expert = layers.route(x.float(), p["router"], ep, fcomm.sim, k=2)
        up, down = (fcomm.shard(p[k].bfloat16(), ep, fcomm.sim) for k in ("up", "down"))
        return LAYERS[name](x, weight, expert, up, down, ep, fcomm.sim)

    y = fcomm.simulate(run, ep)(x.expand(2, *x.shape))[0]
    assert y.dtype == torch.float32
    dense_y = dense.moe(x.float(), p["router"], p["up"].bfloat16().float(), p["down"].bfloat16().float())
    torch.testing.assert_close(y, dense_y, rtol=0.05, atol=0.05)


def _moe_on_rank(world: fcomm.Group, backend: str) -> tuple[Tensor]:
    return (moe_course(world, getattr(fcomm, backend), LAYERS["ragged"]),)


@pytest.mark.parametrize("backend", FIRST_AND_LONG)
def test_training_of_experts_in_processes(backend: str) -> None:
    for (course,) in run_ranks(_moe_on_rank, 2, backend):
        assert_same_course(course, dense_moe_course())


# --- pipeline -----------------------------------------------------------------------------------------------------

MICRO = 4


PIPELINE = {"weight": dense.draw(4, WIDTH, WIDTH, seed=1).float(), "out": dense.draw(5, WIDTH, seed=2).float()}


def pipeline_params(stages: int) -> Params:
    return PIPELINE | {"weight": PIPELINE["weight"][:stages]}


def stage(params: Params, x: Tensor) -> Tensor:
    return x + torch.tanh(x @ params["weight"].T)


def loss_of(out: Tensor, y: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(y @ out.T, label)


def own_stage(stages: int, pp: fcomm.Group, backend: fcomm.Backend) -> Params:
    """The rank's own weight; the output layer belongs to the last rank, the others' copies get zero gradients."""
    params = pipeline_params(stages)
    return {"weight": fcomm.shard(params["weight"], pp, backend)[0], "out": params["out"]}


def micro(x: Tensor) -> Tensor:
    return x.unflatten(0, (MICRO, -1))


def gpipe_course(pp: fcomm.Group, backend: fcomm.Backend) -> Tensor:
    def loss(params: Params, x: Tensor, label: Tensor) -> Tensor:
        y = layers.gpipe(partial(stage, params), micro(x), pp, backend)
        return layers.from_last(loss_of(params["out"], y.flatten(0, 1), label), pp, backend)

    return trained(loss, own_stage(pp.size, pp, backend), POINTS, rate=0.02)


@cache
def dense_pipeline_course(stages: int) -> Tensor:
    def loss(p: Params, x: Tensor, label: Tensor) -> Tensor:
        for weight in p["weight"]:
            x = stage({"weight": weight}, x)
        return loss_of(p["out"], x, label)

    return trained(loss, pipeline_params(stages), POINTS, rate=0.02)


@pytest.mark.parametrize("stages", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4))])
def test_training_of_a_pipeline(stages: int) -> None:
    pp = fcomm.axis("pp", stages)
    assert_same_course(fcomm.simulate(lambda: gpipe_course(pp, fcomm.sim), pp)(), dense_pipeline_course(stages))


def test_ticks_without_a_micro_batch_leave_no_nan() -> None:
    """A stage has an infinite derivative at zero, which must not reach the gradient."""
    pp = fcomm.axis("pp", 3)
    gen = torch.Generator().manual_seed(0)
    weights, x = torch.randn(3, 4, 4, generator=gen).double(), torch.randn(MICRO, 2, 4, generator=gen).double()

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt() @ weight

    def dense(weights: Tensor) -> Tensor:
        y = x
        for weight in weights:
            y = normed(y, weight)
        return y.sin().sum()

    def piped(weight: Tensor) -> Tensor:
        y = layers.gpipe(lambda x: normed(x, weight), x, pp, fcomm.sim)
        return layers.from_last(y.sin().sum(), pp, fcomm.sim)

    got = fcomm.simulate(grad(piped), pp)(weights)
    torch.testing.assert_close(got, grad(dense)(weights))


def _first_and_second(loss: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    first = grad(loss)
    return first(weight), grad(lambda w: first(w).sum())(weight)


# Each is defined only on the results of the one before it.
DOMAINS = (lambda w, x: (w * x).exp(), lambda w, x: -w * x.sqrt(), lambda w, x: w * (-x).sqrt())


def _domains_on_rank(world: fcomm.Group, weights: Tensor, x: Tensor) -> Any:
    def piped(weight: Tensor) -> Tensor:
        y = layers.gpipe(partial(DOMAINS[world.rank or 0], weight), x, world, fcomm.cpu)
        return layers.from_last(y.sum(), world, fcomm.cpu)

    return _first_and_second(piped, weights[world.rank or 0])


def test_a_stage_runs_where_it_is_defined_alone() -> None:
    weights, x = dense.draw(3, seed=1).abs() + 1, dense.draw(MICRO, 2, seed=2)

    def whole(weights: Tensor) -> Tensor:
        y = x
        for weight, stage in zip(weights, DOMAINS, strict=True):
            y = stage(weight, y)
        return y.sum()

    got = run_ranks(_domains_on_rank, 3, weights, x)
    for derivative, wanted in zip(zip(*got, strict=True), _first_and_second(whole, weights), strict=True):
        torch.testing.assert_close(torch.stack(derivative), wanted)


def _many_half_losses(world: fcomm.Group) -> None:
    micro = torch.ones(300, 1, dtype=torch.bfloat16)
    total, _ = layers.one_f_one_b(lambda p, x: x, lambda y, m: y.sum().float() * 1.25, {}, micro, world, fcomm.cpu)
    assert (total.item(), total.dtype) == (375.0, torch.float32)


def test_the_losses_of_half_types_add_up_in_float32() -> None:
    run_ranks(_many_half_losses, 2)


class Activations(TorchDispatchMode):
    """The results of tanh that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.tanh.default:
            self.refs.append(weakref.ref(y))
        return y

    def held(self) -> int:
        return sum(ref() is not None for ref in self.refs)


def _parameters_on_rank(world: fcomm.Group) -> list[str]:
    """Tensors that require grad outside leave no graph: not params, not micro, nor what stage and loss close over."""
    module = torch.nn.Linear(2, 2)
    params = {**dict(module.named_parameters()), "power": torch.tensor(2)}
    held = []

    def squared(params: Params, x: Tensor) -> Tensor:
        held.append(activations.held())
        return torch.tanh(F.linear(x, params["weight"], params["bias"])) ** params["power"]

    micro = torch.ones(6, 1, 2, requires_grad=True)
    with Activations() as activations:
        total, gradient = layers.one_f_one_b(squared, lambda y, m: module(y).sum(), params, micro, world, fcomm.cpu)
    assert list(gradient) == ["weight", "bias"]
    assert not any(x.requires_grad for x in (total, *gradient.values()))
    assert max(held) < world.size
    assert activations.held() == 0
    return []


def test_1f1b_of_parameters_holds_what_is_in_flight_alone() -> None:
    run_ranks(_parameters_on_rank, 2)


def _schedules_on_rank(world: fcomm.Group, backend: str) -> list[str]:
    """1F1B, GPipe's order, one at a time, and the differentiable gpipe: one loss, one gradient."""
    handles = world, getattr(fcomm, backend)
    params = {name: p.double() for name, p in own_stage(world.size, *handles).items()}
    x, label = POINTS[0][0].double(), POINTS[0][1].unflatten(0, (MICRO, -1))

    # The last rank's loss needs its output layer: it is a parameter of the stage that ends there.
    def last_stage(params: Params, x: Tensor) -> Tensor:
        y = stage(params, x)
        return y @ params["out"].T if world.rank == world.size - 1 else y

    def loss(y: Tensor, m: int) -> Tensor:
        return F.cross_entropy(y, label[m]) / MICRO

    def whole(params: Params) -> Tensor:
        y = layers.gpipe(partial(stage, params), micro(x), *handles)
        return layers.from_last(loss_of(params["out"], y.flatten(0, 1), POINTS[0][1]), *handles)

    wanted, value = grad_and_value(whole)(params)
    failures = []
    for in_flight in (None, MICRO, 1):
        got_value, got = layers.one_f_one_b(last_stage, loss, params, micro(x), *handles, in_flight=in_flight)
        for name, a, b in (("loss", got_value, value), *((k, got[k], wanted[k]) for k in wanted)):
            if not torch.allclose(a, b, rtol=1e-10, atol=1e-10):
                failures.append(f"in_flight={in_flight}: {name} is {a}, gpipe has {b}")
    return failures


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4))])
def test_1f1b_in_processes(backend: str, n: int) -> None:
    run_ranks(_schedules_on_rank, n, backend)
