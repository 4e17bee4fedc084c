"""Data parallelism: every rank of `group` has the whole model, or a share of it, and its own part of the batch.

    n  group.size    P  number of parameters

Three ways, by where a parameter and its gradient live. In all of them a rank computes the loss of its own examples, and

    loss = all_reduce_invariant(own_loss, group, backend, op="mean")

is the loss of the whole batch, whose derivative is 1/n for each rank's own loss. What adds the ranks' gradients:

    parameter                    in front of the model                          backward             bytes per rank
    replicated, pure function    params = replicate(params, ..)                 1 all_reduce         2(n-1)/n P
    replicated, .grad after      (nothing) grads = mean_gradients(grads, ..)    1 all_reduce         2(n-1)/n P
    sharded, 1/n on each rank    params = gather_parameters(shards, ..)         1 reduce_scatter     2(n-1)/n P: half
                                                                                                     of it forward

In the second way each rank differentiates its own loss, and the mean of the gradients follows. The third is stage 3 of
ZeRO (Rajbhandari et al.): all_gather forward and, since its derivative is reduce_scatter, each rank gets the summed
gradient of its own share only, which its share of the optimiser's state updates. With torch.utils.checkpoint around a
block that begins with gather_parameters, backward gathers again, and no rank ever holds more than a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fcomm.collectives import all_gather_coalesced, all_reduce_coalesced, checks, pvary, shard
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group


def replicate(params: Iterable[Tensor], group: Group, backend: Backend) -> list[Tensor]:
    """Let replicated parameters enter per-rank use: pvary of a list, gradients added in one message per dtype.

        rank 0  [a] [b]      [a] [b]                     backward   [a0 + a1] [b0 + b1]
        rank 1  [a] [b]  ->  [a] [b]                                [a0 + a1] [b0 + b1]

    params: tensors of any shapes and dtypes, the same on all ranks; the results are copies in the same order.
    Traffic: none forward, one all_reduce per dtype backward, 2(n-1)/n of the bytes per rank.
    """
    params = list(params)  # a module's parameters() can be iterated over only once
    varying = list(params)
    for dtype in dict.fromkeys(p.dtype for p in params):
        places = [i for i, p in enumerate(params) if p.dtype == dtype]
        flat = pvary(torch.cat([params[i].reshape(-1) for i in places]), group, backend)
        for i, part in zip(places, flat.split([params[i].numel() for i in places]), strict=True):
            varying[i] = part.reshape(params[i].shape)
    return varying


def mean_gradients(grads: Iterable[Tensor], group: Group, backend: Backend) -> list[Tensor]:
    """The mean of all ranks' gradients, tensor by tensor. Traffic: one all_reduce per dtype, 2(n-1)/n of the bytes."""
    return all_reduce_coalesced(grads, group, backend, op="mean")


def shard_parameters(params: Iterable[Tensor], group: Group, backend: Backend) -> list[Tensor]:
    """This rank's share of each parameter: flat, padded to a multiple of n, 1/n of it.

        rank 0  [a b c]      [a b]
        rank 1  [a b c]  ->  [c 0]

    No traffic; its derivative, rarely needed, gathers.
    """
    checks.is_group("shard_parameters", group)
    return [shard(pad(p.reshape(-1), (0, -p.numel() % group.size)), group, backend) for p in params]


def gather_parameters(
    shards: Iterable[Tensor], shapes: Iterable[Sequence[int]], group: Group, backend: Backend
) -> list[Tensor]:
    """The whole parameters, of which every rank holds a share, for use on the ranks' own examples.

        rank 0  [a b]      [a b c]                       backward   share 0 of the sum of both ranks' gradients
        rank 1  [c 0]  ->  [a b c]                                  share 1

    shards: as returned by shard_parameters; shapes: those of the whole parameters.
    Traffic: one all_gather per dtype forward, one reduce_scatter backward, (n-1)/n of the whole bytes per rank each.
    Raises ArgumentError if the shards do not belong to parameters of these shapes.
    """
    checks.is_group("gather_parameters", group)
    shards, shapes = list(shards), list(shapes)
    lengths, shares = [x.numel() for x in shards], [-(-math.prod(shape) // group.size) for shape in shapes]
    if lengths != shares:
        raise ArgumentError(
            f"gather_parameters: the shards have {lengths} elements, but those of parameters of the shapes "
            f"{[tuple(shape) for shape in shapes]} on group '{group.name}' of size {group.size} have {shares}; pass "
            "what shard_parameters gave, and the shapes that it was given"
        )
    wholes = all_gather_coalesced(shards, group, backend)
    return [w[: math.prod(shape)].reshape(shape) for w, shape in zip(wholes, shapes, strict=True)]
