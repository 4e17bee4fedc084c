"""Pipeline parallelism: rank r of `group` has stage r of the model, and a batch passes in M micro-batches.

    n  group.size    M  micro-batches    t  tick

    GPipe, n = 3, M = 4      F0 F1 F2 F3 .  .  | .  .  B3 B2 B1 B0       all forwards, then all backwards
                             .  F0 F1 F2 F3 .  | .  B3 B2 B1 B0 .
                             .  .  F0 F1 F2 F3 | B3 B2 B1 B0 .  .

    1F1B, n = 3, M = 4       F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3         a backward as soon as there is one:
                             .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .          rank r holds n - r micro-batches, not M
                             .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

Both idle for (n-1) of (M+n-1) ticks; gpipe's forward has n-1 additional runs of a stage before them. Activations of one
micro-batch move from stage to stage, M times forward and M times backward. No line below says how a cotangent travels:
in gpipe the derivative of ppermute is the inverse ppermute; in one_f_one_b the derivative of send receives, and that of
recv sends.

    gpipe          one differentiable function, the same program on all ranks: simulated, in processes, compiled
    one_f_one_b    in processes only: each rank has its own program, so it cannot run on a simulated axis
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vjp

from fcomm.collectives import all_reduce_invariant, axis_index, checks, ppermute, recv, send
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group

Params = Mapping[str, Tensor]


def gpipe(stage: Callable[[Tensor], Tensor], micro: Tensor, group: Group, backend: Backend) -> Tensor:
    """All micro-batches through all stages: rank r starts micro-batch m at tick m + r.

        rank 0  micro [M ..]      zeros [M ..]
        rank 1  ignored       ->  stage 1(stage 0(micro)) [M ..]

    stage: this rank's stage, [..] -> [..] of one shape. In ticks without a micro-batch it runs on the first input that
    it gets, and nobody reads the result. For that, micro-batch 0 also passes through all stages before tick 0, without
    a derivative. stage must not depend on how often it is called. torch.utils.checkpoint around it keeps only its
    inputs.
    Traffic: n-1 ppermutes of a micro-batch to one rank, then M+n-2 ppermutes to all; backward M+n-2.
    Raises ArgumentError if there is no micro-batch.
    """
    checks.is_group("gpipe", group)
    if not micro.dim() or not micro.shape[0]:
        raise ArgumentError(f"gpipe: micro has shape {tuple(micro.shape)}; stack at least one micro-batch in dim 0")
    n, count = group.size, micro.shape[0]
    rank = axis_index(group, backend).to(micro.device)
    # On inputs other than its own, a stage's derivative may be NaN, and NaN times a zero cotangent is NaN.
    with torch.no_grad():
        idle = arrived = micro[0]
        for r in range(1, n):
            arrived = ppermute(stage(arrived), group, backend, perm=[(r - 1, r)])
            idle = torch.where(rank == r, arrived, idle)
    arrived, results = idle, []
    for tick in range(count + n - 1):
        fresh = torch.where(rank == 0, micro[min(tick, count - 1)], arrived)
        y = stage(torch.where((rank <= tick) & (tick < rank + count), fresh, idle))
        if tick >= n - 1:
            results.append(y)
        if tick < count + n - 2:
            arrived = ppermute(y, group, backend, perm=[(r, r + 1) for r in range(n - 1)])
    return torch.where(rank == n - 1, torch.stack(results), 0.0)


def from_last(x: Tensor, group: Group, backend: Backend) -> Tensor:
    """The last rank's x, such as the loss, for the same use on all ranks.

        rank 0  [a]      [b]
        rank 1  [b]  ->  [b]

    Traffic: all_reduce forward, none backward.
    """
    last = axis_index(group, backend).to(x.device) == group.size - 1
    return all_reduce_invariant(torch.where(last, x, 0.0), group, backend)


# vjp still differentiates inside; outside, tensors that require grad would keep the graphs of all micro-batches alive.
@torch.no_grad()
def one_f_one_b(
    stage: Callable[[Params, Tensor], Tensor],
    loss: Callable[[Tensor, int], Tensor],
    params: Params,
    micro: Tensor,
    group: Group,
    backend: Backend,
    *,
    in_flight: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the micro-batches' losses, on all ranks, and its gradient with respect to this rank's params.

    The sum is float32, or float64 if micro is. The gradient is for floating and complex params; others, such as a
    counter, are only passed to stage. Both results are constants for outer derivatives.

    stage(params, x): this rank's stage, [..] -> [..] of one shape. loss(y, m): one number, of shape (), for the last
    stage's result for micro-batch m; called only on the last rank. micro: [M ..]; the first rank's are used, but all
    must have one shape.
    in_flight: the number of micro-batches whose backward is outstanding; by default n - rank, which is 1F1B; M gives
    GPipe's order.
    Traffic: M sends and M recvs of a micro-batch's bytes each way, and one all_reduce of the loss.
    Raises ArgumentError on a simulated axis, and if loss returns anything but one number.
    """
    checks.is_group("one_f_one_b", group)
    if group.simulated or group.rank is None:
        raise ArgumentError(
            f"one_f_one_b: '{group.name}' is not a group of processes that this one belongs to; use gpipe"
        )
    rank, last = group.rank, group.rank == group.size - 1
    total = micro.new_zeros((), dtype=torch.promote_types(micro.dtype, torch.float32))
    inexact = {name: p for name, p in params.items() if p.is_floating_point() or p.is_complex()}
    gradient = {name: torch.zeros_like(p) for name, p in inexact.items()}
    pending: deque[tuple[Tensor, Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]]] = deque()

    def forward(m: int) -> None:
        def program(own: Params, like: Tensor) -> Tensor:
            x = micro[m] if rank == 0 else recv(like, group, backend, src=rank - 1)
            y = stage({**params, **own}, x)
            return loss(y, m) if last else send(y, group, backend, dst=rank + 1)

        result, pull = vjp(program, inexact, torch.zeros_like(micro[m]))[:2]
        if last and result.dim():
            raise ArgumentError(
                f"one_f_one_b: loss returned shape {tuple(result.shape)}; return one number, of shape ()"
            )
        pending.append((result, pull))

    def backward() -> None:
        # Except on the last rank, the result is send's token: its pull waits for the cotangent, and recv's sends it on.
        result, pull = pending.popleft()
        part, _ = pull(torch.ones_like(result))
        for name, g in part.items():
            gradient[name] += g
        if last:
            total.add_(result)

    for m in range(micro.shape[0]):
        forward(m)
        if len(pending) >= (group.size - rank if in_flight is None else in_flight):
            backward()
    while pending:
        backward()
    return from_last(total, group, backend), gradient
