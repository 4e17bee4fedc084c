"""What NCCL and HCCL share beside their calls: communicators that open, meet a deadline, fail together and close.

A Team is what one backend has on one group and device: a communicator of all ranks, one more for each edge that send
and recv use, and the failure that ended it. issue() runs C calls on a communicator. Neither library bounds the time of a
call, so issue() does: past the group's deadline, or when another rank reports a failure in the group's store, it aborts
the communicators, and the group refuses further calls. notes/0052-communicators-and-deadlines.md has the reasons.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from fcomm.backends import ccall
from fcomm.backends.ccall import Library
from fcomm.errors import (
    BackendError,
    CollectiveTimeoutError,
    FcommError,
    GroupPoisonedError,
    RendezvousError,
)
from fcomm.group import Group
from fcomm.rendezvous import Live, live

T = TypeVar("T")

LOG = logging.getLogger("fcomm")

# Host memory has no streams; the doubles check that some stream was passed.
HOST_STREAM = 1

_SLICE_S = 0.2  # how often a long wait looks for another rank's failure
_ABORT_S = 5.0  # an abort or a destroy that takes longer is left alone


@dataclass(frozen=True)
class Comm:
    """What a native call needs: the library, its communicator, the stream, and this rank's place."""

    library: Library
    handle: ctypes.c_void_p
    stream: int
    rank: int
    size: int


@dataclass(frozen=True)
class Machine:
    """A vendor's library as a table of functions; nccl.py and hccl.py fill the same rows in the same order.

    The natives work on flat contiguous tensors of the wire's dtypes; movement is in bytes (uint8).
    """

    name: str
    library: Callable[[], Library]
    id_nbytes: int
    make_id: Callable[[Library], bytes]
    # connect(library, handle, size, id, rank) fills handle; poll(library, handle) is the asynchronous status.
    connect: Callable[[Library, ctypes.c_void_p, int, bytes, int], None]
    poll: Callable[[Library, ctypes.c_void_p], int]
    # finish(library, handle, settle) ends it in agreement with the peers, abort(library, handle) without.
    finish: Callable[[Library, ctypes.c_void_p, Callable[[], None]], None]
    abort: Callable[[Library, ctypes.c_void_p], None]
    # op -> dtype -> (dtype it is reduced as, op): what the library reduces as fcomm/arithmetic.py says.
    reductions: Mapping[str, Mapping[torch.dtype, tuple[torch.dtype, str]]]
    all_reduce: Callable[[Comm, Tensor, Tensor, str], None]
    reduce: Callable[[Comm, Tensor, Tensor, str, int], None]
    reduce_scatter: Callable[[Comm, Tensor, Tensor, str], None]
    all_gather: Callable[[Comm, Tensor, Tensor], None]
    all_to_all: Callable[[Comm, Tensor, Tensor], None]
    exchange: Callable[[Comm, Tensor, list[int], Tensor, list[int]], None]
    permute: Callable[[Comm, Tensor, int | None, Tensor, int | None], None]
    broadcast: Callable[[Comm, Tensor, Tensor, int], None]
    gather: Callable[[Comm, Tensor, Tensor, int], None]
    scatter: Callable[[Comm, Tensor, Tensor, int], None]
    send: Callable[[Comm, Tensor, int], None]
    recv: Callable[[Comm, Tensor, int], None]
    barrier: Callable[[Comm], None]


@dataclass
class _Worker:
    """A thread that runs calls one after the other. A daemon: a call that never returns must not keep the process."""

    tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = field(default_factory=SimpleQueue)

    def submit(self, fn: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self.tasks.put((fn, future))
        return future


def _start_worker() -> _Worker:
    worker = _Worker()

    def work() -> None:
        while (task := worker.tasks.get()) is not None:
            fn, future = task
            try:
                future.set_result(fn())
            except BaseException as error:
                future.set_exception(error)
            # Otherwise this frame keeps a call's tensors until the next one.
            del task, fn, future

    threading.Thread(target=work, name="fcomm", daemon=True).start()
    return worker


@dataclass
class _Channel:
    """A communicator of some ranks of a group, opened at its first call.

    members: ranks within the group; the first makes the unique id.
    """

    key: str
    members: tuple[int, ...]
    handle: ctypes.c_void_p = field(default_factory=ctypes.c_void_p)
    ready: bool = False
    worker: _Worker | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass
class Team:
    """What one backend has on one group and device in this process."""

    machine: Machine
    group: Group
    device: torch.device
    live: Live
    main: _Channel
    edges: dict[tuple[int, int], _Channel] = field(default_factory=dict)
    senders: dict[int, _Worker] = field(default_factory=dict)
    sending: deque[Future[None]] = field(default_factory=deque)
    pending: deque[tuple[Any, float, str]] = field(default_factory=deque)
    failure: FcommError | None = None
    told: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def rank(self) -> int:
        return self.group.rank or 0

    def key(self, what: str) -> str:
        """A key of the group's store."""
        return f"{self.machine.name}/{self.device.type}/{what}"


def team(machine: Machine, group: Group, device: torch.device) -> Team:
    """The team of a backend on a group; communicates nothing."""
    owner = live(group)

    def make() -> Team:
        return Team(machine, group, device, owner, _Channel("main", tuple(range(group.size))))

    return owner.communicator(f"{machine.name}/{device}", make, _close)


# --- calls --------------------------------------------------------------------------------------------------------


def issue(on: Team, name: str, fn: Callable[[Comm], None], edge: tuple[int, int] | None = None) -> None:
    """Run C calls on the team's communicator, or on an edge's, and return when the library has taken them.

    On host memory that means that they are done; on a device, that they are on the current stream.
    fn: makes the calls; it keeps their tensors alive. Its ranks are the group's, on an edge 0 sends and 1 receives.
    Raises the error that ended them on any rank; the group is then closed to this backend.
    """
    channel = on.main if edge is None else _edge(on, edge)
    with channel.lock:
        _raise_failure(on, name)
        if not channel.ready and is_capturing(on.device):
            raise FcommError(
                f"{name}: the communicator of group '{on.group.name}' cannot be opened while a graph is captured; "
                f"call {name} once before capture"
            )
        deadline = time.monotonic() + on.live.timeout_s
        library = None
        try:
            library = on.machine.library()
            with _device(on.device):
                if not channel.ready:
                    _open(on, name, channel, library, deadline)
                _run(on, name, channel, library, fn, deadline)
        except BaseException as error:
            if library is None:
                raise  # there is no library: nothing was sent, nothing is broken
            raise _give_up(on, name, library, error) from error
        _watch(on, name, deadline)


def _run(on: Team, name: str, channel: _Channel, library: Library, fn: Callable[[Comm], None], deadline: float) -> None:
    comm = Comm(library, channel.handle, stream_of(on.device), channel.members.index(on.rank), len(channel.members))

    def calls() -> None:
        code = on.machine.poll(library, channel.handle)
        ccall.check(library, code, "an earlier call")
        fn(comm)
        _settle(on, name, channel, library, deadline)

    _bounded(on, name, channel, calls, deadline)


def _settle(on: Team, name: str, channel: _Channel, library: Library, deadline: float) -> None:
    """Wait until the library has taken what was called: non-blocking communicators return before."""
    pause, looked = 2e-5, time.monotonic()
    while (code := on.machine.poll(library, channel.handle)) in library.codes.pending:
        now = time.monotonic()
        if now - looked > _SLICE_S or now > deadline:
            _look_around(on, name, deadline)
            looked = now
        time.sleep(pause)
        pause = min(2 * pause, 2e-3)
    ccall.check(library, code, f"{name}, asynchronously,")


def _bounded(on: Team, name: str, channel: _Channel, fn: Callable[[], T], deadline: float) -> T:
    """fn(), or the error of a deadline or of another rank while it runs.

    On host memory in a thread of its own, since calls may block in the library. On a device in this thread: there
    communicators are non-blocking, and stream capture does not follow work into other threads.
    """
    if on.device.type != "cpu":
        return fn()
    if channel.worker is None:
        channel.worker = _start_worker()
    future = channel.worker.submit(fn)
    while True:
        try:
            return future.result(min(_SLICE_S, max(0.0, deadline - time.monotonic())))
        except NotYet:
            if future.done():
                return future.result()
            _look_around(on, name, deadline)


def _look_around(on: Team, name: str, deadline: float) -> None:
    """Raise if the deadline has passed or another rank has failed."""
    if time.monotonic() > deadline:
        raise CollectiveTimeoutError(f"{name} passed its deadline of {on.live.timeout_s} s")
    report = _reported(on)
    if report is not None:
        raise _error_of(on, *report)


@contextmanager
def _device(device: torch.device) -> Iterator[None]:
    """The device as the current one: a communicator belongs to it."""
    if device.type == "cpu":
        yield
    else:
        with torch.get_device_module(device).device(device):
            yield


def stream_of(device: torch.device) -> int:
    """The current stream's handle, for C."""
    if device.type == "cpu":
        return HOST_STREAM
    stream = torch.get_device_module(device).current_stream(device)
    return int(getattr(stream, f"{device.type}_stream"))


def synchronize(device: torch.device) -> None:
    """Wait for the current stream, unless it is being captured."""
    if device.type != "cpu" and not is_capturing(device):
        torch.get_device_module(device).current_stream(device).synchronize()


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a graph."""
    if device.type == "cpu":
        return False
    module = torch.get_device_module(device)
    return hasattr(module, "is_current_stream_capturing") and bool(module.is_current_stream_capturing())


# --- opening ------------------------------------------------------------------------------------------------------

# Of the unique id in the store: magic, format, library version, length of the id, tag.
_FRAME = struct.Struct("<4sIII16s")


def _open(on: Team, name: str, channel: _Channel, library: Library, deadline: float) -> None:
    rank, size = channel.members.index(on.rank), len(channel.members)
    uid = _meet(on, name, channel, library, deadline)

    def connect() -> None:
        on.machine.connect(library, channel.handle, size, uid, rank)
        _settle(on, name, channel, library, deadline)

    _bounded(on, name, channel, connect, deadline)
    channel.ready = True
    if channel is on.main:
        # Connections between ranks are made by the first collective; a graph could not capture that.
        x = torch.zeros(2, device=on.device)
        _run(on, name, channel, library, lambda comm: on.machine.all_reduce(comm, x[:1], x[1:], "sum"), deadline)
        synchronize(on.device)


def _meet(on: Team, name: str, channel: _Channel, library: Library, deadline: float) -> bytes:
    """The unique id, which the channel's first rank makes and the group's store carries."""
    store, key = on.live.store, on.key(f"{channel.key}/id")
    # Two groups, or two backends of one, that shared a store key by mistake would open each other's communicators.
    what = repr((on.group.name, on.group.ranks, on.machine.name, channel.key)).encode()
    tag = hashlib.sha256(what).digest()[:16]
    if channel.members[0] == on.rank:
        uid = _bounded(on, name, channel, lambda: on.machine.make_id(library), deadline)
        store.set(key, _FRAME.pack(b"fcid", 1, library.version, len(uid), tag) + uid)
        return uid
    pause = 1e-3
    # check, not wait: a store's client serves one call at a time, and this rank's sender threads use it too.
    while not store.check([key]):
        _look_around(on, name, deadline)
        time.sleep(pause)
        pause = min(2 * pause, 2e-2)
    frame = bytes(store.get(key))
    if len(frame) != _FRAME.size + on.machine.id_nbytes:
        raise RendezvousError(f"the unique id in the store has {len(frame)} bytes, not that of {on.machine.name}")
    magic, form, version, nbytes, seen = _FRAME.unpack_from(frame)
    if (magic, form, nbytes, seen) != (b"fcid", 1, on.machine.id_nbytes, tag):
        raise RendezvousError("the unique id in the store is of another group; give groups different names")
    if version != library.version:
        raise RendezvousError(
            f"rank {channel.members[0]} has version {version} of the library, this rank {library.version} "
            f"at {library.path}; use one version on all ranks"
        )
    return frame[_FRAME.size :]


def _edge(on: Team, edge: tuple[int, int]) -> _Channel:
    with on.lock:
        return on.edges.setdefault(edge, _Channel(f"edge/{edge[0]}-{edge[1]}", edge))


# --- failing ------------------------------------------------------------------------------------------------------

# Of a failure in the store: magic, rank, code (_TIMEOUT, _OTHER, or the library's).
_REPORT = struct.Struct("<4sIi")
_TIMEOUT, _OTHER = -1, -2


def _raise_failure(on: Team, name: str) -> None:
    """Raise what an earlier call left: first the failure itself, later that the group is poisoned by it."""
    if on.failure is None:
        return
    if not on.told:
        on.told = True
        raise on.failure
    raise GroupPoisonedError(
        f"{name}: group '{on.group.name}' is unusable on backend '{on.machine.name}' since: {on.failure}; "
        "close it and create another"
    )


def _give_up(on: Team, name: str, library: Library, error: BaseException) -> BaseException:
    """Tell the other ranks, abort the communicators, remember why; returns the error to raise."""
    with on.lock:
        return _give_up_once(on, name, library, error)


def _give_up_once(on: Team, name: str, library: Library, error: BaseException) -> BaseException:
    if on.failure is not None:
        return on.failure if isinstance(error, FcommError) else error
    where = f"{name}: on group '{on.group.name}' of backend '{on.machine.name}', rank {on.rank} of {on.group.size}: "
    timeout, code = isinstance(error, CollectiveTimeoutError), getattr(error, "code", _OTHER)
    # The reason before the abort: peers notice an abort at once, and then look for the reason.
    report = _limited(lambda: _report(on, _TIMEOUT if timeout else code, str(error)), 3.0)
    found = error if isinstance(error, FcommError) else FcommError(f"{type(error).__name__}: {error}")
    if report is not None and report[0] != on.rank:
        found = _error_of(on, *report)
    elif timeout:
        absent = _limited(lambda: _absent(on), 3.0)
        found = CollectiveTimeoutError(
            f"{error}; ranks {absent} are not in it: look at their logs" if absent else str(error)
        )
    on.failure, on.told = ccall.at(found, where), isinstance(error, FcommError)
    for channel in (*on.edges.values(), on.main):
        _abort(on, library, channel)
    return on.failure if isinstance(error, FcommError) else error


def _abort(on: Team, library: Library, channel: _Channel) -> None:
    handle, channel.handle, channel.ready = channel.handle, ctypes.c_void_p(), False
    if handle.value:
        _limited(lambda: on.machine.abort(library, handle), _ABORT_S)
    if channel.worker is not None:
        # A call that returns, now that it is aborted, no longer writes its tensors; one that does not keeps them.
        worker, channel.worker = channel.worker, None
        idle = worker.submit(lambda: None)
        with suppress(NotYet):
            idle.result(0.5)
        worker.tasks.put(None)


def _limited(fn: Callable[[], T], limit_s: float) -> T | None:
    """fn(), or None if it fails or takes longer: while giving up, nothing may hold this rank."""
    worker = _start_worker()
    future = worker.submit(fn)
    worker.tasks.put(None)
    try:
        return future.result(limit_s)
    except (NotYet, RuntimeError, OSError) as error:
        LOG.warning("while giving up: %s: %s", type(error).__name__, error)
        return None


def _report(on: Team, code: int, text: str) -> tuple[int, int, str]:
    """Report a failure, unless another rank was first; returns the report that stands."""
    on.live.store.set(on.key(f"here/{on.rank}"), b"1")
    mine = _REPORT.pack(b"fcfl", on.rank, code) + text.encode(errors="replace")[:500]
    if on.live.store.add(on.key("failures"), 1) == 1:
        on.live.store.set(on.key("failure"), mine)
    for _ in range(100):
        report = _reported(on)
        if report is not None:
            return report
        time.sleep(0.01)
    return on.rank, code, text


def _reported(on: Team) -> tuple[int, int, str] | None:
    """Another rank's failure: its rank, code and text."""
    key = on.key("failure")
    try:
        if not on.live.store.check([key]):
            return None
        frame = bytes(on.live.store.get(key))
    except RuntimeError:
        return None  # the store has gone; the deadline holds without it
    if len(frame) < _REPORT.size or frame[:4] != b"fcfl":
        return None
    _, rank, code = _REPORT.unpack_from(frame)
    text = frame[_REPORT.size :].decode(errors="replace")
    return rank, code, "".join(c if c.isprintable() else "?" for c in text)


def _error_of(on: Team, rank: int, code: int, text: str) -> FcommError:
    text = f"rank {rank} failed first: {text}"
    if code == _TIMEOUT:
        return CollectiveTimeoutError(text)
    if code < 0:
        return BackendError(text)
    return ccall.error_of(on.machine.library().codes, code, text)


def _absent(on: Team) -> list[int]:
    """The ranks that have not noticed the failure: they wait for nothing, so they did not make this call."""
    time.sleep(4 * _SLICE_S)
    return [r for r in range(on.group.size) if not on.live.store.check([on.key(f"here/{r}")])]


# --- what runs on a device ----------------------------------------------------------------------------------------

# A call on a device returns long before its kernel has met its peers. So each leaves an event, and a thread looks
# whether the oldest one has passed its deadline.
_TEAMS: list[Team] = []
_TEAMS_LOCK = threading.Lock()
_WATCH_S = 0.5


def _watch(on: Team, name: str, deadline: float) -> None:
    if on.device.type == "cpu" or is_capturing(on.device):
        return
    event = torch.get_device_module(on.device).Event()
    event.record()
    with on.lock:
        while on.pending and on.pending[0][0].query():
            on.pending.popleft()
        on.pending.append((event, deadline, name))
    with _TEAMS_LOCK:
        if on not in _TEAMS:
            _TEAMS.append(on)
            if len(_TEAMS) == 1:
                threading.Thread(target=_watch_teams, name="fcomm-watch", daemon=True).start()


def _watch_teams() -> None:
    while True:
        time.sleep(_WATCH_S)
        with _TEAMS_LOCK:
            teams = list(_TEAMS)
            if not teams:
                return
        for on in teams:
            look_at_pending(on)


def look_at_pending(on: Team) -> None:
    """Drop what is done on the device; give up on the team if the rest is late, or the library or a peer failed."""
    with on.lock:
        while on.pending and on.pending[0][0].query():
            on.pending.popleft()
        late = on.pending[0] if on.pending else None
    if late is None or on.failure is not None:
        return
    _, deadline, name = late
    library = on.machine.library()
    # Held while aborting: no other thread may be inside the library then.
    with on.main.lock:
        try:
            ccall.check(library, on.machine.poll(library, on.main.handle), f"{name}, asynchronously,")
            _look_around(on, name, deadline)
        except FcommError as error:
            _give_up(on, name, library, error)
            on.told = False  # the next call on the group raises it


# --- closing ------------------------------------------------------------------------------------------------------


def _close(on: Team) -> None:
    """Wait for the sends, then end the communicators, edges first and in an order that all ranks share."""
    problem: BaseException | None = None
    deadline = time.monotonic() + on.live.timeout_s
    while on.sending:
        try:
            on.sending.popleft().result(max(0.0, deadline - time.monotonic()) + 1.0)
        except (FcommError, NotYet) as error:
            problem = problem or error
    for worker in on.senders.values():
        worker.tasks.put(None)
    with _TEAMS_LOCK:
        _TEAMS[:] = [t for t in _TEAMS if t is not on]
    for channel in (*(on.edges[edge] for edge in sorted(on.edges)), on.main):
        if channel.ready:
            _finish(on, channel, deadline)
        if channel.worker is not None:
            channel.worker.tasks.put(None)
    if problem is not None and on.failure is None:
        raise problem


def _finish(on: Team, channel: _Channel, deadline: float) -> None:
    library, handle = on.machine.library(), channel.handle

    def finish() -> None:
        on.machine.finish(library, handle, lambda: _settle(on, "close", channel, library, deadline))

    try:
        with _device(on.device):
            synchronize(on.device)
            _bounded(on, "close", channel, finish, deadline)
        channel.handle, channel.ready = ctypes.c_void_p(), False
    except FcommError as error:
        # The peers may be gone, as at the end of a program that failed; nothing is lost but the farewell.
        LOG.warning("closing group '%s' of backend '%s': %s", on.group.name, on.machine.name, error)
        _abort(on, library, channel)


# --- sending without waiting --------------------------------------------------------------------------------------


def send_later(on: Team, x: Tensor, dst: int, fn: Callable[[Comm], None]) -> None:
    """Run a send's calls in a thread and on a stream of its own, after what the current stream has done so far.

    A send waits for its receiver, in the library or on the stream. In a ring all ranks send before they receive, so a
    send may hold neither this thread nor this stream, nor a communicator that a receive needs: each edge has its own.
    """
    _raise_failure(on, "send")
    if is_capturing(on.device):
        raise FcommError(
            f"send: group '{on.group.name}': a graph cannot capture it, its thread is not captured; use ppermute"
        )
    if dst not in on.senders:
        on.senders[dst] = _start_worker()
    module = None if on.device.type == "cpu" else torch.get_device_module(on.device)
    event = module.Event() if module else None
    if event is not None:
        event.record()

    def task() -> None:
        try:
            if module is None:
                return issue(on, "send", fn, (on.rank, dst))
            with _device(on.device):
                side = module.Stream()
                with module.stream(side):
                    side.wait_event(event)
                    issue(on, "send", fn, (on.rank, dst))
                x.record_stream(side)
        except FcommError:
            on.told = False  # nobody waits for this thread: the next call on the group raises it
            raise
        return None

    while on.sending and on.sending[0].done():
        on.sending.popleft().result()
    on.sending.append(on.senders[dst].submit(task))
