"""Other libraries' ways to name a group: process groups, device meshes, lists of ranks, names -> Group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fcomm.backends.c10d import c10d
from fcomm.backends.stacked import sim
from fcomm.errors import ArgumentError, GroupClosedError
from fcomm.group import GROUPS, Backend, Group
from fcomm.registration import constant_to_compiler, process_group_named
from fcomm.rendezvous import close, from_process_group, live, subgroup

GroupLike = Group | dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, int | str] | list[Any] | str
_GROUPS = (Group, dist.ProcessGroup, DeviceMesh)

T = TypeVar("T")


def as_group(group: GroupLike, tag: str = "") -> Group:
    """The Group described in another library's way.

    A Group; a ProcessGroup; a 1-D DeviceMesh or (mesh, dim); ranks of the world, [0, 1], or the partition of the world
    into groups, [[0, 1], [2, 3]]; the name of a Group or of a ProcessGroup. tag distinguishes groups of the same ranks.
    The Group is made at first use and kept. Communicates nothing.
    Raises ArgumentError if it describes no group of this process.
    """
    if isinstance(group, Group):
        return group
    if isinstance(group, list):
        place = _of_ranks(tuple(tuple(r) if isinstance(r, Sequence) else r for r in group), tag)
    elif isinstance(group, tuple):
        if len(group) != 2 or not isinstance(group[0], DeviceMesh):
            raise ArgumentError(f"group is the tuple {group!r}; the only tuple that means a group is (DeviceMesh, dim)")
        place = _of_mesh(*group)
    elif isinstance(group, DeviceMesh):
        place = _of_mesh(group, None)
    elif isinstance(group, str):
        place = _of_name(group)
    elif not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"group is {group!r}; pass a Group, ProcessGroup, DeviceMesh, (DeviceMesh, dim), list of ranks, or name"
        )
    else:
        # While tracing, torch.compile has a stand-in for a ProcessGroup that knows little more than its name.
        place = _of_name_in_torch(group.group_name)
    return cast(Group, getattr(_KEPT, place))


def as_backend(backend: Backend | None, group: Group) -> Backend:
    """backend, or the one that serves any group of its kind: sim for a simulated axis, else c10d."""
    return backend if backend is not None else sim if group.simulated else c10d


def takes_handles(fn: Callable[..., T]) -> Callable[..., T]:
    """fn(.., *, group, backend) that also finds the handles among its positional arguments, by their type.

    Other libraries have the group first, last or in the middle. With this rule their order of arguments stays the same,
    and f(x, group, backend) works everywhere. As a keyword, group may be anything that as_group takes; backend may be
    left out.
    """

    @wraps(fn)
    def call(*args: Any, group: Any = None, backend: Backend | None = None, **options: Any) -> T:
        rest = []
        for a in args:
            if isinstance(a, Tensor):  # first: Dynamo cannot ask whether a tensor is a ProcessGroup
                rest.append(a)
            elif isinstance(a, Backend):
                backend = a
            elif any(isinstance(a, kind) for kind in _GROUPS):  # one by one: Dynamo takes no tuple of opaque types
                group = a
            else:
                rest.append(a)
        if group is None:
            raise TypeError(f"{fn.__name__}: no group is given; pass group= and backend=")
        group = as_group(group)
        return fn(*rest, group=group, backend=as_backend(backend, group), **options)

    return call


# --- groups kept under an attribute of _KEPT ----------------------------------------------------------------------

# The functions below run while torch.compile traces, and their results are constants to it. They return names, since
# Dynamo guards on an object that it finds by name, but refuses to look into one that a constant function returns.

_KEPT = SimpleNamespace()
_PLACES: dict[str, str] = {}


def _keep(group: Group) -> str:
    place = _PLACES.setdefault(group.key, f"group_{len(_PLACES)}")
    setattr(_KEPT, place, group)
    return place


@constant_to_compiler
def _of_name_in_torch(name: str) -> str:
    pg = process_group_named(name)
    key = f"c10d:{name}"
    group = GROUPS.get(key)
    if group is not None:
        try:
            if live(group).process_group is pg:
                return _keep(group)
        except GroupClosedError:
            pass
        # A group of that name from before destroy_process_group, or from before a fork.
        close(group)
    return _keep(from_process_group(pg, name=key))


@constant_to_compiler
def _of_mesh(mesh: DeviceMesh, dim: int | str | None) -> str:
    if dim is None and mesh.ndim != 1:
        raise ArgumentError(f"group is a DeviceMesh of {mesh.ndim} dimensions; pass (mesh, dim)")
    return _of_name_in_torch(mesh.get_group(dim).group_name)


@constant_to_compiler
def _of_ranks(ranks: tuple[Any, ...], tag: str) -> str:
    if dist.group.WORLD is None:
        raise ArgumentError(f"group is {list(ranks)}, and torch.distributed is not initialised; pass a Group")
    world: Group = getattr(_KEPT, _of_name_in_torch(dist.group.WORLD.group_name))
    if ranks and isinstance(ranks[0], tuple):
        if len({len(block) for block in ranks}) > 1:
            raise ArgumentError(f"group is {list(ranks)}; group sizes must be identical")
        ranks = next((block for block in ranks if world.rank in block), ranks[0])
    members = tuple(sorted(ranks))
    if members == world.ranks and not tag:
        return _keep(world)
    key = f"c10d:{tag}{list(members)}"
    found = GROUPS.get(key)
    return _keep(found if found is not None else subgroup(world, members, name=key))


@constant_to_compiler
def _of_name(name: str) -> str:
    if name in GROUPS:
        return _keep(GROUPS[name])
    try:
        return _of_name_in_torch(name)
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"group is '{name}', which names neither a Group nor a ProcessGroup of this process; make one, or pass it"
        ) from error
