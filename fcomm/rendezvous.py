"""How ranks find each other: launcher environment, torch.distributed, or a store -> Group; and what a live group owns.

A Group is a value; what belongs to it in this process (store, deadline, communicators) is its Live record, kept here
and dropped by close(). Creating a subgroup communicates nothing: its communicators open at first use.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fcomm.errors import FcommError, GroupClosedError, RendezvousError
from fcomm.group import GROUPS, Group, register_group

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 300.0


@dataclass
class Live:
    """What a group owns in this process.

    store: carries this group's bootstrap messages, under a prefix that no other group or earlier epoch shares.
    timeout_s: deadline of every blocking call on the group.
    process_group: the caller's own torch.distributed group, where the group was made from one; never closed here.
    """

    group: Group
    store: dist.Store
    timeout_s: float
    process_group: dist.ProcessGroup | None = None
    pid: int = field(default_factory=os.getpid)
    _communicators: dict[str, tuple[Any, Callable[[Any], None]]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def communicator(self, key: str, open: Callable[[], T], close: Callable[[T], None]) -> T:
        """The communicator of this group under key, opened at first use and closed with the group."""
        found = self._communicators.get(key)
        if found is None:
            with self._lock:
                found = self._communicators.get(key)
                if found is None:
                    found = self._communicators[key] = (open(), close)
        return found[0]

    def close_communicators(self) -> None:
        with self._lock:
            while self._communicators:
                _, (communicator, close) = self._communicators.popitem()
                close(communicator)


_LIVE: dict[str, Live] = {}
_EPOCHS: dict[str, int] = {}


def live(group: Group) -> Live:
    """The group's live record, or the error that says why this process cannot use the group."""
    record = _LIVE.get(group.name)
    if record is not None and record.group == group and record.pid == os.getpid():
        return record
    if group.simulated:
        raise FcommError(
            f"group '{group.name}' is a simulated axis; use it inside fcomm.simulate(fn, axis) with backend fcomm.sim"
        )
    if group.rank is None:
        raise FcommError(
            f"this process is not a member of group '{group.name}' (ranks {list(group.ranks)}); "
            "call its collectives on its members only"
        )
    if record is not None and record.pid != os.getpid():
        raise GroupClosedError(
            f"group '{group.name}' was created in process {record.pid}, this is its forked child {os.getpid()}; "
            "create a group in the child, or start processes with fcomm.run"
        )
    raise GroupClosedError(f"group '{group.name}' is closed; create it again")


def close(group: Group | None = None) -> None:
    """Close a group's communicators and forget it; without argument, every group of this process. Idempotent.

    Every rank of the group calls it, after the last collective on the group.
    """
    names = [group.name] if group is not None else list(_LIVE)[::-1]
    for name in names:
        record = _LIVE.get(name)
        if record is None or (group is not None and record.group != group):
            continue
        del _LIVE[name]
        GROUPS.pop(name, None)
        if record.pid == os.getpid():
            record.close_communicators()


# --- groups from nothing ------------------------------------------------------------------------------------------


def init(*, name: str = "world", timeout_s: float = DEFAULT_TIMEOUT_S) -> Group:
    """The group of all processes that the launcher started: ranks 0 .. size-1.

    In this order: an initialised torch.distributed; torchrun's RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; Open MPI's,
    MPICH's and Slurm's environment (with MASTER_ADDR and MASTER_PORT, or else an address derived from the job);
    none of these: one rank. Called again, it returns the group it made.

    timeout_s: deadline in seconds of the rendezvous and of every collective on the group and its subgroups.
    Raises RendezvousError naming the missing, duplicate or disagreeing ranks.
    """
    timeout_s = _check_timeout("init", timeout_s)
    found = _LIVE.get(name)
    if found is not None and found.pid == os.getpid():
        return found.group
    if dist.is_available() and dist.is_initialized():
        return from_process_group(dist.group.WORLD, name=name, timeout_s=timeout_s)
    place = _launcher(os.environ)
    if place is None or place.size == 1:
        return _register(Group(name, (0,), 0), dist.HashStore(), timeout_s)
    store = _tcp_store(place, timeout_s)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "") + "." + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    store = dist.PrefixStore(f"fcomm/{run}/{name}", store)
    _meet(store, name, place, timeout_s)
    return _register(Group(name, tuple(range(place.size)), place.rank), store, timeout_s)


def stateless_group(
    host: str, port: int, rank: int, size: int, *, name: str = "world", timeout_s: float = DEFAULT_TIMEOUT_S
) -> Group:
    """A group of its own TCPStore at host:port, served by rank 0; no torch.distributed state is read or made.

    Raises RendezvousError naming the missing, duplicate or disagreeing ranks after timeout_s seconds.
    """
    timeout_s = _check_timeout("stateless_group", timeout_s)
    if not 0 <= rank < size:
        raise FcommError(f"stateless_group: rank is {rank}, not in 0 .. {size - 1}; pass this process's own rank")
    _check_free("stateless_group", name)
    place = _Place(rank, size, host, port, serve=rank == 0)
    store = dist.PrefixStore(f"fcomm/stateless/{name}", _tcp_store(place, timeout_s))
    _meet(store, name, place, timeout_s)
    return _register(Group(name, tuple(range(size)), rank), store, timeout_s)


# --- groups from torch.distributed --------------------------------------------------------------------------------


def from_process_group(
    pg: dist.ProcessGroup | None, *, name: str = "world", timeout_s: float = DEFAULT_TIMEOUT_S
) -> Group:
    """The ranks of a torch.distributed group, which backend c10d then uses as it is. It stays the caller's to destroy.

    ranks are global torch.distributed ranks, in group order. Communicates nothing.
    """
    timeout_s = _check_timeout("from_process_group", timeout_s)
    pg = dist.group.WORLD if pg is None else pg
    if pg is None:
        raise FcommError(
            "from_process_group: torch.distributed is not initialised; call init_process_group or fcomm.init"
        )
    if not isinstance(pg, dist.ProcessGroup):
        raise FcommError(
            f"from_process_group: '{name}' got {pg!r}, not a ProcessGroup that this process is a member of"
        )
    ranks = tuple(dist.get_process_group_ranks(pg))
    _check_free("from_process_group", name)
    store = dist.PrefixStore(_epoch(f"fcomm/pg/{name}/{_digest(ranks)}"), pg.get_group_store())
    return _register(Group(name, ranks, pg.rank()), store, timeout_s, pg)


def from_device_mesh(
    mesh: Any, dim: str | int | None = None, *, name: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Group:
    """This process's group along one dimension of a torch DeviceMesh; dim may be left out of a 1-D mesh.

    name: by default the mesh dimension's own name.
    """
    names = mesh.mesh_dim_names or ()
    if dim is None and mesh.ndim != 1:
        raise FcommError(f"from_device_mesh: the mesh has dimensions {names or mesh.ndim}; name one of them")
    if isinstance(dim, str) and dim not in names:
        raise FcommError(f"from_device_mesh: the mesh has no dimension {dim!r}; it has {names}")
    index = 0 if dim is None else names.index(dim) if isinstance(dim, str) else dim
    default = names[index] if names else f"mesh{index}"
    return from_process_group(mesh.get_group(index), name=name or default, timeout_s=timeout_s)


# --- groups from groups -------------------------------------------------------------------------------------------


def subgroup(parent: Group, ranks: Sequence[int], *, name: str, timeout_s: float | None = None) -> Group:
    """The group of some ranks of parent, in the order given; ranks count within parent. Communicates nothing.

    Every rank of parent may call it; where this process is not among ranks, the result's rank is None and a collective
    on it raises FcommError. Raises FcommError on empty, repeated or out-of-range ranks.
    """
    members = tuple(ranks)
    for r in members:
        if not isinstance(r, int) or not 0 <= r < parent.size:
            raise FcommError(f"subgroup: rank {r!r} of '{name}' is not in group '{parent.name}' of size {parent.size}")
    if not members or len(set(members)) != len(members):
        raise FcommError(f"subgroup: ranks of '{name}' are {list(members)}; pass each member once, at least one")
    if parent.simulated:
        raise FcommError(f"subgroup: '{parent.name}' is a simulated axis; nest axes, fcomm.axis('{name}', size)")
    owner = live(parent)
    _check_free("subgroup", name)
    world_ranks = tuple(parent.ranks[r] for r in members)
    if parent.rank not in members:
        return Group(name, world_ranks, None)
    store = dist.PrefixStore(_epoch(f"{name}/{_digest(world_ranks)}", owner), owner.store)
    group = Group(name, world_ranks, members.index(parent.rank))
    return _register(group, store, owner.timeout_s if timeout_s is None else _check_timeout("subgroup", timeout_s))


def split(parent: Group, size: int, *, name: str) -> Group:
    """This process's block when parent is cut into consecutive blocks of `size` ranks; all blocks share the name."""
    if not isinstance(size, int) or size < 1 or parent.size % size:
        raise FcommError(f"split: '{parent.name}' has {parent.size} ranks, not divisible into blocks of {size!r}")
    if parent.rank is None:
        live(parent)
    first = (parent.rank or 0) // size * size
    return subgroup(parent, range(first, first + size), name=name)


def mesh(parent: Group, **sizes: int) -> dict[str, Group]:
    """One group for each named dimension of a row-major grid: the last name varies fastest over parent's ranks.

    mesh(world, dp=2, tp=4): rank 5 is dp 1, tp 1; its "tp" is ranks 4..7, its "dp" ranks 1 and 5.
    """
    if math.prod(sizes.values()) != parent.size or not sizes:
        raise FcommError(f"mesh: {sizes} has {math.prod(sizes.values())} places, '{parent.name}' {parent.size} ranks")
    live(parent)
    groups, stride = {}, parent.size
    for name, size in sizes.items():
        stride //= size
        rank = parent.rank or 0
        first = rank - rank // stride % size * stride
        groups[name] = subgroup(parent, range(first, first + size * stride, stride), name=name)
    return groups


# --- private ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where the launcher put this process. serve: this process serves the store."""

    rank: int
    size: int
    host: str
    port: int
    serve: bool


def _launcher(env: Mapping[str, str]) -> _Place | None:
    """The place that a launcher's environment states, or None without a launcher."""
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, job = int(env["RANK"]), int(env["WORLD_SIZE"]), "torchrun"
    elif "OMPI_COMM_WORLD_RANK" in env:
        rank, size = int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"])
        job = env.get("PMIX_NAMESPACE", env.get("OMPI_MCA_ess_base_jobid", "ompi"))
    elif "PMI_RANK" in env:
        rank, size, job = int(env["PMI_RANK"]), int(env["PMI_SIZE"]), env.get("PMI_JOBID", env.get("PMI_FD", "pmi"))
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        job = env.get("SLURM_JOB_ID", "slurm") + "." + env.get("SLURM_STEP_ID", "")
    else:
        return None
    if not 0 <= rank < size:
        raise RendezvousError(f"init: the launcher's environment says rank {rank} of {size}; unset it or correct it")
    host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    port = int(env.get("MASTER_PORT") or 20000 + int(_digest((job,)), 16) % 20000)
    # Under torchrun the agent serves the store and every rank is a client.
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _Place(rank, size, host, port, serve=rank == 0 and not agent)


def _first_host(nodes: str) -> str:
    """First host of a Slurm node list, "node[03-05,9],gpu1" -> "node03"; loopback when there is none."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return found[1] + (found[2] or "") if found else "127.0.0.1"


def _tcp_store(place: _Place, timeout_s: float) -> dist.Store:
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s), "wait_for_workers": False}
    listener = None
    if place.serve and place.host in ("127.0.0.1", "localhost"):
        # Asked for loopback, TCPStore still listens on every interface; hand it a socket that does not.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", place.port))
        except OSError as error:
            raise RendezvousError(
                f"init: port {place.port} on {place.host} is taken ({error.strerror}); set MASTER_PORT to a free port"
            ) from error
        listener.listen(max(128, place.size))
        options["master_listen_fd"] = listener.detach()
    try:
        return dist.TCPStore(place.host, place.port, None, place.serve, **options)
    except (RuntimeError, OSError) as error:
        raise RendezvousError(
            f"init: rank {place.rank} of {place.size} got no store at {place.host}:{place.port} within {timeout_s} s; "
            f"check MASTER_ADDR, MASTER_PORT and that rank 0 runs ({str(error).splitlines()[0]})"
        ) from error


def _meet(store: dist.Store, name: str, place: _Place, timeout_s: float) -> None:
    """Every rank reports once and waits for the others, so that a wrong launch is named here and not in a collective."""
    if store.add(f"rank/{place.rank}", 1) > 1:
        raise RendezvousError(
            f"init: rank {place.rank} of '{name}' joined twice at {place.host}:{place.port}; "
            "give each process its own rank, or a fresh MASTER_PORT to each run"
        )
    store.set(f"claim/{place.rank}", str(place.size))
    keys = [f"claim/{r}" for r in range(place.size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [r for r, key in enumerate(keys) if not store.check([key])]
        raise RendezvousError(
            f"init: of {place.size} ranks of '{name}', ranks {missing} did not arrive within {timeout_s} s; "
            "look at their logs, or raise timeout_s"
        ) from error
    claims = {r: int(store.get(key)) for r, key in enumerate(keys)}
    if set(claims.values()) != {place.size}:
        raise RendezvousError(f"init: the ranks of '{name}' disagree on its size: {claims}; start all with one size")


def _register(group: Group, store: dist.Store, timeout_s: float, pg: dist.ProcessGroup | None = None) -> Group:
    _LIVE[group.name] = Live(group, store, timeout_s, pg)
    return register_group(group)


def _epoch(prefix: str, owner: Live | None = None) -> str:
    """prefix with a count of its earlier uses, so that a group made again does not read its predecessor's messages."""
    key = f"{owner.group.name if owner else ''}:{id(owner)}:{prefix}"
    _EPOCHS[key] = _EPOCHS.get(key, -1) + 1
    return f"{prefix}/{_EPOCHS[key]}"


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:12]


def _check_free(function: str, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise FcommError(f"{function}: name is {name!r}; pass a non-empty string, the same on every rank")
    record = _LIVE.get(name)
    if record is not None and record.pid == os.getpid():
        raise FcommError(
            f"{function}: a live group '{name}' of ranks {list(record.group.ranks)} exists; "
            "close it with fcomm.close, or choose another name"
        )


def _check_timeout(function: str, timeout_s: float) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise FcommError(f"{function}: timeout_s is {timeout_s!r}; pass a positive, finite number of seconds")
    return float(timeout_s)
