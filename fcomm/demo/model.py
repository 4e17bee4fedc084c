"""A byte-level transformer, twice: in plain torch, and with fcomm's functions. Both compute the same loss.

    B  batch    S  sequence    D  width    H  heads    C  width of a head    F  hidden width    V  vocabulary, 256 bytes
    n  ranks of the tensor-parallel group tp

    tokens [B S] -> embedding [B S D] -> blocks (attention, mlp) -> norm -> logits [B S V] -> loss

In the parallel model a rank has H/n heads, F/n hidden features and V/n bytes of the vocabulary, and between them works
on its own S/n positions. Compare the two functions line by line: the parallel one takes two more arguments, the group
and the backend, and says where a value enters per-rank use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fcomm
from fcomm import layers

VOCABULARY = 256

Params = Mapping[str, Tensor]

_ATTENTION = ("q", "k", "v", "out")


@dataclass(frozen=True)
class Model:
    """The sizes. Any number of ranks works that divides heads, hidden and sequence: by default 1, 2, 3, 4, 6 and 12."""

    blocks: int = 2
    width: int = 192
    heads: int = 12
    hidden: int = 768
    sequence: int = 96
    batch: int = 8

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError if the sizes cannot be cut into so many parts."""
        for name in ("heads", "hidden", "sequence"):
            size = getattr(self, name)
            if ranks < 1 or size % ranks:
                raise ValueError(f"--ranks {ranks} does not divide the model's {size} ({name}); try 1, 2, 3 or 4")


# --- the model in plain torch -------------------------------------------------------------------------------------


def dense_loss(params: Params, tokens: Tensor, target: Tensor, model: Model) -> Tensor:
    """The mean cross-entropy of predicting target from tokens, both [B S], on one process."""
    x = F.embedding(tokens, params["embed"]) + params["position"]
    for i in range(model.blocks):
        x = x + _dense_attention(_norm(x, params[f"{i}.norm1"]), *(params[f"{i}.{name}"] for name in _ATTENTION))
        hidden = F.gelu(F.linear(_norm(x, params[f"{i}.norm2"]), params[f"{i}.up"]))
        x = x + F.linear(hidden, params[f"{i}.down"])
    logits = F.linear(_norm(x, params["norm"]), params["embed"])
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _dense_attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bsd,hcd->bhsc", x, w) for w in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.einsum("bhsc,dhc->bsd", y, out)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


# --- the model with tensor and sequence parallelism ---------------------------------------------------------------


def parallel_loss(
    params: Params, tokens: Tensor, target: Tensor, model: Model, tp: fcomm.Group, backend: fcomm.Backend
) -> Tensor:
    """The same loss, on every rank of tp, from this rank's part of the parameters."""
    x = layers.vocab_parallel_embedding(tokens, params["embed"], tp, backend, seq_dim=1)
    x = x + fcomm.shard(params["position"], tp, backend)
    for i in range(model.blocks):
        block = {name: params[f"{i}.{name}"] for name in (*_ATTENTION, "norm1", "norm2", "up", "down")}
        x = layers.transformer_block(x, block, tp, backend, seq_dim=1)
    x = layers.rms_norm(x, fcomm.pvary(params["norm"], tp, backend))
    logits = layers.column_linear(x, params["embed"], None, tp, backend, seq_dim=1)
    return layers.vocab_parallel_cross_entropy(logits, target, tp, backend, vocab=VOCABULARY).mean()


# The dimension of each parameter that is cut over the ranks; the others are replicated.
_CUT = {"embed": 0, "q": 0, "k": 0, "v": 0, "out": 1, "up": 0, "down": 1}


def part(params: Params, rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's part of the dense model's parameters. The vocabulary is padded to a multiple of ranks."""
    parts = dict(params)
    parts["embed"] = F.pad(params["embed"], (0, 0, 0, -VOCABULARY % ranks))
    for path, whole in parts.items():
        dim = _CUT.get(path.split(".")[-1])
        parts[path] = whole if dim is None else whole.chunk(ranks, dim)[rank].clone()
    return parts


def init(model: Model, seed: int) -> dict[str, Tensor]:
    """The dense model's parameters."""
    d, c = model.width, model.width // model.heads
    shapes = {"embed": (VOCABULARY, d), "position": (model.sequence, d), "norm": (d,)}
    for i in range(model.blocks):
        shapes |= {f"{i}.{name}": (model.heads, c, d) for name in "qkv"}
        shapes |= {f"{i}.out": (d, model.heads, c), f"{i}.up": (model.hidden, d), f"{i}.down": (d, model.hidden)}
        shapes |= {f"{i}.norm1": (d,), f"{i}.norm2": (d,)}
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.ones(shape) if "norm" in path else torch.randn(shape, generator=generator) * d**-0.5
        for path, shape in shapes.items()
    }
