"""Tensor parallelism: a weight matrix is cut over the ranks of `group`, and two cuts in a row need one exchange.

    D  model width    F  hidden width    H  heads    C  width of a head    V  vocabulary    B  batch    S  sequence
    n  group.size     F/n: this rank's part of F

A pair of linear layers, first cut by its outputs (column), then by its inputs (row), as in Megatron:

              x            W1[F/n, D]            W2[D, F/n]            y
    rank 0  [B S D]  ->  enter  ->  [B S F/n]  ->  partial sums  ->  leave  ->  [B S D]
    rank 1  [B S D]  ->  enter  ->  [B S F/n]  ->  partial sums  ->  leave  ->  [B S D]

Outside, between leave and the next enter, values live in one of two ways:

    seq_dim   outside a pair                         enter                leave
    None      invariant: [B S D], same on all ranks  pvary                all_reduce_invariant
    1         varying: [B S/n D], own positions      all_gather           reduce_scatter

    seq_dim   a pair, forward      a pair, backward                        bytes of [B S D] sent per rank, each way
    None      1 all_reduce         1 all_reduce                            2(n-1)/n
    1         1 all_gather         1 all_gather                            (n-1)/n of each: 2(n-1)/n in all,
              1 reduce_scatter     1 reduce_scatter                        and 1/n of the memory outside

The second way is called sequence parallelism: norms, dropout and residuals then work on S/n positions. A parameter that
is replicated there (a bias, a norm's weight) meets different positions on each rank, so it enters by pvary and its
gradient is the sum over the ranks. In the first way all ranks compute the same gradient, and it needs nothing. No
gradient is ever scaled by n. The counts are those of Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models".

Parts of F and H need not be equal: in processes a rank may hold any share (simulated ranks have one shape).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fcomm.collectives import all_gather, all_reduce, all_reduce_invariant, axis_index, pvary, reduce_scatter
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.layers.attend import Attend, dot_product_attention
from fcomm.layers.data import replicate


def enter(x: Tensor, group: Group, backend: Backend, *, seq_dim: int | None = None) -> Tensor:
    """The whole of x, for a use that differs by rank: pvary, or all_gather along seq_dim.

    x: [.., S, ..] invariant, or [.., S/n, ..] at seq_dim. Result: [.., S, ..].
    Backward: all_reduce, or reduce_scatter: the cotangents of the ranks' uses add up.
    """
    return pvary(x, group, backend) if seq_dim is None else all_gather(x, group, backend, dim=seq_dim)


def leave(x: Tensor, group: Group, backend: Backend, *, seq_dim: int | None = None) -> Tensor:
    """The sum of all ranks' partial results: all_reduce_invariant, or reduce_scatter along seq_dim.

    x: [.., S, ..], one addend. Result: [.., S, ..] invariant, or [.., S/n, ..] at seq_dim.
    Backward: nothing, or all_gather.
    """
    if seq_dim is None:
        return all_reduce_invariant(x, group, backend)
    return reduce_scatter(x, group, backend, dim=seq_dim)


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, backend: Backend, *, seq_dim: int | None = None
) -> Tensor:
    """x @ weight.T + bias, cut by outputs: every rank computes its own features of all positions.

        rank 0  [B S D], weight [F/n D]      [B S F/n]
        rank 1  [B S D], weight [F/n D]  ->  [B S F/n]

    bias: [F/n] or None. seq_dim: x is [B S/n D]. Concatenated over ranks the results are the dense layer's.
    Traffic: none forward, all_reduce backward; with seq_dim all_gather forward, reduce_scatter backward.
    """
    return F.linear(enter(x, group, backend, seq_dim=seq_dim), weight, bias)


def row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, backend: Backend, *, seq_dim: int | None = None
) -> Tensor:
    """x @ weight.T + bias, cut by inputs: every rank adds what its own features contribute.

        rank 0  [B S F/n], weight [D F/n]      [B S D]
        rank 1  [B S F/n], weight [D F/n]  ->  [B S D]

    bias: [D], the same on all ranks, or None; it is added once, after the sum. seq_dim: the result is [B S/n D].
    Traffic: all_reduce forward, none backward; with seq_dim reduce_scatter forward, all_gather backward, and the
    gradient of bias is all-reduced, since each rank adds it to different positions.
    """
    y = leave(F.linear(x, weight), group, backend, seq_dim=seq_dim)
    if bias is None:
        return y
    return y + (bias if seq_dim is None else pvary(bias, group, backend))


def vocab_parallel_embedding(
    tokens: Tensor, weight: Tensor, group: Group, backend: Backend, *, seq_dim: int | None = None
) -> Tensor:
    """weight[tokens] with the rows of weight cut over the ranks: each looks up the tokens it has, zeros elsewhere.

        rank 0  tokens [B S], weight [V/n D]      [B S D]
        rank 1  tokens [B S], weight [V/n D]  ->  [B S D]

    tokens: integers, the same on all ranks; any outside 0 .. V - 1 gives zeros. weight: equal parts; pad V to a
    multiple of n. seq_dim: result [B S/n D].
    Traffic: all_reduce forward, none backward; with seq_dim reduce_scatter forward, all_gather backward.
    """
    row, mine = _own_entries(tokens, weight.shape[0], group, backend)
    # masked_fill, not a product: a row that was looked up in vain may be inf or NaN, and so may its cotangent.
    own = F.embedding(row, weight).masked_fill(~mine.unsqueeze(-1), 0.0)
    return leave(own, group, backend, seq_dim=seq_dim)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group,
    backend: Backend,
    *,
    vocab: int | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """-log softmax(logits)[target] with the vocabulary cut over the ranks; logits are never gathered.

        rank 0  logits [B S V/n], target [B S]      loss [B S]
        rank 1  logits [B S V/n], target [B S]  ->  loss [B S]

    target: integers, the same on all ranks. The result is invariant. vocab: the number of real entries if V is padded
    to a multiple of n; later logits count as -inf. ignore_index: where target is this, the loss and the gradient of the
    logits are 0, as in torch.nn.functional.cross_entropy; with None, nowhere. .mean() counts these positions too. Any
    other target outside 0 .. vocab - 1 (V - 1 without vocab) makes loss and gradient NaN on every rank: raising an
    error would have to wait for the device. (Megatron uses the maximum as such a target's logit, which gives a finite
    loss.)
    Two all_reduces of [B S] forward, none backward: one takes the maximum, which only keeps exp in range and has no
    derivative; one sums two rows, sum(exp(logits - max)) and the target's logit - max, which one rank has; half types
    are summed in float32.
    Raises TypeError if target is not an integer tensor (probabilities, say), ArgumentError if it has another shape.
    """
    if target.is_floating_point() or target.is_complex():
        raise TypeError(
            f"vocab_parallel_cross_entropy: target is {target.dtype}; pass integers, an entry of the vocabulary for "
            "each position"
        )
    if target.shape != logits.shape[:-1]:
        raise ArgumentError(
            f"vocab_parallel_cross_entropy: target has shape {tuple(target.shape)} and logits {tuple(logits.shape)}; "
            "pass one target for each position, logits without its last dim"
        )
    target = target.long()  # gather requires it, and ignore_index may not fit into a narrow type
    row, mine = _own_entries(target, logits.shape[-1], group, backend)
    if vocab is not None:
        entry = axis_index(group, backend).to(target.device) * logits.shape[-1] + _arange(logits.shape[-1], target)
        logits = logits.masked_fill(entry >= vocab, -torch.inf)
    highest = all_reduce(logits.detach().amax(-1), group, backend, op="max")
    shifted = logits - highest.unsqueeze(-1)
    own_target = shifted.gather(-1, row.unsqueeze(-1)).squeeze(-1)
    # masked_fill, not a product: an entry that was looked up in vain may be the -inf of the padding.
    own_target = own_target.masked_fill(~mine, 0.0)
    # In float32: the sum over a large vocabulary may exceed float16's range.
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = torch.stack([shifted.exp().sum(-1, dtype=wide), own_target.to(wide)])
    total, target_logit = all_reduce_invariant(rows, group, backend).unbind(0)
    loss = (total.log() - target_logit).to(logits.dtype)
    wrong = (target < 0) | (target >= (logits.shape[-1] * group.size if vocab is None else vocab))
    if ignore_index is not None:
        ignored = target == ignore_index
        loss, wrong = loss.masked_fill(ignored, 0.0), wrong & ~ignored
    # A product, because masked_fill's gradient would be 0 where the loss is NaN.
    return loss * torch.where(wrong, torch.nan, 1.0).to(loss.dtype)


def _own_entries(entry: Tensor, length: int, group: Group, backend: Backend) -> tuple[Tensor, Tensor]:
    """The position of each vocabulary entry in this rank's part, 0 if it is not there, and whether it is there."""
    row = entry - axis_index(group, backend).to(entry.device) * length
    mine = (row >= 0) & (row < length)
    return torch.where(mine, row, 0), mine


def _arange(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)


def mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    group: Group,
    backend: Backend,
    *,
    seq_dim: int | None = None,
    activation: Callable[[Tensor], Tensor] = F.gelu,
) -> Tensor:
    """down(activation(up(x))), hidden features cut over the ranks.

    x and result: [B S D], or [B S/n D] with seq_dim. up: [F/n D]. up_bias: [F/n]. down: [D F/n]. down_bias: [D].
    Traffic: one pair, see the module.
    """
    hidden = activation(column_linear(x, up, up_bias, group, backend, seq_dim=seq_dim))
    return row_linear(hidden, down, down_bias, group, backend, seq_dim=seq_dim)


def attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    group: Group,
    backend: Backend,
    *,
    seq_dim: int | None = None,
    causal: bool = True,
    attend: Attend = dot_product_attention,
) -> Tensor:
    """Multi-head self-attention, heads cut over the ranks.

    x and result: [B S D], or [B S/n D] with seq_dim=1. q: [H/n C D]. k, v: [K/n C D], K a divisor of H: each key head
    serves H/K query heads (grouped queries). out: [D H/n C].
    attend(q, k, v, causal=causal) gets [B S H/n C] and [B S K/n C], and returns q's shape; ring or Ulysses attention
    over another group goes here. Traffic: one pair, see the module.
    """
    x = enter(x, group, backend, seq_dim=seq_dim)
    heads = [torch.einsum("bsd,hcd->bshc", x, w) for w in (q, k, v)]
    y = attend(*heads, causal=causal)
    return leave(torch.einsum("bshc,dhc->bsd", y, out), group, backend, seq_dim=seq_dim)


def transformer_block(
    x: Tensor,
    params: Mapping[str, Tensor],
    group: Group,
    backend: Backend,
    *,
    seq_dim: int | None = None,
    causal: bool = True,
    attend: Attend = dot_product_attention,
) -> Tensor:
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block.

    x and result: [B S D], or [B S/n D] with seq_dim=1. params, with the dimension that is cut over the ranks:

        norm1, norm2  [D]      replicated        q, k, v  [H C D]  0        out  [D H C]  1
        up            [F D]    0                 down     [D F]    1

    Traffic: two pairs, see the module; with seq_dim the gradients of both norms are all-reduced in one message.
    """
    norms = [params["norm1"], params["norm2"]]
    if seq_dim is not None:
        norms = replicate(norms, group, backend)
    q, k, v, out = (params[name] for name in ("q", "k", "v", "out"))
    x = x + attention(
        rms_norm(x, norms[0]), q, k, v, out, group, backend, seq_dim=seq_dim, causal=causal, attend=attend
    )
    return x + mlp(rms_norm(x, norms[1]), params["up"], None, params["down"], None, group, backend, seq_dim=seq_dim)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x over its root mean square along the last dimension, times weight. Half types compute in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)
