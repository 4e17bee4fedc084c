"""Where the launcher put this process, the store that the ranks share, and how each learns that all have arrived.

The store carries short texts in a fixed form, never pickles: each rank's claim, and the first error that any rank
found, so that all of them report it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fcomm import processes
from fcomm.backends.worker import apart
from fcomm.errors import RendezvousError, printable

T = TypeVar("T")

LOG = logging.getLogger("fcomm")

_SLICE_S = 0.25  # how often a waiting rank looks for an error that another one reported
_TOLD_S = 20.0  # how long rank 0 stays, at most, so that the others can read an error
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class NoAnswerError(RuntimeError):
    """The process that serves the store does not answer: it is stopped, or a forked child holds its sockets."""


@dataclass(frozen=True)
class Place:
    """A process's place among its peers, and where their store is. serve: this process serves it.

    function: the public function that errors name.
    """

    function: str
    rank: int
    size: int
    host: str
    port: int
    serve: bool

    @property
    def settings(self) -> tuple[str, str]:
        """The names of the settings by which the user gives host and port."""
        return ("MASTER_ADDR", "MASTER_PORT") if self.function == "init" else ("host", "port")


def launcher_place(env: Mapping[str, str]) -> Place | None:
    """The place that a launcher's environment states, or None without a launcher."""
    nodes = local = ""
    if "RANK" in env and "WORLD_SIZE" in env:
        names, job = ("RANK", "WORLD_SIZE"), None
    elif "OMPI_COMM_WORLD_RANK" in env:
        names, job = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), env.get("PMIX_NAMESPACE")
        local = "OMPI_COMM_WORLD_LOCAL_SIZE"
    elif "PMI_RANK" in env:
        names, job, local = ("PMI_RANK", "PMI_SIZE"), env.get("PMI_JOBID") or env.get("PMI_PORT"), "MPI_LOCALNRANKS"
        if job is None and env.get(local) == env["PMI_SIZE"]:
            job = f"child of {os.getppid()}"  # MPICH's Hydra names the job by a pipe; its proxy is every rank's parent
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        names, job = ("SLURM_PROCID", "SLURM_NTASKS"), f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    else:
        return None
    rank, size = (_number(env, name) for name in names)
    if not 0 <= rank < size:
        raise RendezvousError(
            f"init: the environment says {names[0]}={rank} of {names[1]}={size}; correct or unset both"
        )
    if size == 1:
        return Place("init", 0, 1, "", 0, False)
    several_hosts = local in env and _number(env, local) != size
    host = env.get("MASTER_ADDR") or first_host(nodes)
    if not host and not nodes and not several_hosts and job is not None:
        host = _LOOPBACK[0]
    if not host or ("MASTER_PORT" not in env and job is None):
        raise RendezvousError(
            f"init: {names[0]} and {names[1]} say rank {rank} of {size}, but not where the ranks meet; "
            "set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, on every rank"
        )
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else 20000 + int(digest(job), 16) % 12000
    if not 0 < port < 2**16:
        raise RendezvousError(
            f"init: MASTER_PORT is {port} in the environment; set it to a free port of rank 0's host, 1 .. 65535, the "
            "same on every rank"
        )
    # Under torchrun the agent serves the store and every rank is a client.
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place("init", rank, size, host, port, serve=rank == 0 and not agent)


def _number(env: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", env.get(name, "")):
        raise RendezvousError(f"init: {name} is {env.get(name)!r} in the environment; set it to a number")
    return int(env[name])


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: "node[03-05,9],gpu1" -> "node03"."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return found[1] + (found[2] or "") if found else ""


def digest(*parts: object) -> str:
    """A short name made of some values, the same in every process."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def join(place: Place, prefix: str, name: str, timeout_s: float) -> tuple[dist.Store, tuple[str, ...]]:
    """Once every rank has reported there: the store shared by place's ranks, under prefix, and the ranks' identities.

    Raises RendezvousError naming the missing, duplicate or disagreeing ranks.
    """
    if place.serve:
        return _join(place, prefix, name, timeout_s)
    try:  # longer than timeout_s: a late rank is still told the error that the others found
        return answer(apart(lambda: _join(place, prefix, name, timeout_s)), timeout_s + 8 * _SLICE_S)
    except NoAnswerError as error:
        raise _no_store(place, timeout_s, "its process may be stopped") from error


def _join(place: Place, prefix: str, name: str, timeout_s: float) -> tuple[dist.Store, tuple[str, ...]]:
    deadline = time.monotonic() + timeout_s
    claim = f"{place.size} {processes.identity()} {socket.gethostname()} {os.urandom(8).hex()}"
    while True:
        store = dist.PrefixStore(prefix, _connect(place, max(0.01, deadline - time.monotonic()), timeout_s))
        try:
            return store, _meet(store, name, place, claim, deadline, timeout_s)
        except dist.DistNetworkError as error:
            # The store disappeared: it was that of an earlier group at this address. Rank 0 makes the next one.
            if time.monotonic() > deadline or place.serve:
                raise RendezvousError(
                    f"{place.function}: rank {place.rank} of '{name}' lost the store at {place.host}:{place.port}; "
                    "look at the log of rank 0"
                ) from error
            time.sleep(0.05)


# --- the store ----------------------------------------------------------------------------------------------------


def loopback_store(timeout_s: float) -> tuple[dist.Store, int]:
    """A store served by this process on a free port of the loopback interface, and that port."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1", port, None, True, timedelta(seconds=timeout_s), False, master_listen_fd=listener.detach()
    )
    return store, port


def _connect(place: Place, left_s: float, timeout_s: float) -> dist.Store:
    options: dict[str, Any] = {"timeout": timedelta(seconds=left_s), "wait_for_workers": False}
    if place.serve:
        # TCPStore listens on every interface, whatever host it is given; give it a socket that does not.
        options["master_listen_fd"] = _listener(place).detach()
    try:
        return dist.TCPStore(place.host, place.port, None, place.serve, **options)
    except (RuntimeError, OSError) as error:
        raise _no_store(place, timeout_s, str(error).splitlines()[0][:200]) from error


def _no_store(place: Place, timeout_s: float, reason: str) -> RendezvousError:
    return RendezvousError(
        f"{place.function}: rank {place.rank} of {place.size} got no store at {place.host}:{place.port} within "
        f"{timeout_s} s; check {', '.join(place.settings)} and that rank 0 runs ({reason})"
    )


def _listener(place: Place) -> socket.socket:
    """A socket that listens only on the interface of place.host."""
    backlog = max(128, place.size)
    try:
        family, _, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=backlog)
    except OSError as error:
        if place.host in _LOOPBACK or error.errno == errno.EADDRINUSE:
            raise RendezvousError(
                f"{place.function}: port {place.port} on {place.host} is taken or refused ({_reason(error)}); "
                f"set {place.settings[1]} to a free port, the same on every rank"
            ) from error
        # An address that leads here through another host, such as that of a Kubernetes service.
        LOG.warning("%s is no address of this host; the store listens on all interfaces", place.host)
        return socket.create_server(("", place.port), backlog=backlog)


# --- arrival ------------------------------------------------------------------------------------------------------


def _meet(store: dist.Store, name: str, place: Place, claim: str, deadline: float, timeout_s: float) -> tuple[str, ...]:
    """Claim this rank's number and wait for the others: a wrong launch is reported here, not in a collective."""
    keys = [f"claim/{r}" for r in range(place.size)]
    holder = _text(store.compare_set(keys[place.rank], "", claim))
    if holder != claim:
        _give_up(
            store,
            place,
            f"rank {place.rank} of '{name}' joined twice at {place.host}:{place.port}, as {_who(holder)} and "
            f"{_who(claim)}; give each process its own rank, or a fresh {place.settings[1]} to each run",
        )
    while not wait_for_keys(store, keys, _SLICE_S):
        here = [r for r, key in enumerate(keys) if store.check([key])]
        _compare_sizes(store, name, place, here)
        _raise_reported(store, place)
        if time.monotonic() > deadline:
            missing = sorted(set(range(place.size)) - set(here))
            _give_up(
                store,
                place,
                f"of {place.size} ranks of '{name}', ranks {missing} did not arrive within {timeout_s} s; "
                "look at their logs, or raise timeout_s",
                missing,
            )
    _compare_sizes(store, name, place, range(place.size))
    identities = tuple(_text(store.get(key)).split(" ")[1] for key in keys)
    store.set(f"seen/{place.rank}", "")
    if place.serve:
        # The others still have to read the claims, and this process may be about to end.
        wait_for_keys(store, [f"seen/{r}" for r in range(place.size)], max(_SLICE_S, deadline - time.monotonic()))
    return identities


def answer(future: Future[T], limit_s: float, look: Callable[[], None] = lambda: None) -> T:
    """The result of a store call made in another thread: torch does not bound such a call, nor does Ctrl-C end it.

    look: called once per slice until then; may raise. Raises NoAnswerError after limit_s seconds.
    """
    deadline = time.monotonic() + limit_s
    while not wait([future], min(_SLICE_S, max(0.0, deadline - time.monotonic()))).done:
        if time.monotonic() > deadline:
            raise NoAnswerError(f"the store did not answer within {limit_s:.3g} s")
        look()
    return future.result()


def wait_for_keys(store: dist.Store, keys: list[str], limit_s: float) -> bool:
    """Whether all keys are set within the limit. It polls, because store.wait logs a warning whenever they are not."""
    deadline, pause = time.monotonic() + limit_s, 1e-3
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 2e-2)
    return True


def _compare_sizes(store: dist.Store, name: str, place: Place, ranks: Sequence[int]) -> None:
    sizes = {r: _text(store.get(f"claim/{r}")).split(" ")[0] for r in ranks}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"rank {r} says {size}" for r, size in sizes.items())
        _give_up(
            store, place, f"the ranks of '{name}' disagree on its size: {said}; start all with the same size", ranks
        )


def _give_up(store: dist.Store, place: Place, text: str, culprits: Sequence[int] = ()) -> None:
    """Raise the error that the first rank found, once the other ranks that have arrived had time to read it."""
    text = _text(store.compare_set("error", "", text))
    with suppress(dist.DistError):
        store.set(f"told/{processes.identity()}", "")
    if place.serve:
        _wait_until_told(store, place)
    raise RendezvousError(f"{place.function}: {text}", rank=place.rank, culprits=culprits)


def _wait_until_told(store: dist.Store, place: Place) -> None:
    """Stay until the others know why: this process may be about to end, and the store with it."""
    began = time.monotonic()
    while time.monotonic() - began < _TOLD_S:
        claims = {r: _text(store.get(f"claim/{r}")) for r in range(place.size) if store.check([f"claim/{r}"])}
        told = all(
            store.check([f"told/{who}"]) or store.check([f"seen/{r}"]) or processes.has_ended(who)
            for r, claim in claims.items()
            for who in claim.split(" ")[1:2]
        )
        # Ranks that arrive only now, or that claim another's number, get a moment too.
        if told and time.monotonic() - began > 8 * _SLICE_S:
            return
        time.sleep(0.02)


def _raise_reported(store: dist.Store, place: Place) -> None:
    if store.check(["error"]):
        _give_up(store, place, "")


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _text(value: bytes | str) -> str:
    return printable(value if isinstance(value, str) else value.decode(errors="replace"))


def _who(claim: str) -> str:
    _, who, host, *_ = [*claim.split(" "), "?", "?", "?"]
    return f"{processes.process(who)} on {host}"
