"""Ranks that disagree, come late, are interrupted, fork, lack descriptors, or leave: they and the others get errors."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from deadlines import hasten, tell, wait_for_word
from test_kill import everyone

import fcomm
from fcomm import processes
from fcomm.backends import shm_failure
from fcomm.backends.pool import native
from fcomm.testing import run_ranks

pytestmark = pytest.mark.skipif(native is None, reason="the engine is not built; test_cpu_without.py covers that")

# --- ranks that disagree ----------------------------------------------------------------------------------------------

f32, f64, i32 = torch.float32, torch.float64, torch.int32


def ones(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def exchange(group: fcomm.Group, backend: fcomm.Backend, expected: list[int]) -> torch.Tensor:
    return fcomm.all_to_all(ones(group.size), group, backend, send_sizes=[1] * group.size, recv_sizes=expected)


# What the odd rank does, and what the others do.
MISMATCHES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "op": (lambda g, b: fcomm.broadcast(ones(9), g, b), lambda g, b: fcomm.all_reduce(ones(9), g, b)),
    "barrier": (fcomm.barrier, lambda g, b: fcomm.all_reduce(ones(1), g, b)),
    "shape": (lambda g, b: fcomm.all_reduce(ones(900), g, b), lambda g, b: fcomm.all_reduce(ones(1000), g, b)),
    "same numel": (lambda g, b: fcomm.all_reduce(ones(5, 2), g, b), lambda g, b: fcomm.all_reduce(ones(2, 5), g, b)),
    "large": (lambda g, b: fcomm.all_reduce(ones(2**19), g, b), lambda g, b: fcomm.all_reduce(ones(2**19 + 1), g, b)),
    "dtype": (
        lambda g, b: fcomm.all_reduce(ones(9, dtype=i32), g, b),
        lambda g, b: fcomm.all_reduce(ones(9), g, b),
    ),
    "dtype width": (
        lambda g, b: fcomm.all_gather(ones(9, dtype=f64), g, b),
        lambda g, b: fcomm.all_gather(ones(9), g, b),
    ),
    "dtype of moved bytes": (
        lambda g, b: fcomm.broadcast(ones(9, dtype=i32), g, b),
        lambda g, b: fcomm.broadcast(ones(9), g, b),
    ),
    "float8": (
        lambda g, b: fcomm.all_reduce(ones(9).to(torch.float8_e5m2), g, b),
        lambda g, b: fcomm.all_reduce(ones(9), g, b),
    ),
    "redop": (
        lambda g, b: fcomm.all_reduce(ones(9), g, b, op="max"),
        lambda g, b: fcomm.all_reduce(ones(9), g, b, op="sum"),
    ),
    "root": (
        lambda g, b: fcomm.broadcast(ones(9), g, b, src=1),
        lambda g, b: fcomm.broadcast(ones(9), g, b, src=0),
    ),
    "gather shape": (lambda g, b: fcomm.all_gather(ones(3), g, b), lambda g, b: fcomm.all_gather(ones(4), g, b)),
    "gather dim": (
        lambda g, b: fcomm.all_gather(ones(3, 3), g, b, dim=1),
        lambda g, b: fcomm.all_gather(ones(3, 3), g, b),
    ),
    "tiled": (
        lambda g, b: fcomm.all_gather(ones(3), g, b, tiled=False),
        lambda g, b: fcomm.all_gather(ones(3), g, b),
    ),
    "scatter shape": (
        lambda g, b: fcomm.reduce_scatter(ones(2 * g.size), g, b),
        lambda g, b: fcomm.reduce_scatter(ones(g.size), g, b),
    ),
    "perm": (
        lambda g, b: fcomm.ppermute(ones(9), g, b, perm=[(0, 0)]),
        lambda g, b: fcomm.ppermute(ones(9), g, b, perm=everyone(g)),
    ),
    "sizes": (
        lambda g, b: fcomm.reduce_scatter(ones(g.size), g, b, sizes=[g.size, *[0] * (g.size - 1)]),
        lambda g, b: fcomm.reduce_scatter(ones(g.size), g, b, sizes=[1] * g.size),
    ),
    "send sizes": (
        lambda g, b: exchange(g, b, [1 if r == g.rank else 2 for r in range(g.size)]),
        lambda g, b: exchange(g, b, [1] * g.size),
    ),
    "scan direction": (
        lambda g, b: fcomm.scan(ones(9), g, b, reverse=True),
        lambda g, b: fcomm.scan(ones(9), g, b),
    ),
    "order": (
        lambda g, b: (fcomm.all_gather(ones(9), g, b), fcomm.all_reduce(ones(9), g, b)),
        lambda g, b: (fcomm.all_reduce(ones(9), g, b), fcomm.all_gather(ones(9), g, b)),
    ),
}  # fmt: skip


def check_mismatches(world: fcomm.Group, names: list[str]) -> list[str]:
    failures = []
    shm_failure._PATIENCE_S = 20.0  # no rank is missing
    for k, name in enumerate(names):
        odd = k % world.size
        group = fcomm.subgroup(world, range(world.size), name=f"{name} {k}", timeout_s=60)
        fcomm.barrier(group, fcomm.cpu)
        start = time.monotonic()
        try:
            MISMATCHES[name][world.rank != odd](group, fcomm.cpu)
            failures.append(f"{name}: returned normally")
        except fcomm.MismatchError as error:
            text = str(error)
            if time.monotonic() - start > 30:
                failures.append(f"{name}: took {time.monotonic() - start} s")
            if world.size > 2 and name != "send sizes" and error.culprits != (odd,):
                failures.append(f"{name}: blames {error.culprits} and not {odd}: {text}")
            if f"rank {world.rank} of {world.size}" not in text or "make every rank call the same" not in text:
                failures.append(f"{name}: {text}")
        except fcomm.FcommError as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        fcomm.barrier(world, fcomm.cpu)
        fcomm.close(group)
    return failures


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_mismatch_raises_on_all_ranks(size: int) -> None:
    names = [name for name in MISMATCHES if name != "perm" or size > 1]
    run_ranks(check_mismatches, size, names, timeout_s=200)


def check_message(world: fcomm.Group) -> list[str]:
    if world.rank == 0:
        fcomm.send(ones(3, dtype=f64), world, fcomm.cpu, dst=1)
        return []
    try:
        fcomm.recv(ones(6), world, fcomm.cpu, src=0)
    except fcomm.MismatchError as error:
        text = str(error)
        return [] if "float64[3]" in text and "float32[6]" in text else [text]
    return ["a message of another dtype was taken"]


def test_a_message_of_another_kind_is_refused() -> None:
    run_ranks(check_message, 2, timeout_s=60)


def check_words(world: fcomm.Group, late_s: float = 0.0) -> list[str]:
    """Rank 2 comes late_s after the others."""
    shm_failure._PATIENCE_S = 20.0
    x = ones(2, 3) if world.rank else ones(3, 2)
    fcomm.barrier(world, fcomm.cpu)
    if world.rank == 2:
        time.sleep(late_s)
    try:
        fcomm.all_reduce(x, world, fcomm.cpu)
    except fcomm.MismatchError as error:
        expected = (
            f"all_reduce: [rank {world.rank} of 3, group 'world'] the ranks ask for different things: "
            "rank 0: all_reduce(float32[3, 2], op='sum'); ranks 1, 2: all_reduce(float32[2, 3], op='sum'); "
            "make every rank call the same collectives in the same order with the same shapes, dtypes and options; "
            "the group is unusable now; fcomm.close it on every rank and create it again"
        )
        return [] if (str(error), error.culprits) == (expected, (0,)) else [f"{error.culprits} {error}"]
    return ["no error"]


def test_a_mismatch_quotes_what_each_rank_asked_for() -> None:
    run_ranks(check_words, 3, timeout_s=60)


def test_a_late_rank_has_its_say_in_a_mismatch() -> None:
    run_ranks(check_words, 3, 0.3, timeout_s=60)


# --- one rank, late, interrupted, forked, closed ----------------------------------------------------------------------


def check_deadline(world: fcomm.Group) -> tuple[float, float, str]:
    """When the call began and ended, and how."""
    group = fcomm.subgroup(world, range(world.size), name="hasty")
    hasten(group, fcomm.cpu, 2.0)
    late, text = (1, 3), "no error"
    if world.rank in late:
        wait_for_word(world, 0, 2)
        return 0.0, 0.0, ""
    began = time.monotonic()
    try:
        fcomm.all_reduce(ones(4), group, fcomm.cpu)
    except fcomm.CollectiveTimeoutError as error:
        good = error.culprits == late and isinstance(error, TimeoutError) and "ranks 1 (pid" in str(error)
        text = "" if good else f"{error} {error.culprits}"
    ended = time.monotonic()
    tell(world, world.rank)
    return began, ended, text


def test_the_deadline_names_all_who_are_late() -> None:
    results = run_ranks(check_deadline, 4, timeout_s=60)
    assert [text for _, _, text in results] == [""] * 4
    began, ended, _ = zip(results[0], results[2], strict=True)
    # The first to come waited for its whole deadline, and both have the same error.
    assert min(ended) - min(began) > 1.9
    assert max(ended) - max(began) < 20


def check_slow(world: fcomm.Group, calls: int) -> list[str]:
    """Slow but alive: no error, also under a storm of signals."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    group = fcomm.subgroup(world, range(world.size), name="patient", timeout_s=20.0)
    for k in range(calls):
        if world.rank == k % world.size and k % 100 == 0:
            time.sleep(0.2)
        y = fcomm.all_reduce(ones(4), group, fcomm.cpu)
        if y[0] != world.size:
            return [f"{y}"]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return []


def test_slow_ranks_and_signals_are_no_failure() -> None:
    run_ranks(check_slow, 2, 1000, timeout_s=60)


def check_interrupt(world: fcomm.Group) -> list[str]:
    fcomm.barrier(world, fcomm.cpu)
    if world.rank == 1:
        wait_for_word(world, "interrupted")
        try:
            fcomm.all_reduce(ones(4), world, fcomm.cpu)
        except fcomm.PeerDiedError as error:
            return [] if error.culprits == (0,) and "interrupted" in str(error) else [str(error)]
        return ["no error"]
    struck = []

    def strike(*_: Any) -> None:
        struck.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        fcomm.all_reduce(ones(4), world, fcomm.cpu)
    except KeyboardInterrupt:
        took = time.monotonic() - struck[0]
        return [] if took < 10 else [f"Ctrl-C took {took} s"]
    finally:
        tell(world, "interrupted")
    return ["no KeyboardInterrupt"]


def test_ctrl_c_ends_a_wait() -> None:
    run_ranks(check_interrupt, 2, timeout_s=60)


def check_interrupted_close(world: fcomm.Group) -> list[str]:
    """A message that nobody receives holds up close() until Ctrl-C."""
    group = fcomm.subgroup(world, range(2), name="sends", timeout_s=50.0)
    fcomm.barrier(group, fcomm.cpu)
    if world.rank == 1:
        wait_for_word(world, "closed")
        return []
    fcomm.send(ones(2**20), group, fcomm.cpu, dst=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
    began = time.monotonic()
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        fcomm.close(group)
        return ["no KeyboardInterrupt"]
    except KeyboardInterrupt:
        took_s = time.monotonic() - began
        return [] if took_s < 15 else [f"after {took_s} s"]
    finally:
        tell(world, "closed")


def test_ctrl_c_ends_a_close() -> None:
    run_ranks(check_interrupted_close, 2, timeout_s=60)


def check_closed_beneath(world: fcomm.Group) -> list[str]:
    """One thread closes the group in which another one waits, as the exit of the process does."""
    group = fcomm.subgroup(world, range(2), name="beneath", timeout_s=50.0)
    fcomm.barrier(group, fcomm.cpu)
    if world.rank == 1:
        wait_for_word(world, "closed")
        try:
            fcomm.all_reduce(ones(4), group, fcomm.cpu)
            return []  # its part was already there
        except fcomm.PeerDiedError as error:
            return [] if error.culprits == (0,) else [str(error)]
    texts: list[str] = []

    def waits() -> None:
        try:
            fcomm.all_reduce(ones(4), group, fcomm.cpu)
        except fcomm.GroupClosedError as error:
            texts.append(str(error))

    thread = threading.Thread(target=waits)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    fcomm.close(group)
    took_s = time.monotonic() - began
    tell(world, "closed")
    thread.join()
    return (
        []
        if took_s < 15 and texts == ["all_reduce: group 'beneath' is closed; create it again"]
        else [f"{took_s} {texts}"]
    )


def test_close_ends_the_wait_of_another_thread() -> None:
    run_ranks(check_closed_beneath, 2, timeout_s=60)


def check_fork(world: fcomm.Group) -> list[str]:
    fcomm.all_reduce(ones(4), world, fcomm.cpu)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fcomm.all_reduce(ones(4), world, fcomm.cpu)
            text = "returned"
        except fcomm.GroupClosedError as error:
            text = str(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reading, 1000).decode()
    failures = [] if "forked" in text else [f"in the child: {text}"]
    for _ in range(100):
        if fcomm.all_reduce(ones(4), world, fcomm.cpu)[0] != world.size:
            failures.append("the parent's group broke")
    return failures


def test_a_forked_child_is_told_and_does_no_harm() -> None:
    run_ranks(check_fork, 2, timeout_s=60)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def check_closed(world: fcomm.Group) -> list[str]:
    failures = []
    before = open_descriptors()
    for k in range(5):
        group = fcomm.subgroup(world, range(world.size), name="again")
        x = fcomm.all_reduce(ones(4), group, fcomm.cpu)
        if x[0] != world.size:
            failures.append(f"epoch {k}: {x}")
        fcomm.close(group)
        fcomm.close(group)
        try:
            fcomm.all_reduce(ones(4), group, fcomm.cpu)
            failures.append("a closed group works")
        except fcomm.GroupClosedError as error:
            if not str(error).endswith("group 'again' is closed; create it again"):
                failures.append(str(error))
    if open_descriptors() != before:
        failures.append(f"{before} descriptors became {open_descriptors()}")
    return failures


def test_a_closed_group_says_so_and_leaves_nothing() -> None:
    run_ranks(check_closed, 3, timeout_s=60)


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process can open only that many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + count + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for fd in held[-count:] if count else ():
            os.close(held.pop(held.index(fd)))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


def check_without_descriptors(world: fcomm.Group, poor: int) -> list[str]:
    """A rank that can open no file says so, and does not take a rank for dead that it cannot look up."""
    failures: list[str] = []
    fcomm.barrier(world, fcomm.c10d)
    for left in (0, 1, 2, 3, 4, 5):
        group = fcomm.subgroup(world, range(world.size), name=f"poor {left}", timeout_s=30.0)
        fcomm.barrier(world, fcomm.c10d)
        if world.rank == (poor + 1) % world.size:
            time.sleep(0.4)  # so that the others check the ranks
        with descriptors_left(left) if world.rank == poor else contextlib.nullcontext():
            fcomm.barrier(world, fcomm.c10d)
            try:
                fcomm.barrier(group, fcomm.cpu)
                failures.append(f"{left}: opened")
            except fcomm.FcommError as error:
                if error.culprits != (poor,) or "Too many open files" not in str(error):
                    failures.append(f"{left}: {type(error).__name__} of {error.culprits}: {error}")
    return failures


def test_a_rank_without_descriptors_says_so_and_blames_nobody() -> None:
    for poor in (0, 2):
        run_ranks(check_without_descriptors, 3, poor, timeout_s=60)


def test_nothing_is_known_of_a_process_of_another_namespace() -> None:
    host, _, start, space = processes.identity().split("/")
    assert processes.has_ended(f"{host}/{2**22 + 1}/{start}/{space}")
    assert not processes.has_ended(f"{host}/{2**22 + 1}/{start}/{space}0")


def check_left(world: fcomm.Group) -> list[str]:
    group = fcomm.subgroup(world, range(world.size), name="left")
    fcomm.barrier(group, fcomm.cpu)
    if world.rank == 1:
        fcomm.close(group)
        fcomm.barrier(world, fcomm.cpu)
        return []
    try:
        fcomm.all_reduce(ones(4), group, fcomm.cpu)
        return ["no error"]
    except fcomm.PeerDiedError as error:
        return [] if error.culprits == (1,) and "closed the group, or exited" in str(error) else [str(error)]
    finally:
        fcomm.barrier(world, fcomm.cpu)


def test_a_rank_that_closes_early_is_named() -> None:
    run_ranks(check_left, 3, timeout_s=60)
