"""Sequence parallelism: every rank of `group` has its own positions of one long sequence, but attention needs all.

    B  batch    S  positions    H  query heads    K  key heads (H a multiple of K)    C  a head's width    n  group.size

Three ways to let S/n positions attend to S. All take q [B S/n H C] and k, v [B S/n K C] and return [B S/n H C].

    ulysses_attention   exchange positions for heads, attend to all positions with H/n heads, exchange back
    ring_attention      keep q, pass k and v around the ring, and add up the softmax as blocks come by
    usp_attention       both, on a mesh: Ulysses inside blocks of ranks, a ring of these blocks

    collectives           forward             backward   bytes sent per rank, each way, in units of B S C / n elements
    ulysses_attention     2 all_to_all        2          (n-1)/n (2H + 2K): falls with n
    ring_attention        n-1 ppermute        n-1        (n-1) 2K
    usp_attention, u x r  2 all_to_all of u,  the same   (u-1)/u (2H + 2K)  +  (r-1) 2K
                          r-1 ppermute of r

Ulysses (Jacobs et al., "DeepSpeed Ulysses") sends less but needs heads to distribute; a ring (Liu et al., "Ring
Attention") has no such limit, and a step holds only (S/n)^2 scores. A causal mask hides half of all blocks, and a plain
ring computes them for nothing. zigzag gives each rank a block from the front and one from the back, so that at each
step every rank computes a visible half. The derivatives are those of the collectives: all_to_all backwards, and a ring
that turns the other way. Backward keeps the weights of every step; under torch.utils.checkpoint it keeps only q, k, v.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fcomm.collectives import all_to_all, axis_index, checks, ppermute
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.layers.attend import (
    Attend,
    attention_scores,
    causal_mask,
    check_heads,
    dot_product_attention,
    repeat_heads,
)


def partition(length: int, n: int) -> list[int]:
    """length in n parts that differ by at most one, the longer ones first: partition(7, 3) == [3, 2, 2]."""
    return [length // n + (r < length % n) for r in range(n)]


# --- Ulysses ------------------------------------------------------------------------------------------------------


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    backend: Backend,
    *,
    causal: bool = False,
    sizes: Sequence[int] | None = None,
    attend: Attend = dot_product_attention,
) -> Tensor:
    """Attention in which every rank sees all positions of its share of the heads.

        rank 0  [B S/n H C]      [B S H/n C]            [B S H/n C]      [B S/n H C]
        rank 1  [B S/n H C]  ->  [B S H/n C]  attend ->  [B S H/n C]  ->  [B S/n H C]

    q, k, v: see the module. sizes: how many positions each rank has, if they differ (on a simulated axis all are padded
    to the longest). n need not divide H or K: query heads are sent out by partition(H, n), each with the key head it
    uses, which may go to two ranks.
    attend: attention on one rank, or over another group. Traffic: one all_to_all for q, k and v together, one for the
    result.
    Raises ArgumentError if sizes do not fit q or the group, or H is not a multiple of K.
    """
    checks.is_group("ulysses_attention", group)
    check_heads("ulysses_attention", q, k)
    n, heads, key_heads = group.size, q.shape[2], k.shape[2]
    if sizes is None and heads % n == 0 and key_heads % n == 0:
        rows = torch.cat([x.unflatten(2, (n, -1)) for x in (q, k, v)], 3)
        rows = all_to_all(rows, group, backend, split_dim=2, concat_dim=1).squeeze(2)
        q, k, v = rows.split([heads // n, key_heads // n, key_heads // n], 2)
        return all_to_all(attend(q, k, v, causal=causal), group, backend, split_dim=1, concat_dim=2)

    lengths = [q.shape[1]] * n
    if sizes is not None:
        lengths = checks.canonical_sizes("ulysses_attention", "sizes", sizes, group)
    own = partition(heads, n)
    used = [_key_heads(own, r, heads // key_heads) for r in range(n)]
    blocks = [torch.cat([block, k[:, :, used[r]], v[:, :, used[r]]], 2) for r, block in enumerate(q.split(own, 2))]
    totals = [block.shape[2] for block in blocks]
    rows = all_to_all(
        torch.cat(blocks, 2), group, backend, split_dim=2, concat_dim=1, send_sizes=totals, recv_sizes=lengths
    )
    q, k, v = (
        rows.index_select(2, index.to(rows.device))
        for index in _own_heads(own, used, heads // key_heads, group, backend)
    )
    y = attend(q, k, v, causal=causal)
    return all_to_all(y, group, backend, split_dim=1, concat_dim=2, send_sizes=lengths, recv_sizes=own)


def _key_heads(own: Sequence[int], r: int, share: int) -> slice:
    """The key heads that rank r's query heads use, `share` query heads to a key head."""
    first, end = sum(own[:r]), sum(own[: r + 1])
    return slice(first // share, (end - 1) // share + 1 if end > first else first // share)


def _own_heads(
    own: Sequence[int], used: Sequence[slice], share: int, group: Group, backend: Backend
) -> tuple[Tensor, ...]:
    """The positions of a rank's query heads, and of their key and value heads, among the heads it received."""
    width = max(own) if group.simulated else own[group.rank or 0]
    places = []
    for r, keys in enumerate(used):
        first = sum(own[:r])
        q = [*range(own[r])]
        k = [own[r] + (first + i) // share - keys.start for i in q]
        v = [i + keys.stop - keys.start for i in k]
        # Simulated ranks have one shape: a rank with fewer heads repeats its first head, which nobody reads.
        places.append([(heads + [0] * width)[:width] for heads in (q, k, v)])
    return own_row(torch.tensor(places, dtype=torch.int64), axis_index(group, backend)).unbind(0)


def own_row(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; plain indexing would need a simulated rank's number on the host."""
    return table.index_select(0, index.reshape(1)).squeeze(0)


# --- ring ---------------------------------------------------------------------------------------------------------

# Attention to some of the keys: the weighted mean of the values [B H S C], the sum of the weights [B H S 1], and the
# score that all weights are relative to [B H S 1]. When two parts are merged, the lower one is scaled to the higher
# (online softmax). The values are a mean, and half types sum in float32, because over many positions a sum may exceed
# float16's range.
Part = tuple[Tensor, Tensor, Tensor]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    backend: Backend,
    *,
    causal: bool = False,
    zigzag: bool = False,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Attention in which keys and values travel: by step i a rank has seen those of the i ranks before it.

                step 0        1        2
        rank 0  q0: k0 v0     k2 v2    k1 v1
        rank 1  q1: k1 v1     k0 v0    k2 v2
        rank 2  q2: k2 v2     k1 v1    k0 v0

    q, k, v: see the module. sizes: how many positions each rank has (at least 1), if they differ; all ranks pad to the
    longest with arbitrary values, and the results at the padding are meaningless. zigzag: with causal, the whole
    sequence is cut into 2n blocks and rank r has blocks r and 2n-1-r, as in x[:, zigzag_order(S, n)] cut in n.
    Traffic: n-1 ppermutes of k and v together.
    Raises ArgumentError if sizes do not fit q or the group, zigzag=True and the 2n blocks are not equal, or H is not a
    multiple of K.
    """
    checks.is_group("ring_attention", group)
    check_heads("ring_attention", q, k)
    if zigzag and (sizes is not None or q.shape[1] % 2):
        raise ArgumentError(
            f"ring_attention: zigzag=True with {q.shape[1]} positions on a rank and sizes={sizes}; it needs 2n equal "
            f"blocks on group '{group.name}' of size {group.size}: pad, or pass zigzag=False"
        )
    if sizes is not None:
        sizes = checks.canonical_sizes("ring_attention", "sizes", sizes, group)
        if min(sizes) < 1 or max(sizes) != q.shape[1]:
            raise ArgumentError(
                f"ring_attention: sizes is {sizes} and q.shape[1] {q.shape[1]}; group '{group.name}' of size "
                f"{group.size} needs a length >= 1 for each rank, and every rank pads to the longest"
            )
    n, rank = group.size, axis_index(group, backend).to(q.device)
    lengths = None if sizes is None else torch.tensor(sizes, device=q.device)
    if lengths is not None:
        # Masking the scores is not enough: their weight is zero, but zero times the padding's values may be NaN.
        padding = (_positions(q) >= own_row(lengths, rank)).reshape(-1, 1, 1)
        q, k, v = (x.masked_fill(padding, 0.0) for x in (q, k, v))
    kv = torch.stack([k, v])
    seen = _part(q, kv, _own_mask(q, causal, lengths, rank))
    for step in range(1, n):
        kv = ppermute(kv, group, backend, perm=[(r, (r + 1) % n) for r in range(n)])
        source = (rank - step) % n
        if causal and zigzag:
            seen = _zigzag_step(seen, q, kv, earlier=source < rank)
        else:
            block = _part(q, kv, None if lengths is None else _positions(q) < own_row(lengths, source))
            seen = _merge(seen, block, source < rank if causal else None)
    return seen[0].transpose(1, 2).to(q.dtype)


def zigzag_order(length: int, n: int) -> Tensor:
    """The positions in the order in which n ranks hold them: blocks 0, 2n-1, 1, 2n-2, .. of 2n. argsort undoes it.

    zigzag_order(8, 2) == [0 1 6 7 | 2 3 4 5]
    Raises ArgumentError if 2n does not divide length.
    """
    if length % (2 * n):
        raise ArgumentError(f"zigzag_order: length is {length}, not divisible into 2n = {2 * n} blocks; pad it")
    blocks = torch.arange(length).reshape(2 * n, -1)
    return torch.stack([blocks[:n], blocks.flip(0)[:n]], 1).reshape(-1)


def _zigzag_step(seen: Part, q: Tensor, kv: Tensor, *, earlier: Tensor) -> Part:
    """One block of keys, from a rank that is earlier in the sequence or later (earlier: a bool tensor).

    Of rank r's halves (r, 2n-1-r) and the source's (s, 2n-1-s), the later half of q always sees the earlier half of k.
    In addition, if s < r, the earlier half of q sees it too; if s > r, the later half of q sees the later half of k.
    Either way that is two quarters of the scores, without a mask and without control flow that depends on the rank.
    """
    front, back = ((a, b, c) for a, b, c in zip(*(x.chunk(2, 2) for x in seen), strict=True))
    q_front, q_back = q.chunk(2, 1)
    kv_front, kv_back = kv.chunk(2, 2)
    back = _merge(back, _part(q_back, kv_front, None), None)
    second = _part(torch.where(earlier, q_front, q_back), torch.where(earlier, kv_front, kv_back), None)
    front, back = _merge(front, second, earlier), _merge(back, second, ~earlier)
    values, total, highest = (torch.cat(halves, 2) for halves in zip(front, back, strict=True))
    return values, total, highest


def _part(q: Tensor, kv: Tensor, visible: Tensor | None) -> Part:
    k, v = (repeat_heads(x, q.shape[2]) for x in kv.unbind(0))
    scores = attention_scores(q, k).to(torch.promote_types(q.dtype, torch.float32))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    # The result does not depend on this value, which only keeps exp in range. So it has no derivative.
    highest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhst,bthc->bhsc", (weights / total).to(v.dtype), v), total, highest


def _merge(a: Part, b: Part, visible: Tensor | None) -> Part:
    """Two parts as one; where visible (a bool tensor) is False, only a."""
    highest = torch.maximum(a[2], b[2] if visible is None else torch.where(visible, b[2], a[2]))
    of_a, of_b = a[1] * (a[2] - highest).exp(), b[1] * (b[2] - highest).exp()
    if visible is not None:
        of_b = torch.where(visible, of_b, 0.0)
    total = of_a + of_b
    return (a[0] * of_a + b[0] * of_b) / total, total, highest


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def _own_mask(q: Tensor, causal: bool, lengths: Tensor | None, rank: Tensor) -> Tensor | None:
    """What a position sees of its own rank's positions, which are in order, with zigzag too."""
    mask = causal_mask(q.shape[1], q.device) if causal else None
    if lengths is not None:
        real = (_positions(q) < own_row(lengths, rank)).expand(q.shape[1], -1)
        mask = real if mask is None else mask & real
    return mask


# --- both ---------------------------------------------------------------------------------------------------------


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ulysses: Group,
    ring: Group,
    backend: Backend,
    *,
    causal: bool = False,
    zigzag: bool = False,
) -> Tensor:
    """Ulysses whose attention is a ring: a 2-D mesh of ranks, ring x ulysses, row-major over the sequence.

        ring 0    ulysses 0 [s0]  1 [s1]      exchange heads along a row, then rows pass keys down the columns
        ring 1    ulysses 0 [s2]  1 [s3]

    q, k, v: see the module, n = ring.size * ulysses.size. zigzag: the order is zigzag_order(S, ring.size).
    (Fang, Zhao, "USP: A Unified Sequence Parallelism Approach".)
    """
    for group in (ulysses, ring):  # both before the first exchange
        checks.is_group("usp_attention", group)
    attend = partial(ring_attention, group=ring, backend=backend, zigzag=zigzag)
    return ulysses_attention(q, k, v, ulysses, backend, causal=causal, attend=attend)
