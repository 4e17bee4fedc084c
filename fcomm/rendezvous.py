"""How ranks find each other and form a Group: launcher, torch.distributed, or a store; and what a live group owns.

A Group is a value; what belongs to it in this process (store, deadline, communicators) is its Live record, kept here
and dropped by close(). Creating a subgroup communicates nothing: its communicators open at first use.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fcomm.backends.worker import apart
from fcomm.bootstrap import Place, answer, digest, join, launcher_place
from fcomm.errors import ArgumentError, FcommError, GroupClosedError
from fcomm.group import Group, forget_group, register_group

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 300.0


@dataclass
class Live:
    """What a group owns in this process.

    store: carries this group's bootstrap messages, under a prefix that no other group or earlier epoch shares.
    timeout_s: deadline of every blocking call on the group.
    process_group: the caller's own torch.distributed group, if the group was made from one; never closed here.
    identities: those of the ranks' processes, as in fcomm/processes.py; empty if they are not known.
    """

    group: Group
    store: dist.Store
    timeout_s: float
    process_group: dist.ProcessGroup | None = None
    identities: tuple[str, ...] = ()
    pid: int = field(default_factory=os.getpid)
    # How often each subgroup was made: every member makes it equally often, so their counts agree.
    epochs: dict[str, int] = field(default_factory=dict)
    _communicators: dict[str, tuple[Any, Callable[[Any], None], Callable[[Any], None]]] = field(default_factory=dict)
    _opening: threading.RLock = field(default_factory=threading.RLock)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False
    _unanswered: Future[Any] | None = None

    def communicator(
        self, key: str, open: Callable[[], T], close: Callable[[T], None], leave: Callable[[T], None] = lambda _: None
    ) -> T:
        """The communicator of this group under key, opened at first use and closed with the group.

        leave: called before close, and before the same call closes any other group; must not wait for other ranks.
        Raises GroupClosedError if another thread closes the group meanwhile.
        """
        found = self._communicators.get(key)
        if found is None:
            with self._opening:
                found = self._communicators.get(key)
                if found is None:
                    found = (open(), close, leave)
                    self._keep(key, found)
        return found[0]

    def _keep(self, key: str, opened: tuple[Any, Callable[[Any], None], Callable[[Any], None]]) -> None:
        with self._lock:  # not held during open: close must not wait for a thread that waits for other ranks
            if not self._closed:
                self._communicators[key] = opened
                return
        communicator, close, _ = opened
        with suppress(Exception):
            close(communicator)
        raise GroupClosedError(
            f"fcomm: group '{self.group.name}' was closed while a thread opened it; close it after the last call"
        )

    @property
    def silent(self) -> bool:
        """Whether a store call whose limit has passed still waits for its answer."""
        return self._unanswered is not None and not self._unanswered.done()

    def ask(self, call: Callable[[dist.Store], T], limit_s: float, look: Callable[[], None] = lambda: None) -> T:
        """Return call(store); call look() now and then until the store answers.

        Raises NoAnswerError after limit_s seconds. At most one call is pending: the next one waits for it first.
        """
        end = time.monotonic() + limit_s
        future = self._unanswered
        if future is not None:
            with suppress(dist.DistError):
                answer(future, limit_s, look)
        asked: Future[T] = apart(lambda: call(self.store))
        try:
            return answer(asked, max(0.0, end - time.monotonic()), look)
        except BaseException:
            if not asked.done():
                self._unanswered = asked
            raise

    def leave_communicators(self) -> None:
        """Tell the other ranks that this one makes no more calls."""
        for communicator, _, leave in list(self._communicators.values()):
            leave(communicator)

    def close_communicators(self) -> None:
        """Close all communicators, the latest first, then raise the first error, if any."""
        problem: Exception | None = None
        with self._lock:
            self._closed = True
        while self._communicators:
            _, (communicator, close, _) = self._communicators.popitem()
            try:
                close(communicator)
            except Exception as error:
                problem = problem or error
        if problem is not None:
            raise problem


_LIVE: dict[str, Live] = {}
_EPOCHS: dict[str, int] = {}
# Cached, since the system call would take a tenth of a small collective.
_process = os.getpid()


def _keep_what_the_parent_owns() -> None:
    """Keep the destructors from running in a forked child: they would wait for threads that only the parent has."""
    global _process  # noqa: PLW0603
    _process = os.getpid()
    for record in _LIVE.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(record))


os.register_at_fork(after_in_child=_keep_what_the_parent_owns)


def live(group: Group, function: str = "fcomm") -> Live:
    """The group's live record. Raises an error that says why this process cannot use the group in function."""
    record = _LIVE.get(group.name)
    if record is not None and (record.group is group or record.group == group) and record.pid == _process:
        return record
    at = f"{function}: group '{group.name}'"
    if group.simulated:
        raise FcommError(f"{at} is a simulated axis; use it inside fcomm.simulate(fn, axis) with backend fcomm.sim")
    if group.rank is None:
        raise FcommError(
            f"{at} has ranks {list(group.ranks)}, and this process is none of them; call it on its members only"
        )
    if record is not None and record.pid != _process:
        raise GroupClosedError(
            f"{at} was created in process {record.pid}, this is its forked child {_process}; "
            "create a group in the child, or start processes with fcomm.run"
        )
    raise GroupClosedError(f"{at} is closed; create it again")


def close(group: Group | None = None) -> None:
    """Close a group's communicators and forget it; without argument, every group of this process. Idempotent.

    Every rank of the group calls it, after the last collective on the group. Groups still open at exit are closed.
    Raises the first error of ending a communicator, after all have ended.
    """
    if group is not None and not isinstance(group, Group):
        raise TypeError(f"close: group is {group!r}; pass a Group, or nothing to close all of this process")
    problem: Exception | None = None
    records = [record for record in list(_LIVE.values())[::-1] if group is None or record.group == group]
    for record in records:
        if record.pid == os.getpid():
            record.leave_communicators()
    for record in records:
        _LIVE.pop(record.group.name, None)
        forget_group(record.group)
        if record.pid == os.getpid():
            try:
                record.close_communicators()
            except Exception as error:
                problem = problem or error
    if problem is not None:
        raise problem


def _close_at_exit() -> None:
    # Peers may be gone by now, and an error here would hide the one that ends the process.
    with suppress(Exception):
        close()


atexit.register(_close_at_exit)
_IMPORTED_IN = os.getpid()


def check_timeout(function: str, timeout_s: float) -> float:
    """timeout_s as a float; raises ArgumentError unless it is a positive, finite number."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise ArgumentError(f"{function}: timeout_s is {timeout_s!r}; pass a positive, finite number of seconds")
    return float(timeout_s)


# --- groups from nothing ------------------------------------------------------------------------------------------


def init(*, name: str = "world", timeout_s: float = DEFAULT_TIMEOUT_S) -> Group:
    """The group of all processes that the launcher started: ranks 0 .. size-1.

    It takes the first of these that it finds: an initialised torch.distributed; torchrun's RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT; Open MPI's, MPICH's and Slurm's environment (with MASTER_ADDR and MASTER_PORT, or else an
    address derived from the job); with none of these, one rank. Called again, it returns the same group.

    timeout_s: deadline in seconds of the rendezvous and of every collective on the group and its subgroups.
    Raises RendezvousError naming the missing, duplicate or disagreeing ranks.
    """
    timeout_s = check_timeout("init", timeout_s)
    _check_name("init", name)
    found = _LIVE.get(name)
    if found is not None and found.pid == os.getpid():
        return found.group
    if dist.is_available() and dist.is_initialized():
        return from_process_group(dist.group.WORLD, name=name, timeout_s=timeout_s)
    place = launcher_place(os.environ)
    if place is None or place.size == 1:
        return _register(Group(name, (0,), 0), dist.HashStore(), timeout_s)
    # torchrun restarts ranks in place, with the store of the previous attempt.
    run = os.environ.get("TORCHELASTIC_RUN_ID", "") + "." + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    store, identities = join(place, _epoch(f"fcomm/{run}/{name}", _EPOCHS), name, timeout_s)
    return _register(Group(name, tuple(range(place.size)), place.rank), store, timeout_s, identities=identities)


def stateless_group(
    host: str, port: int, rank: int, size: int, *, name: str = "world", timeout_s: float = DEFAULT_TIMEOUT_S
) -> Group:
    """A group of its own TCPStore at host:port, served by rank 0; no torch.distributed state is read or made.

    host, port: an address of rank 0's host that all ranks reach, and a free port there; a group of one rank may pass 0.
    Raises RendezvousError naming the missing, duplicate or disagreeing ranks after timeout_s seconds, ArgumentError if
    the numbers do not describe a group.
    """
    timeout_s = check_timeout("stateless_group", timeout_s)
    _check_name("stateless_group", name)
    for option, value in (("port", port), ("rank", rank), ("size", size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ArgumentError(f"stateless_group: {option} of '{name}' is {value!r}; pass an int")
    if size < 1:
        raise ArgumentError(f"stateless_group: size of '{name}' is {size}; pass the number of its ranks, 1 or more")
    if not isinstance(host, str) or not (0 < port < 2**16 or (port == 0 and size == 1)):
        raise ArgumentError(
            f"stateless_group: '{name}' is to meet at host {host!r}, port {port}; pass the name or address of rank 0's "
            "host, and a port of 1 .. 65535 that is free there"
        )
    if not 0 <= rank < size:
        raise ArgumentError(
            f"stateless_group: rank of '{name}' is {rank}, not in 0 .. {size - 1}; pass this process's own rank"
        )
    _check_free("stateless_group", name)
    place = Place("stateless_group", rank, size, host, port, serve=rank == 0)
    store, identities = join(place, _epoch(f"fcomm/stateless/{name}", _EPOCHS), name, timeout_s)
    return _register(Group(name, tuple(range(size)), rank), store, timeout_s, identities=identities)


# --- groups from torch.distributed --------------------------------------------------------------------------------


def from_process_group(
    pg: dist.ProcessGroup | None, *, name: str = "world", timeout_s: float = DEFAULT_TIMEOUT_S
) -> Group:
    """The ranks of a torch.distributed group, which backend c10d then uses as it is; the caller destroys it.

    pg: None means torch.distributed's default group. The result's ranks are global torch.distributed ranks, in group
    order. Communicates nothing.
    Raises FcommError if torch.distributed is not initialised, pg has no store, or a live group has that name.
    """
    timeout_s = check_timeout("from_process_group", timeout_s)
    pg = dist.group.WORLD if pg is None else pg
    if pg is None:
        raise FcommError(
            "from_process_group: torch.distributed is not initialised; call init_process_group or fcomm.init"
        )
    if not isinstance(pg, dist.ProcessGroup):
        raise ArgumentError(
            f"from_process_group: pg of '{name}' is {pg!r}; pass a ProcessGroup that this process is a member of"
        )
    ranks = tuple(dist.get_process_group_ranks(pg))
    _check_free("from_process_group", name)
    prefix = f"fcomm/pg/{pg.group_name}/{name}/{digest(ranks)}"
    of_pg = pg.get_group_store()
    if of_pg is None:
        raise ArgumentError(
            f"from_process_group: '{name}' is a ProcessGroup without a store, as those of threads are; ranks are "
            "processes, or those of a simulated axis: fcomm.simulate"
        )
    store = dist.PrefixStore(_epoch(prefix, _EPOCHS), of_pg)
    return _register(Group(name, ranks, pg.rank()), store, timeout_s, pg)


def from_device_mesh(
    mesh: DeviceMesh,
    dim: str | int | None = None,
    *,
    name: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Group:
    """This process's group along one dimension of a torch DeviceMesh; dim may be left out of a 1-D mesh.

    name: by default the mesh dimension's own name. Raises as from_process_group, and if mesh has no dimension dim.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"from_device_mesh: mesh is {mesh!r}; pass a torch DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if dim is None and mesh.ndim != 1:
        raise ArgumentError(f"from_device_mesh: the mesh has dimensions {names or mesh.ndim}; name one of them")
    if not isinstance(dim, str | int | None) or isinstance(dim, bool):
        raise ArgumentError(f"from_device_mesh: dim is {dim!r}; pass the name or the number of a dimension")
    if isinstance(dim, str) and dim not in names:
        raise ArgumentError(f"from_device_mesh: the mesh has no dimension {dim!r}; it has {names}")
    if isinstance(dim, int) and not -mesh.ndim <= dim < mesh.ndim:
        raise ArgumentError(f"from_device_mesh: dim is {dim}, the mesh has {mesh.ndim} dimensions; count from 0")
    index = 0 if dim is None else names.index(dim) if isinstance(dim, str) else dim
    default = names[index] if names else f"mesh{index}"
    return from_process_group(mesh.get_group(index), name=name or default, timeout_s=timeout_s)


# --- groups from groups -------------------------------------------------------------------------------------------


def subgroup(parent: Group, ranks: Sequence[int], *, name: str, timeout_s: float | None = None) -> Group:
    """The group of some ranks of parent, in the order given, numbered within parent. Communicates nothing.

    Every rank of parent may call it. If this process is not among ranks, the result's rank is None and a collective on
    it raises FcommError. timeout_s: as in init; by default that of parent.
    Raises FcommError on empty, repeated or out-of-range ranks, or if a live group has that name.
    """
    return _subgroup("subgroup", parent, ranks, name, timeout_s)


def _subgroup(function: str, parent: Group, ranks: Iterable[int], name: str, timeout_s: float | None = None) -> Group:
    _check_parent(function, parent)
    if hasattr(ranks, "tolist"):  # an array or a tensor
        ranks = ranks.tolist()
    if not isinstance(ranks, Iterable):
        raise ArgumentError(f"{function}: ranks of '{name}' are {ranks!r}; pass a list of ranks of '{parent.name}'")
    members = tuple(ranks)
    for r in members:
        if not isinstance(r, Integral) or isinstance(r, bool) or not 0 <= r < parent.size:
            raise ArgumentError(
                f"{function}: rank {r!r} of '{name}' is not in group '{parent.name}' of size {parent.size}; "
                f"ranks count within it, 0 .. {parent.size - 1}"
            )
    members = tuple(map(int, members))  # numpy's integers are not of type int
    if not members or len(set(members)) != len(members):
        raise ArgumentError(f"{function}: ranks of '{name}' are {list(members)}; pass each member once, at least one")
    owner = live(parent, function)
    _check_free(function, name)
    world_ranks = tuple(parent.ranks[r] for r in members)
    if parent.rank not in members:
        return Group(name, world_ranks, None)
    store = dist.PrefixStore(_epoch(f"{name}/{digest(world_ranks)}", owner.epochs), owner.store)
    group = Group(name, world_ranks, members.index(parent.rank))
    timeout_s = owner.timeout_s if timeout_s is None else check_timeout(function, timeout_s)
    identities = tuple(owner.identities[r] for r in members) if owner.identities else ()
    return _register(group, store, timeout_s, identities=identities)


def split(parent: Group, size: int, *, name: str) -> Group:
    """This process's block when parent is cut into consecutive blocks of `size` ranks; all blocks share the name.

    Communicates nothing. Raises FcommError if size does not divide parent.size, or a live group has that name.
    """
    _check_parent("split", parent)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or parent.size % size:
        raise ArgumentError(
            f"split: size is {size!r}, but group '{parent.name}' has {parent.size} ranks; "
            f"pass a divisor of {parent.size}"
        )
    if parent.rank is None:
        live(parent, "split")
    first = (parent.rank or 0) // size * size
    return _subgroup("split", parent, range(first, first + size), name)


def mesh(parent: Group, **sizes: int) -> dict[str, Group]:
    """One group for each named dimension of a row-major grid: the last name varies fastest over parent's ranks.

    mesh(world, dp=2, tp=4): rank 5 is dp 1, tp 1; its "tp" is ranks 4..7, its "dp" ranks 1 and 5.
    Communicates nothing. Raises FcommError if the product of the sizes is not parent.size, or a name is taken.
    """
    _check_parent("mesh", parent)
    wrong = [f"{name}={size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]
    if wrong or math.prod(sizes.values()) != parent.size or not sizes:
        raise ArgumentError(
            f"mesh: the sizes are {sizes}, but group '{parent.name}' has {parent.size} ranks; "
            f"pass positive ints whose product is {parent.size}"
        )
    live(parent, "mesh")
    groups, stride = {}, parent.size
    for name, size in sizes.items():
        stride //= size
        rank = parent.rank or 0
        first = rank - rank // stride % size * stride
        groups[name] = _subgroup("mesh", parent, range(first, first + size * stride, stride), name)
    return groups


# --- private ------------------------------------------------------------------------------------------------------


def _register(
    group: Group,
    store: dist.Store,
    timeout_s: float,
    pg: dist.ProcessGroup | None = None,
    identities: tuple[str, ...] = (),
) -> Group:
    if os.getpid() != _IMPORTED_IN:
        # A forked child: since Python 3.13 multiprocessing clears the exit functions that it has inherited.
        atexit.unregister(_close_at_exit)
        atexit.register(_close_at_exit)
    _LIVE[group.name] = Live(group, store, timeout_s, pg, identities)
    return register_group(group)


def _epoch(prefix: str, epochs: dict[str, int]) -> str:
    """prefix with a count of its earlier uses, so that a group made again does not read its predecessor's messages."""
    epochs[prefix] = epochs.get(prefix, -1) + 1
    return f"{prefix}/{epochs[prefix]}"


def _check_parent(function: str, parent: Group) -> None:
    if not isinstance(parent, Group):
        raise TypeError(f"{function}: parent is {parent!r}; pass a Group, from fcomm.init, fcomm.split, ...")
    if parent.simulated:
        raise ArgumentError(
            f"{function}: parent '{parent.name}' is a simulated axis; make axes, fcomm.axis(name, size), and nest them"
        )


def _check_name(function: str, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"{function}: name is {name!r}; pass a non-empty string, the same on every rank")


def _check_free(function: str, name: str) -> None:
    _check_name(function, name)
    record = _LIVE.get(name)
    if record is not None and record.pid == os.getpid():
        raise FcommError(
            f"{function}: a live group '{name}' of ranks {list(record.group.ranks)} exists; "
            "close it with fcomm.close, or choose another name"
        )
