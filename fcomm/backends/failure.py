"""How a call that would not return is ended, on all ranks and for one reason: deadlines, reports in the store, aborts.

Neither library bounds the time of a call or tells a rank that another one has failed. So a rank that fails writes a
report into the group's store before it aborts, and a waiting rank looks for one. The first report counts: all ranks
raise its error and name its culprits. notes/0052-communicators-and-deadlines.md has the reasons.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Iterable
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from fcomm import processes
from fcomm.backends import ccall
from fcomm.backends.ccall import Library
from fcomm.backends.machine import LOG, Channel, Team, current
from fcomm.backends.worker import start_worker
from fcomm.bootstrap import NoAnswerError
from fcomm.errors import BackendError, CollectiveTimeoutError, FcommError, GroupPoisonedError, PeerDiedError, printable

T = TypeVar("T")

SLICE_S = 0.1  # how often a long wait looks for another rank's failure
_ANSWER_S = 0.4  # how long a rank may take to notice a failure before it counts as absent
STORE_S = 2.0  # how long to wait for the store, which may be what failed
_ABORT_S = 0.5  # an abort that takes longer is left to finish by itself
_ABORT_ON_DEVICE_S = 5.0  # on a device it waits for kernels that write into tensors

# The rank that serves the store may close the group and end while another one does these: losing it is not a failure.
BETWEEN = "between calls"
_OUTLASTING = ("close", "send", BETWEEN)
_OF_EDGES = ("send", "recv")  # a rank may close without doing its part of these

# Header of a failure in the store: magic, rank, code (_TIMEOUT, _OTHER, _DIED, or the library's). Its text follows.
_REPORT = struct.Struct("<4sIi")
_TIMEOUT, _OTHER, _DIED = -1, -2, -3


def raise_failure(on: Team, op: str, *, heard: bool = True) -> None:
    """Raise what an earlier call left behind: at first the failure itself, later that it poisoned the group.

    heard: a caller gets the error, unlike in a thread that nobody waits for.
    """
    if on.failure is None:
        return
    if not on.raised:
        on.raised = heard
        raise on.failure
    raise GroupPoisonedError(
        f"{on.where(op)}: unusable since: {on.failure}; close the group and create another",
        op=op,
        group=on.group.name,
        rank=on.rank,
        culprits=on.failure.culprits,
    )


def look_around(on: Team, op: str, deadline: float, needed: Iterable[int]) -> None:
    """Raise if the deadline has passed, another rank has failed, or one of the needed has ended without closing."""
    if time.monotonic() > deadline:
        raise late(on, op)
    report = _reported(on)
    if report is not None:
        raise _error_of(on, *report)
    gone = _left(on, needed, if_lost=op in _OUTLASTING, entirely=op == "close")
    if gone:
        raise PeerDiedError(f"{_named(on, gone)} ended; look at the log there", culprits=gone)


def late(on: Team, op: str, where: str = "", *, silent: bool | None = None) -> CollectiveTimeoutError:
    """The error of a deadline that has passed. silent: the group's store does not answer, which may be the reason."""
    text = f"{op} passed its deadline of {on.live.timeout_s} s{where}"
    if not (on.live.silent if silent is None else silent):
        return CollectiveTimeoutError(text)
    stopped, cause = processes.why_silent(on.live.identities)
    return CollectiveTimeoutError(f"{text}; the group's store does not answer: {cause}", culprits=stopped)


def check_takers(on: Team, op: str) -> None:
    """Raise if a rank closed the group after fewer calls on all ranks than this one, and so will not take part."""
    try:
        if on.read("closing", SLICE_S) is None:
            return
        said = {r: _calls_of(on, r, SLICE_S) for r in range(on.group.size) if r != on.rank}
    except RuntimeError:
        return  # the store has gone, or does not answer; the deadline holds without it
    closed = [r for r, calls in said.items() if calls is not None and calls < on.calls]
    if closed:
        who = _named(on, closed) if on.live.identities else ", ".join(f"rank {r}" for r in closed)
        text = f"{who} closed the group, or ended, and does not take part in {op}; make every rank call the same"
        raise PeerDiedError(f"{text} collectives", culprits=closed)


def has_closed(on: Team, rank: int, *, if_lost: bool = True, entirely: bool = False) -> bool:
    """Whether a rank is closing, or has closed, the group; if_lost if the store and its server have gone.

    entirely: whether its communicators have ended too, so that it owes nothing to their ends on other ranks.
    """
    try:
        if entirely:
            return on.read(f"closed/{rank}", patience(on)) is not None
        return _calls_of(on, rank, patience(on)) is not None
    except NoAnswerError:
        return if_lost and bool(processes.ended(on.live.identities, [rank]))  # a living rank may still take part
    except RuntimeError:
        return if_lost


def _calls_of(on: Team, rank: int, limit_s: float) -> int | None:
    """How many calls on all ranks a rank had made when it closed the group; None if it has not closed it."""
    said = on.read(f"closing/{rank}", limit_s)
    return None if said is None else int(said)


def patience(on: Team) -> float:
    """How long a rank that gives up or closes waits for the store's answer; the store may be what failed."""
    return SLICE_S if on.live.silent else STORE_S


def leave(on: Team, library: Library, edge: Channel) -> None:
    """Abort an edge with a message that nobody receives; first tell the receiver, which may wait to end it jointly."""
    limited(lambda: on.write(f"{edge.key}/left", b"1", patience(on)), STORE_S)
    abort(on, library, edge)


def is_left(on: Team, channel: Channel) -> bool:
    """Whether the other rank of an edge has left it."""
    try:
        return channel is not on.main and on.read(f"{channel.key}/left", SLICE_S) is not None
    except RuntimeError:
        return False


def _left(on: Team, among: Iterable[int], *, if_lost: bool = True, entirely: bool = False) -> list[int]:
    """Those of some ranks that have ended without closing, if this host can know."""
    ended = processes.ended(on.live.identities, among)
    return [r for r in ended if not has_closed(on, r, if_lost=if_lost, entirely=entirely)]


def _ended_by_now(on: Team) -> list[int]:
    # The kernel closes a process's sockets, so that its peers fail, a little before it shows the end of the process.
    return _wait_for(lambda: processes.ended(on.live.identities) or None) or []


def _named(on: Team, ranks: Iterable[int]) -> str:
    return processes.described(on.live.identities, ranks)


def _without_store(on: Team, error: dist.DistError) -> PeerDiedError:
    """The error of a store that is lost: a rank may have served it."""
    gone = _ended_by_now(on)
    cause = f": {_named(on, gone)} ended" if gone else "; look at the log of the process that served it"
    reason = str(error).partition("\n")[0][:200]
    return PeerDiedError(f"the group's store is lost ({reason}){cause}", culprits=gone)


def give_up(
    on: Team, op: str, library: Library, error: BaseException, among: Iterable[int], *, heard: bool = True
) -> BaseException:
    """Tell the other ranks, abort the communicators, remember why; return the error.

    among: the ranks that the call needs.  heard: a caller gets the error; if not, the next call on the group, or its
    close, raises it.
    """
    if isinstance(error, NoAnswerError):
        error = late(on, op, silent=True)
    if isinstance(error, dist.DistError):
        error = _without_store(on, error)
    with on.lock:
        if on.failure is None:
            found = error if isinstance(error, FcommError) else FcommError(_described(error))
            on.failure = _agreed(on, op, found, tuple(among))
            for channel in on.channels():
                abort(on, library, channel)
        on.raised = on.raised or heard
        return on.failure if isinstance(error, FcommError) else error


def abort(on: Team, library: Library, channel: Channel) -> None:
    """End a communicator without its peers, and whatever call is inside it."""
    # Go on without the lock if a library call that does not return holds it.
    held = channel.polling.acquire(timeout=0.2)
    handle, channel.handle, channel.ready, channel.ended = channel.handle, ctypes.c_void_p(), False, True
    if held:
        channel.polling.release()
    opened = channel.take(handle)
    if opened is not None:
        limit_s = _ABORT_S if on.device.type == "cpu" else _ABORT_ON_DEVICE_S

        def end() -> None:
            with current(on.device):
                on.machine.abort(library, opened)

        limited(end, limit_s)
    if channel.worker is not None:
        # An aborted call that returns no longer writes to its tensors; one that does not return keeps them.
        worker, channel.worker = channel.worker, None
        idle = worker.submit(lambda: None)
        with suppress(NotYet):
            idle.result(0.1)
        worker.stop()


def limited(fn: Callable[[], T], limit_s: float) -> T | None:
    """fn(), or None if it fails or takes longer: nothing may hold up a rank that is giving up."""
    worker = start_worker()
    future = worker.submit(fn)
    worker.stop()
    try:
        return future.result(limit_s)
    except NotYet:
        LOG.warning("while giving up: a call has not returned within %s s, and goes on alone", limit_s)
    except (RuntimeError, OSError) as error:
        LOG.warning("while giving up: %s", _described(error))
    return None


def _agreed(on: Team, op: str, error: FcommError, among: tuple[int, ...]) -> FcommError:
    """The error that all ranks raise for this failure, which is that of the first report."""
    code = {CollectiveTimeoutError: _TIMEOUT, PeerDiedError: _DIED}.get(type(error), getattr(error, "code", _OTHER))
    # Report before the abort: peers notice an abort at once, and then look for the reason.
    report = limited(lambda: _report(on, code, str(error)), patience(on))
    if report is not None:
        rank, code, text = report
        error = error if rank == on.rank else _error_of(on, rank, code, text)
    culprits = limited(lambda: _culprits(on, op, error, report, among), patience(on)) or error.culprits
    silent = culprits if _is_silence(error) and code != _DIED else ()
    absent = f"; ranks {list(silent)} have not answered: look at their logs" if silent else ""
    return _located(error, op, on, f"{on.where(op)}: {error}{absent}", culprits)


def _located(error: FcommError, op: str, on: Team, text: str, culprits: Iterable[int]) -> FcommError:
    """The same error with another text, and where it happened."""
    if isinstance(error, BackendError):
        kind, code, name = type(error), error.code, error.code_name
        return kind(text, code=code, code_name=name, op=op, group=on.group.name, rank=on.rank, culprits=culprits)
    return type(error)(text, op=op, group=on.group.name, rank=on.rank, culprits=culprits)


def _error_of(on: Team, rank: int, code: int, text: str) -> FcommError:
    text = text if rank == on.rank else f"rank {rank} failed first: {text}"
    if code == _TIMEOUT:
        return CollectiveTimeoutError(text)
    if code == _DIED:
        return PeerDiedError(text)
    if code < 0:
        return BackendError(text)
    return ccall.error_of(on.machine.load().codes, code, text)


# --- reports ------------------------------------------------------------------------------------------------------


def _report(on: Team, code: int, text: str) -> tuple[int, int, str]:
    """Report a failure, unless another rank was first; return the report that counts."""
    on.write(f"here/{on.rank}", b"1", STORE_S)
    if on.count("failures", STORE_S) == 1:
        on.write("failure", _REPORT.pack(b"fcfl", on.rank, code) + text.encode(errors="replace")[:500], STORE_S)
        return on.rank, code, text
    return _wait_for(lambda: _reported(on)) or (on.rank, code, text)


def _reported(on: Team) -> tuple[int, int, str] | None:
    """The failure that a rank reported: its rank, code and text."""
    try:
        frame = on.read("failure", SLICE_S)
    except RuntimeError:
        return None  # the store has gone, or does not answer; the deadline holds without it
    if frame is None or len(frame) < _REPORT.size or frame[:4] != b"fcfl":
        return None
    _, rank, code = _REPORT.unpack_from(frame)
    return rank, code, printable(frame[_REPORT.size :].decode(errors="replace"))


def has_failed(on: Team) -> bool:
    """Whether a rank has reported a failure, if the store answers."""
    return _reported(on) is not None


def _is_silence(error: FcommError) -> bool:
    """Whether the problem is that a rank does not answer."""
    return isinstance(error, CollectiveTimeoutError | PeerDiedError)


def _culprits(
    on: Team, op: str, error: FcommError, report: tuple[int, int, str] | None, among: tuple[int, ...]
) -> tuple[int, ...]:
    """The ranks that caused it. The first rank to report finds them, the others read its result.

    If a rank does not answer and the error names none, the culprits are the ranks needed by the call that do not notice
    the failure either: a rank that waits for the group does so within a slice. Otherwise it is the rank whose call
    failed.
    """
    if report is None:
        # The store has gone, and its server may be a rank.
        return error.culprits or tuple(_ended_by_now(on))
    if report[0] != on.rank:
        frame = _wait_for(lambda: on.read("culprits", STORE_S)) or b""
        return tuple(r for (r,) in struct.iter_unpack("<I", frame[: len(frame) // 4 * 4]) if r < on.group.size)
    found = error.culprits or (_absent(on, op, among) if _is_silence(error) else (on.rank,))
    on.write("culprits", b"".join(struct.pack("<I", r) for r in found), STORE_S)
    return found


def _absent(on: Team, op: str, among: tuple[int, ...]) -> tuple[int, ...]:
    if gone := _left(on, range(on.group.size)):  # a living rank may answer late, and is not to blame
        return tuple(gone)
    until = time.monotonic() + _ANSWER_S
    absent = among
    while absent and time.monotonic() < until:
        absent = tuple(r for r in absent if on.read(f"here/{r}", STORE_S) is None)
        time.sleep(0.02)
    return tuple(r for r in absent if op in _OF_EDGES or not _has_done_its_part(on, r))


def _has_done_its_part(on: Team, rank: int) -> bool:
    """Whether a rank closed the group after as many calls on all ranks: it does not answer, and need not."""
    calls = _calls_of(on, rank, STORE_S)
    return calls is not None and calls >= on.calls


def _wait_for(read: Callable[[], T | None]) -> T | None:
    until = time.monotonic() + 2 * _ANSWER_S
    while (found := read()) is None and time.monotonic() < until:
        time.sleep(0.01)
    return found


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
