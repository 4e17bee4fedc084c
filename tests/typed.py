"""A user's program under mypy --strict: `make check` type-checks it, nothing runs it. No public result is Any."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import fcomm

tp = fcomm.axis("tp", 4)


def rank_main(world: fcomm.Group, scale: int) -> float:
    return float(world.size * scale)


def layer(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = fcomm.all_reduce(x @ w, tp, fcomm.sim)
    return y, fcomm.shard(y, tp, fcomm.sim, dim=1)


def groups(pg: torch.distributed.ProcessGroup, mesh: DeviceMesh) -> None:
    world = fcomm.init(timeout_s=60.0)
    assert_type(fcomm.split(world, 2, name="tp"), fcomm.Group)
    assert_type(fcomm.mesh(world, dp=2, tp=4), dict[str, fcomm.Group])
    assert_type(fcomm.subgroup(world, [0, 1], name="two"), fcomm.Group)
    assert_type(fcomm.from_process_group(pg), fcomm.Group)
    assert_type(fcomm.from_device_mesh(mesh, "tp"), fcomm.Group)
    assert_type(fcomm.stateless_group("host", 29500, 0, 2), fcomm.Group)
    assert_type(world.rank, int | None)
    fcomm.close(world)
    try:
        fcomm.close()
    except fcomm.BackendError as error:
        assert_type((error.code, error.culprits), tuple[int, tuple[int, ...]])


def collectives(x: Tensor, group: fcomm.Group, backend: fcomm.Backend) -> None:
    assert_type(fcomm.all_reduce(x, group, backend, op="max"), Tensor)
    assert_type(fcomm.all_gather(x, group, backend, sizes=[1, 2]), Tensor)
    assert_type(fcomm.all_to_all(x, group, backend, send_sizes=[[1, 2], [3, 4]]), Tensor)
    assert_type(fcomm.ppermute(x, group, backend, perm=[(0, 1)]), Tensor)
    assert_type(fcomm.recv(x, group, backend, after=fcomm.send(x, group, backend)), Tensor)
    assert_type(fcomm.all_reduce_coalesced([x, x], group, backend), list[Tensor])
    assert_type(fcomm.axis_size(group, backend), int)
    assert_type(fcomm.apply("all_reduce", x, group, backend, "sum"), Tensor)


def everything_else(x: Tensor, group: fcomm.Group) -> None:
    assert_type(fcomm.run(rank_main, 4, 3), list[float])
    assert_type(fcomm.simulate(layer, tp)(x, x), tuple[Tensor, Tensor])
    assert_type(fcomm.memory_stats(), dict[str, int])
    # Modules that are imported at first use.
    assert_type(fcomm.layers.rms_norm(x, x), Tensor)
    assert_type(fcomm.backends.nccl.open(device="cuda"), fcomm.Backend)
    fcomm.testing.check_collective("all_reduce", fcomm.sim, 3)
    # Functions under other libraries' names take the handles anywhere.
    assert_type(fcomm.compat.megatron.copy_to_tensor_model_parallel_region(x, group, fcomm.cpu), Tensor)
    assert_type(fcomm.compat.megatron.all_to_all(x, group=group, backend=fcomm.cpu), Tensor)
    assert_type(fcomm.compat.fastvideo.all_gather(x, group, fcomm.cpu, dim=1), Tensor)
    assert_type(fcomm.compat.fastvideo.gather(x, group), Tensor | None)
    assert_type(fcomm.compat.funcol.all_reduce(x, "sum", group), Tensor)
