"""Expert parallelism: every rank of `group` has some of the experts, and tokens travel to the experts they chose.

    T  tokens of a rank    D  model width    F  hidden width    E  experts, e = E/n on a rank    k  choices of a token

        rank 0  tokens a b        experts 0 1            a -> 0, 3      results come back, and are added up
        rank 1  tokens c d        experts 2 3            b -> 1, 2      with the router's weights

    weight, expert = route(x, router, group, backend, k=2)
    y = moe_ragged(x, weight, expert, up, down, group, backend)            up [e F D], down [e D F]

All take x [T D], route's results for it, and this rank's experts, and return the tokens' weighted sums [T D]. They
differ in how the tokens travel, hence in what the host must know, and in what is dropped:

    function        sizes of messages         tokens            exchanges forward              rows of a rank's experts
    moe_capacity    fixed: c of each expert   over c: dropped   2 all_to_all                   E c
    moe_ragged      tensors, on the device    all kept          2 ragged_all_to_all, 3 small   room for n k T
    moe_uneven      on the host: counts       all kept          2 uneven all_to_all            those that came

Backward: the same exchanges the other way, and the router's gradient is all-reduced, since it meets different tokens on
each rank. Integers have no derivative, so the small exchanges of sizes are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcomm.collectives import all_gather, all_to_all, axis_index, checks, pvary, ragged_all_to_all, scan
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.layers.sequence import own_row

# experts(rows [R D], which [R], up, down) -> [R D]: row i through local expert which[i]; zeros where which[i] == e.
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def route(x: Tensor, router: Tensor, group: Group, backend: Backend, *, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights, which add up to 1.

    x: [T D], the rank's own tokens. router: [E D], replicated. Results: weight [T k], expert [T k].
    Traffic: none; backward all_reduce of router's gradient. Raises ArgumentError unless 1 <= k <= E.
    """
    if not 1 <= k <= router.shape[0]:
        raise ArgumentError(f"route: k is {k}, and router has {router.shape[0]} experts; choose 1 .. {router.shape[0]}")
    weight, expert = F.linear(x, pvary(router, group, backend)).softmax(-1).topk(k, -1)
    return weight / weight.sum(-1, keepdim=True), expert


def moe_capacity(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    up: Tensor,
    down: Tensor,
    group: Group,
    backend: Backend,
    *,
    capacity: int,
) -> Tensor:
    """Each rank sends each expert a box of `capacity` rows, some empty; what does not fit is dropped (adds zero).

        rank 0  boxes [E c D]      [e n*c D]              [e n*c D]      [E c D]
        rank 1  boxes [E c D]  ->  [e n*c D]  experts ->  [e n*c D]  ->  [E c D]

    First choices are packed before second ones (Lepikhin et al., "GShard"). There may be more experts than the router
    has rows: pad E to a multiple of n. Traffic: two all_to_alls of E c D elements.
    """
    checks.is_group("moe_capacity", group)
    experts = group.size * up.shape[0]
    slot = _slots(expert, experts, capacity)
    # One additional box, for what is dropped.
    boxes = x.new_zeros(experts * capacity + 1, x.shape[1]).index_add(0, slot.reshape(-1), _copies(x, expert))
    boxes = boxes[:-1].unflatten(0, (experts, capacity))
    boxes = all_to_all(boxes, group, backend, split_dim=0, concat_dim=1)
    boxes = torch.einsum("erf,edf->erd", F.gelu(torch.einsum("erd,efd->erf", boxes, up)), down)
    boxes = all_to_all(boxes, group, backend, split_dim=1, concat_dim=0)
    rows = torch.cat([boxes.flatten(0, 1), x.new_zeros(1, x.shape[1])]).index_select(0, slot.reshape(-1))
    return (rows.reshape(*slot.shape, x.shape[1]) * weight.unsqueeze(-1)).sum(1)


def _slots(expert: Tensor, experts: int, capacity: int) -> Tensor:
    """[T k]: the position of each choice in [E c], or E*c if it is dropped."""
    chosen = expert.T.reshape(-1)
    hot = _one_hot(chosen, experts)
    place = (hot.cumsum(0) * hot).sum(1) - 1
    slot: Tensor = torch.where(place < capacity, chosen * capacity + place, experts * capacity)
    return slot.reshape(expert.shape[1], -1).transpose(0, 1)


def moe_ragged(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    up: Tensor,
    down: Tensor,
    group: Group,
    backend: Backend,
    *,
    rows: int | None = None,
    experts: Experts | None = None,
) -> Tensor:
    """Every token reaches its experts; sizes stay on the device, so there is no host synchronisation here.

    (A backend without its own ragged exchange makes one inside ragged_all_to_all.)
    rows: how many rows this rank has room for; by default n k T, the most that can come if every rank has T tokens. If
    their numbers differ, pass k times their sum: a rank does not know those of the others. If more rows come, the rank
    that lacks the room raises ArgumentError in processes; simulated ranks, which cannot raise depending on data, lose
    them.
    experts: the local experts, by default masked_experts.
    Traffic: k T D elements each way, and counts and positions of n or E integers.
    """
    checks.is_group("moe_ragged", group)
    n, local = group.size, up.shape[0]
    order, counts = _sorted(expert, n * local)
    sends = counts.reshape(n, local).sum(1)
    counts = all_to_all(counts, group, backend).reshape(n, local)
    recvs = counts.sum(1)
    starts, landed = sends.cumsum(0) - sends, recvs.cumsum(0) - recvs
    # At each receiver this rank's rows come after those of lower ranks.
    landing = scan(sends, group, backend, exclusive=True)
    room = x.new_zeros(n * expert.numel() if rows is None else rows, x.shape[1])
    if n == 1 and not group.simulated and len(room) < expert.numel():  # nothing is sent: nothing below refuses it
        raise _no_room(group, len(room))
    try:
        there = ragged_all_to_all(_copies(x, expert, order), room, starts, sends, landing, recvs, group, backend)
    except ArgumentError as error:  # everything else about the arguments was checked here
        raise _no_room(group, len(room)) from error
    which = _which(counts.reshape(-1), room.shape[0], local)
    there = (experts or masked_experts)(there, which, up, down)
    back = all_to_all(starts, group, backend)
    here = ragged_all_to_all(there, x.new_zeros(expert.numel(), x.shape[1]), landed, recvs, back, sends, group, backend)
    return _combined(here, weight, order, x)


def _no_room(group: Group, rows: int) -> ArgumentError:
    return ArgumentError(
        f"moe_ragged: more rows come than rank {group.rank} of group '{group.name}' has room for, rows={rows}; pass "
        "rows=, at worst k times the tokens of all ranks"
    )


def moe_uneven(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    up: Tensor,
    down: Tensor,
    group: Group,
    backend: Backend,
    *,
    counts: Sequence[Sequence[int]],
    experts: Experts | None = None,
) -> Tensor:
    """Every token reaches its experts, by messages whose sizes the host knows.

    counts: counts[r][j] rows go from rank r to expert j, the same on all ranks: expert_counts(..).tolist(), the only
    host synchronisation. No room is wasted, but the sizes are part of the program: when compiled, each counts has a
    graph of its own. Traffic: k T D elements each way. Raises ArgumentError if counts is not n rows of E numbers.
    """
    checks.is_group("moe_uneven", group)
    n, local = group.size, up.shape[0]
    if isinstance(counts, Tensor) or [len(row) for row in counts] != [n * local] * n:
        raise ArgumentError(
            f"moe_uneven: counts is {counts!r}; group '{group.name}' of size {n}, with {local} experts on this rank, "
            f"needs {n} lists of {n * local} ints, expert_counts(..).tolist()"
        )
    order, _ = _sorted(expert, n * local)
    matrix = [[sum(row[r * local : (r + 1) * local]) for r in range(n)] for row in counts]
    there = all_to_all(_copies(x, expert, order), group, backend, send_sizes=matrix)
    table = torch.tensor([[row[r * local : (r + 1) * local] for row in counts] for r in range(n)], device=x.device)
    segments = own_row(table, axis_index(group, backend)).reshape(-1)
    there = (experts or masked_experts)(there, _which(segments, there.shape[0], local), up, down)
    here = all_to_all(there, group, backend, send_sizes=[list(column) for column in zip(*matrix, strict=True)])
    return _combined(here, weight, order, x)


def expert_counts(expert: Tensor, experts: int, group: Group, backend: Backend) -> Tensor:
    """[n E]: how many choices of each rank's tokens fell on each expert. Traffic: all_gather of E integers."""
    return all_gather(_one_hot(expert.reshape(-1), experts).sum(0), group, backend, tiled=False)


def masked_experts(rows: Tensor, which: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each expert computes all rows and keeps its own: e times the arithmetic, in plain operations of fixed shape.

    If that matters, pass the machine's grouped matrix product instead.
    """
    y = torch.zeros_like(rows)
    for j in range(up.shape[0]):
        other = (which != j).unsqueeze(1)
        # Masked twice: an infinite row times a zero cotangent, or zero times an infinite weight, would be NaN.
        hidden = F.gelu(F.linear(rows.masked_fill(other, 0.0), up[j]))
        y = y + F.linear(hidden, down[j]).masked_fill(other, 0.0)
    return y


def _sorted(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The choices ordered by expert, and how many fell on each."""
    chosen = expert.reshape(-1)
    return chosen.argsort(stable=True), _one_hot(chosen, experts).sum(0)


def _which(segments: Tensor, rows: int, local: int) -> Tensor:
    """The local expert of each received row, `local` for none: rows come by rank, from each by expert."""
    ends = segments.cumsum(0)
    segment = (torch.arange(rows, device=segments.device).unsqueeze(1) >= ends).sum(1)
    return torch.where(segment < ends.shape[0], segment % local, local)


def _copies(x: Tensor, expert: Tensor, order: Tensor | None = None) -> Tensor:
    """A row for each choice of each token, in the order given or, for boxes, in the order of the choices."""
    k = expert.shape[1]
    return x.repeat_interleave(k, 0) if order is None else x.index_select(0, order // k)


def _combined(rows: Tensor, weight: Tensor, order: Tensor, x: Tensor) -> Tensor:
    """The weighted sum of each token's rows, which are in the given order."""
    rows = rows * weight.reshape(-1).index_select(0, order).unsqueeze(1)
    return torch.zeros_like(x, dtype=rows.dtype).index_add(0, order // weight.shape[1], rows)


def _one_hot(index: Tensor, length: int) -> Tensor:
    return (index.unsqueeze(1) == torch.arange(length, device=index.device)).long()
