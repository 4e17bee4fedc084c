"""Calls that collectives refuse, and the error texts: the table of test_errors.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fcomm
from fcomm import ArgumentError, Backend, FcommError, Group, GroupClosedError

X = torch.ones(2, 3)
INTS = torch.ones(4, dtype=torch.int64)
Call = Callable[[Group, Backend], Any]


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


# A call of each collective with a tensor that none of them accepts.
WITH: dict[str, Any] = {
    **{name: getattr(fcomm, name) for name in (
        "all_reduce", "all_reduce_invariant", "scan", "reduce", "broadcast", "pvary", "shard", "gather", "scatter",
        "all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all", "send",
    )},
    **{name: lambda x, g, b, name=name: getattr(fcomm, name)([X, x], g, b) for name in (
        "all_reduce_coalesced", "all_gather_coalesced", "reduce_scatter_coalesced",
    )},
    "ppermute": lambda x, g, b: fcomm.ppermute(x, g, b, perm=[(0, 1)]),
    "barrier": lambda x, g, b: fcomm.barrier(g, b, after=x),
    "recv": lambda x, g, b: fcomm.recv(x, g, b, after=X),
    "ragged_all_to_all": lambda x, g, b: fcomm.ragged_all_to_all(x, x, INTS, INTS, INTS, INTS, g, b),
}  # fmt: skip


# Texts name function, argument, value, group and remedy. The group is 'world' of size 2; on the simulated axis of that
# name and size the texts are the same. "{group}" stands for the group's repr, "{backend}" for the backend's.
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
        "all_to_all: send_sizes is None, recv_sizes [1, 1] and tiled True on group 'world'; blocks of different "
        "lengths need send_sizes and tiled=True",
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
        # Refused before the first dtype is sent.
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
        for name, call in WITH.items()
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

# Calls that are wrong only in processes, or only on a simulated axis.
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
