"""run: a function on N processes of this machine, their results in rank order, and a deadline that holds."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
import torch.distributed as dist

from fcomm.errors import CollectiveTimeoutError, FcommError
from fcomm.rendezvous import close, init

# After the first failure the other ranks get this long to fail by themselves, so that their errors can be shown too.
_GRACE_S = 2.0


def run(fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call fn(world, *args) in `size` processes on this machine; their results, in rank order.

    fn and args are pickled, so fn is a module-level function; results come back by value. Every process has the
    environment that torchrun would give it, and one torch thread unless OMP_NUM_THREADS says otherwise.

    Raises FcommError with the first failing rank's own traceback, CollectiveTimeoutError after timeout_s seconds;
    in both cases every process that was started is gone when it raises.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise FcommError(f"run: size is {size!r}; pass a positive int")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1", port, None, True, timedelta(seconds=timeout_s), False, master_listen_fd=listener.detach()
    )
    # A clean server process imports torch once and forks a rank in milliseconds; forking this one would copy its threads.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["fcomm.launch"])
    processes: list[ForkServerProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(fn, args, rank, size, port, timeout_s, theirs), name=f"fcomm-rank-{rank}"
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(processes, pipes, timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()
        del store


def _rank_main(
    fn: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, port: int, timeout_s: float, pipe: Connection
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        world = init(timeout_s=timeout_s)
        outcome = (True, fn(world, *args))
        close()
        # By value: torch would otherwise share storages that die with this process.
        message = pickle.dumps(outcome)
    except BaseException as error:
        message = pickle.dumps((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))
    pipe.send_bytes(message)
    pipe.close()


def _collect(processes: list[ForkServerProcess], pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, tuple[str, str]] = {}
    open_ranks = set(range(len(pipes)))
    while open_ranks:
        limit = deadline - time.monotonic()
        ready = wait([pipes[r] for r in open_ranks], max(0.0, limit))
        if not ready:
            break
        for rank in [r for r in open_ranks if pipes[r] in ready]:
            open_ranks.remove(rank)
            ok, value = _receive(processes[rank], pipes[rank])
            (results if ok else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        rank = next(iter(failures))
        others = "".join(f"\nrank {r}: {failures[r][0]}" for r in list(failures)[1:])
        raise FcommError(f"run: rank {rank} of {len(pipes)} failed:\n{failures[rank][1]}{others}")
    if open_ranks:
        raise CollectiveTimeoutError(
            f"run: ranks {sorted(open_ranks)} of {len(pipes)} did not finish within {timeout_s} s and were killed; "
            "look for a collective that not every rank calls, or raise timeout_s"
        )
    return [results[rank] for rank in range(len(pipes))]


def _receive(process: ForkServerProcess, pipe: Connection) -> tuple[bool, Any]:
    try:
        ok, value = pickle.loads(pipe.recv_bytes())
        return ok, value
    except EOFError:
        process.join(_GRACE_S)
        code = process.exitcode
        cause = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return False, (cause, f"the process ended without a result: {cause}")
