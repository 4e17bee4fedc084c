"""What torch's own test_functional_api.py checks, restated for compat.funcol, and every way to name a group."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as theirs
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx

import fcomm
from fcomm.compat import funcol, megatron
from fcomm.testing import run_ranks

NAMES = [
    "wait_tensor",
    "wait_tensors",
    "broadcast",
    "all_reduce",
    "all_gather_single",
    "all_gather_single_autograd",
    "all_gather_tensor",
    "all_gather_tensor_autograd",
    "reduce_scatter_single",
    "reduce_scatter_single_autograd",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_autograd",
    "all_reduce_coalesced",
    "all_gather_single_coalesced",
    "all_gather_into_tensor_coalesced",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "all_to_all_single",
    "all_to_all_single_autograd",
    "permute_tensor",
    "all_reduce_inplace",
    "all_gather_inplace",
    "all_gather_tensor_inplace",
    "reduce_scatter_tensor_inplace",
    "all_to_all_inplace",
    "batch_p2p_ops_inplace",
    "reduce_scatter_inplace",
]
# Not in every version.
LATER = ("wait_tensors", "batch_p2p_ops_inplace", "reduce_scatter_inplace")


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name: str) -> None:
    original = getattr(theirs, name, None)
    if original is None and name in LATER:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    if original is None:
        assert "_single" in name, f"torch {torch.__version__} has no {name}"
        older = [name.replace("_single", old, 1) for old in ("_tensor", "_into_tensor")]
        original = next(getattr(theirs, n) for n in older if hasattr(theirs, n))
    mine = dict(inspect.signature(getattr(funcol, name)).parameters)
    assert mine.pop("backend", None) is not None or name.startswith("wait_tensor")
    expected = inspect.signature(original).parameters
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in expected.values()]


# Parts of torch's own rules and compiler, and the receive that is posted before its message is awaited.
NOT_HERE = ("_backward", "_setup_context", "_ctx", "isend_inplace", "irecv_inplace")


def test_every_public_name_is_here() -> None:
    own = {name for name, v in vars(theirs).items() if inspect.isfunction(v) and v.__module__ == theirs.__name__}
    assert {name for name in own if not name.startswith("_") and not name.endswith(NOT_HERE)} <= set(NAMES)
    assert theirs.REDUCE_OP_TO_STR == funcol.REDUCE_OP_TO_STR
    assert funcol.AsyncCollectiveTensor is theirs.AsyncCollectiveTensor
    assert funcol.RANK_TYPES is funcol.GroupLike
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        funcol.nonsense  # noqa: B018  (the attribute is what is tested)


def in_place(world: fcomm.Group) -> None:
    start_torch_distributed(world, "in place")
    n, rank = world.size, world.rank or 0

    def program(x: Tensor) -> list[Tensor]:
        """Each of them writes into an existing tensor; without a group, torch's world is used."""
        total, rows = x.clone(), [torch.zeros_like(x) for _ in range(n)]
        # A ring of two messages, whose receives come first in the list.
        first, second, (before, after) = torch.zeros_like(x), torch.zeros_like(x), ((rank - 1) % n, (rank + 1) % n)
        received = funcol.batch_p2p_ops_inplace(
            ["irecv", "isend", "isend", "irecv"], [before, after, after, before], [0] * 4, [first, x, 2 * x, second], ""
        )
        return [
            first,
            second,
            received[0],
            funcol.all_reduce_inplace(total),
            total,
            *funcol.all_gather_inplace(rows, x),
            *rows,
            funcol.all_gather_tensor_inplace(x.new_zeros(n * n, 2), x, world),
            funcol.reduce_scatter_tensor_inplace(x.new_zeros(1, 2), x, "max"),
            funcol.reduce_scatter_inplace(x.new_zeros(2), list(x), "max"),
            funcol.reduce_scatter_inplace(x.new_zeros(()), list(x[:, 0])),
            *funcol.wait_tensors([x]),
            funcol.all_to_all_inplace(torch.zeros_like(x), x),
        ]

    xs = [torch.arange(2.0 * n).reshape(n, 2) * (r + 1) for r in range(n)]
    total = torch.stack(xs).sum(0)
    exchanged = torch.cat([x[rank : rank + 1] for x in xs])
    came = xs[rank - 1]
    expected = [came, 2 * came, came, total, total, *xs, *xs, torch.cat(xs), xs[-1][rank : rank + 1], xs[-1][rank]]
    expected += [total[rank, 0], xs[rank], exchanged]
    for run in (program, torch.compile(program, fullgraph=True, backend="aot_eager")):
        for got, want in zip(run(xs[rank]), expected, strict=True):
            close(got, want)
    # The derivative is that of the collective.
    x = xs[rank].clone().requires_grad_()
    funcol.all_gather_tensor_inplace(torch.zeros(n * n, 2), x).sum().backward()
    close(x.grad, torch.full((n, 2), float(n)))
    assert not program(x)[0].requires_grad, "a message that was sent without a token has no derivative"
    for ops, tags, text in ((["isend"], [1], "a tag 0"), (["send"], [0], "an op is isend"), ([], [0], "one of each")):
        with pytest.raises(ValueError, match=text):
            funcol.batch_p2p_ops_inplace(ops, [1 - rank], tags, [x], world)
    with pytest.raises(ValueError, match="async_op is True"):
        funcol.all_reduce_inplace(x, async_op=True)
    with pytest.raises(ValueError, match=f"needs {n} tensors of tensor's shape"):
        funcol.all_gather_inplace([torch.zeros(1, 2)] * n, xs[rank])
    with pytest.raises(ValueError, match=f"needs {n} tensors of output's shape"):
        funcol.reduce_scatter_inplace(torch.zeros(2), [torch.zeros(2)])
    fcomm.close()
    dist.destroy_process_group()


def test_in_place() -> None:
    run_ranks(in_place, 2)


def test_in_place_needs_a_group_without_torch_distributed() -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        funcol.all_reduce_inplace(torch.ones(1))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def start_torch_distributed(world: fcomm.Group, name: str) -> None:
    """Over the world's own store: no port to agree on."""
    store = dist.PrefixStore(name, fcomm.rendezvous.live(world).store)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)


def every_kind_of_group(world: fcomm.Group) -> None:
    start_torch_distributed(world, "kinds")
    rank = dist.get_rank()
    line = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    row = [rank // 2 * 2, rank // 2 * 2 + 1]
    column = [rank % 2, rank % 2 + 2]
    everyone = [0, 1, 2, 3]
    kinds: list[tuple[Any, list[int]]] = [
        (dist.group.WORLD, everyone),
        (line, everyone),
        (everyone, everyone),
        (dist.group.WORLD.group_name, everyone),
        (world, everyone),
        (world.name, everyone),
        (pairs[rank // 2], row),
        (pairs[rank // 2].group_name, row),
        (grid["tp"], row),
        ((grid, 1), row),
        (row, row),
        ([[0, 1], [2, 3]], row),
        ((grid, 0), column),
        ((grid, "dp"), column),
        ([[0, 2], [1, 3]], column),
    ]
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    rows = [torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in everyone]

    def program(x: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        reduced = funcol.all_reduce(x, "sum", group)
        return funcol.wait_tensor(reduced), funcol.all_gather_tensor(x, gather_dim=1, group=group)

    def check(results: tuple[Tensor, Tensor], members: list[int]) -> None:
        close(results[0], torch.stack([rows[r] for r in members]).sum(0))
        close(results[1], torch.cat([rows[r] for r in members], 1))

    for group, members in kinds:
        check(program(x, group), members)
        check(program(x, group), members)  # the second time the group is found
    fcomm.close()  # and in a graph the group is made while tracing
    world = fcomm.init()
    kinds = [(world if group is kinds[4][0] else group, members) for group, members in kinds]

    def program_of_all(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [program(x, group) for group, _ in kinds]

    for results, (_, members) in zip(
        torch.compile(program_of_all, fullgraph=True, backend="aot_eager")(x), kinds, strict=True
    ):
        check(results, members)
    for k in (0, 1, 6):  # as an argument of the compiled function
        check(torch.compile(program, fullgraph=True, backend="aot_eager")(x, kinds[k][0]), kinds[k][1])

    for group, members in kinds[:2]:  # Megatron's functions take them too, at the place of its group
        reduce = megatron.reduce_from_tensor_model_parallel_region
        expected = torch.stack([rows[r] for r in members]).sum(0)
        close(reduce(x, group), expected)
        close(torch.compile(reduce, fullgraph=True, backend="aot_eager")(x, group), expected)

    with pytest.raises(fcomm.FcommError, match="of 2 dimensions; pass"):
        funcol.all_reduce(x, "sum", grid)
    with pytest.raises(ValueError, match="group sizes must be identical"):
        funcol.all_reduce(x, "sum", [[0], [1, 2, 3]])
    with pytest.raises(ValueError, match="'nobody', which names neither a Group"):
        funcol.all_reduce(x, "sum", "nobody")
    with pytest.raises(ValueError, match="the only tuple"):
        funcol.all_reduce(x, "sum", (0, 1))
    for no_group in (None, 0):
        with pytest.raises(ValueError, match=f"group is {no_group}; pass a Group"):
            funcol.all_reduce(x, "sum", no_group)

    dist.barrier()
    dist.destroy_process_group()
    # A new world of the same name is another group.
    start_torch_distributed(world, "again")
    check(program(x, dist.group.WORLD), everyone)
    fcomm.close()
    dist.destroy_process_group()


def test_every_kind_of_group() -> None:
    run_ranks(every_kind_of_group, 4, timeout_s=300)


def uneven_and_others(world: fcomm.Group) -> None:
    n, rank = world.size, world.rank or 0
    # test_all_to_all_single: rank r sends (i + 1) * (r + 1) rows to rank i; with the transpose to receive.
    sends = [(i + 1) * (rank + 1) for i in range(n)]
    recvs = [(rank + 1) * (s + 1) for s in range(n)]
    for trailing in ((), (5,)):
        x = torch.full((sum(sends), *trailing), rank + 1.0, requires_grad=True)
        y = funcol.all_to_all_single(x, recvs, sends, world)
        close(y.detach(), torch.cat([torch.full((d, *trailing), s + 1.0) for s, d in enumerate(recvs)]))
        y.backward(torch.full_like(y, rank + 10.0))
        close(x.grad, torch.cat([torch.full((d, *trailing), r + 10.0) for r, d in enumerate(sends)]))
    ones = torch.ones(n, n) * (rank + 1)
    expected = torch.cat([torch.full((1, n), s + 1.0) for s in range(n)])
    for out, into in ((None, None), ([1] * n, None), (None, [1] * n)):
        close(funcol.all_to_all_single(ones, output_split_sizes=out, input_split_sizes=into, group=world), expected)
    # test_reduce_scatter_into_tensor_coalesced
    tensors = [torch.ones(2 * n, dtype=torch.int64), torch.ones(n, dtype=torch.int64) + 1]
    res = funcol.reduce_scatter_tensor_coalesced(tensors, "sum", [0, 0], world)
    assert [t.tolist() for t in res] == [[n, n], [2 * n]]
    assert torch.equal(tensors[1], torch.ones(n, dtype=torch.int64) + 1), "an input was written into"
    # test_all_gather_into_tensor_coalesced
    res = funcol.all_gather_into_tensor_coalesced([torch.ones(4), torch.ones(()) + 1], world)
    assert torch.equal(res[0], torch.ones(4 * n))
    assert torch.equal(res[1], torch.full((n,), 2.0))
    with pytest.raises(ValueError, match="one dim for each"):
        funcol.reduce_scatter_tensor_coalesced(tensors, "sum", [0], world)
    with pytest.raises(ValueError, match="not divisible"):
        funcol.reduce_scatter_tensor(torch.ones(n + 1), "sum", 0, world)
    with pytest.raises(fcomm.FcommError, match="op is 'nonsense'"):
        funcol.all_reduce(ones, "nonsense", world)
    with pytest.raises(ValueError, match="reduceOp is a tensor"):
        funcol.all_reduce(ones, ones, world)  # type: ignore[arg-type]
    # the result is a plain tensor, and the input is unchanged
    result = funcol.all_reduce(ones, dist.ReduceOp.SUM, world)
    assert type(result) is Tensor
    assert torch.equal(ones, torch.ones(n, n) * (rank + 1))
    # named differently on another backend: the keyword
    close(funcol.all_reduce(ones, "avg", world, backend=fcomm.c10d), torch.ones(n, n) * (n + 1) / 2)


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_and_others(size: int) -> None:
    run_ranks(uneven_and_others, size)


def sizes_read_in_a_graph(world: fcomm.Group) -> None:
    # test_inductor_all_to_all_single: the graph is traced without knowing the lengths, and serves all of them.
    n, rank = world.size, world.rank or 0

    def exchange(x: Tensor, recvs: Tensor, sends: Tensor) -> Tensor:
        lengths = recvs.tolist(), sends.tolist()
        for length in (*lengths[0], *lengths[1]):
            torch._check(length >= 0)
        return funcol.all_to_all_single(2 * x, *lengths, world)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(exchange, fullgraph=True, backend="aot_eager", dynamic=True)
        for seed in (1, 2, 3):
            matrix = torch.randint(0, 5, (n, n), generator=torch.Generator().manual_seed(seed))
            sends, recvs = matrix[rank], matrix[:, rank].contiguous()
            x = torch.full((int(sends.sum()), 2), rank + 1.0, requires_grad=True)
            y = compiled(x, recvs, sends)
            close(y.detach(), torch.cat([torch.full((int(d), 2), 2.0 * (s + 1)) for s, d in enumerate(recvs)]))
            y.backward(torch.full_like(y, rank + 10.0))
            close(x.grad, torch.cat([torch.full((int(d), 2), 2 * (r + 10.0)) for r, d in enumerate(sends)]))
        with pytest.raises(RuntimeError):
            compiled(torch.zeros(int(sends.sum()) + 1, 2), recvs, sends)


def test_sizes_read_in_a_graph() -> None:
    run_ranks(sizes_read_in_a_graph, 2)


def fake_process_group(_: fcomm.Group) -> None:
    # test_functional_api.py traces, and runs, on torch's backend of one process that stands for all.
    dist.init_process_group("fake", rank=0, world_size=4)
    world, grid = dist.group.WORLD, init_device_mesh("cpu", (2, 2))
    x = torch.ones(4, 8, requires_grad=True)
    for call, shape in (
        (lambda x: funcol.all_reduce(x, "sum", world), (4, 8)),
        (lambda x: funcol.all_reduce(x, "max", (grid, 0)), (4, 8)),
        (lambda x: funcol.all_gather_tensor(x, 1, world), (4, 32)),
        (lambda x: funcol.reduce_scatter_tensor(x, "avg", 1, world), (4, 2)),
        (lambda x: funcol.all_to_all_single(x, None, None, world), (4, 8)),
        (lambda x: funcol.permute_tensor(x, [1, 2, 3, 0], world), (4, 8)),
    ):
        y = call(x)
        assert y.shape == shape
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == x.shape
    graph = make_fx(lambda x: funcol.all_reduce(x, "sum", world) + 1)(torch.rand(4))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("all_reduce" in t for t in targets)
    assert not any(node.op == "get_attr" for node in graph.graph.nodes)
    with (
        patch.object(dist.ProcessGroup, "get_group_store", lambda pg: None),
        pytest.raises(fcomm.FcommError, match="without a store, as those of threads are"),
    ):
        fcomm.from_process_group(world, name="threads")
    fcomm.close()
    dist.destroy_process_group()


def test_fake_process_group() -> None:
    run_ranks(fake_process_group, 1)


@pytest.mark.parametrize(
    ("op", "name"),
    [("SUM", "sum"), ("AVG", "mean"), ("PRODUCT", "prod"), ("MIN", "min"), ("MAX", "max"), ("BOR", "bor")],
)
def test_reduce_ops_by_name_and_object(op: str, name: str) -> None:
    assert funcol.op_name(op) == funcol.op_name(op.lower()) == name
    assert funcol.op_name(getattr(dist.ReduceOp, op)) == name
    assert funcol.op_name(dist.ReduceOp(getattr(dist.ReduceOp, op))) == name


def test_simulated_groups_need_no_backend() -> None:
    axis = fcomm.axis("tp", 3)
    x = torch.randn(3, 2)
    run: Callable[[Tensor], Tensor] = fcomm.simulate(lambda x: funcol.all_reduce(x, "avg", axis), axis)
    torch.testing.assert_close(run(x), x.mean(0).expand(3, 2))
