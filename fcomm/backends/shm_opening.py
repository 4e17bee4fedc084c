"""Opening the engine's shared memory: how ranks of one host get hold of one nameless region, and of each other's lives.

Rank 0 makes the region, a sealed memfd, and waits on an abstract UNIX socket. Each other rank connects and passes a
descriptor of its own life (a pidfd); rank 0 passes back the region and the lives of all. Nothing has a name in a file
system, so nothing is left behind, whichever rank is killed at whatever time. The group's store carries fixed-size
bytes, except for an error:

    claim/<rank>   every rank: whether it can run the engine, and which host it is on
    failed         the first error that a rank finds, which all raise
    address        rank 0: the socket's random name, and the nonce that the region must show

A peer must belong to our own user (SO_PEERCRED), and one that does not first send the nonce is turned away.
"""

from __future__ import annotations

import array
import contextlib
import errno
import hashlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from fcomm import processes
from fcomm.backends.pool import MAX_RANKS
from fcomm.bootstrap import NoAnswerError
from fcomm.errors import FcommError, PeerDiedError, RendezvousError, printable
from fcomm.rendezvous import Live

T = TypeVar("T")

_CLAIM = struct.Struct("!B3x32s")  # engine ABI, 0 for none; host
_ADDRESS = struct.Struct("!16sQ")  # socket name, nonce
_HELLO = struct.Struct("!QI4x")  # nonce, rank
_FDS_PER_MESSAGE = 250  # the kernel takes 253
_READY, _FAILED = b"+", b"-"
_FAILED_KEY = "cpu/failed"
_FIRST_S = 2.0  # how long a rank that fails asks the store whether another one failed first
# A rank says which one it is as soon as it has connected, but may get no core for seconds, and does not connect twice.
# A stranger that says nothing holds the opening up for this long; it can only be a process of our own user.
_HELLO_S = 30.0
_SLICE_S = 0.2  # how often a waiting rank checks whether another one has ended


def host_identity() -> bytes:
    """Equal for two processes that can share memory: those of one host, as in processes.py, and of one user."""
    return hashlib.sha256(repr((processes.host(processes.identity()), os.geteuid())).encode()).digest()


def why_not_shared(owner: Live, abi: int) -> str | None:
    """Tell the others whether this rank has the engine and where it runs; None if all can share memory, else why."""
    if owner.group.size > MAX_RANKS:
        return f"its {owner.group.size} ranks are more than the {MAX_RANKS} that share memory"
    with _agreed(owner):
        return _why_not_shared(owner, abi)


def _why_not_shared(owner: Live, abi: int) -> str | None:
    group = owner.group
    deadline = time.monotonic() + owner.timeout_s
    _set(owner, f"cpu/claim/{group.rank}", _CLAIM.pack(abi, host_identity()))
    claims = []
    for rank in range(group.size):
        claims.append(_CLAIM.unpack(_get(owner, f"cpu/claim/{rank}", _CLAIM.size, rank, deadline)))
    without = [r for r, (theirs, _) in enumerate(claims) if theirs == 0]
    if without:
        return f"ranks {without} have no engine" if without != list(range(group.size)) else "the engine is not built"
    if len({theirs for theirs, _ in claims}) > 1:
        return f"the ranks have engines of different versions, {[theirs for theirs, _ in claims]}"
    hosts = len({host for _, host in claims})
    return f"its {group.size} ranks are on {hosts} hosts" if hosts > 1 else None


def open_region(owner: Live, native: Any, first_round: int = 0) -> Any:
    """This rank's communicator in the engine. Raises RendezvousError, or PeerDiedError if a rank ends meanwhile."""
    deadline = time.monotonic() + owner.timeout_s
    # In this order, so that a rank that fails says why before its sockets close.
    with contextlib.ExitStack() as opened, _agreed(owner):
        life = opened.enter_context(_descriptor(_own_life()))
        if owner.group.rank == 0:
            return _serve(owner, native, first_round, life, deadline, opened)
        return _join(owner, native, life, deadline, opened)


def _serve(owner: Live, native: Any, first_round: int, life: int, deadline: float, opened: contextlib.ExitStack) -> Any:
    size = owner.group.size
    nonce, name = secrets.randbits(64), secrets.token_bytes(16)
    region = opened.enter_context(_descriptor(os.memfd_create("fcomm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)))
    native.format(region, size, nonce, first_round)
    listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.bind(_abstract(name))
    listener.listen(size)
    _set(owner, "cpu/address", _ADDRESS.pack(name, nonce))
    peers: dict[int, socket.socket] = {}
    lives = {0: life}
    while len(peers) < size - 1:
        missing = [r for r in range(1, size) if r not in peers]
        connection = opened.enter_context(_accept(owner, listener, missing, deadline))
        if _peer_uid(connection) != os.geteuid():
            continue
        try:
            hello, fds = _receive(connection, _HELLO.size, 1, min(deadline, time.monotonic() + _HELLO_S))
        except (OSError, EOFError) as error:
            _raise_if_ours(error)
            continue  # a stranger, or a rank that died: the deadline's error names the missing ranks
        theirs, rank = _HELLO.unpack(hello)
        if theirs != nonce or rank not in missing or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            continue
        peers[rank] = connection
        lives[rank] = opened.enter_context(_descriptor(fds[0]))
    everyone = [lives[r] for r in range(size)]
    for rank, connection in peers.items():
        with _peer(owner, rank):
            _send_fds(connection, [region, *everyone])
    communicator, text = _map(owner, native, region, everyone, nonce)
    reports = {0: text}
    for rank, connection in peers.items():
        with _peer(owner, rank):
            ok, _ = _receive(connection, 1, 0, deadline)
            reports[rank] = "" if ok == _READY else "it could not map its memory"
    failed = {r: text for r, text in reports.items() if text}
    for rank, connection in peers.items():
        with _peer(owner, rank):
            connection.sendall(_FAILED if failed else _READY)
    if failed:
        raise _unmapped(owner, failed)
    return communicator


def _join(owner: Live, native: Any, life: int, deadline: float, opened: contextlib.ExitStack) -> Any:
    rank, size = owner.group.rank or 0, owner.group.size
    name, nonce = _ADDRESS.unpack(_get(owner, "cpu/address", _ADDRESS.size, 0, deadline))
    connection = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    with _peer(owner, 0):
        _connect(connection, _abstract(name), deadline)
        if _peer_uid(connection) != os.geteuid():
            raise RendezvousError(
                f"cpu: the socket of rank 0 of group '{owner.group.name}' belongs to user {_peer_uid(connection)}, not "
                f"to {os.geteuid()}; start all ranks as one user"
            )
        socket.send_fds(connection, [_HELLO.pack(nonce, rank)], [life])
        fds = _receive_fds(connection, size + 1, deadline)
    region, lives = fds[0], fds[1:]
    for fd in fds:
        opened.enter_context(_descriptor(fd))
    communicator, text = _map(owner, native, region, lives, nonce)
    with _peer(owner, 0):
        connection.sendall(_FAILED if text else _READY)
        verdict, _ = _receive(connection, 1, 0, deadline)
    failed = {rank: text} if text else {} if verdict == _READY else {0: "a rank could not map its memory, see its log"}
    if failed:
        raise _unmapped(owner, failed)
    return communicator


def _map(owner: Live, native: Any, region: int, lives: Sequence[int], nonce: int) -> tuple[Any, str]:
    """The communicator, or None and the text of the error. The engine gets its own descriptors and closes them."""
    group = owner.group
    owned = [os.dup(fd) for fd in (region, *lives)]
    try:
        return native.open(owned[0], group.rank, group.size, tuple(owned[1:]), nonce, owner.timeout_s), ""
    except (OSError, ValueError) as error:
        for fd in owned:
            os.close(fd)
        return None, str(error)


def _unmapped(owner: Live, failed: dict[int, str]) -> RendezvousError:
    """{rank: why} could not map the region."""
    group = owner.group
    named = "; ".join(f"rank {r}: {text}" for r, text in sorted(failed.items()))
    return RendezvousError(
        f"cpu: group '{group.name}' of size {group.size} could not open its shared memory: {named}; "
        "check the limits of memory and of descriptors, or use fcomm.c10d",
        group=group.name, rank=group.rank, culprits=failed,
    )  # fmt: skip


# --- lives --------------------------------------------------------------------------------------------------------


def _own_life() -> int:
    """A descriptor that becomes readable when this process ends; its holder need not be able to see our process id."""
    try:
        return os.pidfd_open(os.getpid())
    except OSError:
        # An old kernel, or a filter that refuses the call. The end of the pipe that we never close hangs up when we
        # end, though only once our forked children are gone too.
        theirs, _ = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        return theirs


@contextlib.contextmanager
def _descriptor(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


# --- the socket ---------------------------------------------------------------------------------------------------


def _abstract(name: bytes) -> bytes:
    return b"\0fcomm." + name.hex().encode()


def _connect(connection: socket.socket, address: bytes, deadline: float) -> None:
    """Connect; raises TimeoutError if the socket accepts nobody before the deadline."""
    connection.setblocking(False)
    while True:
        try:
            return connection.connect(address)
        except BlockingIOError:  # the queue of those to be accepted is full, and the socket reserves us no place
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(0.001)


def _accept(owner: Live, listener: socket.socket, missing: Sequence[int], deadline: float) -> socket.socket:
    while True:
        _look_around(owner, deadline)
        listener.settimeout(min(_SLICE_S, max(0.001, deadline - time.monotonic())))
        try:
            return listener.accept()[0]
        except TimeoutError as error:
            if time.monotonic() > deadline:
                raise _absent(owner, missing) from error


def _absent(owner: Live, missing: Sequence[int]) -> RendezvousError:
    return RendezvousError(
        f"cpu: ranks {list(missing)} of group '{owner.group.name}' of size {owner.group.size} did not open it within "
        f"{owner.timeout_s} s; look at their logs for an earlier error, or for a rank that calls no collective on it",
        group=owner.group.name, rank=owner.group.rank, culprits=missing,
    )  # fmt: skip


@contextlib.contextmanager
def _peer(owner: Live, rank: int) -> Iterator[None]:
    """Turn errors on the socket to rank into ours: it ended, or did not answer in time."""
    try:
        yield
    except TimeoutError as error:
        raise _absent(owner, [rank]) from error
    except (OSError, EOFError) as error:
        _raise_if_ours(error)
        # A rank that gave up because another had ended closes its socket too.
        raise _died(owner, processes.ended(owner.identities) or [rank]) from error


def _raise_if_ours(error: BaseException) -> None:
    """Raise the error if no peer caused it."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
        raise error


def _look_for_the_dead(owner: Live) -> None:
    """Raise PeerDiedError if a rank has ended: not all have joined yet, so now they never will."""
    if dead := processes.ended(owner.identities):
        raise _died(owner, dead)


def _look_around(owner: Live, deadline: float) -> None:
    """Raise if a rank has ended, or has reported an error."""
    _look_for_the_dead(owner)
    if _has(owner, _FAILED_KEY, deadline):
        raise FcommError("another rank failed")  # _agreed finds out how


@contextlib.contextmanager
def _agreed(owner: Live) -> Iterator[None]:
    """Make all ranks raise the first error that one of them finds, and none wait for a rank that has given up."""
    group = owner.group
    try:
        yield
    except OSError as error:
        mine: FcommError = error if isinstance(error, FcommError) else _unmapped(owner, {group.rank or 0: str(error)})
        raise _first(owner, mine) from error
    except FcommError as error:
        raise _first(owner, error) from error


def _first(owner: Live, error: FcommError) -> FcommError:
    """The error that all ranks raise: this one, if no rank was faster or the store has gone."""
    said = "\n".join((type(error).__name__, " ".join(map(str, error.culprits)), str(error)))
    limit_s = _SLICE_S if owner.silent else _FIRST_S
    try:
        stands = owner.ask(lambda store: store.compare_set(_FAILED_KEY, "", said), limit_s).decode(errors="replace")
    except RuntimeError:
        return error
    kind, culprits, text = [*stands.split("\n", 2), "", ""][:3]
    ranks = [int(r) for r in culprits.split() if r.isdigit()]
    of = PeerDiedError if kind == PeerDiedError.__name__ else RendezvousError
    return of(printable(text), group=owner.group.name, rank=owner.group.rank, culprits=ranks)


def _died(owner: Live, dead: Sequence[int]) -> PeerDiedError:
    return PeerDiedError(
        f"cpu: {processes.named(dead)} ended before group '{owner.group.name}' of size {owner.group.size} had opened "
        "its shared memory; look at the log there",
        group=owner.group.name, rank=owner.group.rank, culprits=dead,
    )  # fmt: skip


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _receive(connection: socket.socket, nbytes: int, fds: int, deadline: float) -> tuple[bytes, list[int]]:
    """Exactly nbytes, and the descriptors that came with them. Raises EOFError if the peer ended."""
    data = b""
    received: list[int] = []
    while len(data) < nbytes:
        connection.settimeout(max(0.0, deadline - time.monotonic()) or 0.001)
        if fds:
            part, more = _recv_fds(connection, nbytes - len(data), fds)
            received += more
        else:
            part = connection.recv(nbytes - len(data))
        if not part:
            raise EOFError
        data += part
    return data, received


def _recv_fds(connection: socket.socket, nbytes: int, fds: int) -> tuple[bytes, list[int]]:
    # Not socket.recv_fds: its descriptors would be inherited by programs that this process starts.
    found = array.array("i")
    room = socket.CMSG_LEN(fds * found.itemsize)
    data, ancillary, flags, _ = connection.recvmsg(nbytes, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    if flags & socket.MSG_CTRUNC and len(found) < fds:  # there was room for them, but this process has too many open
        for fd in found:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return data, list(found)


def _send_fds(connection: socket.socket, fds: Sequence[int]) -> None:
    for k in range(0, len(fds), _FDS_PER_MESSAGE):
        socket.send_fds(connection, [_READY], list(fds[k : k + _FDS_PER_MESSAGE]))


def _receive_fds(connection: socket.socket, count: int, deadline: float) -> list[int]:
    received: list[int] = []
    while len(received) < count:
        _, more = _receive(connection, 1, min(count - len(received), _FDS_PER_MESSAGE), deadline)
        if not more:
            raise EOFError
        received += more
    return received


# --- the store ----------------------------------------------------------------------------------------------------


def _ask(owner: Live, call: Callable[[dist.Store], T], deadline: float) -> T:
    """call(store). It fails if the process that serves the store, often a rank, has ended or does not answer."""
    group = owner.group
    try:
        return owner.ask(call, max(0.0, deadline - time.monotonic()), lambda: _look_for_the_dead(owner))
    except NoAnswerError as error:
        stopped, cause = processes.why_silent(owner.identities)
        raise RendezvousError(
            f"cpu: the store of group '{group.name}' of size {group.size} did not answer within {owner.timeout_s} s; "
            f"{cause}",
            group=group.name, rank=group.rank, culprits=stopped,
        ) from error  # fmt: skip
    except dist.DistError as error:
        time.sleep(_SLICE_S)  # a process that ends closes its sockets first
        dead = processes.ended(owner.identities)
        cause = (
            f": {processes.named(dead)} ended; look at the log there" if dead else "; look at the log of its process"
        )
        raise PeerDiedError(
            f"cpu: the store of group '{owner.group.name}' of size {owner.group.size} is gone{cause}",
            group=owner.group.name, rank=owner.group.rank, culprits=dead,
        ) from error  # fmt: skip


def _set(owner: Live, key: str, value: bytes) -> None:
    # torch's stub says str, bytes arrive unchanged.
    _ask(owner, lambda store: store.set(key, value), time.monotonic() + owner.timeout_s)  # type: ignore[arg-type]


def _has(owner: Live, key: str, deadline: float) -> bool:
    return _ask(owner, lambda store: store.check([key]), deadline)


def _get(owner: Live, key: str, nbytes: int, rank: int, deadline: float) -> bytes:
    """The value of that length that rank sets; polled, since a blocking wait would not see Ctrl-C."""
    nap = 0.0005
    look = time.monotonic() + _SLICE_S
    while not _has(owner, key, deadline):
        if time.monotonic() > deadline:
            raise _absent(owner, [rank])
        if time.monotonic() > look:
            _look_around(owner, deadline)
            look = time.monotonic() + _SLICE_S
        time.sleep(nap)
        nap = min(2 * nap, 0.02)
    value = bytes(_ask(owner, lambda store: store.get(key), deadline))
    if len(value) != nbytes:
        raise RendezvousError(
            f"cpu: rank {rank} of group '{owner.group.name}' left {len(value)} bytes under '{key}', not {nbytes}; "
            "start all ranks with one version of fcomm"
        )
    return value
