"""Identities of processes, one word each, by which a peer on the same host can see whether a process has ended."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path


def identity() -> str:
    """This process's host/id/start time/namespace of the id. Process ids are reused, identities are not."""
    pid = os.getpid()
    return f"{_host()}/{pid}/{_start(pid) or ''}/{_id_namespace()}"


def host(who: str) -> str:
    """The host of an identity; equal for processes that share a loopback interface."""
    return who.split("/", maxsplit=1)[0]


def process(who: str) -> str:
    """An identity in words."""
    return f"process {[*who.split('/'), '?'][1]}"


def has_ended(who: str) -> bool:
    """Whether that process, of this host, has ended.

    False if nothing is known about it: it is on another host or in another namespace of process ids (containers of one
    pod share a network, but not these), or this process has no file descriptor left to look with.
    """
    _, number, start, namespace = [*who.split("/"), "", "", ""][:4]
    if not who.startswith(f"{_host()}/") or namespace != _id_namespace() or not (number.isdigit() and start):
        return False
    return _start(int(number)) not in (start, None)


def ended(identities: Sequence[str], among: Iterable[int] | None = None) -> list[int]:
    """The ranks, of all or of some, whose processes have ended, if this host can know."""
    ranks = range(len(identities)) if among is None else sorted(among)
    return [r for r in ranks if r < len(identities) and has_ended(identities[r])]


def stopped(identities: Sequence[str]) -> list[int]:
    """The ranks whose processes are stopped, by SIGSTOP or a debugger, say, if this host can know."""
    return [r for r, who in enumerate(identities) if not has_ended(who) and _state(who) in ("T", "t")]


def named(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


def described(identities: Sequence[str], ranks: Iterable[int]) -> str:
    """Ranks with their processes in words."""
    return ", ".join(f"rank {r} ({process(identities[r])})" for r in ranks)


def why_silent(identities: Sequence[str]) -> tuple[list[int], str]:
    """Why the group's store does not answer: the ranks that are stopped, and the cause in words."""
    found = stopped(identities)
    if found:
        return found, f"{described(identities, found)} stopped"
    return found, "the process that serves it may be stopped, or its host gone"


@functools.cache
def _host() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/net").removeprefix("net:[").removesuffix("]")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "." + namespace
    except OSError:
        return socket.gethostname()


@functools.cache
def _id_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").removeprefix("pid:[").removesuffix("]")
    except OSError:
        return ""


def _state(who: str) -> str:
    host_, number, _, namespace = [*who.split("/"), "", "", ""][:4]
    if (host_, namespace) != (_host(), _id_namespace()):
        return ""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; "" if there is none, or it is a zombie; None if unknown."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:  # for example, this process has no file descriptor left
        return None
    return "" if state in "ZX" else rest[18]
