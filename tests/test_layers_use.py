"""How the layers are used: meshes of two axes, modules, per-sample gradients, bytes, and the choice that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from dense import draw, stack_parts
from test_layers import BACKENDS, Traffic, differences, measured
from torch import Tensor
from torch.func import functional_call, grad, hessian, vmap
from torch.utils.checkpoint import checkpoint

import fcomm
from fcomm import layers
from fcomm.testing import run_ranks

N = 2
TP = fcomm.axis("tp", N)


def mlp_args() -> tuple[list[Tensor], list[Tensor]]:
    """x, up, down; and the rows of each rank's up and down."""
    x, up, _, down, _ = dense.CASES["mlp"].args(N)
    return [x, up, down], [stack_parts(up, 0, N), stack_parts(down, 1, N)]


def dense_loss(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return dense.mlp(x, up, None, down, None).square().mean()


# --- the choice that is wrong -------------------------------------------------------------------------------------


def mlp_with(enter: Any, leave: Any) -> Any:
    def loss(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(enter(x, TP, fcomm.sim), up))
        return leave(F.linear(hidden, down), TP, fcomm.sim).square().mean()

    return loss


@pytest.mark.parametrize(
    ("enter", "leave", "weights_times", "x_times"),
    [
        (fcomm.pvary, fcomm.all_reduce_invariant, 1, 1),
        # all_reduce means that each rank uses the sum in its own way, so n cotangents add up; here all are equal.
        (fcomm.pvary, fcomm.all_reduce, N, N),
    ],
)
def test_all_reduce_where_all_reduce_invariant_belongs(
    enter: Any, leave: Any, weights_times: int, x_times: int
) -> None:
    (x, up, down), parts = mlp_args()
    loss = mlp_with(enter, leave)
    of_up, of_down, of_x = fcomm.simulate(grad(loss, argnums=(0, 1, 2)), TP)(*parts, x.expand(N, *x.shape))
    wanted = grad(dense_loss, argnums=(1, 2, 0))(x, up, down)
    # The value is right either way: only a gradient check against the dense model shows the fault.
    value = fcomm.simulate(loss, TP)(*parts, x.expand(N, *x.shape))
    torch.testing.assert_close(value, dense_loss(x, up, down).expand(N))
    torch.testing.assert_close(of_up, weights_times * stack_parts(wanted[0], 0, N))
    torch.testing.assert_close(of_down, weights_times * stack_parts(wanted[1], 1, N))
    torch.testing.assert_close(of_x, x_times * stack_parts(wanted[2], None, N))


@pytest.mark.parametrize("n", [2, 3])
def test_the_wrong_choice_grows_with_depth(n: int) -> None:
    """n times too much in the last of two layers, n * n in the first: no learning rate can correct that."""
    tp = fcomm.axis("tp", n)
    x, *weights = (
        draw(*shape, seed=i) for i, shape in enumerate([(2, 3), (2 * n, 3), (3, 2 * n), (2 * n, 3), (3, 2 * n)])
    )
    dims = (0, 1, 0, 1)

    def loss(leave: Any, *parts: Tensor) -> Tensor:
        y = x
        for up, down in (parts[:2], parts[2:]):
            y = leave(F.linear(F.gelu(F.linear(fcomm.pvary(y, tp, fcomm.sim), up)), down), tp, fcomm.sim)
        return y.square().mean()

    rows = [stack_parts(w, d, n) for w, d in zip(weights, dims, strict=True)]
    right, wrong = (
        fcomm.simulate(grad(partial(loss, leave), argnums=(0, 1, 2, 3)), tp)(*rows)
        for leave in (fcomm.all_reduce_invariant, fcomm.all_reduce)
    )
    for a, b, times in zip(right, wrong, (n * n, n * n, n, n), strict=True):
        torch.testing.assert_close(b, times * a)


def test_without_pvary_a_rank_sees_its_own_part_of_the_gradient_only() -> None:
    (x, up, down), parts = mlp_args()
    loss = mlp_with(lambda x, group, backend: x, fcomm.all_reduce_invariant)
    of_x = fcomm.simulate(grad(loss, argnums=2), TP)(*parts, x.expand(N, *x.shape))
    wanted = grad(dense_loss)(x, up, down)
    assert not torch.allclose(of_x[0], of_x[1]), "an invariant value with a gradient that differs by rank"
    torch.testing.assert_close(of_x.sum(0), wanted)


# --- planted faults: the comparison that all layers go through must see them ----------------------------------------


def _fault(name: str, **changes: Any) -> list[str]:
    case = dense.CASES[name]
    wanted = dense.expected(case, N)

    def one_rank(ct: Tensor, *args: Tensor) -> list[Tensor]:
        return dense.value_and_vjp(lambda *a: case.parallel(*a, group=TP, backend=fcomm.sim), args, ct)

    return differences(fcomm.simulate(one_rank, TP)(wanted.ct, *wanted.args), wanted.results, name)


@pytest.mark.parametrize(
    ("name", "module", "attribute", "wrong"),
    [
        ("mlp", "tensor", "all_reduce_invariant", fcomm.all_reduce),
        ("row_linear-sequence", "tensor", "pvary", lambda x, group, backend: x),
        ("column_linear-sequence", "tensor", "all_gather", fcomm.all_gather_invariant),
        ("transformer_block-sequence", "tensor", "replicate", lambda xs, group, backend: list(xs)),
        ("cross_entropy", "tensor", "all_reduce_invariant", fcomm.all_reduce),
        ("ring-causal", "sequence", "causal_mask", lambda n, device: torch.ones(n, n, dtype=torch.bool).triu()),
        ("ulysses", "sequence", "all_to_all", lambda x, *handles, **kw: fcomm.all_to_all(x.flip(1), *handles, **kw)),
        ("moe_ragged", "expert", "pvary", lambda x, group, backend: x),
        ("moe_capacity", "expert", "pvary", lambda x, group, backend: x),
        ("gather_parameters", "data", "all_gather_coalesced", lambda xs, group, backend: [
            fcomm.all_gather_invariant(x, group, backend) for x in xs]),
        ("diffusion_block", "diffusion", "replicate", lambda xs, group, backend: list(xs)),
        ("diffusion_block", "diffusion", "all_gather_invariant", fcomm.all_gather),
    ],
)  # fmt: skip
def test_a_planted_fault_is_seen(
    name: str, module: str, attribute: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _fault(name)
    monkeypatch.setattr(f"fcomm.layers.{module}.{attribute}", wrong)
    assert _fault(name)


# --- modules and functional_call ----------------------------------------------------------------------------------


class ParallelMLP(torch.nn.Module):
    """Parameters in a module; the layer is the function."""

    def __init__(self, up: Tensor, down: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Parameter(up), torch.nn.Parameter(down)
        self.group, self.backend = group, backend

    def forward(self, x: Tensor) -> Tensor:
        return layers.mlp(x, self.up, None, self.down, None, self.group, self.backend)


def test_functional_call_of_a_module() -> None:
    (x, up, down), (ups, downs) = mlp_args()
    module = ParallelMLP(ups[0], downs[0], TP, fcomm.sim)

    def one_rank(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return grad(lambda p: functional_call(module, p, (x,)).square().mean())(params)

    got = fcomm.simulate(one_rank, TP)({"up": ups, "down": downs})
    wanted = grad(dense_loss, argnums=(1, 2))(x, up, down)
    torch.testing.assert_close(got["up"], stack_parts(wanted[0], 0, N))
    torch.testing.assert_close(got["down"], stack_parts(wanted[1], 1, N))


class ParallelBlock(torch.nn.Module):
    """A module of the whole block, trained with torch.optim like any other."""

    def __init__(self, params: dict[str, Tensor], group: fcomm.Group, backend: fcomm.Backend) -> None:
        super().__init__()
        self.params = torch.nn.ParameterDict(params)
        self.group, self.backend = group, backend

    def forward(self, x: Tensor) -> Tensor:
        return layers.transformer_block(
            x, {name: self.params[name] for name in dense.BLOCK}, self.group, self.backend, seq_dim=1
        )


def _block_parts(n: int) -> tuple[list[Tensor], list[Tensor]]:
    """The parts of x, and of the block's parameters."""
    x, *params = dense.CASES["transformer_block"].args(n)
    return [stack_parts(x, 1, n)], [stack_parts(p, d, n) for p, d in zip(params, dense.BLOCK.values(), strict=True)]


def _module_on_rank(world: fcomm.Group, backend: str) -> list[list[Tensor]]:
    return [_trained_module(world, backend, compiled) for compiled in (False, True)]


def _trained_module(world: fcomm.Group, backend: str, compiled: bool) -> list[Tensor]:
    (x,), params = _block_parts(world.size)
    own = {name: p[world.rank].clone() for name, p in zip(dense.BLOCK, params, strict=True)}
    module = ParallelBlock(own, world, getattr(fcomm, backend))
    step = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        # Each rank has its own positions: what is differentiated is the sum of all ranks' losses.
        step(x[world.rank]).square().sum().backward()
        optimizer.step()
    return [module.params[name].detach() for name in dense.BLOCK]


def test_a_module_in_processes() -> None:
    """Eager and compiled, three steps of torch.optim."""
    x, *params = dense.CASES["transformer_block"].args(N)
    leaves = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        dense.block(x, *leaves).square().sum().backward()
        optimizer.step()
    for ranks in zip(*fcomm.run(_module_on_rank, N, BACKENDS[0]), strict=True):
        for i, (p, dim) in enumerate(zip(leaves, dense.BLOCK.values(), strict=True)):
            torch.testing.assert_close(torch.stack([r[i] for r in ranks]), stack_parts(p.detach(), dim, N))


# --- per-sample gradients -----------------------------------------------------------------------------------------


def _per_sample(up: Tensor, down: Tensor, x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> Any:
    def loss(up: Tensor, down: Tensor, sample: Tensor) -> Tensor:
        return layers.mlp(sample, up, None, down, None, group, backend).square().mean()

    return vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(up, down, x)


def _wanted_per_sample(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    each = [grad(dense_loss, argnums=(1, 2))(sample, up, down) for sample in x]
    return [stack_parts(torch.stack(g), dim, N) for g, dim in zip(zip(*each, strict=True), (1, 2), strict=True)]


def test_per_sample_gradients_simulated() -> None:
    (x, up, down), parts = mlp_args()
    got = fcomm.simulate(lambda up, down: _per_sample(up, down, x, TP, fcomm.sim), TP)(*parts)
    torch.testing.assert_close(list(got), _wanted_per_sample(x, up, down), rtol=1e-10, atol=1e-10)


def _per_sample_on_rank(world: fcomm.Group, backend: str) -> Any:
    (x, _, _), (ups, downs) = mlp_args()
    return _per_sample(ups[world.rank], downs[world.rank], x, world, getattr(fcomm, backend))


def _hessian_on_rank(world: fcomm.Group, backend: str) -> Any:
    """Second derivatives through the layer: of the loss with respect to x."""
    (x, _, _), (ups, downs) = mlp_args()
    handles = (world, getattr(fcomm, backend))
    return hessian(lambda x: layers.mlp(x, ups[world.rank], None, downs[world.rank], None, *handles).square().mean())(x)


def _uneven_on_rank(world: fcomm.Group, backend: str) -> list[Tensor]:
    """Three hidden features on rank 0, one on rank 1: each rank's gradients, cut as its weights are."""
    (x, up, down), _ = mlp_args()
    own = slice(0, 3) if world.rank == 0 else slice(3, 4)
    handles = (world, getattr(fcomm, backend))

    def loss(up: Tensor, down: Tensor) -> Tensor:
        return layers.mlp(x, up, None, down, None, *handles).square().mean()

    return list(grad(loss, argnums=(0, 1))(up[own], down[:, own]))


def _counts_on_rank(world: fcomm.Group, backend: str) -> list[list[Tensor]]:
    """A training step whose messages are sized by the host, and one whose sizes stay on the device."""
    handles = (world, getattr(fcomm, backend))
    rows = [x[world.rank] for x in dense.expected(dense.CASES["moe_ragged"], world.size).args]
    results = []
    for on_host in (True, False):
        x, router, up, down = (v.clone().requires_grad_() for v in rows)
        weight, expert = layers.route(x, router, *handles, k=dense.CHOICES)
        if on_host:
            counts = layers.expert_counts(expert, router.shape[0], *handles).tolist()
            y = layers.moe_uneven(x, weight, expert, up, down, *handles, counts=counts)
        else:
            y = layers.moe_ragged(x, weight, expert, up, down, *handles)
        y.square().sum().backward()
        results.append([v.grad for v in (x, router, up, down)])
    return results


def _small_on_rank(world: fcomm.Group, backend: str) -> Any:
    programs = (_per_sample_on_rank, _hessian_on_rank, _uneven_on_rank, _counts_on_rank)
    return [program(world, backend) for program in programs]


def test_small_programs_in_processes() -> None:
    (x, up, down), _ = mlp_args()
    per_sample, second, uneven, counts = zip(*fcomm.run(_small_on_rank, N, BACKENDS[0]), strict=True)
    for i, wanted in enumerate(_wanted_per_sample(x, up, down)):
        torch.testing.assert_close(torch.stack([r[i] for r in per_sample]), wanted, rtol=1e-10, atol=1e-10)
    for got in second:
        torch.testing.assert_close(got, hessian(dense_loss)(x, up, down), rtol=1e-9, atol=1e-9)
    wanted_up, wanted_down = grad(dense_loss, argnums=(1, 2))(x, up, down)
    torch.testing.assert_close(torch.cat([r[0] for r in uneven]), wanted_up, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([r[1] for r in uneven], 1), wanted_down, rtol=1e-10, atol=1e-10)
    for on_host, on_device in counts:
        torch.testing.assert_close(on_host, on_device, rtol=1e-10, atol=1e-10)


def test_expert_counts() -> None:
    ep = fcomm.axis("ep", 3)
    x, router, *_ = dense.CASES["moe_ragged"].args(3)

    def one_rank(x: Tensor) -> Tensor:
        _, expert = layers.route(x, router, ep, fcomm.sim, k=dense.CHOICES)
        return layers.expert_counts(expert, router.shape[0], ep, fcomm.sim)

    for got in fcomm.simulate(one_rank, ep)(stack_parts(x, 0, 3)):
        assert got.tolist() == dense.COUNTS[3]


# --- ranks with different numbers of tokens -----------------------------------------------------------------------


def _tokens_on_rank(world: fcomm.Group, layer: Any) -> list[str]:
    """All tokens are on rank 0; value and gradients are those of the dense layer."""
    x, router, up, down = dense.CASES["moe_capacity"].args(world.size)
    ct = draw(*x.shape, seed=9)
    y, of_x, of_router, of_up, of_down = dense.value_and_vjp(dense.moe, [x, router, up, down], ct)
    own = slice(None if world.rank == 0 else 0)

    def part(experts: Tensor) -> Tensor:
        return stack_parts(experts, 0, world.size)[world.rank]

    def routed(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weight, expert = layers.route(x, router, world, fcomm.cpu, k=dense.CHOICES)
        return layer(x, weight, expert, up, down, world, fcomm.cpu)

    got = dense.value_and_vjp(routed, [x[own], router, part(up), part(down)], ct[own])
    return differences(got, [y[own], of_x[own], of_router, part(of_up), part(of_down)], "moe")


ALL = N * dense.TOKENS


@pytest.mark.parametrize(
    "layer",
    [
        partial(layers.moe_capacity, capacity=ALL),
        partial(layers.moe_ragged, rows=ALL * dense.CHOICES),
        partial(layers.moe_uneven, counts=[[sum(c) for c in zip(*dense.COUNTS[N], strict=True)], [0] * 2 * N]),
    ],
    ids=["capacity", "ragged", "uneven"],
)
def test_a_rank_without_tokens(layer: Any) -> None:
    run_ranks(_tokens_on_rank, N, layer)


def test_too_little_room_names_rows() -> None:
    with pytest.raises(fcomm.FcommError, match="rank 1 of group 'world' has room for, rows=0; pass rows="):
        run_ranks(_tokens_on_rank, N, layers.moe_ragged)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[fcomm.Group]:
    """A group of this process only."""
    group = fcomm.init(name="alone")
    yield group
    fcomm.close(group)


def test_errors_name_the_remedy(alone: fcomm.Group) -> None:
    q = draw(1, 3, 2, 2, seed=1)
    with pytest.raises(fcomm.FcommError, match=r"zigzag=True with 3 positions .* pad, or pass zigzag=False"):
        layers.ring_attention(q, q, q, TP, fcomm.sim, causal=True, zigzag=True)
    with pytest.raises(fcomm.FcommError, match=r"sizes is \[3, 0\] .* a length >= 1 for each rank"):
        layers.ring_attention(q, q, q, TP, fcomm.sim, sizes=[3, 0])
    with pytest.raises(fcomm.FcommError, match="length is 6, not divisible into 2n = 4 blocks; pad it"):
        layers.zigzag_order(6, 2)
    with pytest.raises(fcomm.FcommError, match="'tp' is not a group of processes that this one belongs to; use gpipe"):
        layers.one_f_one_b(lambda p, x: x, lambda y, m: y.sum(), {}, q, TP, fcomm.sim)
    with pytest.raises(TypeError, match=r"target is torch.float64; pass integers"):
        layers.vocab_parallel_cross_entropy(q, q[..., 0], TP, fcomm.sim)
    with pytest.raises(
        fcomm.FcommError, match=r"target has shape \(3,\) and logits \(1, 3, 2, 2\); pass one target for"
    ):
        layers.vocab_parallel_cross_entropy(q, torch.zeros(3).long(), TP, fcomm.sim)
    with pytest.raises(fcomm.FcommError, match=r"one_f_one_b: loss returned shape \(3, 2, 2\); return one number"):
        layers.one_f_one_b(lambda p, x: x, lambda y, m: y, {}, q, alone, fcomm.cpu)
    with pytest.raises(fcomm.FcommError, match=r"q of shape \(1, 3, 2, 2\) has 2 heads and k of shape .* 3; pass"):
        layers.ulysses_attention(q, q.repeat(1, 1, 2, 1)[:, :, :3], q, TP, fcomm.sim)
    with pytest.raises(fcomm.FcommError, match=r"route: k is 5, and router has 4 experts; choose 1 .. 4"):
        layers.route(q[0, 0], draw(4, 2, seed=1), TP, fcomm.sim, k=5)
    with pytest.raises(fcomm.FcommError, match=r"(?s)moe_uneven: counts is tensor.* expert_counts\(..\).tolist\(\)"):
        layers.moe_uneven(X, *ROUTED, *EXPERTS, TP, fcomm.sim, counts=torch.ones(2, 2).long())
    with pytest.raises(fcomm.FcommError, match=r"micro has shape \(0, 3, 2, 2\); stack at least one micro-batch"):
        layers.gpipe(lambda x: x, q[:0], TP, fcomm.sim)
    with pytest.raises(fcomm.FcommError, match=r"shards have \[3\] elements, but .* \[\(2, 2\)\] .* have \[2\]; pass"):
        layers.gather_parameters([draw(3, seed=1)], [(2, 2)], TP, fcomm.sim)


def test_too_little_room_on_a_rank_alone(alone: fcomm.Group) -> None:
    x, up, down = draw(3, 4, seed=1), draw(2, 5, 4, seed=2), draw(2, 4, 5, seed=3)
    choices = torch.zeros(3, 1).long()
    with pytest.raises(fcomm.FcommError, match="rank 0 of group 'alone' has room for, rows=2; pass rows="):
        layers.moe_ragged(x, choices.double(), choices, up, down, alone, fcomm.cpu, rows=2)


X, Q, ROUTED = torch.ones(2, 2), torch.ones(1, 2, 2, 2), (torch.ones(2, 1), torch.zeros(2, 1).long())
EXPERTS = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
TOKENS = torch.zeros(2, 2).long()
# The layers that use their group for more than passing it on.
ASKING: dict[str, Any] = {
    "shard_parameters": lambda g, b: layers.shard_parameters([X], g, b),
    "gather_parameters": lambda g, b: layers.gather_parameters([X], [X.shape], g, b),
    "ulysses_attention": lambda g, b: layers.ulysses_attention(Q, Q, Q, g, b),
    "ring_attention": lambda g, b: layers.ring_attention(Q, Q, Q, g, b, causal=True, zigzag=True),
    "usp_attention": lambda g, b: layers.usp_attention(Q, Q, Q, TP, g, b),
    "moe_capacity": lambda g, b: layers.moe_capacity(X, *ROUTED, *EXPERTS, g, b, capacity=1),
    "moe_ragged": lambda g, b: layers.moe_ragged(X, *ROUTED, *EXPERTS, g, b),
    "moe_uneven": lambda g, b: layers.moe_uneven(X, *ROUTED, *EXPERTS, g, b, counts=[[2]]),
    "gpipe": lambda g, b: layers.gpipe(lambda x: x, X, g, b),
    "one_f_one_b": lambda g, b: layers.one_f_one_b(lambda p, x: x, lambda y, m: y.sum(), {}, X, g, b),
    "own_tokens": lambda g, b: layers.own_tokens(TOKENS, TP, g, b),
    "gpt_loss": lambda g, b: layers.gpt_loss({}, TOKENS, TOKENS, layers.GPT(), TP, g, TP, b),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_is_no_group_is_named(name: str) -> None:
    for group in ("tp", None):
        with pytest.raises(TypeError, match=rf"{name}: group is {group!r}; pass a Group, from fcomm.init"):
            ASKING[name](group, fcomm.sim)


def test_replicate_takes_what_can_be_gone_through_once() -> None:
    """Such as a module's parameters(): iterated over twice, the second loop would find nothing."""

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        (own,) = layers.replicate((p for p in [weight]), TP, fcomm.sim)
        return (own * x).sum()

    weight, x = draw(3, seed=1), draw(N, 3, seed=2)
    got = fcomm.simulate(grad(loss), TP)(weight.expand(N, 3), x)
    torch.testing.assert_close(got, x.sum(0).expand(N, 3))


# --- sharded parameters on dp x tp --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (2, 1)])
def test_sharded_parameters_with_tensor_parallelism(sizes: tuple[int, int]) -> None:
    """Each rank holds 1/dp of its 1/tp of the weights, padded where dp does not divide it; gradients come as shares."""
    dp, tp = fcomm.axis("dp", sizes[0]), fcomm.axis("tp", sizes[1])
    x, up, down = draw(sizes[0] * 2, 4, 3, seed=1), draw(4, 3, seed=2), draw(3, 4, seed=3)

    def one_rank() -> list[Tensor]:
        own = [fcomm.shard(up, tp, fcomm.sim), fcomm.shard(down, tp, fcomm.sim, dim=1)]
        shapes = [p.shape for p in own]
        batch = fcomm.shard(x, dp, fcomm.sim)

        def loss(shards: list[Tensor]) -> Tensor:
            a, b = layers.gather_parameters(shards, shapes, dp, fcomm.sim)
            y = layers.mlp(batch, a, None, b, None, tp, fcomm.sim)
            return fcomm.all_reduce_invariant(y.square().mean(), dp, fcomm.sim, op="mean")

        shards = layers.shard_parameters(own, dp, fcomm.sim)
        got = grad(loss)(shards)
        assert sum(s.numel() for s in shards) < sum(p.numel() for p in own) / sizes[0] + 2
        return layers.gather_parameters(got, shapes, dp, fcomm.sim)

    got = fcomm.simulate(fcomm.simulate(one_rank, tp), dp)()
    wanted = grad(lambda p: dense.zero_mlp(x, *p).square().mean())([up, down])
    for g, w, dim in zip(got, wanted, (0, 1), strict=True):
        torch.testing.assert_close(g, stack_parts(w, dim, sizes[1]).expand_as(g), rtol=1e-10, atol=1e-10)


def test_a_parameter_of_no_dimensions_is_sharded_and_gathered() -> None:
    def one_rank(scale: Tensor) -> Tensor:
        shards = layers.shard_parameters([scale], TP, fcomm.sim)
        return layers.gather_parameters(shards, [scale.shape], TP, fcomm.sim)[0]

    assert fcomm.simulate(one_rank, TP)(torch.tensor([2.5, 2.5])).tolist() == [2.5, 2.5]


def test_three_ways_of_data_parallelism_agree() -> None:
    dp = fcomm.axis("dp", 3)
    x, up, down = draw(6, 4, 3, seed=1), draw(4, 3, seed=2), draw(3, 4, seed=3)

    def one_rank(batch: Tensor) -> list[list[Tensor]]:
        def mean_loss(params: list[Tensor]) -> Tensor:
            own = dense.zero_mlp(batch, *layers.replicate(params, dp, fcomm.sim)).square().mean()
            return fcomm.all_reduce_invariant(own, dp, fcomm.sim, op="mean")

        own = grad(lambda params: dense.zero_mlp(batch, *params).square().mean())([up, down])
        return [grad(mean_loss)([up, down]), layers.mean_gradients(own, dp, fcomm.sim)]

    wanted = grad(lambda params: dense.zero_mlp(x, *params).square().mean())([up, down])
    for way in fcomm.simulate(one_rank, dp)(stack_parts(x, 0, 3)):
        torch.testing.assert_close(way, [w.expand(3, *w.shape) for w in wanted], rtol=1e-10, atol=1e-10)


# --- bytes --------------------------------------------------------------------------------------------------------


def _bytes_on_rank(world: fcomm.Group, backend: str) -> list[str]:
    """The bytes that a rank sends, in float64, by the formulas in the layers' docstrings."""
    n, failures = world.size, []
    handles = {"group": world, "backend": getattr(fcomm, backend)}
    each, twice = (n - 1) / n, 2 * (n - 1) / n
    hidden = 8 * 2 * (2 * n) * 6  # transformer_block: B S D
    norms = 8 * 2 * 6
    heads = 8 * 2 * 2 * 3  # ulysses, ring: B S/n C
    parameters = 8 * 2 * 6 * n
    tokens = 8 * 2 * n * dense.TOKENS * 4  # moe_capacity: E c D
    router = 8 * 2 * n * 4
    textbook = {
        "transformer_block": (2 * twice * hidden, 2 * twice * hidden),
        "transformer_block-sequence": (4 * each * hidden, 4 * each * hidden + twice * norms),
        "cross_entropy": (twice * 3 * 8 * 2 * 3, 0),
        "ulysses": (each * heads * (2 * 2 * n + 2 * n), each * heads * (2 * 2 * n + 2 * n)),
        "ring": ((n - 1) * heads * 2 * 3, (n - 1) * heads * 2 * 3),
        "gather_parameters": (each * parameters, each * parameters),
        "moe_capacity": (2 * each * tokens, 2 * each * tokens + twice * router),
    }
    for name, wanted in textbook.items():
        case = dense.CASES[name]
        rows = dense.expected(case, n)
        got = measured(case, [x[world.rank] for x in rows.args], rows.ct[world.rank], **handles)
        failures += [f"{name}, {n} ranks: {g.nbytes} bytes, the textbook has {w}"
                     for g, w in zip(got, wanted, strict=True) if abs(g.nbytes - w) > 1e-6]  # fmt: skip
    return failures + _gathers_again(n, **handles)


def _gathers_again(n: int, **handles: Any) -> list[str]:
    """Sharded parameters under checkpoint: backward gathers again instead of keeping the whole."""
    case = dense.CASES["gather_parameters"]
    x, *shards = (rows[0].clone().requires_grad_() for rows in dense.expected(case, n).args)
    with Traffic() as forward:
        y = checkpoint(lambda *shards: case.parallel(x, *shards, **handles), *shards, use_reentrant=False)
    with Traffic() as backward:
        y.sum().backward()
    calls = dict(forward.calls), dict(backward.calls)
    wanted = {"all_gather": 1}, {"all_gather": 1, "reduce_scatter": 1}
    return [] if calls == wanted else [f"gather_parameters under checkpoint: {calls}, wanted {wanted}"]


@pytest.mark.parametrize("n", [3, pytest.param(2, marks=pytest.mark.long)])
def test_bytes(n: int) -> None:
    run_ranks(_bytes_on_rank, n, "c10d")
