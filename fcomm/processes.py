"""Which process is which: an identity in one word, so that a peer on the same host can see whether it has ended."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path


def identity() -> str:
    """host/process id/start time of this process. Process ids are reused, identities are not."""
    pid = os.getpid()
    return f"{_host()}/{pid}/{_start(pid)}"


def host(who: str) -> str:
    """The host of an identity; equal on processes that share a loopback interface."""
    return who.split("/", maxsplit=1)[0]


def process(who: str) -> str:
    """An identity in words."""
    return f"process {[*who.split('/'), '?'][1]}"


def has_ended(who: str) -> bool:
    """Whether that process of this host has ended. False of other hosts, of which nothing is known."""
    if not who.startswith(f"{_host()}/"):
        return False
    _, number, start = [*who.split("/"), ""][:3]
    return number.isdigit() and _start(int(number)) != start


def ended(identities: Sequence[str], among: Iterable[int] | None = None) -> list[int]:
    """The ranks whose processes have ended, as far as this host knows: of all, or of some."""
    ranks = range(len(identities)) if among is None else sorted(among)
    return [r for r in ranks if r < len(identities) and has_ended(identities[r])]


def named(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


@functools.cache
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
