"""What goes on after a call has returned: sends wait for their receivers, and kernels for their peers."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any

from torch import Tensor

from fcomm.backends import ccall
from fcomm.backends.failure import BETWEEN, SLICE_S, give_up, has_closed, late, leave, look_around, raise_failure
from fcomm.backends.machine import LOG, Team, current, is_capturing, record_event
from fcomm.backends.worker import start_worker, started, submit_behind
from fcomm.errors import BackendError, FcommError

_FAREWELL_S = 0.5  # if a message was received, the sender knows within this time

# --- sends --------------------------------------------------------------------------------------------------------


def send_later(on: Team, x: Tensor, dst: int, call: Callable[[], None]) -> None:
    """Run a send's calls in a thread and on a stream of its own, after what the current stream has done so far.

    A send waits for its receiver, in the library or on the stream. In a ring all ranks send before they receive, so a
    send must not block this thread, this stream, or a communicator that a receive needs: each edge has its own.
    """
    raise_failure(on, "send")
    if is_capturing(on.device):
        raise FcommError(f"{on.where('send')}: a graph cannot capture it, its thread is not captured; use ppermute")
    if dst not in on.senders:
        on.senders[dst] = start_worker()

    def task() -> Any:
        call()
        return record_event(on.device)

    while on.sending and _is_taken(on.sending[0][1], within_s=0):
        on.sending.popleft()
    on.sending.append((dst, submit_behind(on.senders[dst], x, task)))


def finish_sending(on: Team, deadline: float) -> BaseException | None:
    """Wait until each message is received or its receiver closes the group, or the deadline passes; return what failed.

    A program may send what nobody receives: a checkpoint stops its second forward as soon as it has what it needs.
    """
    problem: BaseException | None = None
    while on.sending:
        dst, sent = on.sending.popleft()
        try:
            if not _was_taken(on, dst, sent, deadline):
                LOG.warning("%s: a message to rank %d was not received", on.where("send"), dst)
                leave(on, on.machine.load(), on.edges[on.rank, dst])
                on.sending = deque((to, other) for to, other in on.sending if to != dst)
        except Exception as error:
            problem = problem or error
    for worker in on.senders.values():
        worker.stop()
    return problem


def _was_taken(on: Team, dst: int, sent: Future[Any], deadline: float) -> bool:
    closed = False
    try:
        while not _is_taken(sent, _FAREWELL_S if closed else SLICE_S):
            if closed or time.monotonic() > deadline:
                return False
            closed = on.failure is not None or has_closed(on, dst)
    except BackendError:
        if on.failure is not None:
            raise
        return False  # its receiver has ended the edge
    return True


def _is_taken(sent: Future[Any], within_s: float) -> bool:
    """Whether, within that time, a send's calls return and the device passes the event after them."""
    until = time.monotonic() + within_s
    try:
        event = sent.result(within_s)
    except NotYet:
        if not sent.done():
            return False
        event = sent.result()  # it ended as the wait did, or by its own deadline
    while event is not None and not event.query():
        if time.monotonic() >= until:
            return False
        time.sleep(1e-3)
    return True


# --- kernels ------------------------------------------------------------------------------------------------------

# A call on a device returns long before its kernel has met its peers. So each call leaves an event, and a thread checks
# whether the oldest one is past its deadline.
_TEAMS: list[Team] = []
_TEAMS_LOCK = threading.Lock()
_watcher: threading.Thread | None = None
_WATCH_S = 0.5


def watch(on: Team, op: str, deadline: float) -> None:
    """Have the thread watch what was just put on the current stream."""
    global _watcher  # noqa: PLW0603
    event = record_event(on.device)
    if event is None:
        return
    with on.lock:
        _drop_finished(on)
        on.pending.append((event, deadline, op))
    with _TEAMS_LOCK:
        if not any(other is on for other in _TEAMS):
            _TEAMS.append(on)
        if _watcher is None or not _watcher.is_alive():  # in a forked child, the parent's thread has ended
            thread = threading.Thread(target=_watch_teams, name="fcomm-watch", daemon=True)
            _watcher = thread if started(thread) else None


def forget(on: Team) -> None:
    """The opposite of watch, for all calls."""
    with _TEAMS_LOCK:
        _TEAMS[:] = [other for other in _TEAMS if other is not on]


def _watch_teams() -> None:
    global _watcher  # noqa: PLW0603
    while True:
        time.sleep(_WATCH_S)
        with _TEAMS_LOCK:
            teams = list(_TEAMS)
            if not teams:
                _watcher = None
                return
        for on in teams:
            look_at_pending(on)


def look_at_pending(on: Team) -> None:
    """Give up on the team if the device's pending work is late, or if the library or a rank has failed.

    It looks even if nothing is pending: a call after another rank's failure must raise, and not put a kernel on
    the device that waits for peers that never come.
    """
    with on.lock:
        _, deadline, op = on.pending[0] if on.pending else (None, math.inf, BETWEEN)
    if on.failure is not None:
        return
    library = on.machine.load()
    # Held while aborting: no other thread may be inside the library then. A long call checks for failures itself.
    if not on.main.lock.acquire(timeout=SLICE_S):
        return
    try:
        with current(on.device):
            ready = [channel for channel in on.channels() if channel.ready]
            for channel in ready:
                ccall.check(library, on.poll(library, channel), f"{op}, asynchronously,")
            needed = {rank for channel in ready for rank in channel.members}
            # Not op: it may be done, and asking would spoil a capture. Nor its deadline, for the same reason.
            look_around(on, BETWEEN, math.inf, needed)
            if time.monotonic() > deadline:
                _check_late(on)
    except Exception as error:
        give_up(on, op, library, error, range(on.group.size), heard=False)
    finally:
        on.main.lock.release()


def _check_late(on: Team) -> None:
    # Only now: a query of an event, from any thread, spoils a graph that some thread is capturing.
    with on.lock:
        _drop_finished(on)
        overdue = [op for _, deadline, op in on.pending if time.monotonic() > deadline]
    if overdue:
        raise late(on, overdue[0], " on the device")


def _drop_finished(on: Team) -> None:
    while on.pending and on.pending[0][0].query():
        on.pending.popleft()
