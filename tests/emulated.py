"""A double's backend as if its tensors were on a device: the current device, streams and events, on host memory.

The double "nccl-device" takes calls at once and does them later, as a device does, so tests keep a call's tensors until
it is done. Unlike on a device, calls of two communicators on one stream run side by side.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vendors import backend, control

import fcomm
from fcomm.backends import communicator, lowering
from fcomm.backends.machine import Team, synchronize
from fcomm.rendezvous import live

DEVICE = torch.device("cuda", 0)


def emulate(double: str) -> fcomm.Backend:
    """The double's backend; from now on, everything it has in this process is on DEVICE, and so is this thread."""
    module, zeros, get_module = _module(control(double)), torch.zeros, torch.get_device_module
    module.set_device(True)
    patched: Any = torch
    patched.get_device_module = lambda device=None: module if device == DEVICE else get_module(device)
    patched.zeros = lambda *size, device=None, **kw: zeros(*size, device=None if device == DEVICE else device, **kw)
    lowering.team = lambda machine, group, _: communicator.team(machine, group, DEVICE)
    lowering.synchronize = lambda _: synchronize(DEVICE)
    return backend(double)


def team(group: fcomm.Group) -> Team:
    """The emulated backend's team on the group."""
    (found,) = [made for made, *_ in live(group)._communicators.values()]
    assert isinstance(found, Team)
    return found


def _module(lib: ctypes.CDLL) -> Any:
    """What torch.get_device_module returns for a device; each thread has its own stream."""
    works_later = hasattr(lib, "double_reached")
    set_device = getattr(lib, "double_set_device", lambda has: None)
    here = threading.local()

    class Event:
        def __init__(self) -> None:
            self.stream = threading.get_ident()
            self.number = lib.double_issued() if works_later else 0

        def query(self) -> bool:
            return not works_later or bool(lib.double_reached(self.stream, self.number))

    class Stream:
        record_event = Event

        def __init__(self, device: torch.device) -> None:
            self.cuda_stream = threading.get_ident()

        def synchronize(self) -> None:
            event = Event()
            while not event.query():
                time.sleep(0.01)

    def on_device(has: bool) -> None:
        here.has_device = has
        set_device(int(has))

    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        before = getattr(here, "has_device", False)
        on_device(True)
        try:
            yield
        finally:
            on_device(before)

    return SimpleNamespace(current_stream=Stream, device=device, set_device=on_device)
