"""How the layers are used: meshes of two axes, modules, per-sample gradients, bytes, and the choice that is wrong."""

from __future__ import annotations

from functools import partial
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from dense import draw, stack_parts
from test_layers import BACKENDS, Traffic, differences, measured
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
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
        # all_reduce says: each rank uses the sum in its own way, so n cotangents add up. Here they are n times one.
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
    # The value is right either way: nothing but a gradient check against the dense model shows the fault.
    value = fcomm.simulate(loss, TP)(*parts, x.expand(N, *x.shape))
    torch.testing.assert_close(value, dense_loss(x, up, down).expand(N))
    torch.testing.assert_close(of_up, weights_times * stack_parts(wanted[0], 0, N))
    torch.testing.assert_close(of_down, weights_times * stack_parts(wanted[1], 1, N))
    torch.testing.assert_close(of_x, x_times * stack_parts(wanted[2], None, N))


@pytest.mark.parametrize("n", [2, 3])
def test_the_wrong_choice_grows_with_depth(n: int) -> None:
    """n times too much in the last of two layers, n * n in the first: no learning rate mends that."""
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


# --- targets that are no entry of the vocabulary ------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [None, 7])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_targets_outside_the_vocabulary_are_ignored_or_nan(vocab: int | None, compiler: str | None) -> None:
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([[0, -100, 6], [3, -100, 5]])

    def losses(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The loss of each position, on both ranks, and the gradient of their sum by the whole of the logits."""

        def summed(parts: Tensor) -> tuple[Tensor, Tensor]:
            loss = fcomm.simulate(
                lambda part: layers.vocab_parallel_cross_entropy(part, target, TP, fcomm.sim, vocab=vocab, **options),
                TP,
            )(parts)
            return loss[0].sum(), loss

        parts, loss = grad(summed, has_aux=True)(torch.stack(logits.chunk(2, -1)))
        return loss, torch.cat(list(parts), -1)

    run = losses if compiler is None else torch.compile(losses, fullgraph=True, backend=compiler)
    loss, gradient = run(logits, target)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf[..., :vocab].transpose(1, 2), target, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(loss, torch.stack([expected.detach()] * 2))
    torch.testing.assert_close(gradient, leaf.grad)
    assert not loss[:, :, 1].any()
    assert not gradient[:, 1].any()

    # Any other is NaN, the loss and the gradient of its position alone.
    last = 8 if vocab is None else vocab
    for wrong in (-1, -99, last, last + 100, 2**40):
        spoiled = target.clone()
        spoiled[1, 0] = wrong
        got, slope = run(logits, spoiled)
        assert got[:, 1, 0].isnan().all()
        assert got.isnan().sum() == 2
        assert slope[1, 0, :vocab].isnan().all()
        assert not slope[0].isnan().any()
        assert not slope[1, 1:].isnan().any()
    assert run(logits, target, ignore_index=None)[0][:, :, 1].isnan().all()
    assert run(logits, target.clamp(min=0), ignore_index=6)[0][0, 0, 2] == 0
    torch.testing.assert_close(run(logits, target.to(torch.int8))[0], loss)


# --- what is not finite stays with its own tokens -----------------------------------------------------------------


def test_a_row_that_is_not_finite_spoils_its_own_tokens_alone() -> None:
    tokens, weight = torch.tensor([0, 3, 1]), draw(4, 3, seed=1)
    ct = draw(3, 3, seed=2)
    weight[2] = torch.inf  # rank 1's first row, which it looks up for the tokens of rank 0
    ct[1] = torch.nan  # of a token of rank 1, for which rank 0 looks up its first row

    def one_rank(weight: Tensor) -> list[Tensor]:
        return dense.value_and_vjp(lambda w: layers.vocab_parallel_embedding(tokens, w, TP, fcomm.sim), [weight], ct)

    got = fcomm.simulate(one_rank, TP)(stack_parts(weight, 0, N))
    y, gradient = dense.value_and_vjp(lambda w: F.embedding(tokens, w), [weight], ct)
    torch.testing.assert_close(got, [stack_parts(y, None, N), stack_parts(gradient, 0, N)], equal_nan=True)


def test_neither_a_bad_token_nor_a_bad_expert_spoils_another_expert() -> None:
    args = rows, _, down = [draw(*shape, seed=i) for i, shape in enumerate([(3, 4), (3, 5, 4), (3, 4, 5)])]
    rows[0], down[1] = torch.inf, torch.inf
    ct = draw(3, 4, seed=3)
    got = dense.value_and_vjp(lambda x, *of: layers.masked_experts(x, torch.arange(3), *of), args, ct)
    wanted = dense.value_and_vjp(dense.zero_mlp, [x[2] for x in args], ct[2])
    torch.testing.assert_close([x[2] for x in got], wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_what_the_padding_of_a_ring_holds_does_not_matter(causal: bool) -> None:
    layer = partial(layers.ring_attention, group=TP, backend=fcomm.sim, causal=causal, sizes=[3, 2])

    def with_padding(value: float) -> list[Tensor]:
        """The results on real positions."""
        qkv, ct = draw(3, N, 1, 3, 2, 2, seed=1), draw(N, 1, 3, 2, 2, seed=2)
        qkv[:, 1, :, 2], ct[1, :, 2] = value, 0.0
        results = fcomm.simulate(lambda ct, *qkv: dense.value_and_vjp(layer, qkv, ct), TP)(ct, *qkv)
        return [x.squeeze(1)[(0, 0, 0, 1, 1), (0, 1, 2, 0, 1)] for x in results]

    torch.testing.assert_close(with_padding(torch.nan), with_padding(0.0))


# --- half types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_of_half_types_is_that_of_torch(scale: float, dtype: torch.dtype) -> None:
    x, ct = draw(3, 8, seed=1, scale=scale).to(dtype), draw(3, 8, seed=2).to(dtype)
    weight = draw(8, seed=3).to(dtype)
    got = dense.value_and_vjp(layers.rms_norm, [x, weight], ct)
    wanted = dense.value_and_vjp(lambda x, w: F.rms_norm(x, (8,), w, 1e-6), [x, weight], ct)
    torch.testing.assert_close(got, wanted)


def test_cross_entropy_over_more_entries_than_float16_counts() -> None:
    logits, target = draw(1, 2, 80_000, seed=1, scale=0.01).half(), torch.tensor([[3, 79_999]])
    parts, ct = stack_parts(logits, 2, N), torch.ones(1, 2).half()

    def one_rank(part: Tensor) -> list[Tensor]:
        return dense.value_and_vjp(
            lambda part: layers.vocab_parallel_cross_entropy(part, target, TP, fcomm.sim), [part], ct
        )

    loss, gradient = dense.value_and_vjp(lambda x: dense.cross_entropy(x, target), [logits.double()], ct.double())
    wanted = [stack_parts(loss, None, N).half(), stack_parts(gradient, 2, N).half()]
    torch.testing.assert_close(fcomm.simulate(one_rank, TP)(parts), wanted)


@pytest.mark.parametrize("zigzag", [False, True])
def test_ring_attention_over_values_that_add_up_to_more_than_float16_has(zigzag: bool) -> None:
    q, k, v, ct = (draw(1, 512, 1, 2, seed=i).half() for i in range(4))
    v += 300
    order = layers.zigzag_order(512, N) if zigzag else torch.arange(512)
    layer = partial(layers.ring_attention, group=TP, backend=fcomm.sim, causal=zigzag, zigzag=zigzag)
    parts = [stack_parts(x[:, order], 1, N) for x in (ct, q, k, v)]
    got = fcomm.simulate(lambda ct, *qkv: dense.value_and_vjp(layer, qkv, ct), TP)(*parts)
    wanted = dense.value_and_vjp(partial(dense.sdpa, causal=zigzag), [x.double() for x in (q, k, v)], ct.double())
    torch.testing.assert_close(got, [stack_parts(x[:, order], 1, N).half() for x in wanted], rtol=0.02, atol=0.05)


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
    """A module of the whole block, trained with torch.optim as any other."""

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
        # Each rank's own positions: the sum of all ranks' losses is what is differentiated.
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
    """Second derivatives through the layer: of the loss by x."""
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
    """All tokens are rank 0's; value and gradients are the dense layer's."""
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


def test_errors_name_the_remedy() -> None:
    q = draw(1, 3, 2, 2, seed=1)
    with pytest.raises(fcomm.FcommError, match=r"zigzag=True with 3 positions .* pad, or pass zigzag=False"):
        layers.ring_attention(q, q, q, TP, fcomm.sim, causal=True, zigzag=True)
    with pytest.raises(fcomm.FcommError, match=r"sizes is \[3, 0\] .* a length >= 1 for each rank"):
        layers.ring_attention(q, q, q, TP, fcomm.sim, sizes=[3, 0])
    with pytest.raises(fcomm.FcommError, match="length is 6, not divisible into 2n = 4 blocks; pad it"):
        layers.zigzag_order(6, 2)
    with pytest.raises(fcomm.FcommError, match="'tp' is not a group of processes that this one belongs to; use gpipe"):
        layers.one_f_one_b(lambda p, x: x, lambda y, m: y.sum(), {}, q, TP, fcomm.sim)


# --- attention against torch's own --------------------------------------------------------------------------------


# Zigzag is an order for the causal mask.
ATTENTIONS = [(name, causal) for name in ("ulysses", "ulysses-fused", "ring", "usp") for causal in (False, True)]


@pytest.mark.parametrize(("name", "causal"), [*ATTENTIONS, ("ring-zigzag", True), ("usp-zigzag", True)])
def test_attention_is_scaled_dot_product_attention(name: str, causal: bool) -> None:
    """Value, gradient and jvp, on 2 x 2 ranks or 4."""
    outer, inner = fcomm.axis("ring", 2), fcomm.axis("ulysses", 2)
    four = fcomm.axis("sp", 4)
    q, k, v = (draw(2, 16, heads, 3, seed=s, scale=3.0) for s, heads in ((1, 4), (2, 4), (3, 4)))
    ct, t = draw(2, 16, 4, 3, seed=4), draw(2, 16, 4, 3, seed=5)
    order = torch.arange(16)
    if "zigzag" in name:
        order = layers.zigzag_order(16, 2 if "usp" in name else 4)
    zigzag = {"zigzag": "zigzag" in name}
    layer = {
        "ulysses": partial(layers.ulysses_attention, group=four),
        "ulysses-fused": partial(layers.ulysses_attention, group=four, attend=layers.fused_attention),
        "ring": partial(layers.ring_attention, group=four),
        "ring-zigzag": partial(layers.ring_attention, group=four, **zigzag),
        "usp": partial(layers.usp_attention, ulysses=inner, ring=outer),
        "usp-zigzag": partial(layers.usp_attention, ulysses=inner, ring=outer, **zigzag),
    }[name]

    def one_rank(q: Tensor, k: Tensor, v: Tensor, ct: Tensor, t: Tensor) -> list[Tensor]:
        f = partial(layer, backend=fcomm.sim, causal=causal)
        y, pull = vjp(f, q, k, v)
        # torch's fused kernel has no forward mode; its math form has.
        with sdpa_kernel(SDPBackend.MATH):
            tangent = jvp(f, (q, k, v), (t, t, t))[1]
        return [y, *pull(ct), tangent]

    def wanted(q: Tensor, k: Tensor, v: Tensor, ct: Tensor, t: Tensor) -> list[Tensor]:
        f = partial(dense.sdpa, causal=causal)
        y, pull = vjp(f, q, k, v)
        return [y, *pull(ct), jvp(f, (q, k, v), (t, t, t))[1]]

    def parts(x: Tensor) -> Tensor:
        rows = stack_parts(x[:, order], 1, 4)
        return rows.unflatten(0, (2, 2)) if "usp" in name else rows

    if "usp" in name:
        stacked = fcomm.simulate(fcomm.simulate(one_rank, inner), outer)
    else:
        stacked = fcomm.simulate(one_rank, four)
    got = stacked(*(parts(x) for x in (q, k, v, ct, t)))
    assert not differences(got, [parts(x) for x in wanted(q, k, v, ct, t)], name)


def check_few_heads(world: fcomm.Group) -> list[str]:
    """On three ranks the last one gets none of two query heads, which share a key head."""
    xs = [draw(2, 6, heads, 3, seed=s) for s, heads in ((1, 2), (2, 1), (3, 1))]
    ct = draw(2, 6, 2, 3, seed=4)
    y, pull = vjp(lambda q, k, v: dense.sdpa(q, k, v, causal=True), *xs)
    got, pull_got = vjp(
        partial(layers.ulysses_attention, group=world, backend=fcomm.c10d, causal=True),
        *(x.chunk(3, 1)[world.rank or 0] for x in xs),
    )
    pairs = zip((got, *pull_got(ct.chunk(3, 1)[world.rank or 0])), (y, *pull(ct)), strict=True)
    return [f"{a} is not {b}" for a, b in ((a, b.chunk(3, 1)[world.rank or 0]) for a, b in pairs) if not close(a, b)]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b)


def test_a_rank_may_get_no_heads() -> None:
    run_ranks(check_few_heads, 3, timeout_s=60)


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
    """Bytes a rank sends, float64, by the formulas in the layers' own texts."""
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
