"""Attention on one rank: the plain functions that the parallel ones apply to the heads and positions they collect."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fcomm.errors import ArgumentError


class Attend(Protocol):
    """attend(q, k, v, causal=..): q [B S H C], k and v [B T K C], H a multiple of K; the result has q's shape."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor: ...


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(C)) v in plain operations, so that every transform of torch works on it.

    q: [B S H C]. k, v: [B T K C]; key head h serves the H/K query heads from h*H/K on. causal: position s sees t <= s.
    Scores are in q's dtype: a row with a score beyond float16's range becomes NaN, unlike in fused_attention.
    Raises ArgumentError if H is not a multiple of K.
    """
    check_heads("dot_product_attention", q, k)
    scores = attention_scores(q, repeat_heads(k, q.shape[2]))
    if causal:
        scores = scores.masked_fill(~causal_mask(q.shape[1], q.device), -torch.inf)
    return torch.einsum("bhst,bthc->bshc", scores.softmax(-1), repeat_heads(v, q.shape[2]))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """The same by torch's scaled_dot_product_attention: less memory and time, but only first derivatives."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def check_heads(name: str, q: Tensor, k: Tensor) -> None:
    """Raise unless every key head serves the same number of query heads."""
    heads, key_heads = q.shape[2], k.shape[2]
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise ArgumentError(
            f"{name}: q of shape {tuple(q.shape)} has {heads} heads and k of shape {tuple(k.shape)} {key_heads}; pass "
            "[batch, positions, heads, width], and as many query heads as key heads, or a multiple"
        )


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """[B S H C], [B T H C] -> q k^T / sqrt(C), [B H S T]."""
    return torch.einsum("bshc,bthc->bhst", q * q.shape[-1] ** -0.5, k)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """[S S] bool: whether position s sees position t."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B S K C] -> [B S heads C]: each key head once for each query head that uses it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)
