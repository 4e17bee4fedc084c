"""run: call a function in N processes on this machine, return their results in rank order, and keep the deadline."""

from __future__ import annotations

import copyreg
import io
import multiprocessing as mp
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple, TypeVar

import torch

from fcomm.bootstrap import loopback_store
from fcomm.errors import ArgumentError, CollectiveTimeoutError, FcommError, GroupPoisonedError, PeerDiedError
from fcomm.rendezvous import check_timeout, close, init

T = TypeVar("T")

# After the first failure the other ranks get this long to fail by themselves, so that their errors can be shown too.
_GRACE_S = 2.0
# The server process reports at once how a rank ended, unless it gets no core.
_STATUS_S = 10.0
# Imported by the server process, which forks the ranks.
_PRELOAD = ["fcomm.launch"]
# Exit code of a rank that was started while it read the script that starts it.
_UNGUARDED = 113
# Errors that are consequences of another rank's error.
_CONSEQUENCES = (CollectiveTimeoutError.__name__, PeerDiedError.__name__, GroupPoisonedError.__name__)

_in_rank = False


class _Failure(NamedTuple):
    kind: str
    summary: str
    text: str


def run(fn: Callable[..., T], size: int, *args: Any, timeout_s: float = 120.0) -> list[T]:
    """Call fn(world, *args) in `size` processes on this machine and return their results in rank order.

    fn, args and results are pickled, so fn must be a function of a module or script, not a lambda; tensors are passed
    by value. A script must call run under `if __name__ == "__main__":`. Every process has this one's environment plus
    what torchrun would add to it, and one torch thread unless OMP_NUM_THREADS says otherwise. The world's deadline is
    three quarters of timeout_s, so that a collective that waits in vain can still report it.

    Raises FcommError with the first failing rank's own traceback, CollectiveTimeoutError after timeout_s seconds;
    in both cases, and on KeyboardInterrupt, all processes that were started have ended when it raises.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(f"run: size is {size!r}; pass a positive int")
    check_timeout("run", timeout_s)
    if mp.current_process().name.startswith("fcomm-rank-") and not _in_rank:
        # This process imports the script to find fn in it. Starting ranks here would go on without end.
        os._exit(_UNGUARDED)
    call = _pickled(fn, args)
    store, port = loopback_store(timeout_s)
    # A clean server process imports torch once and forks a rank in milliseconds; forking this one would copy its
    # threads.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    processes: list[ForkServerProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(call, _environment(rank, size, port), timeout_s, theirs),
                name=f"fcomm-rank-{rank}",
            )
            # Append before the start, since Ctrl-C may come between any two lines.
            processes.append(process)
            pipes.append(ours)
            process.start()
            theirs.close()
        return _collect(processes, pipes, timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            if process.pid is not None:  # it was started
                process.join()
        for pipe in pipes:
            pipe.close()
        del store


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The call as bytes, or an error before anything is started."""
    name = getattr(fn, "__qualname__", repr(fn))
    if not callable(fn):
        raise TypeError(f"run: fn is {fn!r}; pass a function fn(world, *args)")
    main = sys.modules["__main__"]
    if getattr(fn, "__module__", None) == "__main__" and not os.path.isfile(getattr(main, "__file__", None) or ""):
        raise ArgumentError(f"run: {name} is not in a file, where the ranks could import it; put it into a module")
    try:
        return _dumps((fn, args))
    except Exception as error:
        raise ArgumentError(
            f"run: {name} or its arguments cannot be pickled ({error}); "
            "pass a function defined at the top of a module, and what it closes over as arguments"
        ) from error


def _dumps(value: Any) -> bytes:
    """value as bytes; tensors by value, since torch's own pickler shares storages, which disappear with the process."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.UntypedStorage: _reduce_storage}
    pickler.dump(value)
    return buffer.getvalue()


def _reduce_storage(storage: torch.UntypedStorage) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
    # The storage of a tensor of a newer dtype (uint16, float8): torch fails to pickle it, but can save it.
    buffer = io.BytesIO()
    torch.save(storage, buffer)
    return _load_storage, (buffer.getvalue(),)


def _load_storage(saved: bytes) -> torch.UntypedStorage:
    return torch.load(io.BytesIO(saved))  # type: ignore[no-any-return]


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    # The forkserver keeps the environment that it was started with, so the current one is passed along.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    return inherited | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank_main(call: bytes, environment: dict[str, str], timeout_s: float, pipe: Connection) -> None:
    global _in_rank  # noqa: PLW0603  a process is a rank from here on
    _in_rank = True
    threading.Thread(target=_end_with_caller, name="fcomm-caller", daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    try:
        threads, *_ = environment.get("OMP_NUM_THREADS", "1").split(",")  # a list has one number per nesting level
        torch.set_num_threads(int(threads))
        fn, args = pickle.loads(call)
        world = init(timeout_s=0.75 * timeout_s)
        result = fn(world, *args)
        close()
        message = _dumps((True, result))
    except BaseException as error:
        summary = f"{type(error).__name__}: {error}"
        message = pickle.dumps((False, _Failure(type(error).__name__, summary, traceback.format_exc())))
    pipe.send_bytes(message)
    pipe.close()


def _end_with_caller() -> None:
    """End with the caller: once killed, it cannot kill its ranks, and the server process lives as long as they."""
    caller = mp.parent_process()
    if caller is not None:
        caller.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _collect(processes: list[ForkServerProcess], pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
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
        causes = [r for r, failure in failures.items() if failure.kind not in _CONSEQUENCES]
        rank = [*causes, *failures][0]
        others = "".join(f"\nrank {r}: {failure.summary}" for r, failure in failures.items() if r != rank)
        raise FcommError(f"run: rank {rank} of {len(pipes)} failed:\n{failures[rank].text}{others}")
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
        process.join(_STATUS_S)
        code = process.exitcode
        if code == _UNGUARDED:
            raise FcommError(
                "run: the script calls fcomm.run while its ranks import it; put the call under "
                '`if __name__ == "__main__":`'
            ) from None
        cause = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return False, _Failure("", cause, f"the process ended without a result: {cause}")
