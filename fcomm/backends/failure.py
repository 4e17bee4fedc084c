"""How a call that will not end is ended, on all ranks, for one reason: deadlines, reports in the store, the abort.

Neither library bounds the time of a call, and neither tells a rank that another one has failed. So a rank that fails
writes a report into the group's store before it aborts, and a rank that waits looks for one. The first report stands:
all ranks raise its error and name its culprits. notes/0052-communicators-and-deadlines.md has the reasons.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Iterable
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import TypeVar

from fcomm.backends import ccall
from fcomm.backends.ccall import Library
from fcomm.backends.machine import LOG, Channel, Team, current
from fcomm.backends.worker import start_worker
from fcomm.errors import BackendError, CollectiveTimeoutError, FcommError, GroupPoisonedError, PeerDiedError

T = TypeVar("T")

SLICE_S = 0.1  # how often a long wait looks for another rank's failure
_ANSWER_S = 0.4  # how long a rank may take to notice a failure before it counts as absent
STORE_S = 2.0  # the store may be what failed
_ABORT_S = 0.5  # an abort that takes longer goes on alone
_ABORT_ON_DEVICE_S = 5.0  # there it waits for kernels that write into tensors

# Of a failure in the store: magic, rank, code (_TIMEOUT, _OTHER, or the library's). Its text follows.
_REPORT = struct.Struct("<4sIi")
_TIMEOUT, _OTHER = -1, -2


def raise_failure(on: Team, op: str) -> None:
    """Raise what an earlier call left: first the failure itself, later that the group is poisoned by it."""
    if on.failure is None:
        return
    if not on.raised:
        on.raised = True
        raise on.failure
    raise GroupPoisonedError(
        f"{on.where(op)}: unusable since: {on.failure}; close the group and create another",
        op=op,
        group=on.group.name,
        rank=on.rank,
        culprits=on.failure.culprits,
    )


def look_around(on: Team, op: str, deadline: float) -> None:
    """Raise if the deadline has passed or another rank has failed."""
    if time.monotonic() > deadline:
        raise CollectiveTimeoutError(f"{op} passed its deadline of {on.live.timeout_s} s")
    report = _reported(on)
    if report is not None:
        raise _error_of(on, *report)


def give_up(on: Team, op: str, library: Library, error: BaseException) -> BaseException:
    """Tell the other ranks, abort the communicators, remember why; returns the error to raise."""
    with on.lock:
        if on.failure is None:
            on.failure = _agreed(on, op, error if isinstance(error, FcommError) else FcommError(_described(error)))
            on.raised = isinstance(error, FcommError)
            for channel in on.channels():
                abort(on, library, channel)
        return on.failure if isinstance(error, FcommError) else error


def abort(on: Team, library: Library, channel: Channel) -> None:
    """End a communicator without its peers, and whatever call is inside it."""
    # Without the lock, if the library holds it in a call that does not return.
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
        # A call that returns, now that it is aborted, no longer writes its tensors; one that does not keeps them.
        worker, channel.worker = channel.worker, None
        idle = worker.submit(lambda: None)
        with suppress(NotYet):
            idle.result(0.1)
        worker.stop()


def limited(fn: Callable[[], T], limit_s: float) -> T | None:
    """fn(), or None if it fails or takes longer: while giving up, nothing may hold this rank."""
    worker = start_worker()
    future = worker.submit(fn)
    worker.stop()
    try:
        return future.result(limit_s)
    except (NotYet, RuntimeError, OSError) as error:
        LOG.warning("while giving up: %s", _described(error))
        return None


def _agreed(on: Team, op: str, error: FcommError) -> FcommError:
    """The error that all ranks raise for this failure: that of the first report."""
    code = _TIMEOUT if type(error) is CollectiveTimeoutError else getattr(error, "code", _OTHER)
    # The report before the abort: peers notice an abort at once, and then look for the reason.
    report = limited(lambda: _report(on, code, str(error)), STORE_S)
    if report is not None:
        rank, code, text = report
        error = error if rank == on.rank else _error_of(on, rank, code, text)
    late = isinstance(error, CollectiveTimeoutError | PeerDiedError)
    culprits = limited(lambda: _culprits(on, late, report), STORE_S) or ()
    absent = f"; ranks {list(culprits)} have not answered: look at their logs" if late and culprits else ""
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
    if code < 0:
        return BackendError(text)
    return ccall.error_of(on.machine.load().codes, code, text)


# --- reports ------------------------------------------------------------------------------------------------------


def _report(on: Team, code: int, text: str) -> tuple[int, int, str]:
    """Report a failure, unless another rank was first; returns the report that stands."""
    on.write(f"here/{on.rank}", b"1")
    if on.count("failures") == 1:
        on.write("failure", _REPORT.pack(b"fcfl", on.rank, code) + text.encode(errors="replace")[:500])
        return on.rank, code, text
    return _wait_for(lambda: _reported(on)) or (on.rank, code, text)


def _reported(on: Team) -> tuple[int, int, str] | None:
    """The failure that a rank reported: its rank, code and text."""
    try:
        frame = on.read("failure")
    except RuntimeError:
        return None  # the store has gone; the deadline holds without it
    if frame is None or len(frame) < _REPORT.size or frame[:4] != b"fcfl":
        return None
    _, rank, code = _REPORT.unpack_from(frame)
    text = frame[_REPORT.size :].decode(errors="replace")
    return rank, code, "".join(c if c.isprintable() else "?" for c in text)


def _culprits(on: Team, late: bool, report: tuple[int, int, str] | None) -> tuple[int, ...]:
    """The ranks that caused it. The first to report finds them, the others read what it found.

    late: what is wrong is that a rank does not answer. Then it is whoever does not notice the failure either: a rank
    that waits for the group does so within a slice. Else it is the rank whose call failed.
    """
    if report is None:
        return ()
    if report[0] != on.rank:
        frame = _wait_for(lambda: on.read("culprits")) or b""
        return tuple(r for (r,) in struct.iter_unpack("<I", frame[: len(frame) // 4 * 4]) if r < on.group.size)
    found = _absent(on) if late else (on.rank,)
    on.write("culprits", b"".join(struct.pack("<I", r) for r in found))
    return found


def _absent(on: Team) -> tuple[int, ...]:
    until = time.monotonic() + _ANSWER_S
    absent = tuple(range(on.group.size))
    while absent and time.monotonic() < until:
        absent = tuple(r for r in absent if on.read(f"here/{r}") is None)
        time.sleep(0.02)
    return absent


def _wait_for(read: Callable[[], T | None]) -> T | None:
    until = time.monotonic() + 2 * _ANSWER_S
    while (found := read()) is None and time.monotonic() < until:
        time.sleep(0.01)
    return found


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
