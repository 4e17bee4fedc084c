"""Bad input, by exact text: raised before any communication, the same on all ranks, and the group works afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fcomm
from fcomm import ArgumentError, Backend, FcommError, Group, GroupClosedError
from fcomm.testing import run_ranks

X = torch.ones(2, 3)
INTS = torch.ones(4, dtype=torch.int64)
Call = Callable[[Group, Backend], Any]


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


NESTED: dict[str, Any] = {
    **{name: getattr(fcomm, name) for name in (
        "all_reduce", "all_reduce_invariant", "scan", "reduce", "broadcast", "pvary", "shard", "gather", "scatter",
        "all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all", "send",
        "all_reduce_coalesced", "all_gather_coalesced", "reduce_scatter_coalesced",
    )},
    "ppermute": lambda x, g, b: fcomm.ppermute(x, g, b, perm=[(0, 1)]),
    "barrier": lambda x, g, b: fcomm.barrier(g, b, after=x),
    "recv": lambda x, g, b: fcomm.recv(x, g, b, after=X),
    "ragged_all_to_all": lambda x, g, b: fcomm.ragged_all_to_all(x, x, INTS, INTS, INTS, INTS, g, b),
}  # fmt: skip
NESTED |= {
    name: lambda x, g, b, call=NESTED[name]: call([X, x], g, b) for name in NESTED if name.endswith("_coalesced")
}


# Texts name function, argument, value, group and remedy. The group is 'world' of size 2; on the simulated axis of that
# name and size they are the same. "{group}" stands for the group's repr, "{backend}" for the backend's.
BAD: list[tuple[Call, type[Exception], str]] = [
    # dims
    (
        lambda g, b: fcomm.all_gather(X, g, b, dim=2),
        ArgumentError,
        "all_gather: dim is 2, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.all_gather(X, g, b, dim=-4, tiled=False),
        ArgumentError,
        "all_gather: dim is -4, out of range for the 3 dimensions of the result on group 'world'; "
        "choose one in -3 .. 2",
    ),
    (
        lambda g, b: fcomm.all_gather(torch.ones(()), g, b),
        ArgumentError,
        "all_gather: dim is 0, out of range for x of shape () on group 'world'; reshape x to (1,)",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, dim=True),
        ArgumentError,
        "reduce_scatter: dim is True, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, dim="0"),
        ArgumentError,
        "reduce_scatter: dim is '0', out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, split_dim=5),
        ArgumentError,
        "all_to_all: split_dim is 5, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, concat_dim=-3),
        ArgumentError,
        "all_to_all: concat_dim is -3, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.gather(X, g, b, dim=2.0),
        ArgumentError,
        "gather: dim is 2.0, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.scatter(X, g, b, dim=9),
        ArgumentError,
        "scatter: dim is 9, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.shard(X, g, b, dim=2),
        ArgumentError,
        "shard: dim is 2, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.all_gather_invariant(X, g, b, dim=2),
        ArgumentError,
        "all_gather_invariant: dim is 2, out of range for x of shape (2, 3) on group 'world'; choose one in -2 .. 1",
    ),
    (
        lambda g, b: fcomm.all_gather_coalesced([X, INTS], g, b, dim=1),
        ArgumentError,
        "all_gather_coalesced: dim is 1, out of range for x of shape (4,) on group 'world'; choose one in -1 .. 0",
    ),
    # lengths
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, dim=1),
        ArgumentError,
        "reduce_scatter: x.shape[1] is 3, not divisible by group 'world' of size 2; pad to 4 or choose another dim",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, split_dim=1),
        ArgumentError,
        "all_to_all: x.shape[1] is 3, not divisible by group 'world' of size 2; pad to 4 or choose another dim",
    ),
    (
        lambda g, b: fcomm.scatter(X, g, b, dim=-1),
        ArgumentError,
        "scatter: x.shape[1] is 3, not divisible by group 'world' of size 2; pad to 4 or choose another dim",
    ),
    (
        lambda g, b: fcomm.shard(X, g, b, dim=1),
        ArgumentError,
        "shard: x.shape[1] is 3, not divisible by group 'world' of size 2; pad to 4 or choose another dim",
    ),
    (
        lambda g, b: fcomm.reduce_scatter_coalesced([INTS, X], g, b, dim=-1),
        ArgumentError,
        "reduce_scatter_coalesced: x.shape[1] is 3, not divisible by group 'world' of size 2; "
        "pad to 4 or choose another dim",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, dim=1, tiled=False),
        ArgumentError,
        "reduce_scatter: x.shape[1] is 3, but with tiled=False it must be 2, the size of group 'world'; "
        "reshape x or pass tiled=True",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, split_dim=1, tiled=False),
        ArgumentError,
        "all_to_all: x.shape[1] is 3, but with tiled=False it must be 2, the size of group 'world'; "
        "reshape x or pass tiled=True",
    ),
    # sizes
    (
        lambda g, b: fcomm.all_gather(X, g, b, sizes=[2]),
        ArgumentError,
        "all_gather: sizes is [2]; group 'world' of size 2 needs a list of 2 lengths >= 0, one for each rank",
    ),
    (
        lambda g, b: fcomm.all_gather(X, g, b, sizes=[2, -1]),
        ArgumentError,
        "all_gather: sizes is [2, -1]; group 'world' of size 2 needs a list of 2 lengths >= 0, one for each rank",
    ),
    (
        lambda g, b: fcomm.all_gather(X, g, b, sizes=4),
        ArgumentError,
        "all_gather: sizes is 4; group 'world' of size 2 needs a list of 2 lengths >= 0, one for each rank",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, sizes=[1, 2]),
        ArgumentError,
        "reduce_scatter: x.shape[0] is 2, but sizes=[1, 2] add up to 3; make them agree on group 'world'",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, sizes=[1.0, 1.0]),
        ArgumentError,
        "reduce_scatter: sizes is [1.0, 1.0]; group 'world' of size 2 needs a list of 2 lengths >= 0, "
        "one for each rank",
    ),
    (
        lambda g, b: fcomm.all_gather(X, g, b, sizes=[None, 2]),
        ArgumentError,
        "all_gather: sizes is [None, 2]; group 'world' of size 2 needs a list of 2 lengths >= 0, one for each rank",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, sizes=[torch.tensor(True), 1]),
        ArgumentError,
        "reduce_scatter: sizes is [tensor(True), 1]; group 'world' of size 2 needs a list of 2 lengths >= 0, "
        "one for each rank",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, send_sizes=np.array([1.0, 1.0]), recv_sizes=[1, 1], concat_dim=1),
        ArgumentError,
        "all_to_all: send_sizes is [1.0, 1.0]; group 'world' of size 2 needs a list of 2 lengths >= 0, "
        "one for each rank",
    ),
    (
        lambda g, b: fcomm.all_gather(X, g, b, sizes=[1, 1], tiled=False),
        ArgumentError,
        "all_gather: sizes is given with tiled=False; blocks of different lengths cannot be stacked",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, sizes=[1, 1], tiled=False),
        ArgumentError,
        "reduce_scatter: sizes is given with tiled=False; blocks of different lengths cannot be stacked",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, send_sizes=[[1, 1]]),
        ArgumentError,
        "all_to_all: a matrix send_sizes needs 2 rows for group 'world', no recv_sizes, and split_dim == concat_dim; "
        "got 1 rows, recv_sizes=None, 0 and 0",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, send_sizes=[[1, 2], [2, 1]]),
        ArgumentError,
        # The simulated axis says "the longest row of send_sizes=[3]".
        "all_to_all: x.shape[0] is 2, but send_sizes=[{row}] add up to 3; make them agree on group 'world'",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, recv_sizes=[1, 1]),
        ArgumentError,
        "all_to_all: uneven blocks need tiled=True and send_sizes; pass both",
    ),
    # ranks
    (
        lambda g, b: fcomm.broadcast(X, g, b, src=2),
        ArgumentError,
        "broadcast: src is 2, not a rank of group 'world' of size 2; ranks count within the group, 0 .. 1",
    ),
    (
        lambda g, b: fcomm.broadcast(X, g, b, src=True),
        ArgumentError,
        "broadcast: src is True, not a rank of group 'world' of size 2; ranks count within the group, 0 .. 1",
    ),
    (
        lambda g, b: fcomm.reduce(X, g, b, dst="0"),
        ArgumentError,
        "reduce: dst is '0', not a rank of group 'world' of size 2; ranks count within the group, 0 .. 1",
    ),
    (
        lambda g, b: fcomm.gather(X, g, b, dst=-1),
        ArgumentError,
        "gather: dst is -1, not a rank of group 'world' of size 2; ranks count within the group, 0 .. 1",
    ),
    (
        lambda g, b: fcomm.scatter(X, g, b, src=None),
        ArgumentError,
        "scatter: src is None, not a rank of group 'world' of size 2; ranks count within the group, 0 .. 1",
    ),
    # permutations
    (
        lambda g, b: fcomm.ppermute(X, g, b, perm=[(0, 1), (0, 0)]),
        ArgumentError,
        "ppermute: perm=[(0, 1), (0, 0)] names source 0 twice on group 'world'; each rank sends at most once and "
        "receives at most once, use broadcast or reduce for more",
    ),
    (
        lambda g, b: fcomm.ppermute(X, g, b, perm=[(0, 1), (1, 1)]),
        ArgumentError,
        "ppermute: perm=[(0, 1), (1, 1)] names destination 1 twice on group 'world'; each rank sends at most once and "
        "receives at most once, use broadcast or reduce for more",
    ),
    (
        lambda g, b: fcomm.ppermute(X, g, b, perm=[(0, 2)]),
        ArgumentError,
        "ppermute: a rank in perm is 2, not a rank of group 'world' of size 2; ranks count within the group, 0 .. 1",
    ),
    (
        lambda g, b: fcomm.ppermute(X, g, b, perm=[(0, 1, 1)]),
        ArgumentError,
        "ppermute: perm has the entry (0, 1, 1) on group 'world'; pass (source, destination) pairs",
    ),
    (
        lambda g, b: fcomm.ppermute(X, g, b, perm=[0, 1]),
        ArgumentError,
        "ppermute: perm has the entry 0 on group 'world'; pass (source, destination) pairs",
    ),
    (
        lambda g, b: fcomm.ppermute(X, g, b, perm=1),
        ArgumentError,
        "ppermute: perm is 1 on group 'world'; pass (source, destination) pairs",
    ),
    # ops
    (
        lambda g, b: fcomm.all_reduce(X, g, b, op="avg"),
        ArgumentError,
        "all_reduce: op is 'avg'; choose one of sum, mean, max, min, prod, band, bor, bxor",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X, g, b, op="bor"),
        ArgumentError,
        "reduce_scatter: op is 'bor'; choose one of sum, mean, max, min, prod",
    ),
    (
        lambda g, b: fcomm.scan(X, g, b, op="max"),
        ArgumentError,
        "scan: op is 'max'; choose one of sum",
    ),
    (
        lambda g, b: fcomm.all_reduce_invariant(X, g, b, op="prod"),
        ArgumentError,
        "all_reduce_invariant: op is 'prod'; choose one of sum, mean",
    ),
    (
        lambda g, b: fcomm.all_reduce(X, g, b, op="bor"),
        TypeError,
        "all_reduce: op 'bor' is defined on integers and bool, on every backend, but x is torch.float32; "
        "choose another op",
    ),
    (
        lambda g, b: fcomm.reduce(X.to(torch.complex64), g, b, op="max"),
        TypeError,
        "reduce: op 'max' needs an order, on every backend, but x is torch.complex64; "
        "reduce torch.view_as_real(x) or x.abs()",
    ),
    (
        lambda g, b: fcomm.all_reduce(X.bool(), g, b, op="mean"),
        TypeError,
        "all_reduce: op 'mean' has no meaning for torch.bool on any backend; convert x to a float dtype",
    ),
    # tensors
    (
        lambda g, b: fcomm.all_reduce([1.0, 2.0], g, b),
        TypeError,
        "all_reduce: x is list, not a tensor; pass torch.as_tensor(x)",
    ),
    (
        lambda g, b: fcomm.broadcast(3.0, g, b),
        TypeError,
        "broadcast: x is float, not a tensor; pass torch.as_tensor(x)",
    ),
    (
        lambda g, b: fcomm.all_gather(None, g, b),
        TypeError,
        "all_gather: x is NoneType, not a tensor; pass torch.as_tensor(x)",
    ),
    (
        lambda g, b: fcomm.all_reduce_coalesced(X, g, b),
        TypeError,
        "all_reduce_coalesced: xs is one tensor; pass a list of tensors, or call the collective without _coalesced",
    ),
    (
        lambda g, b: fcomm.all_reduce_coalesced([X, 1], g, b),
        TypeError,
        "all_reduce_coalesced: x is int, not a tensor; pass torch.as_tensor(x)",
    ),
    (
        lambda g, b: fcomm.all_gather_coalesced(3, g, b),
        TypeError,
        "all_gather_coalesced: xs is int; pass a list of tensors",
    ),
    (
        lambda g, b: fcomm.all_reduce_coalesced([], g, b, op="foo"),
        ArgumentError,
        "all_reduce_coalesced: op is 'foo'; choose one of sum, mean, max, min, prod, band, bor, bxor",
    ),
    (
        lambda g, b: fcomm.reduce_scatter_coalesced([], g, b, op="band"),
        ArgumentError,
        "reduce_scatter_coalesced: op is 'band'; choose one of sum, mean, max, min, prod",
    ),
    (
        # Before the first dtype is sent.
        lambda g, b: fcomm.all_reduce_coalesced([INTS, X], g, b, op="bor"),
        TypeError,
        "all_reduce_coalesced: op 'bor' is defined on integers and bool, on every backend, but x is torch.float32; "
        "choose another op",
    ),
    (
        lambda g, b: fcomm.all_reduce(X.to_sparse(), g, b),
        TypeError,
        "all_reduce: x has layout torch.sparse_coo; collectives take strided tensors, pass x.to_dense()",
    ),
    (
        lambda g, b: fcomm.all_gather(X.to_sparse_csr(), g, b),
        TypeError,
        "all_gather: x has layout torch.sparse_csr; collectives take strided tensors, pass x.to_dense()",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X.to_sparse(), g, b, op="max"),
        TypeError,
        "reduce_scatter: x has layout torch.sparse_coo; collectives take strided tensors, pass x.to_dense()",
    ),
    (
        lambda g, b: fcomm.all_reduce_coalesced([X, X.to_sparse()], g, b),
        TypeError,
        "all_reduce_coalesced: x has layout torch.sparse_coo; collectives take strided tensors, pass x.to_dense()",
    ),
    *[
        (
            partial(lambda name, call, g, b: call(nested(), g, b), name, call),
            TypeError,
            f"{name}: x is a nested tensor, whose rows have lengths of their own; pass its rows, x.unbind(), to the "
            "coalesced collectives, or torch.nested.to_padded_tensor(x, 0.0)",
        )
        for name, call in NESTED.items()
    ],
    (
        lambda g, b: fcomm.all_reduce(X.to("meta"), g, b),
        TypeError,
        "all_reduce: x is on the meta device and has no data; materialise it first",
    ),
    (
        lambda g, b: fcomm.reduce_scatter(X.to("meta"), g, b, op="prod"),
        TypeError,
        "reduce_scatter: x is on the meta device and has no data; materialise it first",
    ),
    (
        lambda g, b: fcomm.broadcast(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), g, b),
        TypeError,
        "broadcast: x is quantized (torch.qint8); pass x.dequantize() or x.int_repr()",
    ),
    # handles
    (
        lambda g, b: fcomm.all_reduce(X, b, g),
        TypeError,
        "all_reduce: group is {backend}; pass a Group, from fcomm.init, fcomm.split, fcomm.axis, ...",
    ),
    (
        lambda g, b: fcomm.all_gather(X, b, g),
        TypeError,
        "all_gather: group is {backend}; pass a Group, from fcomm.init, fcomm.split, fcomm.axis, ...",
    ),
    (
        lambda g, b: fcomm.broadcast(X, "world", b),
        TypeError,
        "broadcast: group is 'world'; pass a Group, from fcomm.init, fcomm.split, fcomm.axis, ...",
    ),
    (
        lambda g, b: fcomm.ppermute(X, None, b, perm=[]),
        TypeError,
        "ppermute: group is None; pass a Group, from fcomm.init, fcomm.split, fcomm.axis, ...",
    ),
    (
        lambda g, b: fcomm.send(X, b, g),
        TypeError,
        "send: group is {backend}; pass a Group, from fcomm.init, fcomm.split, fcomm.axis, ...",
    ),
    (
        lambda g, b: fcomm.all_reduce(X, g, "c10d"),
        TypeError,
        "all_reduce: backend is 'c10d'; pass a Backend, such as fcomm.cpu, fcomm.c10d or fcomm.sim",
    ),
    (
        lambda g, b: fcomm.barrier(g, g),
        TypeError,
        "barrier: backend is {group}; pass a Backend, such as fcomm.cpu, fcomm.c10d or fcomm.sim",
    ),
    (
        lambda g, b: fcomm.axis_index(g, None),
        TypeError,
        "axis_index: backend is None; pass a Backend, such as fcomm.cpu, fcomm.c10d or fcomm.sim",
    ),
    (
        lambda g, b: fcomm.recv(X, g, b, after=3),
        TypeError,
        "recv: after is int, not a tensor; pass torch.as_tensor(after)",
    ),
    (
        lambda g, b: fcomm.axis_size("world", b),
        TypeError,
        "axis_size: group is 'world'; pass a Group, from fcomm.init, fcomm.split, fcomm.axis, ...",
    ),
    # ragged
    (
        lambda g, b: fcomm.ragged_all_to_all([1.0], X, INTS[:2], INTS[:2], INTS[:2], INTS[:2], g, b),
        TypeError,
        "ragged_all_to_all: operand is list, not a tensor; pass torch.as_tensor(operand)",
    ),
    (
        lambda g, b: fcomm.ragged_all_to_all(X, X, INTS[:2], [1, 1], INTS[:2], INTS[:2], g, b),
        TypeError,
        "ragged_all_to_all: send_sizes is list, not a tensor; pass torch.as_tensor(send_sizes)",
    ),
    (
        lambda g, b: fcomm.ragged_all_to_all(X.to("meta"), X, INTS[:2], INTS[:2], INTS[:2], INTS[:2], g, b),
        TypeError,
        "ragged_all_to_all: x is on the meta device and has no data; materialise it first",
    ),
    (
        lambda g, b: fcomm.ragged_all_to_all(X[0, 0], X[0, 0], INTS[:2], INTS[:2], INTS[:2], INTS[:2], g, b),
        ArgumentError,
        "ragged_all_to_all: operand is () torch.float32, output () torch.float32; both have rows, "
        "and only their numbers of rows may differ",
    ),
    (
        lambda g, b: fcomm.ragged_all_to_all(X, X.double(), INTS[:2], INTS[:2], INTS[:2], INTS[:2], g, b),
        ArgumentError,
        "ragged_all_to_all: operand is (2, 3) torch.float32, output (2, 3) torch.float64; both have rows, "
        "and only their numbers of rows may differ",
    ),
    (
        lambda g, b: fcomm.ragged_all_to_all(X, X[:, :2], INTS[:2], INTS[:2], INTS[:2], INTS[:2], g, b),
        ArgumentError,
        "ragged_all_to_all: operand is (2, 3) torch.float32, output (2, 2) torch.float32; both have rows, "
        "and only their numbers of rows may differ",
    ),
    (
        lambda g, b: fcomm.ragged_all_to_all(X, X, INTS[:2], INTS, INTS[:2], INTS[:2], g, b),
        ArgumentError,
        "ragged_all_to_all: send_sizes is (4,) torch.int64; group 'world' needs (2,) integers, one for each rank",
    ),
    (
        lambda g, b: fcomm.ragged_all_to_all(X, X, INTS[:2].float(), INTS[:2], INTS[:2], INTS[:2], g, b),
        ArgumentError,
        "ragged_all_to_all: input_offsets is (2,) torch.float32; group 'world' needs (2,) integers, one for each rank",
    ),
]

# What only processes, and only a simulated axis, get wrong.
BAD_IN_PROCESSES: list[tuple[Call, type[Exception], str]] = [
    (
        lambda g, b: fcomm.all_reduce(X, g, fcomm.sim),
        FcommError,
        "all_reduce: group 'world' is made of processes, which backend 'sim' cannot serve; "
        "pass fcomm.cpu or fcomm.c10d",
    ),
    (
        lambda g, b: fcomm.all_reduce(X, fcomm.axis("i", 2), b),
        FcommError,
        "all_reduce: group 'i' is a simulated axis, which backend 'c10d' cannot serve; pass fcomm.sim",
    ),
    (
        lambda g, b: fcomm.all_reduce(X, g, replace(b, name="other", devices=("cuda", "npu"))),
        FcommError,
        "all_reduce: x is on device 'cpu', but backend 'other' takes cuda or npu; "
        "move x or choose another backend for group 'world'",
    ),
    (
        lambda g, b: fcomm.all_reduce(
            X, g, replace(b, name="other", lowerings={}, unsupported={"all_reduce": "no bus"})
        ),
        FcommError,
        "all_reduce: backend 'other' does not support it: no bus; use another backend for group 'world'",
    ),
    (
        lambda g, b: fcomm.all_reduce(X, Group("gone", (0, 1), g.rank), b),
        GroupClosedError,
        "all_reduce: group 'gone' is closed; create it again",
    ),
    (
        lambda g, b: fcomm.all_reduce(X, Group("others", (4, 5), None), b),
        FcommError,
        "all_reduce: group 'others' has ranks [4, 5], and this process is none of them; call it on its members only",
    ),
    (
        lambda g, b: fcomm.all_gather(X[: g.rank], g, b, sizes=[2, 2]),
        ArgumentError,
        "all_gather: x.shape[0] is {rank}, but rank {rank}'s entry of sizes=[2, 2] is 2; "
        "pass the lengths that the ranks of group 'world' hold",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, send_sizes=[1, 1]),
        ArgumentError,
        "all_to_all: group 'world' needs recv_sizes beside send_sizes, or send_sizes as the matrix of all ranks' sends",
    ),
    (
        lambda g, b: fcomm.all_to_all(
            X, g, b, send_sizes=[[2, 0], [0, 2]][g.rank], recv_sizes=[[0, 2], [2, 0]][g.rank]
        ),
        ArgumentError,
        "all_to_all: this rank sends itself 2 of send_sizes={own} and receives 0 of recv_sizes={other} on group "
        "'world'; make the two equal",
    ),
    (
        lambda g, b: fcomm.send(X, g, b, dst=g.rank),
        ArgumentError,
        "send: dst is {rank}, this rank itself, on group 'world'; use x as it is",
    ),
    (
        lambda g, b: fcomm.recv(X, g, b, src=7),
        ArgumentError,
        "recv: src is 7, not a rank of group 'world' of size 2; ranks count within the group, 0 .. 1",
    ),
    (
        lambda g, b: fcomm.recv([1.0], g, b),
        TypeError,
        "recv: like is list, not a tensor; pass torch.as_tensor(like)",
    ),
]

BAD_ON_AN_AXIS: list[tuple[Call, type[Exception], str]] = [
    (
        lambda g, b: fcomm.send(X, g, b, dst=1),
        ArgumentError,
        "send: dst is 1, but every rank of simulated axis 'world' makes this call; leave it out for the neighbour, or "
        "use ppermute(perm=[(source, destination)])",
    ),
    (
        lambda g, b: fcomm.recv(X, g, b),
        ArgumentError,
        "recv: on group 'world' the token carries the message; pass after=send(..)",
    ),
    (
        lambda g, b: fcomm.all_to_all(X, g, b, send_sizes=[1, 1], recv_sizes=[1, 1]),
        ArgumentError,
        "all_to_all: group 'world' needs send_sizes as the matrix of all ranks' sends",
    ),
]

# Of handles themselves, on the ranks of a group of 2.
BAD_GROUPS: list[tuple[Callable[[Group], Any], type[Exception], str]] = [
    (
        lambda g: fcomm.subgroup(g, 0, name="s"),
        ArgumentError,
        "subgroup: ranks of 's' are 0; pass a list of ranks of 'world'",
    ),
    (
        lambda g: fcomm.split(g, 2, name="world"),
        FcommError,
        "split: a live group 'world' of ranks [0, 1] exists; close it with fcomm.close, or choose another name",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", 2**16, 0, 2, name="s"),
        ArgumentError,
        "stateless_group: 's' is to meet at host '127.0.0.1', port 65536; pass the name or address of rank 0's host, "
        "and a port below 65536 that is free there",
    ),
    (
        lambda g: fcomm.stateless_group(7, 80, 0, 2, name="s"),
        ArgumentError,
        "stateless_group: 's' is to meet at host 7, port 80; pass the name or address of rank 0's host, "
        "and a port below 65536 that is free there",
    ),
    (
        lambda g: fcomm.from_device_mesh(g.ranks, "tp"),
        TypeError,
        "from_device_mesh: mesh is (0, 1); pass a torch DeviceMesh",
    ),
    (
        lambda g: fcomm.apply("all_educe", X, g, fcomm.c10d),
        ArgumentError,
        "apply: no collective is named 'all_educe'; define it by fcomm.define",
    ),
    (
        lambda g: fcomm.apply("all_reduce", X, g, fcomm.c10d),
        TypeError,
        "apply: 'all_reduce' takes the tensors ('x',) and the parameters ('op',) and got 1 in all; "
        "pass (tensors), group, backend and each parameter, by position",
    ),
    (
        lambda g: fcomm.apply("all_reduce", (X, X), g, fcomm.c10d, "sum"),
        TypeError,
        "apply: 'all_reduce' takes the tensors ('x',) and the parameters ('op',) and got 3 in all; "
        "pass (tensors), group, backend and each parameter, by position",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 2], name="s"),
        ArgumentError,
        "subgroup: rank 2 of 's' is not in group 'world' of size 2",
    ),
    (
        lambda g: fcomm.subgroup(g, [True], name="s"),
        ArgumentError,
        "subgroup: rank True of 's' is not in group 'world' of size 2",
    ),
    (
        lambda g: fcomm.subgroup(g, [], name="s"),
        ArgumentError,
        "subgroup: ranks of 's' are []; pass each member once, at least one",
    ),
    (
        lambda g: fcomm.subgroup(g, [1, 1], name="s"),
        ArgumentError,
        "subgroup: ranks of 's' are [1, 1]; pass each member once, at least one",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 1], name=""),
        ArgumentError,
        "subgroup: name is ''; pass a non-empty string, the same on every rank",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 1], name="world"),
        FcommError,
        "subgroup: a live group 'world' of ranks [0, 1] exists; close it with fcomm.close, or choose another name",
    ),
    (
        lambda g: fcomm.subgroup(g, [0, 1], name="s", timeout_s=0),
        ArgumentError,
        "subgroup: timeout_s is 0; pass a positive, finite number of seconds",
    ),
    (
        lambda g: fcomm.subgroup(fcomm.axis("i", 2), [0, 1], name="s"),
        ArgumentError,
        "subgroup: 'i' is a simulated axis; nest axes, fcomm.axis('s', size)",
    ),
    (
        lambda g: fcomm.split(g, 3, name="s"),
        ArgumentError,
        "split: size is 3, but group 'world' has 2 ranks; pass a divisor of 2",
    ),
    (
        lambda g: fcomm.split(g, True, name="s"),
        ArgumentError,
        "split: size is True, but group 'world' has 2 ranks; pass a divisor of 2",
    ),
    (
        lambda g: fcomm.mesh(g, dp=2, tp=2),
        ArgumentError,
        "mesh: the sizes are {'dp': 2, 'tp': 2}, but group 'world' has 2 ranks; pass positive ints whose product is 2",
    ),
    (
        fcomm.mesh,
        ArgumentError,
        "mesh: the sizes are {}, but group 'world' has 2 ranks; pass positive ints whose product is 2",
    ),
    (
        lambda g: fcomm.mesh(g, dp=-1, tp=-2),
        ArgumentError,
        "mesh: the sizes are {'dp': -1, 'tp': -2}, but group 'world' has 2 ranks; "
        "pass positive ints whose product is 2",
    ),
    (
        lambda g: fcomm.split("world", 2, name="s"),
        TypeError,
        "split: parent is 'world'; pass a Group, from fcomm.init, fcomm.split, ...",
    ),
    (
        lambda g: fcomm.subgroup(Group("gone", (0, 1), 0), [0], name="s"),
        GroupClosedError,
        "subgroup: group 'gone' is closed; create it again",
    ),
    (
        lambda g: fcomm.close("world"),
        TypeError,
        "close: group is 'world'; pass a Group, or nothing to close all of this process",
    ),
    (lambda g: fcomm.axis("", 2), ArgumentError, "axis: name is ''; pass a non-empty string"),
    (lambda g: fcomm.axis("i", 0), ArgumentError, "axis: size of 'i' is 0; pass a positive int"),
    (lambda g: fcomm.axis("i", True), ArgumentError, "axis: size of 'i' is True; pass a positive int"),
    (
        lambda g: fcomm.init(timeout_s=float("nan")),
        ArgumentError,
        "init: timeout_s is nan; pass a positive, finite number of seconds",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", 1, 2, 2, name="s"),
        ArgumentError,
        "stateless_group: rank of 's' is 2, not in 0 .. 1; pass this process's own rank",
    ),
    (
        lambda g: fcomm.stateless_group("127.0.0.1", "80", 0, 2, name="s"),
        ArgumentError,
        "stateless_group: port of 's' is '80'; pass an int",
    ),
    (
        lambda g: fcomm.from_process_group(None, name="s"),
        FcommError,
        "from_process_group: torch.distributed is not initialised; call init_process_group or fcomm.init",
    ),
    (
        lambda g: fcomm.from_process_group("tp", name="s"),
        ArgumentError,
        "from_process_group: 's' got 'tp', not a ProcessGroup that this process is a member of",
    ),
]


def raised(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return AssertionError, "nothing was raised"


def compare(got: tuple[type[BaseException], str], kind: type[Exception], text: str, **words: Any) -> list[str]:
    for word, value in words.items():
        text = text.replace("{" + word + "}", str(value))
    return [] if got[1] == text and issubclass(got[0], kind) else [f"{got[0].__name__}: {got[1]}\n  expected {text}"]


def bad_input_on_this_rank(world: Group) -> list[str]:
    rank, failures = world.rank or 0, []
    words: dict[str, Any] = {"group": repr(world), "backend": repr(fcomm.c10d), "rank": rank}
    words |= {"row": ["1, 2", "2, 1"][rank], "own": [[2, 0], [0, 2]][rank], "other": [[0, 2], [2, 0]][rank]}
    for call, kind, text in BAD + BAD_IN_PROCESSES:
        failures += compare(raised(lambda: call(world, fcomm.c10d)), kind, text, **words)
        # One rank's mistake leaves nothing behind: the others are not out of step.
        if rank == 0:
            raised(lambda: call(world, fcomm.c10d))
    for make, kind, text in BAD_GROUPS:
        failures += compare(raised(lambda: make(world)), kind, text)
    y = fcomm.all_reduce(torch.tensor(rank + 1), world, fcomm.c10d)
    return failures if y.item() == 3 else [*failures, f"after all that, all_reduce is {y}"]


def test_bad_input_in_processes() -> None:
    run_ranks(bad_input_on_this_rank, 2)


def test_bad_input_on_a_simulated_axis() -> None:
    axis = fcomm.axis("world", 2)
    for call, kind, text in BAD + BAD_ON_AN_AXIS:
        if "[{row}]" in text:
            text = text.replace("send_sizes=[{row}]", "the longest row of send_sizes=[3]")

        def one_rank(x: Tensor) -> Tensor:
            failures.extend(
                compare(raised(lambda: call(axis, fcomm.sim)), kind, text, group=repr(axis), backend=repr(fcomm.sim))
            )
            return x

        failures: list[str] = []
        fcomm.simulate(one_rank, axis)(torch.zeros(2))
        assert not failures, failures[0]


def test_bad_input_in_a_compiled_program() -> None:
    axis = fcomm.axis("world", 2)
    program = torch.compile(
        fcomm.simulate(lambda x: fcomm.reduce_scatter(x, axis, fcomm.sim, dim=1), axis), backend="aot_eager"
    )
    with pytest.raises(
        Exception, match=r"reduce_scatter: x\.shape\[1\] is 3, not divisible by group 'world' of size 2"
    ):
        program(torch.ones(2, 2, 3))


def test_there_are_enough_messages() -> None:
    texts = {text for _, _, text in [*BAD, *BAD_IN_PROCESSES, *BAD_ON_AN_AXIS, *BAD_GROUPS]}
    assert len(texts) >= 100


def test_a_simulated_result_that_is_no_tensor() -> None:
    axis = fcomm.axis("i", 2)
    with pytest.raises(
        TypeError, match="simulate: fn returned None; return tensors, nested in tuples, lists and dicts"
    ):
        fcomm.simulate(lambda x: (x, [None]), axis)(torch.ones(2))


LATER = fcomm.axis("later", 3)


class Copied(torch.autograd.Function):
    """What is pvary here, as others write it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:  # type: ignore[override]
        return fcomm.all_reduce(ct, LATER, fcomm.sim)


def test_a_backward_that_communicates_after_simulate_has_returned() -> None:
    x = torch.arange(6.0).reshape(3, 2)

    def loss(x: Tensor) -> Tensor:
        return (Copied.apply(x) ** 2).sum()

    assert fcomm.simulate(torch.func.grad(loss), LATER)(x).tolist() == [[12, 18]] * 3
    text = re.escape(
        "all_reduce: group 'later' is a simulated axis, which a backward uses outside fcomm.simulate; take "
        "the derivative inside, fcomm.simulate(torch.func.grad(fn), axis)"
    )
    with pytest.raises(FcommError, match=text):
        torch.func.grad(lambda x: fcomm.simulate(loss, LATER)(x).sum())(x)
    with pytest.raises(FcommError, match=text):
        fcomm.simulate(loss, LATER)(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("copy", ["copy.copy", "copy.deepcopy", "pickle.dumps"])
def test_a_live_group_says_what_to_do_instead_of_copying_it(copy: str) -> None:
    module, function = copy.split(".")
    text = (
        "group 'alone' is a live handle of this process and cannot be pickled or copied; "
        "pass its name and ranks, and rebuild it there with fcomm.init and fcomm.subgroup"
    )
    with pytest.raises(TypeError) as error:
        getattr(__import__(module), function)(Group("alone", (0,), 0))
    assert str(error.value) == text


def test_a_simulated_axis_is_a_value_and_travels() -> None:
    import copy
    import pickle

    axis = fcomm.axis("i", 3)
    assert copy.deepcopy(axis) == pickle.loads(pickle.dumps(axis)) == axis


def test_coalesced_collectives_take_any_iterable() -> None:
    group = fcomm.axis("any", 2)

    def program(x: Tensor) -> list[Tensor]:
        return [
            *fcomm.all_reduce_coalesced((y for y in (x, x * 2)), group, fcomm.sim),
            *fcomm.all_gather_coalesced({"a": x}.values(), group, fcomm.sim),
            *fcomm.reduce_scatter_coalesced(iter([x, x + 1]), group, fcomm.sim),
        ]

    ys = fcomm.simulate(program, group)(torch.arange(8.0).view(2, 4))
    assert [y[1].tolist() for y in ys] == [
        [4, 6, 8, 10],
        [8, 12, 16, 20],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 10],
        [10, 12],
    ]


def sizes_of_other_integers(world: Group) -> list[str]:
    failures, x = [], torch.arange(2.0) + 2 * (world.rank or 0)
    for two in (np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor([2], dtype=torch.int32)):
        one = two // 2
        for on in (fcomm.cpu, fcomm.c10d):
            got = [
                fcomm.all_gather(x, world, on, sizes=[two, two]).tolist(),
                fcomm.reduce_scatter(x, world, on, sizes=(one, one)).tolist(),
                fcomm.all_to_all(x, world, on, send_sizes=[[one, one]] * 2).tolist(),
                fcomm.all_to_all(x, world, on, send_sizes=[one, one], recv_sizes=[one, one]).tolist(),
                fcomm.all_to_all(x, world, on, send_sizes=np.array([1, 1]), recv_sizes=torch.tensor([1, 1])).tolist(),
            ]
            own = [0, 2] if world.rank == 0 else [1, 3]
            want = [[0, 1, 2, 3], [2 if world.rank == 0 else 4], own, own, own]
            failures += [] if got == want else [f"{two!r} on {on.name}: {got} is not {want}"]
    return failures


def test_sizes_may_be_arrays_tensors_and_their_entries() -> None:
    run_ranks(sizes_of_other_integers, 2)
