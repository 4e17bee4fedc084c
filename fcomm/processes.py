"""Which process is which: an identity in one word, so that a peer on the same host can see whether it has ended."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def identity(pid: int | None = None) -> str:
    """host/process id/start time of a process here, by default this one. Process ids are reused, identities are not."""
    pid = os.getpid() if pid is None else pid
    return f"{_host()}/{pid}/{_start(pid)}"


def host(who: str) -> str:
    """The host of an identity; equal on processes that share a loopback interface."""
    return who.split("/", maxsplit=1)[0]


def process(who: str) -> str:
    """An identity in words."""
    return f"process {[*who.split('/'), '?'][1]}"


def has_ended(who: str) -> bool:
    """Whether that process of this host has ended. False of other hosts, of which nothing is known."""
    there, number, start = [*who.split("/"), "", ""][:3]
    return there == _host() and number.isdigit() and _start(int(number)) != start


def _host() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/net").strip("net:[]")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "." + namespace
    except OSError:
        return socket.gethostname()


def _start(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" if there is none, or it waits to be reaped."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
