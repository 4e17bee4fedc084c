"""Communicators of a vendor's library: opened at their first call, called with a deadline, closed with their group.

A plain collective opens one communicator of all ranks, and no other. send and recv open one more for each edge they
use: notes/0052-communicators-and-deadlines.md has the reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures import wait
from contextlib import suppress
from typing import Any, TypeVar

import torch

from fcomm import processes
from fcomm.backends import ccall
from fcomm.backends.ccall import Library
from fcomm.backends.failure import (
    SLICE_S,
    STORE_S,
    abort,
    check_takers,
    give_up,
    has_closed,
    has_failed,
    is_left,
    leave,
    limited,
    look_around,
    patience,
    raise_failure,
)
from fcomm.backends.later import finish_sending, forget, watch
from fcomm.backends.machine import Channel, Comm, Machine, Team, current, is_capturing, record_event, stream_of
from fcomm.backends.worker import start_worker
from fcomm.bootstrap import NoAnswerError
from fcomm.errors import BackendError, FcommError, GroupClosedError, PeerDiedError, RendezvousError
from fcomm.group import Group
from fcomm.rendezvous import live

T = TypeVar("T")

# How long a thread may stay in a call after another one closes the group, for example at the exit of the process.
_GRACE_S = 1.0


def team(machine: Machine, group: Group, device: torch.device) -> Team:
    """The team of a backend on a group. Communicates nothing."""
    owner = live(group)

    def make() -> Team:
        return Team(machine, group, device, owner, Channel("main", tuple(range(group.size))))

    return owner.communicator(f"{machine.name}/{device}", make, _close, _leave)


# --- calls --------------------------------------------------------------------------------------------------------


def issue(on: Team, op: str, fn: Callable[[Comm], None], edge: tuple[int, int] | None = None) -> None:
    """Run C calls on the team's communicator, or on an edge's, and return when the library has taken them.

    On host memory they are then done; on a device they are on the current stream.
    fn: makes the calls and keeps their tensors alive. Its ranks are the group's; on an edge 0 sends and 1 receives.
    Raises the error that ended them on any rank; the group is then closed to this backend.
    """
    channel = on.main if edge is None else _edge(on, edge)
    heard = op != "send"  # a send's thread has no caller: the next call on the group raises what it finds
    with channel.lock:
        raise_failure(on, op, heard=heard)
        if channel.ended:  # the second part of a message that nobody receives: no other communicator is opened for it
            raise FcommError(f"{on.where(op)}: its communicator was aborted")
        if channel is on.main:
            on.calls += 1
        if not channel.ready and is_capturing(on.device):
            raise FcommError(
                f"{on.where(op)}: its communicator cannot be opened while a graph is captured; "
                f"call {op} once before capture"
            )
        # Not inside the try: without a library nothing is sent, and nothing breaks.
        library = on.machine.load()
        deadline = time.monotonic() + on.live.timeout_s
        try:
            with current(on.device):
                if not channel.ready:
                    _open(on, op, channel, library, deadline)
                _run(on, op, channel, library, fn, deadline)
        except BaseException as error:
            if on.failure is None and (channel.ended or _is_refused(on, op, edge, error)):
                # A message that nobody receives, while the group is closed: nothing has failed.
                if not channel.ended:
                    leave(on, library, channel)  # or its second part would open another communicator over this one
                raise
            found = give_up(on, op, library, error, channel.members, heard=heard)
            if found is error:
                raise
            raise found from error
        watch(on, op, deadline)


def _is_refused(on: Team, op: str, edge: tuple[int, int] | None, error: BaseException) -> bool:
    """Whether a message failed because its receiver ended the edge, which it does when it has closed the group.

    False if the receiver closed the group after a failure, which is then the message's failure too.
    """
    if op != "send" or edge is None or not isinstance(error, BackendError):
        return False
    return has_closed(on, edge[1]) and not has_failed(on)


def _run(on: Team, op: str, channel: Channel, library: Library, fn: Callable[[Comm], None], deadline: float) -> None:
    rank, size = channel.members.index(on.rank), len(channel.members)
    comm = Comm(library, channel.handle, stream_of(on.device), rank, size)

    def calls() -> None:
        ccall.check(library, on.poll(library, channel), "an earlier call")
        fn(comm)
        _settle(on, op, channel, library, deadline)

    if on.device.type == "cpu":
        _bounded(on, op, channel, calls, deadline)
    else:
        # In this thread, since stream capture follows it. Nothing waits here: the communicator does not block.
        calls()


def _settle(on: Team, op: str, channel: Channel, library: Library, deadline: float, event: Any = None) -> None:
    """Wait for event, and until the library has taken the calls: non-blocking communicators return earlier."""
    pause, looked = 2e-5, time.monotonic()

    def is_done() -> bool:
        code = on.poll(library, channel)
        ccall.check(library, code, f"{op}, asynchronously,")
        return code == 0 and (event is None or bool(event.query()))

    while not is_done():
        now = time.monotonic()
        if now - looked > SLICE_S or now > deadline:
            try:
                _look(on, op, channel, deadline)
            except FcommError:
                if is_done():  # _bounded gives the reason
                    return
                raise
            looked = now
        time.sleep(pause)
        pause = min(2 * pause, 2e-3)


def _look(on: Team, op: str, channel: Channel, deadline: float) -> None:
    if op == "close" and is_left(on, channel):
        raise FcommError("the other rank has aborted this edge")  # it will not take part in ending it
    look_around(on, op, deadline, channel.members)
    if op != "close" and channel is on.main:
        check_takers(on, op)


def _bounded(on: Team, op: str, channel: Channel, fn: Callable[[], T], deadline: float) -> T:
    """fn() in the channel's thread, since calls may block; or the error of a deadline or of another rank."""

    def task() -> T:
        with current(on.device):  # each thread has its own
            return fn()

    worker = channel.worker = channel.worker or start_worker()
    future = worker.submit(task)
    while True:
        try:
            return future.result(min(SLICE_S, max(0.0, deadline - time.monotonic())))
        except NotYet:
            if future.done():
                return future.result()
            try:
                _look(on, op, channel, deadline)
            except FcommError as error:
                # Since we last looked at the call, another rank may have come, done its part in its last call, and
                # ended. This rank's thread may then only need a core to return from the call.
                wait([future], SLICE_S if isinstance(error, PeerDiedError) else 0)
                if future.done() and future.exception() is None:
                    return future.result()
                raise


# --- opening ------------------------------------------------------------------------------------------------------

# Header of the unique id in the store: magic, format, library version, length of the id, tag.
_FRAME = struct.Struct("<4sIII16s")


def _open(on: Team, op: str, channel: Channel, library: Library, deadline: float) -> None:
    rank, size = channel.members.index(on.rank), len(channel.members)
    uid = _meet(on, op, channel, library, deadline)

    def connect() -> None:
        handle = channel.handle
        if channel.ended:
            raise FcommError("the communicator was aborted")
        try:
            on.machine.connect(library, handle, size, uid, rank)
        finally:
            if channel.ended and (late := channel.take(handle)):
                # Another thread gave up meanwhile, before there was anything to abort.
                on.machine.abort(library, late)
        _settle(on, op, channel, library, deadline)

    _bounded(on, op, channel, connect, deadline)
    channel.ready = True
    if rank == 0:
        # Every rank has used the id. Whoever holds it can join, so it is kept no longer.
        with suppress(NoAnswerError):  # the store has the request, and erases the id once it answers
            on.erase(f"{channel.key}/id", patience(on))
    if channel is on.main:
        # The first collective makes the connections between ranks; a graph could not capture that.
        x = torch.zeros(2, device=on.device)
        _run(on, op, channel, library, lambda comm: on.machine.all_reduce(comm, x[:1], x[1:], "sum"), deadline)
        _settle(on, op, channel, library, deadline, record_event(on.device))


def _meet(on: Team, op: str, channel: Channel, library: Library, deadline: float) -> bytes:
    """The unique id, which the channel's first rank makes and the group's store carries; its prefix has the epoch."""
    key = f"{channel.key}/id"

    def look() -> None:
        # Not look_around, which asks the store too.
        if gone := processes.ended(on.live.identities, channel.members):
            raise PeerDiedError(f"{processes.named(gone)} ended, and the group's store does not answer", culprits=gone)

    # If two groups, or two backends of one, shared a store key by mistake, they would open each other's communicators.
    what = repr((on.group.name, on.group.ranks, on.machine.name, channel.key)).encode()
    tag = hashlib.sha256(what).digest()[:16]
    if channel.members[0] == on.rank:
        uid = _bounded(on, op, channel, lambda: on.machine.make_id(library), deadline)
        mine = _FRAME.pack(b"fcid", 1, library.version, len(uid), tag) + uid
        on.write(key, mine, max(SLICE_S, deadline - time.monotonic()), look)
        return uid
    pause = 1e-3
    while (frame := on.read(key, max(SLICE_S, deadline - time.monotonic()), look)) is None:
        _look(on, op, channel, deadline)
        time.sleep(pause)
        pause = min(2 * pause, 2e-2)
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


def _edge(on: Team, edge: tuple[int, int]) -> Channel:
    with on.lock:
        return on.edges.setdefault(edge, Channel(f"edge/{edge[0]}-{edge[1]}", edge))


# --- closing ------------------------------------------------------------------------------------------------------


def _leave(on: Team) -> None:
    """Publish how many calls this rank has made: ranks that wait for it in a later call wait in vain."""

    def say_so() -> None:
        with suppress(RuntimeError):  # the process that serves the store may already have ended
            on.write(f"closing/{on.rank}", str(on.calls).encode(), patience(on))
            on.write("closing", b"1", patience(on))  # that some rank has closed: waiting ranks ask only for this
            on.said = True

    # Senders wait for their receivers, but not for one that has come this far, whether it has ever received or not.
    limited(say_so, STORE_S)


def _close(on: Team) -> None:
    """Wait for the sends, then end the communicators, edges first and in an order that all ranks share.

    Raises what ended the team, or the first error of a send or of ending a communicator, unless a call has raised it.
    """
    raised, deadline = on.raised, time.monotonic() + on.live.timeout_s
    if _end_calls(on):
        raised = True  # in the thread whose call it was
    problem = finish_sending(on, deadline)
    forget(on)
    for channel in on.channels():
        if channel.ready and on.failure is None:
            problem = _finish(on, channel, deadline) or problem
        if channel.worker is not None:
            channel.worker.stop()
    if on.said:  # otherwise the store has gone
        # Before this process can end: if it ended without this word, others would wait for its part of an end.
        with suppress(RuntimeError):
            on.write(f"closed/{on.rank}", b"1", patience(on))
    problem = problem or on.failure
    if problem is not None and not raised:
        on.raised = True
        raise problem


def _end_calls(on: Team) -> bool:
    """Give other threads a moment to finish a call or to open the group, then end their call; whether one was ended."""
    until = time.monotonic() + _GRACE_S
    for channel in on.channels():
        if channel is not on.main and channel.members[1] != on.rank:
            continue  # a send's edge, which finish_sending waits for
        if channel.lock.acquire(timeout=max(0.0, until - time.monotonic())):
            channel.lock.release()
        elif on.failure is None:
            error = GroupClosedError("the group was closed while a thread was in a call; close it after the last call")
            give_up(on, "close", on.machine.load(), error, channel.members)
            return True
    return False


def _finish(on: Team, channel: Channel, deadline: float) -> BaseException | None:
    library, handle = on.machine.load(), channel.handle

    def finish(event: Any) -> None:
        _settle(on, "close", channel, library, deadline, event)
        on.machine.finalize(library, handle, lambda: _settle(on, "close", channel, library, deadline))
        with channel.polling:  # no thread asks the library about it from here on
            own = channel.take(handle)
        if own is None:
            raise FcommError("the communicator was aborted")
        on.machine.destroy(library, own)

    try:
        event = record_event(on.device)
        _bounded(on, "close", channel, lambda: finish(event), deadline)
        channel.handle, channel.ready = ctypes.c_void_p(), False
    except Exception as error:
        if on.failure is not None or not is_left(on, channel):
            return give_up(on, "close", library, error, channel.members)
        abort(on, library, channel)
    return None
