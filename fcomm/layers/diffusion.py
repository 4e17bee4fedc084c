"""A diffusion transformer block under sequence parallelism: a worked model, for video with very many patches.

    B  batch    S  patches    L  text tokens    D  width    H  heads    C  head width    F  hidden    n  group.size

Two streams, as in multi-modal diffusion transformers: patches are cut over the ranks, text is the same on all. They
meet in attention, where every rank has all tokens and its own heads:

    patches  q k v [3B S/n H C]  -> all_to_all, heads out, positions in ->  [3B S H/n C] \\
                                                                                           attend -> and back again
    text     q k v [3B L   H C]  -> shard, own heads                    ->  [3B L H/n C] /

The 4-D all_to_all(split_dim=2, concat_dim=1) and its inverse are all the communication of the patches; the text's
result is all_gather_invariant over heads. The kinds of values say what the gradients need. Patch parameters and the
conditioning vector meet different patches on every rank, so they enter by replicate, and their gradients are added up
in one message. Text parameters do the same work on all ranks, so their gradients are already complete, and adding them
or dividing by n would be wrong. Traffic per block: 2 all_to_alls and 1 all_gather, and backward the same and 1
all_reduce.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fcomm.collectives import all_gather_invariant, all_to_all, axis_index, shard
from fcomm.group import Backend, Group
from fcomm.layers.attend import Attend, dot_product_attention
from fcomm.layers.data import replicate

Params = Mapping[str, Tensor]

STREAM = ("modulation", "qkv", "out", "up", "down")


def joint_attention(
    patches: Tensor, text: Tensor, group: Group, backend: Backend, *, attend: Attend = dot_product_attention
) -> tuple[Tensor, Tensor]:
    """Attention over all patches and all text.

    patches: [3B S/n H C], q, k and v of a rank's own patches. text: [3B L H C], the same on all ranks; n divides H.
    Results: [B S/n H C], and [B L H C], the same on all ranks.
    Traffic: 2 all_to_alls and 1 all_gather forward, 2 and 1 backward.
    """
    patches = all_to_all(patches, group, backend, split_dim=2, concat_dim=1)
    tokens = torch.cat([patches, shard(text, group, backend, dim=2)], 1)
    y = attend(*tokens.chunk(3), causal=False)
    of_patches, of_text = y.split([patches.shape[1], text.shape[1]], 1)
    of_patches = all_to_all(of_patches, group, backend, split_dim=1, concat_dim=2)
    return of_patches, all_gather_invariant(of_text, group, backend, dim=2)


def diffusion_block(
    patches: Tensor,
    text: Tensor,
    cond: Tensor,
    patch_params: Params,
    text_params: Params,
    group: Group,
    backend: Backend,
    *,
    attend: Attend = dot_product_attention,
) -> tuple[Tensor, Tensor]:
    """Modulated joint attention, then a modulated MLP, in both streams.

    patches: [B S/n D]. text: [B L D] and cond: [B D], the same on all ranks, as all parameters are. For each stream:
    modulation [6D D], qkv [3 H C D], out [D H C], up [F D], down [D F]. Results: the two streams.
    """
    own_cond, *own = replicate([cond, *(patch_params[name] for name in STREAM)], group, backend)
    own_params = dict(zip(STREAM, own, strict=True))
    before, after = _modulation(own_cond, own_params)
    text_before, text_after = _modulation(cond, text_params)
    attended, text_attended = joint_attention(
        _heads(patches, own_params, before), _heads(text, text_params, text_before), group, backend, attend=attend
    )
    return (
        _rest(patches, attended, own_params, before, after),
        _rest(text, text_attended, text_params, text_before, text_after),
    )


# Shift, scale and gate, [B 1 D] each.
Change = tuple[Tensor, ...]


def _modulation(cond: Tensor, params: Params) -> tuple[Change, Change]:
    """What the conditioning vector does to attention and to the MLP."""
    changes = F.linear(F.silu(cond), params["modulation"]).unsqueeze(1).chunk(6, -1)
    return changes[:3], changes[3:]


def _heads(x: Tensor, params: Params, change: Change) -> Tensor:
    return torch.einsum("bsd,ihcd->ibshc", _modulated(x, change), params["qkv"]).flatten(0, 1)


def _rest(x: Tensor, attended: Tensor, params: Params, before: Change, after: Change) -> Tensor:
    x = x + before[2] * torch.einsum("bshc,dhc->bsd", attended, params["out"])
    return x + after[2] * F.linear(F.gelu(F.linear(_modulated(x, after), params["up"])), params["down"])


def _modulated(x: Tensor, change: Change) -> Tensor:
    shift, scale, _ = change
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def patch_positions(own: int, width: int, group: Group, backend: Backend) -> Tensor:
    """[own width]: sines and cosines of this rank's positions, which begin at rank * own, float64."""
    position = axis_index(group, backend) * own + torch.arange(own)
    angle = position.unsqueeze(1) * 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat([angle.sin(), angle.cos()], 1)
