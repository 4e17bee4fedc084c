"""Layers on difficult numbers: targets outside the vocabulary, not finite, half types; and attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from dense import draw, stack_parts
from test_layers import differences
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fcomm
from fcomm import layers
from fcomm.testing import run_ranks

N = 2
TP = fcomm.axis("tp", N)

# --- targets that are no entry of the vocabulary ------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [None, 7])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_targets_outside_the_vocabulary_are_ignored_or_nan(vocab: int | None, compiler: str | None) -> None:
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([[0, -100, 6], [3, -100, 5]])

    def losses(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The loss of each position, on both ranks, and the gradient of their sum with respect to all logits."""

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

    # Any other target makes the loss and the gradient NaN, only at its own position.
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


# --- attention against torch's own --------------------------------------------------------------------------------


# Zigzag only makes sense with the causal mask.
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
