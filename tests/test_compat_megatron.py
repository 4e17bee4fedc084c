"""What Megatron-core's test_mappings.py checks, restated for compat.megatron: two tensor-parallel groups of two."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fcomm
from fcomm.compat import megatron
from fcomm.testing import run_ranks

# Megatron-core's, without group; what is left keeps its order and defaults.
SIGNATURES = {
    "copy_to_tensor_model_parallel_region": "input_",
    "reduce_from_tensor_model_parallel_region": "input_",
    "scatter_to_tensor_model_parallel_region": "input_",
    "gather_from_tensor_model_parallel_region": "input_",
    "scatter_to_sequence_parallel_region": "input_",
    "gather_from_sequence_parallel_region": "input_, tensor_parallel_output_grad=True, output_split_sizes=None, "
    "use_global_buffer=False",
    "reduce_scatter_to_sequence_parallel_region": "input_, input_split_sizes=None, use_global_buffer=False",
    "all_gather_last_dim_from_tensor_parallel_region": "input_",
    "reduce_scatter_last_dim_to_tensor_parallel_region": "input_",
    "all_to_all": "input_, output_split_sizes_=None, input_split_sizes=None, use_nccl_stream=False",
    "all_to_all_sp2hp": "input_",
    "all_to_all_hp2sp": "input_",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_megatrons(name: str) -> None:
    found = inspect.signature(getattr(megatron, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert text == f"({SIGNATURES[name]}, *, group, backend)"


def backward(y: Tensor, x: Tensor, ct: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, ct)[0]


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def mappings(world: fcomm.Group) -> None:
    rank = world.rank or 0
    tp = fcomm.split(world, 2, name="tp")
    handles: dict[str, Any] = {"group": tp, "backend": fcomm.c10d}
    mine = tp.rank or 0
    total = 1.0 if rank < 2 else 5.0  # 0 + 1, 2 + 3
    both = torch.cat([torch.full((4,), float(r)) for r in tp.ranks])

    x = leaf(torch.full((1,), float(rank)))
    y = megatron.copy_to_tensor_model_parallel_region(x, **handles)
    assert torch.equal(y, x)
    assert backward(y, x, x.detach()).item() == total

    y = megatron.reduce_from_tensor_model_parallel_region(x, **handles)
    assert y.item() == total
    assert torch.equal(backward(y, x, x.detach()), x)

    whole = leaf(torch.rand((4, 4), generator=torch.Generator().manual_seed(0)))
    y = megatron.scatter_to_tensor_model_parallel_region(whole, **handles)
    assert torch.equal(y, whole[:, 2 * mine : 2 * mine + 2])
    assert torch.equal(backward(y, whole, torch.full((4, 2), float(rank)))[0], both[::2])

    y = megatron.scatter_to_sequence_parallel_region(whole, **handles)
    assert torch.equal(y, whole[2 * mine : 2 * mine + 2])
    assert torch.equal(backward(y, whole, torch.full((2, 4), float(rank)))[:, 0], both[::2])

    part = leaf(torch.full((4,), float(rank)))
    ct = torch.arange(8.0) * (rank + 1)
    y = megatron.gather_from_tensor_model_parallel_region(part, **handles)
    assert torch.equal(y, both)
    assert torch.equal(backward(y, part, ct), ct[4 * mine : 4 * mine + 4])

    summed = torch.arange(8.0) * sum(r + 1 for r in tp.ranks)
    for gather in (
        megatron.gather_from_sequence_parallel_region,
        megatron.all_gather_last_dim_from_tensor_parallel_region,
    ):
        y = gather(part, **handles)
        assert torch.equal(y, both)
        assert torch.equal(backward(y, part, ct), summed[4 * mine : 4 * mine + 4])
    y = megatron.gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=False, **handles)
    assert torch.equal(backward(y, part, ct), ct[4 * mine : 4 * mine + 4])

    full = leaf(torch.arange(8.0) * (rank + 1))
    for scatter in (
        megatron.reduce_scatter_to_sequence_parallel_region,
        megatron.reduce_scatter_last_dim_to_tensor_parallel_region,
    ):
        y = scatter(full, **handles)
        assert torch.equal(y, summed[4 * mine : 4 * mine + 4])
        assert torch.equal(backward(y, full, part.detach()), both)

    # A transposed argument: Megatron's own all-reduce returned it unreduced.
    square = torch.arange(6.0).reshape(2, 3) * (rank + 1)
    y = megatron.reduce_from_tensor_model_parallel_region(square.T, **handles)
    assert torch.equal(y, torch.arange(6.0).reshape(2, 3).T * sum(r + 1 for r in tp.ranks))

    # Uneven splits: this rank holds mine + 1 rows, and block r has r + 1.
    rows = leaf(torch.full((mine + 1, 2), float(rank)))
    y = megatron.gather_from_sequence_parallel_region(rows, output_split_sizes=[1, 2], **handles)
    assert torch.equal(y[:, 0], torch.tensor([0.0, 1, 1]) if rank < 2 else torch.tensor([2.0, 3, 3]))
    assert torch.equal(backward(y, rows, torch.ones(3, 2)), torch.full((mine + 1, 2), 2.0))
    y = megatron.reduce_scatter_to_sequence_parallel_region(torch.ones(3, 2), input_split_sizes=[1, 2], **handles)
    assert torch.equal(y, torch.full((mine + 1, 2), 2.0))
    y = megatron.gather_from_sequence_parallel_region(rows, False, output_split_sizes=[1, 2], **handles)
    assert torch.equal(y[:, 0], torch.tensor([0.0, 1, 1]) if rank < 2 else torch.tensor([2.0, 3, 3]))
    ct = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(backward(y, rows, ct), ct.split([1, 2])[mine])
    nothing = megatron.gather_from_sequence_parallel_region(rows[:0], False, output_split_sizes=[0, 0], **handles)
    assert nothing.shape == (0, 2)
    with pytest.raises(ValueError, match=r"entry of output_split_sizes=\[2, 1\]"):
        megatron.gather_from_sequence_parallel_region(rows, False, output_split_sizes=[2, 1], **handles)

    # Uneven all_to_all, the group first as Megatron has it: this rank sends r + 1 rows to rank r.
    sent = leaf(torch.full((3, 2), float(rank)))
    y = megatron.all_to_all(tp, fcomm.c10d, sent, [mine + 1] * 2, [1, 2])
    assert torch.equal(y[:, 0], torch.tensor([float(r) for r in tp.ranks]).repeat_interleave(mine + 1))
    assert torch.equal(backward(y, sent, torch.full_like(y, float(rank)))[:, 0], both[[0, 4, 4]])
    # The splits as Megatron's dispatchers pass them; if one side's are left out, its blocks are equal.
    outs, ins = np.array([mine + 1] * 2), np.array([1, 2])
    assert torch.equal(megatron.all_to_all(tp, sent, outs, ins, use_nccl_stream=True, backend=fcomm.c10d), y)
    equal = megatron.all_to_all(tp, part, backend=fcomm.c10d)
    for split in ({"output_split_sizes_": np.array([2, 2])}, {"input_split_sizes": np.array([2, 2])}):
        assert torch.equal(megatron.all_to_all(tp, part, backend=fcomm.c10d, **split), equal)

    tokens = torch.arange(8.0).reshape(2, 4) + 8 * mine
    there = megatron.all_to_all_sp2hp(tokens, **handles)
    assert torch.equal(there, torch.arange(16.0).reshape(4, 4)[:, 2 * mine : 2 * mine + 2])
    assert torch.equal(megatron.all_to_all_hp2sp(there, **handles), tokens)


def test_mappings() -> None:
    run_ranks(mappings, 4)


REGIONS = [name for name in SIGNATURES if not name.startswith("all_to_all_")]


@pytest.mark.parametrize("name", REGIONS)
def test_one_rank_keeps_its_input_whatever_it_is(name: str) -> None:
    def on_one_rank(x: Tensor, **splits: Any) -> Tensor:
        return fcomm.simulate(lambda x: getattr(megatron, name)(x, group=axis, **splits), axis)(x)

    axis = fcomm.axis("tp", 1)
    x = torch.randn(1)
    assert torch.equal(on_one_rank(x), x)
    for split in SIGNATURES[name].split(", "):
        if "split_sizes" in split:
            assert torch.equal(on_one_rank(x[None], **{split.removesuffix("=None"): [7]}), x[None])


def test_one_rank_is_checked_as_many_are() -> None:
    alone = fcomm.stateless_group("127.0.0.1", 0, 0, 1, name="alone")
    with pytest.raises(TypeError, match="x is list, not a tensor"):
        megatron.copy_to_tensor_model_parallel_region([1.0], group=alone, backend=fcomm.cpu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'output_split_size'"):
        megatron.gather_from_sequence_parallel_region(
            torch.ones(2), output_split_size=[2], group=alone, backend=fcomm.cpu
        )
    fcomm.close(alone)
    with pytest.raises(fcomm.GroupClosedError):
        megatron.reduce_scatter_to_sequence_parallel_region(torch.ones(2), group=alone, backend=fcomm.cpu)


def test_handles_stand_anywhere_and_are_needed() -> None:
    axis = fcomm.axis("tp", 2)
    x = torch.randn(2, 3)
    for call in (
        lambda x: megatron.gather_from_sequence_parallel_region(x, axis, fcomm.sim),
        lambda x: megatron.gather_from_sequence_parallel_region(x, True, axis, fcomm.sim),
        lambda x: megatron.gather_from_sequence_parallel_region(x, True, group=axis, backend=fcomm.sim),
        lambda x: megatron.gather_from_sequence_parallel_region(input_=x, group=axis),
    ):
        torch.testing.assert_close(fcomm.simulate(call, axis)(x), x.reshape(1, 6).expand(2, 6))
    with pytest.raises(TypeError, match="no group is given"):
        megatron.copy_to_tensor_model_parallel_region(x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dim'"):
        megatron.copy_to_tensor_model_parallel_region(x, axis, fcomm.sim, dim=0)
