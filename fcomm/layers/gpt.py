"""A small GPT under three axes at once: a worked model. One function runs simulated, in processes, and on one rank.

    dp   each rank its own examples       B/dp
    sp   each rank its own positions      S/sp, in zigzag order, attention by ring_attention
    tp   each rank its own heads, hidden features and vocabulary; between the pairs its own S/sp/tp positions

    tokens [B/dp S/sp] -> embedding [.. S/sp/tp D] -> blocks -> norm -> logits [.. S/sp V/tp] -> loss [.. S/sp] -> mean

A rank has its tp part of each parameter, from init_params and cut; over dp and sp it is replicated. A replicated
parameter enters per-rank use once per axis:

    axis   enters by                  parameters
    dp     replicate, one message     all
    sp     replicate, one message     all except position, of which a rank uses its own rows: shard
    tp     replicate, in the block    norms; position by shard; the rest is cut, not replicated

The loss is invariant over all three axes, and on every rank torch.func.grad gives the gradient of this one mean loss
with respect to the rank's own part. No world size appears anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fcomm.collectives import all_reduce_invariant, checks, shard
from fcomm.group import Backend, Group
from fcomm.layers.data import replicate
from fcomm.layers.sequence import ring_attention, zigzag_order
from fcomm.layers.tensor import (
    column_linear,
    rms_norm,
    transformer_block,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
)

Params = Mapping[str, Tensor]

# The dimension of a block's parameter that is cut over tp.
_BLOCK = {"norm1": None, "norm2": None, "q": 0, "k": 0, "v": 0, "out": 1, "up": 0, "down": 1}


@dataclass(frozen=True)
class GPT:
    """vocab, heads, key_heads and hidden are multiples of tp.size; length of 2 sp.size and of sp.size tp.size."""

    vocab: int = 64
    length: int = 16
    blocks: int = 2
    width: int = 32
    heads: int = 4
    key_heads: int = 2
    hidden: int = 64

    def tp_dims(self) -> dict[str, int | None]:
        """The dimension of each parameter that is cut over tp; None if it is replicated."""
        inner = {f"{i}.{name}": dim for i in range(self.blocks) for name, dim in _BLOCK.items()}
        return {"embed": 0, "position": None, **inner, "norm": None}


def init_params(model: GPT, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The whole parameters, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    d, c = model.width, model.width // model.heads
    shapes = {
        "q": (model.heads, c, d), "k": (model.key_heads, c, d), "v": (model.key_heads, c, d),
        "out": (d, model.heads, c), "up": (model.hidden, d), "down": (d, model.hidden),
        "embed": (model.vocab, d), "position": (model.length, d),
    }  # fmt: skip
    params = {}
    for path in model.tp_dims():
        name = path.split(".")[-1]
        if "norm" in name:
            params[path] = torch.ones(d, dtype=dtype)
        else:
            scale = model.hidden**-0.5 if name == "down" else d**-0.5
            params[path] = (torch.randn(shapes[name], generator=generator, dtype=torch.float64) * scale).to(dtype)
    return params


def cut(params: Params, model: GPT, tp: Group, backend: Backend) -> dict[str, Tensor]:
    """This rank's part of the whole parameters."""
    dims = model.tp_dims()
    return {name: p if (d := dims[name]) is None else shard(p, tp, backend, dim=d) for name, p in params.items()}


def own_tokens(tokens: Tensor, dp: Group, sp: Group, backend: Backend) -> Tensor:
    """[B S], the same on all ranks -> this rank's examples and, in zigzag order, positions, [B/dp S/sp]."""
    checks.is_group("own_tokens", sp)
    tokens = tokens.index_select(1, zigzag_order(tokens.shape[1], sp.size).to(tokens.device))
    return shard(shard(tokens, dp, backend, dim=0), sp, backend, dim=1)


def gpt_loss(
    params: Params, tokens: Tensor, target: Tensor, model: GPT, dp: Group, sp: Group, tp: Group, backend: Backend
) -> Tensor:
    """The mean cross-entropy over all examples and positions, the same on all ranks.

    params: from cut. tokens, target: [B/dp S/sp], from own_tokens.
    """
    checks.is_group("gpt_loss", sp)
    order = zigzag_order(model.length, sp.size).to(tokens.device)
    params = dict(zip(params, replicate(list(params.values()), dp, backend), strict=True))
    position = shard(params.pop("position").index_select(0, order), sp, backend)
    params = dict(zip(params, replicate(list(params.values()), sp, backend), strict=True))

    x = vocab_parallel_embedding(tokens, params["embed"], tp, backend, seq_dim=1) + shard(position, tp, backend)
    attend = partial(ring_attention, group=sp, backend=backend, zigzag=True)
    for i in range(model.blocks):
        block = {name: params[f"{i}.{name}"] for name in _BLOCK}
        x = transformer_block(x, block, tp, backend, seq_dim=1, attend=attend)
    x = rms_norm(x, *replicate([params["norm"]], tp, backend))
    logits = column_linear(x, params["embed"], None, tp, backend, seq_dim=1)
    loss = vocab_parallel_cross_entropy(logits, target, tp, backend).mean()
    for group in (dp, sp):
        loss = all_reduce_invariant(loss, group, backend, op="mean")
    return loss
