"""Megatron-core's tensor_parallel.mappings: what crosses into and out of tensor- and sequence-parallel regions.

    function                                          forward                   backward
    copy_to_tensor_model_parallel_region              identity                  all_reduce
    reduce_from_tensor_model_parallel_region          all_reduce                identity
    scatter_to_tensor_model_parallel_region           own slice of last dim     all_gather
    gather_from_tensor_model_parallel_region          all_gather, last dim      own slice
    scatter_to_sequence_parallel_region               own slice of first dim    all_gather
    gather_from_sequence_parallel_region              all_gather, first dim     reduce_scatter, or own slice
    reduce_scatter_to_sequence_parallel_region        reduce_scatter, first     all_gather
    all_gather_last_dim_from_tensor_parallel_region   all_gather, last dim      reduce_scatter
    reduce_scatter_last_dim_to_tensor_parallel_region reduce_scatter, last      all_gather
    all_to_all, all_to_all_sp2hp, all_to_all_hp2sp    all_to_all                all_to_all back

Names, arguments and their order are Megatron's, read in its source. Where Megatron takes group, these take group and
backend, as keywords or anywhere among the positional arguments: f(x, group, backend) works for all. In a group of one,
the result is a copy of the input, whatever the sizes. There is no default group, and Megatron's autograd.Functions are
not here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

import fcomm
from fcomm.collectives import checks
from fcomm.compat import funcol
from fcomm.compat.handles import takes_handles
from fcomm.group import Backend, Group


def _region(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """takes_handles; in a group of one the result is a copy of the input, which may then have no dim to cut."""
    arguments = inspect.signature(fn)

    @takes_handles
    @wraps(fn)
    def call(input_: Tensor, *args: Any, group: Group, backend: Backend, **options: Any) -> Tensor:
        if group.size == 1:
            if not torch.compiler.is_compiling():
                arguments.bind(input_, *args, group=group, backend=backend, **options)  # raises as the call would
            return fcomm.pvary(input_, group, backend)
        return fn(input_, *args, group=group, backend=backend, **options)

    return call


@_region
def copy_to_tensor_model_parallel_region(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """A replicated value enters the parallel region."""
    return fcomm.pvary(input_, group, backend)


@_region
def reduce_from_tensor_model_parallel_region(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """Partial sums leave the parallel region as one replicated value."""
    return fcomm.all_reduce_invariant(input_, group, backend)


@_region
def scatter_to_tensor_model_parallel_region(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """This rank's slice of the last dim of a replicated value."""
    return fcomm.shard(input_, group, backend, dim=-1)


@_region
def gather_from_tensor_model_parallel_region(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """Slices of the last dim leave the parallel region as one replicated value."""
    return fcomm.all_gather_invariant(input_, group, backend, dim=-1)


@_region
def scatter_to_sequence_parallel_region(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """This rank's slice of the first dim of a replicated value."""
    return fcomm.shard(input_, group, backend, dim=0)


@_region
def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
    *,
    group: Group,
    backend: Backend,
) -> Tensor:
    """Slices of the first dim become the whole; use_global_buffer has no effect.

    tensor_parallel_output_grad: True if the whole goes into a parallel region, where each rank's cotangent differs;
    False if all ranks go on identically.
    """
    if tensor_parallel_output_grad:
        return fcomm.all_gather(input_, group, backend, sizes=output_split_sizes)
    if output_split_sizes is None:
        return fcomm.all_gather_invariant(input_, group, backend)
    name, option = "gather_from_sequence_parallel_region", "output_split_sizes"
    sizes = checks.canonical_sizes(name, option, output_split_sizes, group)
    checks.own_length(name, option, sizes, input_, 0, group)
    longest = max(sizes)
    padded = torch.cat([input_, input_.new_zeros(longest - input_.shape[0], *input_.shape[1:])])
    blocks = fcomm.all_gather_invariant(padded, group, backend).unflatten(0, (group.size, longest))
    return torch.cat([block[:d] for block, d in zip(blocks, sizes, strict=True)])


@_region
def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
    *,
    group: Group,
    backend: Backend,
) -> Tensor:
    """Partial sums become slices of the first dim; use_global_buffer has no effect."""
    return fcomm.reduce_scatter(input_, group, backend, sizes=input_split_sizes)


@_region
def all_gather_last_dim_from_tensor_parallel_region(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """Slices of the last dim become the whole, for a use in which ranks differ."""
    return fcomm.all_gather(input_, group, backend, dim=-1)


@_region
def reduce_scatter_last_dim_to_tensor_parallel_region(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """Partial sums become slices of the last dim."""
    return fcomm.reduce_scatter(input_, group, backend, dim=-1)


@_region
def all_to_all(
    input_: Tensor,
    output_split_sizes_: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    use_nccl_stream: bool = False,
    *,
    group: Group,
    backend: Backend,
) -> Tensor:
    """Blocks of rows to and from every rank; without sizes, equal blocks. use_nccl_stream has no effect."""
    return funcol.all_to_all_single(input_, output_split_sizes_, input_split_sizes, group, backend=backend)


@takes_handles
def all_to_all_sp2hp(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """[tokens / n, hidden] -> [tokens, hidden / n]; dims before the last count as tokens."""
    return fcomm.all_to_all(input_.reshape(-1, input_.shape[-1]), group, backend, split_dim=1, concat_dim=0)


@takes_handles
def all_to_all_hp2sp(input_: Tensor, *, group: Group, backend: Backend) -> Tensor:
    """[tokens, hidden / n] -> [tokens / n, hidden]; dims before the last count as tokens."""
    return fcomm.all_to_all(input_.reshape(-1, input_.shape[-1]), group, backend, split_dim=0, concat_dim=1)
