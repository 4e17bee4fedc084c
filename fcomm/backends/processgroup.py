"""What c10d keeps for a group: a torch.distributed process group, and the account of which rank broke a call on it.

torch.distributed says "Connection closed by peer 127.0.0.1:4711". So each rank leaves its host and process id in the
group's store when the communicator opens. When a call fails, the ranks look there for ranks that have ended, that
closed, that failed (and where), and that did not come. The first to reach a verdict writes it down, and all ranks raise
that. notes/0012-c10d-failures.md has the reasons and the limits.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fcomm import processes
from fcomm.backends.worker import Worker, apart, start_worker, submit_behind
from fcomm.bootstrap import NoAnswerError, answer, wait_for_keys
from fcomm.errors import (
    BackendError,
    CollectiveTimeoutError,
    FcommError,
    GroupPoisonedError,
    MismatchError,
    PeerDiedError,
    printable,
)
from fcomm.group import Group
from fcomm.rendezvous import Live, live

T = TypeVar("T")

_SLICE_S = 0.25  # how often a waiting rank checks whether another one has failed
_SLICE = timedelta(seconds=_SLICE_S)
_FOREVER = timedelta(days=365)
_ACCOUNT_S = 1.0  # how long ranks collect each other's reports
_STORE_S = 3.0  # a store that takes longer to answer is considered gone

_ERRORS: dict[str, type[FcommError]] = {
    e.__name__: e for e in (BackendError, CollectiveTimeoutError, MismatchError, PeerDiedError)
}


# torch's NCCL has one communicator for both directions between two ranks: if both send before they receive, opening it
# fails ("internal error"). So on these devices send and recv have a process group for each direction.
_DIRECTED = ("cuda",)
_STARTING = threading.Lock()  # of workers; not the edge's lock, which its worker holds until the receiver comes


@dataclass
class Edge:
    """From one rank to another: the thread that waits for the messages and, if directed, a process group of the two."""

    pg: Any = None
    worker: Worker | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Communicator:
    """A group's process group for one device type, and this rank's position in its sequence of calls.

    owned: made here, so not the caller's.
    check: every call is compared across the ranks before it is made (FCOMM_CHECK=1).
    peers: the ranks' identities, as in fcomm/processes.py.
    directed: each edge has a process group. calls, name: how many calls were made, and the collective of the last.
    asked: the pending question whether another rank has failed, which the store, perhaps stopped, has not answered.
    sending: the sends that may still be on their way, or futures of them, with the tensors they read.
    """

    group: Group
    live: Live
    device: str
    pg: Any
    owned: bool
    check: bool
    peers: Sequence[str]
    store: dist.Store
    directed: bool
    calls: int = 0
    name: str = ""
    sending: list[tuple[Any, Tensor]] = field(default_factory=list)
    edges: dict[tuple[int, int], Edge] = field(default_factory=dict)
    failure: FcommError | None = None
    asked: Future[bool] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def rank(self) -> int:
        return self.group.rank or 0

    @property
    def size(self) -> int:
        return self.group.size


def communicator(group: Group, device: str) -> Communicator:
    """The group's communicator, opened by all ranks at their first call."""
    return live(group).communicator(f"c10d/{device}", lambda: _open(group, device), _close)


@contextmanager
def calling(name: str, group: Group, device: str) -> Iterator[Communicator]:
    """The context of a collective's call on the group: one call at a time, refused after a failure."""
    on = communicator(group, device)
    # A thread that waits in recv must not hold up the one that makes the send it waits for.
    with nullcontext() if name in ("send", "recv") else on.lock:
        if on.failure is not None:
            raise GroupPoisonedError(
                f"{name}: group '{group.name}' is unusable on backend 'c10d' since: {on.failure}; "
                "close it and create another",
                op=name,
                group=group.name,
                rank=on.rank,
                culprits=on.failure.culprits,
            )
        on.calls += 1
        on.name = name
        try:
            yield on
        except FcommError:
            raise
        except BaseException as error:
            _leave(on, error)
            raise


def call(on: Communicator, start: Callable[[Any], Any], wait_apart: Callable[[Any], Future[Any]] | None = None) -> None:
    """Start a torch.distributed call and wait for it; its errors become this package's.

    wait_apart: waits in another thread, for calls that cannot be waited for in slices.
    """
    deadline = time.monotonic() + on.live.timeout_s
    work = None
    try:
        work = start(on.pg)
        if on.device != "cpu":
            work.wait()  # orders the current stream after it; the deadline is the process group's
            return
        waited = work if wait_apart is None else wait_apart(work)
        while not _is_done(waited):
            try:
                # gloo reports the end of a message's sender, and the end of another rank does not concern the message.
                _look_around(on, deadline, on.peers if wait_apart is None else ())
            except RuntimeError:
                # Since we last looked at the call, another rank may have come, done its part and ended.
                if _is_done(waited):
                    return
                raise
    except BaseException as error:
        if on.owned and work is not None and not work.is_completed():
            # Its destructor waits for the call, which nothing can cancel.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(on.pg))
        if isinstance(error, RuntimeError):
            raise _fail(on, error) from error
        raise


def send_later(on: Communicator, x: Tensor, dst: int, tag: int) -> None:
    """Start a send and do not wait for it; x must not be written to any more."""
    try:
        on.sending = [(work, sent) for work, sent in on.sending if not _is_sent(work)]
        if on.directed:
            # In its thread: not even the process group exists until the receiver comes.
            worker = _worker(on, on.rank, dst)
            work = submit_behind(worker, x, lambda: _opened(on, on.rank, dst).send([x], 1, tag))
        else:
            work = on.pg.send([x], dst, tag)
            if on.device == "cpu":
                work = _wait_apart(on, work, x, on.rank, dst)
        on.sending.append((work, x))
    except RuntimeError as error:
        raise _fail(on, error) from error


def receive(on: Communicator, y: Tensor, src: int, tag: int) -> None:
    """Receive into y, contiguous."""

    def start(pg: Any) -> Any:
        return _opened(on, src, on.rank).recv([y], 0, tag) if on.directed else pg.recv([y], src, tag)

    call(on, start, lambda work: _wait_apart(on, work, y, src, on.rank))


def _opened(on: Communicator, src: int, dst: int) -> Any:
    edge = on.edges.setdefault((src, dst), Edge())
    with edge.lock:
        if edge.pg is None:
            # A separate client: one that waits for a key blocks all other threads.
            own = on.store.clone()  # type: ignore[attr-defined]  # not in the stub
            store = dist.PrefixStore(f"edge/{src}-{dst}", own)
            edge.pg = _process_group(on, store, int(on.rank == dst), 2)
    return edge.pg


def _worker(on: Communicator, src: int, dst: int) -> Worker:
    edge = on.edges.setdefault((src, dst), Edge())
    with _STARTING:
        edge.worker = edge.worker or start_worker()
    return edge.worker


def _wait_apart(on: Communicator, work: Any, x: Tensor, src: int, dst: int) -> Future[Any]:
    """Wait for a gloo message in the edge's thread, which keeps the tensor as long as gloo may use it.

    gloo breaks the connection if a wait for a message ends early, and only that wait can learn that a message was sent.
    """
    worker = _worker(on, src, dst)
    limit = _FOREVER if worker.started else timedelta(seconds=on.live.timeout_s)

    def task(_: Tensor = x) -> None:
        work.wait(limit)

    return worker.submit(task)


def _is_sent(work: Any) -> bool:
    if isinstance(work, Future):
        return work.done() and (work.result() is None or _is_sent(work.result()))
    return bool(work.is_completed())


def _fail(on: Communicator, error: Exception) -> FcommError:
    on.failure = _account(on, error)
    return on.failure


def _is_done(work: Any) -> bool:
    try:
        if isinstance(work, Future):
            if not wait([work], _SLICE_S).done:
                return False
            work.result()
        else:
            work.wait(_SLICE)
        return True
    except RuntimeError as error:
        # "Operation timed out!" comes from the slice; gloo's own timeouts name the operation.
        if str(error).startswith("Operation timed out"):
            return False
        raise


# --- opening and closing ------------------------------------------------------------------------------------------


_MADE_FOR = ("cpu", "cuda")


def _open(group: Group, device: str) -> Communicator:
    owner, pg = live(group), live(group).process_group
    if pg is None and device not in _MADE_FOR:
        raise FcommError(
            f"c10d: x is on device '{device}', and process groups are made here for {' and '.join(_MADE_FOR)} alone; "
            f"make one with torch.distributed and pass it to fcomm.from_process_group, in place of '{group.name}'"
        )
    store = dist.PrefixStore(f"c10d/{device}", owner.store)
    check = os.environ.get("FCOMM_CHECK", "0") not in ("", "0")
    directed = device in _DIRECTED and not _is_fake(pg)
    on = Communicator(group, owner, device, pg, pg is None, check, owner.identities, store, directed)
    try:
        on.peers = [""] * on.size if _is_fake(pg) else _answered(on, lambda: _introduce(on))
        if on.owned:
            on.pg = _answered(on, lambda: _process_group(on, on.store, on.rank, on.size))
    except RuntimeError as error:
        raise error if isinstance(error, FcommError) else _account(on, error) from error
    except OSError as error:  # a problem of this process only, such as a lack of descriptors
        _leave(on, error)
        raise BackendError(
            f"c10d: group '{group.name}' of size {on.size} cannot be opened on rank {on.rank}: {error}",
            group=group.name,
            rank=on.rank,
            culprits=[on.rank],
        ) from error
    return on


def _answered(on: Communicator, fn: Callable[[], T]) -> T:
    """fn(), which asks the store again and again; raises what fn raises, unless the store does not answer."""
    if on.device != "cpu":
        return fn()  # NCCL's process group belongs to the thread that makes it

    def look() -> None:
        if processes.ended(on.peers) and time.monotonic() > deadline - on.live.timeout_s + _STORE_S:
            raise NoAnswerError("the store does not answer")

    deadline = time.monotonic() + on.live.timeout_s
    try:
        return answer(apart(fn), on.live.timeout_s + _SLICE_S, look)
    except NoAnswerError as error:
        raise _error(on, _verdict_alone(on, True, str(error))) from error


def _is_fake(pg: Any) -> bool:
    """Whether it is torch's "fake" backend, one process that stands for all: results have shapes but no meaning."""
    with suppress(ValueError):
        return pg is not None and dist.get_backend(pg) == "fake"
    return False


def _process_group(on: Communicator, store: dist.Store, rank: int, size: int) -> Any:
    timeout = timedelta(seconds=on.live.timeout_s)
    if on.device == "cuda":
        return dist.ProcessGroupNCCL(store, rank, size, timeout)  # type: ignore[arg-type]  # not in the stub
    with _on_loopback(on.peers):
        return dist.ProcessGroupGloo(store, rank, size, timeout)


def _introduce(on: Communicator) -> list[str]:
    """Every rank's identity, once all ranks have arrived."""
    deadline = time.monotonic() + on.live.timeout_s
    on.store.set(f"member/{on.rank}", f"{processes.identity()} {int(on.check)}")
    keys = [f"member/{r}" for r in range(on.size)]
    while not wait_for_keys(on.store, keys, _SLICE_S):
        if gone := processes.ended(on.peers):
            raise PeerDiedError(
                f"{processes.named(gone)} of group '{on.group.name}' ended before this call; look at the log there",
                group=on.group.name,
                rank=on.rank,
                culprits=gone,
            )
        absent = [r for r, key in enumerate(keys) if not on.store.check([key])]
        if absent and time.monotonic() > deadline:
            raise CollectiveTimeoutError(
                f"{processes.named(absent)} of group '{on.group.name}' made no call on backend 'c10d' within "
                f"{on.live.timeout_s} s; every rank of the group makes the same calls",
                group=on.group.name,
                rank=on.rank,
                culprits=absent,
            )
    said = [on.store.get(key).decode(errors="replace").split(" ") for key in keys]
    checks = [check for _, check in said]
    if len(set(checks)) > 1:
        raise MismatchError(
            f"the ranks of group '{on.group.name}' have FCOMM_CHECK = {', '.join(checks)}; "
            "set it to the same value on all",
            group=on.group.name,
            rank=on.rank,
        )
    return [who for who, _ in said]


@contextmanager
def _on_loopback(peers: Sequence[str]) -> Iterator[None]:
    """Let ranks of one host connect over the loopback interface; gloo would use the interface of the host's name."""
    name = "GLOO_SOCKET_IFNAME"
    loopback = [i for _, i in socket.if_nameindex() if i in ("lo", "lo0")]
    if name in os.environ or not loopback or len({processes.host(who) for who in peers}) > 1:
        yield
        return
    os.environ[name] = loopback[0]
    try:
        yield
    finally:
        del os.environ[name]


def _close(on: Communicator) -> None:
    for edge in on.edges.values():
        if edge.worker is not None:
            edge.worker.stop()  # it ends when its messages have been received
    if on.failure is not None:
        return
    with suppress(RuntimeError, TimeoutError):
        for work, _ in on.sending:
            started = work.result(on.live.timeout_s) if isinstance(work, Future) else work
            if started is not None:
                started.wait(timedelta(seconds=on.live.timeout_s))
    on.edges.clear()
    with suppress(RuntimeError):
        answer(apart(lambda: on.store.set(f"closed/{on.rank}", str(on.calls))), _STORE_S)
    on.pg = None


# --- the account --------------------------------------------------------------------------------------------------


def _look_around(on: Communicator, deadline: float, needed: Sequence[str]) -> None:
    """Raise if the deadline has passed, another rank has failed, or one of those needed is gone."""
    if time.monotonic() > deadline:
        raise RuntimeError(f"Timed out after {on.live.timeout_s} s")
    if processes.ended(needed):
        raise RuntimeError("Connection lost")
    asked = on.asked = on.asked or apart(lambda: on.store.check(["failed"]))
    if wait([asked], _SLICE_S).done:
        on.asked = None
        if asked.result():
            raise RuntimeError("another rank failed")


def _leave(on: Communicator, error: BaseException) -> None:
    """Break the group: the program left a call midway, by Ctrl-C, say, and its next one would meet the rest of it."""
    why = type(error).__name__ + (f": {str(error)[:200]}" if str(error) else "")
    verdict = _write(PeerDiedError, [on.rank], f"rank {on.rank} left it in the middle ({why}); look at the log there")

    def tell() -> str:
        stands = on.store.compare_set("verdict", "", verdict).decode(errors="replace")
        on.store.set("failed", "")
        return stands

    with suppress(RuntimeError):
        verdict = answer(apart(tell), _STORE_S)
    on.failure = on.failure or _error(on, verdict)


def _account(on: Communicator, error: Exception) -> FcommError:
    """What all ranks will raise for a failed call. Bounded in time, since the lost rank may be the store's server."""
    text = str(error).splitlines()[0][:200]
    timeout = "imed out" in text or "imeout" in text
    verdicts: list[str] = []

    def agree() -> None:
        verdict = _verdict(on, timeout, text)
        with suppress(RuntimeError):
            verdict = on.store.compare_set("verdict", "", verdict).decode(errors="replace")
        verdicts.append(verdict)

    thread = threading.Thread(target=agree, name="fcomm-account", daemon=True)
    thread.start()
    patience_s = _ACCOUNT_S / 2 if processes.ended(on.peers) else _STORE_S
    thread.join(_SLICE_S if on.asked else _ACCOUNT_S + patience_s)
    return _error(on, verdicts[0] if verdicts else _verdict_alone(on, timeout, text))


def _verdict_alone(on: Communicator, timeout: bool, text: str) -> str:
    """The verdict without the store: this host's kernel says the same about the ranks to all of them."""
    unanswered = f"the store does not answer ({text})"
    # At the deadline a stopped rank explains it; one that has ended may be a survivor that was quicker than this rank.
    if timeout and (still := processes.stopped(on.peers)):
        text = f"{processes.named(still)} stopped, by a signal or a debugger; {unanswered}"
        return _write(CollectiveTimeoutError, still, text)
    if gone := processes.ended(on.peers):
        return _write(PeerDiedError, gone, f"{processes.named(gone)} ended; {unanswered}")
    return _write(CollectiveTimeoutError if timeout else BackendError, [], unanswered)


def _verdict(on: Communicator, timeout: bool, text: str) -> str:
    failed, closed = _reports(on)
    gone = processes.ended(on.peers)
    silent = [r for r in range(on.size) if r not in failed and r not in closed]
    where = ", ".join(f"rank {r} in {place}" for r, place in sorted(failed.items()))
    if gone:
        who = ", ".join(processes.process(on.peers[r]) for r in gone)
        return _write(PeerDiedError, gone, f"{processes.named(gone)} ended ({who}); look at the log there")
    if closed:
        return _write(
            PeerDiedError, closed, f"{processes.named(closed)} closed the group, or ended; close it after the last call"
        )
    if silent:
        kind = CollectiveTimeoutError if timeout else PeerDiedError
        within = f" within {on.live.timeout_s} s" if timeout else ""
        return _write(
            kind, silent, f"{processes.named(silent)} did not arrive{within} ({where}); look at the log there"
        )
    if len(set(failed.values())) > 1:
        return _write(
            MismatchError, sorted(failed), f"the ranks are in different calls: {where}; make them call the same"
        )
    return _write(CollectiveTimeoutError if timeout else BackendError, [], f"torch.distributed says: {text}")


def _reports(on: Communicator) -> tuple[dict[int, str], list[int]]:
    """{rank: the call in which it failed}, and the ranks that closed the group, if they say so within a second."""
    failed, ranks = {on.rank: f"call {on.calls}, {on.name}"}, range(on.size)
    closed: list[int] = []
    deadline = time.monotonic() + _ACCOUNT_S
    with suppress(RuntimeError):
        on.store.set(f"failed/{on.rank}", failed[on.rank])
        on.store.set("failed", "")
        while time.monotonic() < deadline and not on.store.check(["verdict"]):
            closed = [r for r in ranks if r not in failed and on.store.check([f"closed/{r}"])]
            for r in ranks:
                if r not in failed and on.store.check([f"failed/{r}"]):
                    failed[r] = on.store.get(f"failed/{r}").decode(errors="replace")
            if {*failed, *closed, *processes.ended(on.peers)} == set(ranks):
                break
            time.sleep(0.02)
    return failed, closed


def _write(kind: type[FcommError], culprits: Iterable[int], text: str) -> str:
    return "\n".join((kind.__name__, " ".join(map(str, culprits)), text))


def _error(on: Communicator, verdict: str) -> FcommError:
    kind, culprits, text = [*verdict.split("\n", 2), "", ""][:3]
    return _ERRORS.get(kind, BackendError)(
        f"{on.name or 'c10d'}: call {on.calls} on group '{on.group.name}' of size {on.size}: {printable(text)}",
        op=on.name,
        group=on.group.name,
        rank=on.rank,
        culprits=[int(r) for r in culprits.split() if r.isdigit()],
    )


# --- the same call on every rank ----------------------------------------------------------------------------------

_TEXT_BYTES = 256


def compare_calls(on: Communicator, x: Tensor, what: str) -> None:
    """Raise MismatchError on every rank unless all are making the same call; costs one small all_gather."""
    mine = f"call {on.calls}, {on.name}{what}".encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES)
    own = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(x.device)
    rows = list(own.new_empty(on.size, _TEXT_BYTES).unbind(0))
    call(on, lambda pg: pg.allgather([rows], [own]))
    said = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in rows]
    if len(set(said)) == 1:
        return
    fewest = min(set(said), key=said.count)
    raise MismatchError(
        f"{on.name}: the ranks of group '{on.group.name}' are in different calls: "
        + "; ".join(f"rank {r} in {text}" for r, text in enumerate(said))
        + "; make them call the same",
        op=on.name,
        group=on.group.name,
        rank=on.rank,
        culprits=[r for r, text in enumerate(said) if text == fewest],
    )
