"""What NCCL and HCCL share besides their calls: a library as a table of functions, and its state on one group.

machine.py       the values: Machine, Comm, Channel, Team; the device's stream
communicator.py  opening, calling, closing
failure.py       deadlines, other ranks' failures, the abort
later.py         work that goes on after a call has returned: sends, and a device's kernels
worker.py        the threads of calls that may wait
lowering.py      the collectives
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fcomm.backends.ccall import Library
from fcomm.backends.worker import Worker
from fcomm.errors import FcommError
from fcomm.group import Group
from fcomm.rendezvous import Live

LOG = logging.getLogger("fcomm")


@dataclass(frozen=True)
class Comm:
    """What a native call needs: the library, its communicator, the stream, and this rank's number."""

    lib: Library
    handle: ctypes.c_void_p
    stream: int
    rank: int
    size: int


def _lacking(*_: Any) -> None:
    raise FcommError("this machine has no such native; ask has_uneven first")


@dataclass(frozen=True)
class Machine:
    """A vendor's library as a table of functions; nccl.py and hccl.py fill the same rows in the same order.

    The natives work on flat contiguous tensors of the dtypes named in moves and reductions, of one element or more.
    """

    name: str
    load: Callable[[], Library]  # loads it at the first call, and returns the same one later
    id_nbytes: int
    make_id: Callable[[Library], bytes]
    # connect(library, handle, size, id, rank) fills handle; poll(library, handle) is the asynchronous status.
    connect: Callable[[Library, ctypes.c_void_p, int, bytes, int], None]
    poll: Callable[[Library, ctypes.c_void_p], int]
    # finalize(library, handle, settle) agrees with the peers that everything is done, before destroy(library, handle);
    # abort(library, handle) ends the communicator without them.
    finalize: Callable[[Library, ctypes.c_void_p, Callable[[], None]], None]
    destroy: Callable[[Library, ctypes.c_void_p], None]
    abort: Callable[[Library, ctypes.c_void_p], None]
    # dtype -> the dtype it moves as; others move as bytes.
    moves: Mapping[torch.dtype, torch.dtype]
    # op -> dtype -> (dtype it is reduced as, op), where the library's result is that of fcomm/arithmetic.py.
    reductions: Mapping[str, Mapping[torch.dtype, tuple[torch.dtype, str]]]
    all_reduce: Callable[[Comm, Tensor, Tensor, str], None]
    reduce: Callable[[Comm, Tensor, Tensor, str, int], None]
    reduce_scatter: Callable[[Comm, Tensor, Tensor, str], None]
    all_gather: Callable[[Comm, Tensor, Tensor], None]
    all_to_all: Callable[[Comm, Tensor, Tensor], None]
    # exchange(comm, x, sends, y, recvs): the first sends[0] elements of x go to rank 0, ...; every rank calls it.
    exchange: Callable[[Comm, Tensor, list[int], Tensor, list[int]], None]
    # permute(comm, x, y, dst, src): ranks without dst and src do not call it.
    permute: Callable[[Comm, Tensor, Tensor, int | None, int | None], None]
    broadcast: Callable[[Comm, Tensor, Tensor, int], None]
    gather: Callable[[Comm, Tensor, Tensor, int], None]
    scatter: Callable[[Comm, Tensor, Tensor, int], None]
    send: Callable[[Comm, Tensor, int], None]
    recv: Callable[[Comm, Tensor, int], None]
    # barrier(comm, flags): two elements, for a library without a barrier. No native keeps temporaries until a
    # non-blocking communicator has used them, so callers own all memory.
    barrier: Callable[[Comm, Tensor], None]
    # By collective, the symbols of the two natives that not every library has; without them, uneven calls are composed:
    # all_gather_uneven(comm, x, y, counts), reduce_scatter_uneven(comm, x, counts, y, op).
    uneven: Mapping[str, str] = field(default_factory=dict)
    uneven_refuses: tuple[torch.dtype, ...] = ()  # what reduce_scatter reduces, but reduce_scatter_uneven does not
    all_gather_uneven: Callable[[Comm, Tensor, Tensor, list[int]], None] = _lacking
    reduce_scatter_uneven: Callable[[Comm, Tensor, list[int], Tensor, str], None] = _lacking

    def has_uneven(self, name: str) -> bool:
        return name in self.uneven and self.uneven[name] in self.load()


@dataclass
class Channel:
    """A communicator of some ranks of a group, opened at its first call.

    members: ranks within the group; the first makes the unique id.
    ended: it was aborted. polling: held while asking the library about the handle, and while ending it: after an abort
    the handle's memory is no longer the library's, and a thread that polls must not ask again.
    """

    key: str
    members: tuple[int, ...]
    handle: ctypes.c_void_p = field(default_factory=ctypes.c_void_p)
    ready: bool = False
    ended: bool = False
    worker: Worker | None = None
    polling: threading.Lock = field(default_factory=threading.Lock)
    taking: threading.Lock = field(default_factory=threading.Lock)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def take(self, handle: ctypes.c_void_p) -> ctypes.c_void_p | None:
        """What the library has put into handle, for the one caller that is to end it; None for all others."""
        with self.taking:
            taken, handle.value = ctypes.c_void_p(handle.value), None
        return taken if taken.value else None


@dataclass
class Team:
    """What one backend has on one group and device in this process.

    main: the communicator of all ranks.  edges: one more for each edge that send and recv use, (from, to).
    calls: how many calls on all ranks were made, the same number on each; a rank that closes publishes it.
    said: whether the store has taken that number.
    failure: what ended the team; raised: whether a caller has got that error.
    sending: (destination, send) of messages on their way; a send's result is the event after it on the device.
    pending: (event, deadline, collective) of work that the device has not finished.
    """

    machine: Machine
    group: Group
    device: torch.device
    live: Live
    main: Channel
    edges: dict[tuple[int, int], Channel] = field(default_factory=dict)
    senders: dict[int, Worker] = field(default_factory=dict)
    sending: deque[tuple[int, Future[Any]]] = field(default_factory=deque)
    pending: deque[tuple[Any, float, str]] = field(default_factory=deque)
    calls: int = 0
    said: bool = False
    failure: FcommError | None = None
    raised: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def rank(self) -> int:
        return self.group.rank or 0

    def channels(self) -> list[Channel]:
        """Edges first, in an order that all ranks share."""
        return [*(self.edges[edge] for edge in sorted(self.edges)), self.main]

    def poll(self, library: Library, channel: Channel) -> int:
        """The library's asynchronous status of a communicator."""
        with channel.polling:
            if channel.ended:
                raise FcommError("the communicator was aborted")
            if not channel.handle.value:
                return 0  # it has ended since the caller looked
            return self.machine.poll(library, channel.handle)

    def where(self, op: str) -> str:
        """The beginning of an error's text."""
        group, backend = self.group, self.machine.name
        return f"{op}: on group '{group.name}' of backend '{backend}', rank {self.rank} of {group.size}"

    # The group's store. Each call raises NoAnswerError after limit_s seconds without an answer; look: as in Live.ask.

    def read(self, what: str, limit_s: float, look: Callable[[], None] = lambda: None) -> bytes | None:
        """The value that this team's ranks share under a key of the group's store, or None.

        It polls and does not wait, because a store's client serves one call at a time, and other threads use it too.
        """
        key = self._key(what)
        return self.live.ask(lambda store: bytes(store.get(key)) if store.check([key]) else None, limit_s, look)

    def write(self, what: str, value: bytes, limit_s: float, look: Callable[[], None] = lambda: None) -> None:
        key = self._key(what)
        self.live.ask(lambda store: store.set(key, value), limit_s, look)  # type: ignore[arg-type]  # it stores bytes

    def count(self, what: str, limit_s: float) -> int:
        """The number of calls by all ranks, this one included."""
        key = self._key(what)
        return self.live.ask(lambda store: store.add(key, 1), limit_s)

    def erase(self, what: str, limit_s: float) -> None:
        key = self._key(what)
        self.live.ask(lambda store: store.delete_key(key), limit_s)

    def _key(self, what: str) -> str:
        return f"{self.machine.name}/{self.device.type}/{what}"


# --- the device ---------------------------------------------------------------------------------------------------

# Host memory has no streams, but a library refuses a null one. So this is some memory that lives as long as the module.
_NO_STREAM = ctypes.create_string_buffer(64)


def stream_of(device: torch.device) -> int:
    """The current stream's handle, for C."""
    if device.type == "cpu":
        return ctypes.addressof(_NO_STREAM)
    stream = torch.get_device_module(device).current_stream(device)
    return int(getattr(stream, f"{device.type}_stream"))


def record_event(device: torch.device) -> Any:
    """An event after what the current stream has so far; None on host memory and while a graph is captured."""
    if device.type == "cpu" or is_capturing(device):
        return None
    return torch.get_device_module(device).current_stream(device).record_event()


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


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Make the device the current one: a communicator belongs to it."""
    if device.type == "cpu":
        yield
    else:
        with torch.get_device_module(device).device(device):
            yield
