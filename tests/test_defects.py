"""What is wrong elsewhere and right here: one test for each defect, numbered as in notes/0070-defects.md.

The comments say what the other system returns; the tests do not call it. Defects of meaning are tested on simulated
ranks, defects of communication in processes (one start for all of them).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.distributed as dist
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fcomm
from fcomm.compat import fastvideo, funcol, lax, megatron
from fcomm.testing import run_ranks

AXIS = fcomm.axis("defects", 3)
SIM = (AXIS, fcomm.sim)


def on_axis(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return fcomm.simulate(fn, AXIS)(*args)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


def pull(f: Callable[[Tensor], Tensor], x: Tensor, ct: Tensor) -> Tensor:
    return vjp(f, x)[1](ct)[0]


# --- in processes: bodies here, run together, each reported by its own test ---------------------------------------


def broadcast_reaches_the_source(world: fcomm.Group) -> None:
    # funcol.broadcast: each rank's own cotangent in eager, None compiled.
    rank = world.rank or 0

    def gradient(x: Tensor) -> Tensor:
        return grad(lambda x: ((rank + 1.0) * funcol.broadcast(x, 1, world)).sum())(x)

    expected = torch.full((2,), 3.0 if rank == 1 else 0.0)
    close(gradient(torch.ones(2)), expected)
    close(compiled(gradient)(torch.ones(2)), expected)
    x = torch.ones(2, requires_grad=True)
    ((rank + 1.0) * funcol.broadcast(x, 1, world)).sum().backward()
    close(x.grad, expected)


def vmap_reduces(world: fcomm.Group) -> None:
    # vmap(funcol.all_reduce) returns its argument, vmap(reduce_scatter) uninitialised memory.
    rank = world.rank or 0
    rows = normal(2, 5, 4)
    close(vmap(lambda x: funcol.all_reduce(x, "sum", world))(rows[rank]), rows.sum(0))
    got = vmap(lambda x: funcol.reduce_scatter_tensor(x, "sum", 0, world))(rows[rank])
    close(got, rows.sum(0)[:, 2 * rank : 2 * rank + 2])


def forward_mode_is_reduced(world: fcomm.Group) -> None:
    # jvp and jacfwd through funcol or a custom_op: zeros. dist.all_reduce under forward mode: the unreduced tangent.
    rank = world.rank or 0

    def f(x: Tensor) -> Tensor:
        return funcol.all_reduce(x * x, "sum", world)

    x, t = torch.full((2,), rank + 1.0), torch.full((2,), 10.0)
    close(jvp(f, (x,), (t,))[1], torch.full((2,), 60.0))
    close(jacfwd(f)(x), 6.0 * torch.eye(2))
    with fwd.dual_level():
        close(fwd.unpack_dual(f(fwd.make_dual(x, t))).tangent.clone(), torch.full((2,), 60.0))


def eager_equals_compiled(world: fcomm.Group) -> None:
    # dist.all_reduce(y) in a model: the eager gradient ignores it (2 and 4), the compiled one does not (6).
    rank = world.rank or 0

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = fcomm.all_reduce(x * 2.0 * (rank + 1), world, fcomm.c10d)
        return torch.autograd.grad(y.sum(), x)[0]

    def functional(x: Tensor) -> Tensor:
        return grad(lambda x: fcomm.all_reduce(x * 2.0 * (rank + 1), world, fcomm.c10d).sum())(x)

    expected = torch.full((3,), 4.0 * (rank + 1))
    close(gradient(torch.ones(3)), expected)
    close(functional(torch.ones(3)), expected)
    close(compiled(functional)(torch.ones(3)), expected)

    def loss(x: Tensor) -> Tensor:
        return fcomm.all_reduce(x * 2.0 * (rank + 1), world, fcomm.c10d).sum()

    x = torch.ones(3, requires_grad=True)
    compiled(loss)(x).backward()
    close(x.grad, expected)


def permute_takes_any_shape(world: fcomm.Group) -> None:
    # funcol.permute_tensor of a 2-D tensor passes numel as split sizes, and fails at first use.
    rank = world.rank or 0
    rows = normal(2, 2, 3)
    close(funcol.permute_tensor(rows[rank], [1, 0], world), rows[1 - rank])


def subgroups_count_their_own_ranks(world: fcomm.Group) -> None:
    # dist.nn.broadcast on [2, 3] with src 2: zero gradient at the source; dist.nn.gather raises.
    group = fcomm.subgroup(world, [2, 3], name="upper")
    if group.rank is None:
        return
    x = torch.ones(2, requires_grad=True)
    ((group.rank + 1.0) * fcomm.broadcast(x, group, fcomm.c10d, src=0)).sum().backward()
    close(x.grad, torch.full((2,), 3.0 if group.rank == 0 else 0.0))
    x = torch.ones(1, requires_grad=True)
    y = fcomm.gather(x, group, fcomm.c10d, dst=0)
    (y * torch.tensor([5.0, 7.0])).sum().backward()
    close(x.grad, torch.tensor([5.0 if group.rank == 0 else 7.0]))


def an_ignored_result_can_be_differentiated(world: fcomm.Group) -> None:
    # A rank that ignores the result leaves its peer's backward collective unmatched. Used with weight zero it does not;
    # and an unused result alone, eager or compiled, does not put the ranks out of step.
    rank = world.rank or 0

    def loss(x: Tensor) -> Tensor:
        y = fcomm.all_reduce(x, world, fcomm.c10d)
        return (y * 3.0).sum() if rank == 0 else x.sum() + 0.0 * y.sum()

    expected = torch.full((2,), 3.0 if rank == 0 else 4.0)
    close(grad(loss)(torch.ones(2)), expected)
    close(compiled(grad(loss))(torch.ones(2)), expected)

    def ignores(x: Tensor) -> Tensor:
        y = fcomm.all_reduce(x, world, fcomm.c10d)
        return x + y if rank == 0 else x + 1

    close(compiled(ignores)(torch.ones(2)), torch.full((2,), 3.0 if rank == 0 else 2.0))


def fastvideo_gathers_and_keeps_op(world: fcomm.Group) -> None:
    # AllGather's backward aborts on gloo and does not compile; a path of all_reduce drops op; contiguity is unchecked.
    rank = world.rank or 0
    weights = normal(2, 3, 4)

    def f(x: Tensor) -> Tensor:
        return (weights[rank] * fastvideo.all_gather(x, world, fcomm.c10d)).sum()

    expected = weights.sum(0)[:, 2 * rank : 2 * rank + 2]
    close(grad(f)(normal(3, 2)), expected)
    close(compiled(grad(f))(normal(3, 2)), expected)
    got = fastvideo.all_reduce(torch.full((1,), float(rank)), op=dist.ReduceOp.MAX, group=world, backend=fcomm.c10d)
    assert got.item() == 1.0
    rows = normal(2, 3, 4)
    close(fastvideo.all_reduce(rows[rank].T, world, fcomm.c10d), rows.sum(0).T)


def mismatched_sizes_are_reported(world: fcomm.Group) -> None:
    # all_to_all_single hangs, or reads past the end, on splits that do not match.
    sizes = [1, 2] if world.rank == 0 else [1, 1]
    with pytest.raises(fcomm.FcommError, match=r"rank 0 .* sends 2 to rank 1|sends 2 to rank 1"):
        funcol.all_to_all_single(torch.ones(sum(sizes)), [1, 1], sizes, world)


def graphs_are_the_same_on_all_ranks(world: fcomm.Group) -> str:
    # The name of the process group in the graph differs from rank to rank, so compile caches miss.
    tp = fcomm.split(world, 1, name="tp")
    texts = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        texts.append(graph.code)
        return graph.forward

    def program(x: Tensor) -> Tensor:
        return fcomm.all_gather(fcomm.all_reduce(x, tp, fcomm.c10d), world, fcomm.c10d)

    torch.compiler.reset()
    torch.compile(program, fullgraph=True, backend=keep)(torch.ones(2))
    return "\n".join(texts)


TWO = [
    broadcast_reaches_the_source,
    vmap_reduces,
    forward_mode_is_reduced,
    eager_equals_compiled,
    permute_takes_any_shape,
    an_ignored_result_can_be_differentiated,
    fastvideo_gathers_and_keeps_op,
    mismatched_sizes_are_reported,
    graphs_are_the_same_on_all_ranks,
]
FOUR = [subgroups_count_their_own_ranks]


def bodies(world: fcomm.Group) -> dict[str, tuple[str, object]]:
    results: dict[str, tuple[str, object]] = {}
    for body in TWO if world.size == 2 else FOUR:
        try:
            results[body.__name__] = ("", body(world))
        except (AssertionError, pytest.fail.Exception):
            results[body.__name__] = (traceback.format_exc(), None)  # the ranks are still in step
    return results


@cache
def outcomes(size: int) -> list[dict[str, tuple[str, object]]]:
    return run_ranks(bodies, size, timeout_s=240)


def in_processes(body: Callable[[fcomm.Group], object], size: int = 2) -> list[object]:
    results = [rank[body.__name__] for rank in outcomes(size)]
    failures = "\n".join(f"rank {r}: {text}" for r, (text, _) in enumerate(results) if text)
    assert not failures, failures
    return [value for _, value in results]


def test_01_funcol_broadcast_gradient() -> None:
    in_processes(broadcast_reaches_the_source)


def test_02_vmap_of_funcol() -> None:
    in_processes(vmap_reduces)


def test_03_forward_mode_through_funcol() -> None:
    in_processes(forward_mode_is_reduced)


def test_04_eager_gradient_equals_compiled_gradient() -> None:
    in_processes(eager_equals_compiled)


def test_05_permute_tensor_2d() -> None:
    in_processes(permute_takes_any_shape)


def test_08_a_rank_that_ignores_a_result() -> None:
    in_processes(an_ignored_result_can_be_differentiated)


def test_09_fastvideo_all_gather_and_op() -> None:
    in_processes(fastvideo_gathers_and_keeps_op)


# Two public issues, placed here so that one start of processes serves all tests that a worker runs together.


def test_pytorch_189330_one_graph_for_all_ranks() -> None:
    texts = in_processes(graphs_are_the_same_on_all_ranks)
    assert texts[0]
    assert texts[0] == texts[1]


def test_pytorch_117486_mismatched_sizes() -> None:
    in_processes(mismatched_sizes_are_reported)


@pytest.mark.parametrize("op", ["max", "min", "prod"])
def test_06_gradients_of_max_min_prod(op: str) -> None:
    # torch.distributed.nn and FastVideo all-reduce the cotangent with the same op, without a warning.
    folds = {"max": lambda v: v.amax(0), "min": lambda v: v.amin(0), "prod": lambda v: v.prod(0)}
    x, ct = normal(3, 6, 2), normal(3, 6, 2, seed=1)
    got = on_axis(lambda x, ct: pull(lambda x: fcomm.all_reduce(x, *SIM, op=op), x, ct), x, ct)
    close(got, pull(lambda x: folds[op](x).expand_as(x), x, ct))
    got = on_axis(lambda x, ct: pull(lambda x: fcomm.reduce(x, *SIM, op=op, dst=1), x, ct), x, ct)
    close(got, pull(folds[op], x, ct[1]))
    got = on_axis(lambda x, ct: pull(lambda x: fcomm.reduce_scatter(x, *SIM, op=op), x, ct), x, ct[:, :2])
    close(got, pull(lambda x: folds[op](x).reshape(3, 2, 2), x, ct[:, :2]))


def test_07_subgroups_count_their_own_ranks() -> None:
    in_processes(subgroups_count_their_own_ranks, 4)


@pytest.mark.parametrize("op", ["sum", "max", "min", "prod"])
def test_09_second_derivatives(op: str) -> None:
    # FastVideo's AllReduce differentiates twice to a wrong number.
    folds = {"sum": lambda v: v.sum(0), "max": lambda v: v.amax(0), "min": lambda v: v.amin(0)}
    fold = folds.get(op, lambda v: v.prod(0))
    x, t = normal(3, 2), normal(3, 2, seed=1)

    def loss(x: Tensor) -> Tensor:
        return (fastvideo.all_reduce(x**2, *SIM, op=op) ** 3).sum()

    got = on_axis(lambda x, t: pull(grad(loss), x, t), x, t)
    close(got, pull(grad(lambda x: 3 * (fold(x**2) ** 3).sum()), x, t))


def test_10_invariant_gather_along_another_dim() -> None:
    # spmd_types: the backward of all_gather(V -> I, gather_dim=1) slices along dim 0.
    ct = normal(3, 9)
    got = on_axis(lambda x: pull(lambda x: fcomm.all_gather_invariant(x, *SIM, dim=1), x, ct), normal(3, 3, 3))
    close(got, torch.stack(ct.chunk(3, 1)))
    got = on_axis(lambda x: pull(lambda x: megatron.gather_from_tensor_model_parallel_region(x, *SIM), x, ct), got)
    close(got, torch.stack(ct.chunk(3, 1)))


def test_11_ragged_all_to_all_with_empty_slices() -> None:
    # JAX's transpose masks output's cotangent with set(1), add(-1), which is wrong where a received slice is empty.
    sends = torch.tensor([[0, 2, 1], [1, 0, 0], [0, 1, 2]])
    starts = sends.cumsum(1) - sends
    lands = sends.cumsum(0) - sends
    operand, output, ct = normal(3, 4, 2), normal(3, 5, 2, seed=1), normal(3, 5, 2, seed=2)

    def f(operand: Tensor, output: Tensor, *routes: Tensor) -> Tensor:
        return lax.ragged_all_to_all(operand, output, *routes, *SIM)

    def both(operand: Tensor, output: Tensor, ct: Tensor, *routes: Tensor) -> tuple[Tensor, ...]:
        return vjp(lambda operand, output: f(operand, output, *routes), operand, output)[1](ct)

    routes = (starts, sends, lands, sends.T.contiguous())
    of_operand, of_output = on_axis(both, operand, output, ct, *routes)
    expected_operand, expected_output = torch.zeros_like(operand), ct.clone()
    for s in range(3):
        for r in range(3):
            for k in range(int(sends[s, r])):
                expected_operand[s, starts[s, r] + k] += ct[r, lands[s, r] + k]
                expected_output[r, lands[s, r] + k] = 0
    close(of_operand, expected_operand)
    close(of_output, expected_output)


def test_11_partial_permutation_under_vmap() -> None:
    # JAX asserts that every rank is a destination when ppermute is batched; an older one inverted the permutation.
    x = normal(3, 4, 2)
    got = on_axis(vmap(lambda x: lax.ppermute(x, *SIM, [(0, 1), (1, 2)])), x)
    close(got, torch.stack([torch.zeros(4, 2, dtype=x.dtype), x[0], x[1]]))


def test_12_a_cotangent_is_never_written_into() -> None:
    # torchcomms reduces grad_output in place: the sibling that shares it is corrupted.
    x, ct = normal(3, 2), normal(3, 2, seed=1)

    def siblings(x: Tensor) -> Tensor:
        y = x * 1.0
        return fcomm.all_reduce(y, *SIM) + y

    before = ct.clone()
    close(pull(fcomm.simulate(siblings, AXIS), x, ct), ct.sum(0) + ct)
    close(on_axis(lambda x, ct: pull(siblings, x, ct), x, ct), ct.sum(0) + ct)
    assert torch.equal(before, ct)


def test_13_a_gathered_value_used_by_every_rank() -> None:
    # DTensor's Shard -> Replicate -> to_local() returns each rank's own cotangent, 1 and 2, unless told of Partial.
    weights = torch.tensor([1.0, 2.0, 4.0])
    got = on_axis(lambda x, w: grad(lambda x: (w * fcomm.all_gather(x, *SIM)).sum())(x), torch.ones(3, 1), weights)
    close(got, torch.full((3, 1), 7.0))


# --- public issues ------------------------------------------------------------------------------------------------


def test_pytorch_152127_nothing_is_silently_ignored() -> None:
    with pytest.raises(TypeError, match="op 'band' is defined on integers"):
        on_axis(lambda x: fcomm.all_reduce(x, *SIM, op="band"), normal(3, 2))
    x = torch.ones(3, 2, requires_grad=True)
    assert on_axis(lambda x: fcomm.all_reduce(x, *SIM), x).requires_grad


def test_pytorch_152131_product_with_zeros() -> None:
    x = torch.tensor([[0.0, 0.0, 2.0], [3.0, 0.0, 5.0], [7.0, 4.0, 0.0]], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return fcomm.all_reduce(x, *SIM, op="prod").sum()

    # fwd_out / fwd_in is 0 / 0; every rank's loss counts, so 3 times the product of the others.
    close(on_axis(grad(f), x), 3 * torch.tensor([[21.0, 0, 0], [0, 0, 0], [0, 0, 10.0]], dtype=torch.float64))
    second = on_axis(hessian(f), x)
    assert torch.isfinite(second).all()


def test_pytorch_58005_both_conventions_have_a_name() -> None:
    # One all_reduce whose backward is now all_reduce, now identity, "scales gradients". jax#3970 is the same question.
    x = normal(3, 2)
    close(on_axis(grad(lambda x: fcomm.all_reduce(x, *SIM).sum()), x), torch.full_like(x, 3.0))
    close(on_axis(grad(lambda x: fcomm.all_reduce_invariant(x, *SIM).sum()), x), torch.ones_like(x))


def test_pytorch_190007_avg_has_a_backward() -> None:
    x, ct = normal(3, 2), normal(3, 2, seed=1)
    got = on_axis(lambda x, ct: pull(lambda x: funcol.all_reduce(x, "avg", *SIM[:1]), x, ct), x, ct)
    close(got, ct.mean(0).expand_as(x))


def test_pytorch_120386_a_gathered_value_used_twice() -> None:
    x = normal(3, 2)

    def loss(x: Tensor) -> Tensor:
        y = fcomm.all_gather(x, *SIM)
        return (y * y).sum() + y.sin().sum()

    close(on_axis(grad(loss), x), 3 * (2 * x + x.cos()))


def test_pytorch_179652_jacobians() -> None:
    x = normal(3, 2)
    eye = torch.eye(2, dtype=x.dtype).expand(3, 2, 2)

    def f(x: Tensor) -> Tensor:
        return fcomm.all_reduce(x, *SIM)

    close(on_axis(jacrev(f), x), 3 * eye)
    close(on_axis(jacfwd(f), x), 3 * eye)


def test_pytorch_192985_and_193279_compiled_derivatives() -> None:
    x, t = normal(3, 2), normal(3, 2, seed=1)

    def f(x: Tensor) -> Tensor:
        return fcomm.all_reduce(x, *SIM, op="prod")

    push = fcomm.simulate(lambda x, t: jvp(f, (x,), (t,))[1], AXIS)
    close(compiled(push)(x, t), jvp(lambda x: x.prod(0).expand_as(x), (x,), (t,))[1])
    gradient = fcomm.simulate(grad(lambda x: f(x).sin().sum()), AXIS)
    close(compiled(gradient)(x), grad(lambda x: 3 * x.prod(0).sin().sum())(x))


def test_pytorch_148701_gather_on_another_dim_compiled() -> None:
    x = normal(3, 2, 4)
    program = fcomm.simulate(lambda x: funcol.all_gather_tensor_autograd(x, 1, AXIS).sin(), AXIS)
    close(compiled(program)(x), torch.cat(list(x), 1).sin().expand(3, 2, 12))


def test_pytorch_152534_a_cast_waits() -> None:
    y = on_axis(lambda x: funcol.all_reduce(x, "sum", AXIS).to(torch.float32), normal(3, 2))
    assert type(y) is Tensor
    torch.testing.assert_close(y, normal(3, 2).sum(0).to(torch.float32).expand(3, 2))


def test_pytorch_167430_strides_are_those_of_a_new_tensor() -> None:
    x = normal(3, 4, 5).transpose(1, 2)
    f = fcomm.simulate(lambda x: fcomm.all_reduce(x, *SIM) * 1, AXIS)
    eager, graph = f(x), compiled(f)(x)
    assert eager.stride() == graph.stride()
    assert torch.equal(eager, graph)


def test_pytorch_121386_a_ring_compiles() -> None:
    x = normal(3, 2)

    def ring(x: Tensor) -> Tensor:
        total = x
        for _ in range(AXIS.size - 1):
            x = fcomm.ppermute(x, *SIM, perm=[(0, 1), (1, 2), (2, 0)])
            total = total + x
        return total

    close(compiled(fcomm.simulate(ring, AXIS))(x), x.sum(0).expand_as(x))


def test_pytorch_111943_scatter() -> None:
    x, ct = normal(3, 6), normal(3, 2, seed=1)
    close(on_axis(lambda x: fcomm.scatter(x, *SIM, src=1), x), x[1].reshape(3, 2))
    got = on_axis(lambda x, ct: pull(lambda x: fcomm.scatter(x, *SIM, src=1), x, ct), x, ct)
    close(got, torch.stack([torch.zeros(6, dtype=x.dtype), ct.reshape(6), torch.zeros(6, dtype=x.dtype)]))


def test_jax_7167_pmax_has_a_derivative_and_ties_share_it() -> None:
    x = torch.tensor([[2.0, 1.0], [2.0, 3.0], [0.0, 3.0]], dtype=torch.float64)
    got = on_axis(grad(lambda x: lax.pmax(x, *SIM).sum()), x)
    close(got, 3 * torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.0, 0.5]], dtype=torch.float64))


def test_jax_15982_gradient_of_all_to_all() -> None:
    x, ct = normal(3, 6, 2), normal(3, 2, 6, seed=1)
    got = on_axis(lambda x, ct: pull(lambda x: lax.all_to_all(x, *SIM, 0, 1, tiled=True), x, ct), x, ct)
    back = on_axis(lambda ct: lax.all_to_all(ct, *SIM, 1, 0, tiled=True), ct)
    close(got, back)
    close((got * x).sum(), (ct * on_axis(lambda x: lax.all_to_all(x, *SIM, 0, 1, tiled=True), x)).sum())


def test_all_to_all_of_a_value_that_all_ranks_share() -> None:
    # jax.vmap(axis_name=..) of an untiled all_to_all stacks once more where its argument does not depend on the rank.
    x = normal(3, 3)
    got = on_axis(lambda x: lax.all_to_all(lax.psum(x, *SIM), *SIM, 0, 0), x)
    close(got, x.sum(0)[:, None].expand(3, 3))


def test_megatron_1635_sequence_shards_train_like_the_dense_model() -> None:
    # Gradients off by the number of ranks: a gather's backward that does not fit what follows it.
    x, w = normal(6, 2), normal(2, 2, seed=1)
    dense = grad(lambda w: ((x @ w).sin()).sum())(w)

    def shares_the_loss(w: Tensor) -> Tensor:
        mine = megatron.scatter_to_sequence_parallel_region(x, *SIM)
        y = megatron.gather_from_sequence_parallel_region(mine @ w, False, *SIM)
        return y.sin().sum()

    def own_loss(w: Tensor) -> Tensor:
        mine = megatron.scatter_to_sequence_parallel_region(x, *SIM)
        return (mine @ w).sin().sum()

    for loss in (shares_the_loss, own_loss):
        parts = on_axis(lambda index, loss=loss: grad(loss)(w + 0.0 * index), torch.zeros(3, dtype=w.dtype))
        close(parts.sum(0), dense)


def test_transformer_engine_530_last_dim() -> None:
    x = normal(3, 2, 2, 2)
    got = on_axis(lambda x: megatron.all_gather_last_dim_from_tensor_parallel_region(x, *SIM), x)
    close(got, torch.cat(list(x), -1).expand(3, 2, 2, 6))


def test_mpi4jax_176_other_layouts_compiled() -> None:
    x = normal(3, 4, 6)
    f = fcomm.simulate(lambda x: fcomm.all_to_all(x.T, *SIM), AXIS)
    close(compiled(f)(x), f(x))
    close(f(x), torch.stack([torch.cat([x[s].T[2 * r : 2 * r + 2] for s in range(3)]) for r in range(3)]))


def test_pytorch_177371_uneven_all_to_all_simulated() -> None:
    matrix = [[1, 0, 2], [0, 1, 1], [2, 1, 0]]
    x = normal(3, 3)
    got = on_axis(lambda x: fcomm.all_to_all(x, *SIM, send_sizes=matrix), x)
    rows = [x[s].narrow(0, 0, sum(matrix[s])).split(matrix[s]) for s in range(3)]
    for r in range(3):
        expected = torch.cat([row[r] for row in rows])
        close(got[r][: len(expected)], expected)


EMPTY: dict[str, Callable[[Tensor], Tensor]] = {
    "all_gather": lambda x: fcomm.all_gather(x, *SIM),
    "all_gather uneven": lambda x: fcomm.all_gather(x, *SIM, sizes=[0, 0, 0]),
    "all_gather_invariant": lambda x: fcomm.all_gather_invariant(x, *SIM),
    "all_to_all": lambda x: fcomm.all_to_all(x, *SIM),
    "all_to_all uneven": lambda x: fcomm.all_to_all(x, *SIM, send_sizes=[[0] * 3] * 3),
    "gather": lambda x: fcomm.gather(x, *SIM),
    "reduce_scatter of uneven blocks": lambda x: fcomm.reduce_scatter(x, *SIM, op="max", sizes=[0, 0, 0]),
    "all_reduce_coalesced": lambda x: fcomm.all_reduce_coalesced([x, torch.ones(2)], *SIM)[0],
    "all_gather_coalesced": lambda x: fcomm.all_gather_coalesced([x], *SIM)[0],
    "reduce_scatter_coalesced": lambda x: fcomm.reduce_scatter_coalesced([x], *SIM)[0],
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_vmap_of_cat_over_the_last_dim_of_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    # torch: vmap(lambda x: torch.cat([x]), in_dims=-1, out_dims=-1)(torch.zeros(0, 2)) has shape (34359738369, 0)
    if name.endswith(("uneven", "blocks")) and shape[0]:
        return
    x, f = torch.zeros(3, *shape, 2), EMPTY[name]
    expected = torch.stack([on_axis(f, example) for example in x.unbind(-1)], -1)
    close(vmap(lambda x: on_axis(f, x), in_dims=-1, out_dims=-1)(x), expected)
    close(on_axis(vmap(f, in_dims=-1, out_dims=-1), x), expected)
