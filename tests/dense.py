"""The parallel layers' dense counterparts, on one device without communication, and the table that pairs the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

import fcomm
from fcomm import layers


@dataclass(frozen=True)
class LayerCase:
    """A layer, its dense counterpart, and how the counterpart's tensors are laid out over the ranks.

    parallel(*parts, group, backend) -> y on one rank.  dense(*wholes) -> y, or dense(*wholes, n=n).
    args: n -> the whole tensors.  dims: the dim of each that is cut over the ranks, None if all ranks have the whole.
    out: the dim of y that is cut, None if y is the same on all ranks.
    forward, backward: n -> {collective: calls}, for the layer and for its vjp.
    """

    id: str
    parallel: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    args: Callable[[int], Sequence[Tensor]]
    dims: Sequence[int | None]
    out: int | None
    forward: Callable[[int], dict[str, int]]
    backward: Callable[[int], dict[str, int]]
    sizes: Sequence[int] = (1, 2, 3, 4)
    dense_takes_n: bool = False

    def whole(self, n: int) -> Callable[..., Tensor]:
        return partial(self.dense, n=n) if self.dense_takes_n else self.dense


def stack_parts(x: Tensor, dim: int | None, n: int) -> Tensor:
    """Each rank's part of a whole tensor, ranks in the leading dimension."""
    return x.expand(n, *x.shape) if dim is None else torch.stack(x.chunk(n, dim))


def differentiable(args: Sequence[Tensor]) -> list[int]:
    return [i for i, x in enumerate(args) if x.is_floating_point()]


def of_floats(fn: Callable[..., Tensor], args: Sequence[Tensor]) -> Callable[..., Tensor]:
    """fn as a function of its float arguments only."""
    places = differentiable(args)

    def of(*floats: Tensor) -> Tensor:
        full = list(args)
        for i, x in zip(places, floats, strict=True):
            full[i] = x
        return fn(*full)

    return of


def value_and_vjp(fn: Callable[..., Tensor], args: Sequence[Tensor], ct: Tensor) -> list[Tensor]:
    """[fn(*args), then the cotangent of every float argument]."""
    y, pull = vjp(of_floats(fn, args), *(args[i] for i in differentiable(args)))
    return [y, *pull(ct)]


@dataclass(frozen=True)
class Expected:
    """What all ranks must return: rows of every result, and the rows of the arguments and the cotangent."""

    args: list[Tensor]
    ct: Tensor
    results: list[Tensor]


def expected(case: LayerCase, n: int) -> Expected:
    wholes = list(case.args(n))
    dense = case.whole(n)
    y = dense(*wholes)
    ct = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    results = value_and_vjp(dense, wholes, ct)
    dims = [case.out, *(case.dims[i] for i in differentiable(wholes))]
    return Expected(
        [stack_parts(x, d, n) for x, d in zip(wholes, case.dims, strict=True)],
        stack_parts(ct, case.out, n),
        [stack_parts(x, d, n) for x, d in zip(results, dims, strict=True)],
    )


def draw(*shape: int, seed: int, scale: float = 0.5) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def integers(*shape: int, high: int, seed: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# --- tensor parallel ----------------------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """torch's attention over [B S H C], [B T K C]; the math backend has all derivatives."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal: bool = True) -> Tensor:
    heads = [torch.einsum("bsd,hcd->bshc", x, w) for w in (q, k, v)]
    return torch.einsum("bshc,dhc->bsd", sdpa(*heads, causal=causal), out)


def mlp(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)


BLOCK = {"norm1": None, "norm2": None, "q": 0, "k": 0, "v": 0, "out": 1, "up": 0, "down": 1}


def block(x: Tensor, *params: Tensor, causal: bool = True) -> Tensor:
    p = dict(zip(BLOCK, params, strict=True))
    d = x.shape[-1:]
    x = x + attention(F.rms_norm(x, d, p["norm1"], 1e-6), *(p[name] for name in ("q", "k", "v", "out")), causal)
    return x + mlp(F.rms_norm(x, d, p["norm2"], 1e-6), p["up"], None, p["down"], None)


def cross_entropy(logits: Tensor, target: Tensor, vocab: int | None = None) -> Tensor:
    return F.cross_entropy(logits[..., :vocab].transpose(1, 2), target, reduction="none")


def _linear_args(n: int) -> list[Tensor]:
    return [draw(2, n, 3, seed=1), draw(2 * n, 3, seed=2), draw(2 * n, seed=3)]


def _row_args(n: int) -> list[Tensor]:
    return [draw(2, n, 2 * n, seed=1), draw(3, 2 * n, seed=2), draw(3, seed=3)]


def _embedding_args(n: int) -> list[Tensor]:
    return [integers(2, 2 * n, high=3 * n, seed=1), draw(3 * n, 4, seed=2)]


def _entropy_args(n: int) -> list[Tensor]:
    # Large values: exp of an unshifted logit would overflow.
    return [draw(2, 3, 3 * n, seed=1, scale=2.0) + 900.0, integers(2, 3, high=3 * n - 2, seed=2)]


def _attention_args(n: int) -> list[Tensor]:
    return [draw(2, 2 * n, 5, seed=1), draw(2 * n, 3, 5, seed=2), *(draw(n, 3, 5, seed=s) for s in (3, 4)),
            draw(5, 2 * n, 3, seed=5)]  # fmt: skip


def _mlp_args(n: int) -> list[Tensor]:
    return [draw(2, n, 3, seed=1), draw(2 * n, 3, seed=2), draw(2 * n, seed=3), draw(3, 2 * n, seed=4), draw(3, seed=5)]


def block_args(n: int) -> list[Tensor]:
    return [
        draw(2, 2 * n, 6, seed=1),
        draw(6, seed=2) + 1,
        draw(6, seed=3) + 1,
        *_attention_like(n, 6),
        draw(2 * n, 6, seed=8),
        draw(6, 2 * n, seed=9),
    ]


def _attention_like(n: int, d: int) -> list[Tensor]:
    return [draw(2 * n, 3, d, seed=4), draw(n, 3, d, seed=5), draw(n, 3, d, seed=6), draw(d, 2 * n, 3, seed=7)]


def _block(x: Tensor, *params: Tensor, **rest: Any) -> Tensor:
    return layers.transformer_block(x, dict(zip(BLOCK, params, strict=True)), **rest)


def _always(**counts: int) -> Callable[[int], dict[str, int]]:
    return lambda n: counts


def _both(id: str, parallel: Callable[..., Tensor], dense: Callable[..., Tensor], args: Any, dims: Sequence[int | None],
          out: int | None, x_dim: int | None, pairs: int, replicated: int) -> list[LayerCase]:  # fmt: skip
    """A case without and with sequence parallelism; the counts are those of Megatron's tables."""
    reduce = _always(all_reduce_invariant=pairs)
    exchange = {"all_gather": pairs, "reduce_scatter": pairs}

    def sequence(*parts: Tensor, **rest: Any) -> Tensor:
        return parallel(*parts, seq_dim=1, **rest)

    return [
        LayerCase(id, parallel, dense, args, dims, out, reduce, reduce),
        LayerCase(f"{id}-sequence", sequence, dense, args, [x_dim, *dims[1:]], 1, _always(**exchange),
                  _always(**exchange, **({"all_reduce_invariant": replicated} if replicated else {}))),
    ]  # fmt: skip


def _sequence(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *parts, **rest: fn(*parts, seq_dim=1, **rest)


TENSOR = [
    LayerCase("column_linear", layers.column_linear, F.linear, _linear_args, [None, 0, 0], 2,
              _always(), _always(all_reduce_invariant=1)),
    LayerCase("column_linear-sequence", _sequence(layers.column_linear), F.linear, _linear_args, [1, 0, 0], 2,
              _always(all_gather=1), _always(reduce_scatter=1)),
    LayerCase("row_linear", layers.row_linear, F.linear, _row_args, [2, 1, None], None,
              _always(all_reduce_invariant=1), _always()),
    LayerCase("row_linear-sequence", _sequence(layers.row_linear), F.linear, _row_args, [2, 1, None], 1,
              _always(reduce_scatter=1), _always(all_gather=1, all_reduce_invariant=1)),
    LayerCase("embedding", layers.vocab_parallel_embedding, F.embedding, _embedding_args, [None, 0], None,
              _always(all_reduce_invariant=1), _always()),
    LayerCase("embedding-sequence", _sequence(layers.vocab_parallel_embedding), F.embedding, _embedding_args,
              [None, 0], 1, _always(reduce_scatter=1), _always(all_gather=1)),
    LayerCase("cross_entropy", layers.vocab_parallel_cross_entropy, cross_entropy, _entropy_args, [2, None], None,
              _always(all_reduce=1, all_reduce_invariant=1), _always()),
    LayerCase("cross_entropy-padded",
              lambda logits, target, **rest: layers.vocab_parallel_cross_entropy(
                  logits, target, vocab=logits.shape[-1] * rest["group"].size - 2, **rest),
              lambda logits, target: cross_entropy(logits, target, -2), _entropy_args, [2, None], None,
              _always(all_reduce=1, all_reduce_invariant=1), _always()),
    *_both("mlp", layers.mlp, mlp, _mlp_args, [None, 0, 0, 1, None], None, 1, 1, 1),
    *_both("attention", layers.attention, attention, _attention_args, [None, 0, 0, 0, 1], None, 1, 1, 0),
    *_both("transformer_block", _block, block, block_args, [None, *BLOCK.values()], None, 1, 2, 1),
]  # fmt: skip


# --- sequence parallel --------------------------------------------------------------------------------------------


def lengths(n: int) -> list[int]:
    """How many positions each rank has, different from its neighbours."""
    return [3, 1, 2, 3][:n]


def _real(n: int) -> Tensor:
    """Where the real positions are when every rank pads to the longest."""
    longest = max(lengths(n))
    return torch.cat([torch.arange(d) + r * longest for r, d in enumerate(lengths(n))])


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, *, n: int, causal: bool) -> Tensor:
    real = _real(n)
    y = sdpa(*(x[:, real] for x in (q, k, v)), causal=causal)
    return torch.zeros_like(q).index_copy(1, real, y)


def _own(x: Tensor, group: fcomm.Group) -> Tensor:
    """In processes a rank drops the padding that simulated ranks need."""
    return x if group.simulated else x[:, : lengths(group.size)[group.rank]]


def _ulysses_of_lengths(q: Tensor, k: Tensor, v: Tensor, *, group: Any, backend: Any, causal: bool) -> Tensor:
    y = layers.ulysses_attention(
        *(_own(x, group) for x in (q, k, v)), group, backend, causal=causal, sizes=lengths(group.size)
    )
    return F.pad(y, (0, 0, 0, 0, 0, q.shape[1] - y.shape[1]))


def _ring_of_lengths(q: Tensor, k: Tensor, v: Tensor, *, group: Any, backend: Any, causal: bool) -> Tensor:
    y = layers.ring_attention(q, k, v, group, backend, causal=causal, sizes=lengths(group.size))
    own = torch.tensor(lengths(group.size)).index_select(0, fcomm.axis_index(group, backend).reshape(1))
    return y * (torch.arange(q.shape[1]) < own)[:, None, None]


def _zigzag_sdpa(q: Tensor, k: Tensor, v: Tensor, *, n: int) -> Tensor:
    order = layers.zigzag_order(q.shape[1], n)
    back = order.argsort()
    return sdpa(*(x[:, back] for x in (q, k, v)), causal=True)[:, order]


def _qkv(seq: Callable[[int], int], heads: Callable[[int], int], keys: Callable[[int], int]) -> Callable[[int], Any]:
    # Scores far from 0, to reveal a softmax that is not shifted, or is shifted twice.
    return lambda n: [draw(2, seq(n), heads(n), 3, seed=1, scale=3.0),
                      *(draw(2, seq(n), keys(n), 3, seed=s, scale=3.0) for s in (2, 3))]  # fmt: skip


def _sequence_cases() -> list[LayerCase]:
    even = _qkv(lambda n: 2 * n, lambda n: 2 * n, lambda n: n)
    few = _qkv(lambda n: 2 * n, lambda n: 6, lambda n: 3)
    uneven = _qkv(lambda n: n * max(lengths(n)), lambda n: 4, lambda n: 2)
    two = {"all_to_all": 2}
    cases = []
    for causal in (False, True):
        label = "-causal" if causal else ""
        plain = partial(sdpa, causal=causal)
        for name, layer, args, dense in (
            ("ulysses", layers.ulysses_attention, even, plain),
            ("ulysses-heads", layers.ulysses_attention, few, plain),
            ("ulysses-lengths", _ulysses_of_lengths, uneven, partial(_padded_sdpa, causal=causal)),
            ("ring", layers.ring_attention, few, plain),
            ("ring-lengths", _ring_of_lengths, uneven, partial(_padded_sdpa, causal=causal)),
        ):
            traffic = (lambda n: {"ppermute": n - 1}) if "ring" in name else (lambda n: two)
            cases.append(LayerCase(name + label, partial(layer, causal=causal), dense, args, [1, 1, 1], 1,
                                   traffic, traffic, dense_takes_n="lengths" in name))  # fmt: skip
    zigzag = partial(layers.ring_attention, causal=True, zigzag=True)
    ring = lambda n: {"ppermute": n - 1}
    return [*cases, LayerCase("ring-zigzag", zigzag, _zigzag_sdpa, _qkv(lambda n: 4 * n, lambda n: 2, lambda n: 1),
                              [1, 1, 1], 1, ring, ring, dense_takes_n=True)]  # fmt: skip


SEQUENCE = _sequence_cases()


# --- experts ------------------------------------------------------------------------------------------------------

TOKENS, CHOICES, CAPACITY = 5, 2, 1


def _choices(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    weight, expert = torch.topk(torch.softmax(x @ router.T, 1), CHOICES, 1)
    return weight / weight.sum(1, keepdim=True), expert


def moe(x: Tensor, router: Tensor, up: Tensor, down: Tensor, kept: Tensor | None = None) -> Tensor:
    """Every expert on every token, weighted by 0 where it was not chosen, or not kept."""
    weight, expert = _choices(x, router)
    if kept is not None:
        weight = weight * kept
    dense = torch.zeros(x.shape[0], up.shape[0], dtype=x.dtype).scatter(1, expert, weight)
    each = torch.einsum("tef,edf->ted", F.gelu(torch.einsum("td,efd->tef", x, up)), down)
    return torch.einsum("te,ted->td", dense, each)


def moe_with_drops(x: Tensor, router: Tensor, up: Tensor, down: Tensor, *, n: int) -> Tensor:
    """Each rank's tokens fill CAPACITY places of each expert, first choices before second ones."""
    expert = _choices(x, router)[1].detach()
    kept = torch.zeros(expert.shape, dtype=torch.bool)
    for tokens in torch.arange(x.shape[0]).chunk(n):
        used = dict.fromkeys(range(up.shape[0]), 0)
        for choice in range(CHOICES):
            for t in tokens.tolist():
                e = int(expert[t, choice])
                kept[t, choice] = used[e] < CAPACITY
                used[e] += 1
    assert n == 1 or not kept.all(), "nothing was dropped: the case shows nothing"
    return moe(x, router, up, down, kept)


def _moe_args(n: int, missing: int = 0) -> list[Tensor]:
    return [draw(n * TOKENS, 4, seed=1), draw(2 * n - missing, 4, seed=2, scale=2.0),
            draw(2 * n, 3, 4, seed=3), draw(2 * n, 4, 3, seed=4)]  # fmt: skip


def _moe(
    layer: Callable[..., Tensor],
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    group: Any,
    backend: Any,
    **rest: Any,
) -> Tensor:
    weight, expert = layers.route(x, router, group, backend, k=CHOICES)
    return layer(x, weight, expert, up, down, group, backend, **rest)


def _counts(n: int) -> list[list[int]]:
    """What expert_counts returns: how many choices of each rank fell on each expert."""
    x, router, *_ = _moe_args(n)
    return [torch.bincount(c.reshape(-1), minlength=2 * n).tolist() for c in _choices(x, router)[1].chunk(n)]


# Computed before the layer runs: simulated ranks cannot bring a number to the host.
COUNTS = {n: _counts(n) for n in (1, 2, 3, 4)}


def _moe_of_counts(*parts: Tensor, group: Any, **rest: Any) -> Tensor:
    return _moe(partial(layers.moe_uneven, counts=COUNTS[group.size]), *parts, group=group, **rest)


def _expert_case(id: str, parallel: Any, dense: Any, args: Any, forward: Any, backward: Any, **rest: Any) -> LayerCase:
    return LayerCase(id, parallel, dense, args, [0, None, 0, 0], 0, forward, backward, **rest)


_SWAPPED = _always(all_to_all=2, all_reduce_invariant=1)
EXPERT = [
    _expert_case("moe_capacity", partial(_moe, partial(layers.moe_capacity, capacity=TOKENS)), moe, _moe_args,
                 _always(all_to_all=2), _SWAPPED),
    _expert_case("moe_capacity-experts", partial(_moe, partial(layers.moe_capacity, capacity=TOKENS)), moe,
                 partial(_moe_args, missing=1), _always(all_to_all=2), _SWAPPED, sizes=(2, 3, 4)),
    _expert_case("moe_capacity-drops", partial(_moe, partial(layers.moe_capacity, capacity=CAPACITY)), moe_with_drops,
                 _moe_args, _always(all_to_all=2), _SWAPPED, dense_takes_n=True),
    _expert_case("moe_ragged", partial(_moe, layers.moe_ragged), moe, _moe_args,
                 _always(ragged_all_to_all=2, all_to_all=4, scan=1),
                 _always(ragged_all_to_all=2, all_to_all=4, all_reduce_invariant=1)),
    _expert_case("moe_uneven", _moe_of_counts, moe, _moe_args, _always(all_to_all=2), _SWAPPED),
]  # fmt: skip


# --- worked models ------------------------------------------------------------------------------------------------


def gpt(params: dict[str, Tensor], tokens: Tensor, target: Tensor, model: layers.GPT) -> Tensor:
    x = F.embedding(tokens, params["embed"]) + params["position"]
    for i in range(model.blocks):
        x = block(x, *(params[f"{i}.{name}"] for name in BLOCK))
    x = F.rms_norm(x, (model.width,), params["norm"], 1e-6)
    return F.cross_entropy((x @ params["embed"].T).flatten(0, 1), target.flatten())


def _stream(x: Tensor, cond: Tensor, modulation: Tensor, qkv: Tensor) -> tuple[Any, Tensor]:
    changes = [c[:, None] for c in (F.silu(cond) @ modulation.T).chunk(6, 1)]
    y = F.layer_norm(x, x.shape[-1:]) * (1 + changes[1]) + changes[0]
    return changes, torch.stack([torch.einsum("bsd,hcd->bshc", y, w) for w in qkv])


def diffusion(patches: Tensor, text: Tensor, cond: Tensor, *params: Tensor) -> Tensor:
    both = [(patches, *params[:5]), (text, *params[5:])]
    changes, qkv = zip(*(_stream(x, cond, *p[:2]) for x, *p in both), strict=True)
    y = sdpa(*torch.cat(qkv, 2), causal=False).split([patches.shape[1], text.shape[1]], 1)
    results = []
    for (x, _, _, out, up, down), change, attended in zip(both, changes, y, strict=True):
        x = x + change[2] * torch.einsum("bshc,dhc->bsd", attended, out)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + change[4]) + change[3]
        results.append(x + change[5] * (F.gelu(h @ up.T) @ down.T))
    return results[0] + results[1].sum(1, keepdim=True)


def _diffusion(patches: Tensor, text: Tensor, cond: Tensor, *params: Tensor, group: Any, backend: Any) -> Tensor:
    own, of_text = (dict(zip(layers.STREAM, p, strict=True)) for p in (params[:5], params[5:]))
    patches, text = layers.diffusion_block(patches, text, cond, own, of_text, group, backend)
    # The text is one value, and here it meets different patches on every rank.
    return patches + fcomm.pvary(text.sum(1, keepdim=True), group, backend)


def _diffusion_args(n: int) -> list[Tensor]:
    d = 4
    stream = ((6 * d, d), (3, n, 3, d), (d, n, 3), (5, d), (d, 5))
    return [draw(2, 2 * n, d, seed=1), draw(2, 3, d, seed=2), draw(2, d, seed=3),
            *(draw(*shape, seed=10 + i) for i, shape in enumerate(stream + stream))]  # fmt: skip


MODELS = [
    LayerCase("diffusion_block", _diffusion, diffusion, _diffusion_args, [1, *[None] * 12], 1,
              _always(all_to_all=2, all_gather_invariant=1),
              _always(all_to_all=2, all_gather_invariant=1, all_reduce_invariant=2)),
]  # fmt: skip


# --- pipeline and sharded parameters ------------------------------------------------------------------------------


def stages(micro: Tensor, weight: Tensor) -> Tensor:
    """All stages one after the other: weight [n D D], micro [M B D]."""
    for w in weight:
        micro = micro + torch.tanh(micro @ w.T)
    return micro


def _gpipe(micro: Tensor, weight: Tensor, *, group: Any, backend: Any) -> Tensor:
    y = layers.gpipe(lambda x: x + torch.tanh(x @ weight[0].T), micro, group, backend)
    return layers.from_last(y, group, backend)


def _pulled_from_first(micro: Tensor, weight: Tensor, *, group: Any, backend: Any) -> Tensor:
    """micro as one value: only the first rank's use of it counts, and all ranks need its cotangent."""
    return _gpipe(fcomm.pvary(micro, group, backend), weight, group=group, backend=backend)


def zero_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return mlp(x, up, None, down, None)


def _zero(x: Tensor, *shards: Tensor, group: Any, backend: Any) -> Tensor:
    n = group.size
    up, down = layers.gather_parameters(shards, [(2 * n, 3), (3, 2 * n)], group, backend)
    return zero_mlp(x, up, down)


def _zero_args(n: int) -> list[Tensor]:
    return [draw(2 * n, 4, 3, seed=1), draw(6 * n, seed=2), draw(6 * n, seed=3)]


def _replicated(x: Tensor, *params: Tensor, group: Any, backend: Any) -> Tensor:
    return mlp(x, *layers.replicate(params, group, backend))


OTHERS = [
    LayerCase("gpipe", _pulled_from_first, stages, lambda n: [draw(3, 2, 4, seed=1), draw(n, 4, 4, seed=2)],
              [None, 0], None, lambda n: {"ppermute": 2 * n, "all_reduce_invariant": 1},
              lambda n: {"ppermute": n + 1, "all_reduce_invariant": 1}),
    LayerCase("replicate", _replicated, mlp, _mlp_args, [0, *[None] * 4], 0, _always(), _always(all_reduce_invariant=1),
              sizes=(1, 2)),
    LayerCase("gather_parameters", _zero,
              lambda x, up, down: zero_mlp(x, up.reshape(-1, 3), down.reshape(3, -1)), _zero_args, [0, 0, 0], 0,
              _always(all_gather=1), _always(reduce_scatter=1)),
]  # fmt: skip

CASES = {case.id: case for case in TENSOR + SEQUENCE + EXPERT + MODELS + OTHERS}
