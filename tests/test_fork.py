"""Groups when processes fork and end: a child gets an error, its parent goes on, and nothing hangs at the exit."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rendezvous import sum_of_ranks

import fcomm
from fcomm import Group
from fcomm.rendezvous import live
from fcomm.testing import run_ranks


def in_child(work: Callable[[], Any], timeout_s: float = 60) -> int:
    """Exit status of a forked child that does some work and then ends as a Python program does.

    A child that does not end within timeout_s is killed, after it has shown its traceback; the error says what it did.
    """
    pid = fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.enable()
            status = int(work() or 0)
        except BaseException as error:
            sys.stderr.write(f"child: {type(error).__name__}: {error}\n")
        finally:
            ctypes.pythonapi.Py_Exit(status)  # finalises the interpreter, unlike the end of a multiprocessing child
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    state = " ".join(Path(f"/proc/{pid}/{name}").read_text().strip() for name in ("stat", "wchan"))
    os.kill(pid, signal.SIGABRT)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a forked child did not end within {timeout_s} s; its /proc stat and wchan: {state}")


def fork(within_s: float = 10) -> int:
    """os.fork, tried again if the child hangs inside it.

    A thread of gloo enters Python when its work is done. If it holds the lock of Python's list of threads at that
    moment, the child waits for the lock inside os.fork for ever: python/cpython#112275, fixed in 3.11.10.
    """
    for _ in range(3):
        time.sleep(0.05)  # until gloo's thread is quiet, if it gets a core
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, b"+")
        os.close(writing)
        here = pid == 0 or bool(select.select([reading], [], [], within_s)[0])
        os.close(reading)
        if here:
            return pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise TimeoutError("three children hung in os.fork")


def test_a_child_that_hangs_in_fork_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    forks: list[int] = []
    real = os.fork

    def hangs_once() -> int:
        forks.append(0)
        pid = real()
        while pid == 0 and len(forks) == 1:
            time.sleep(60)
        return pid

    monkeypatch.setattr(os, "fork", hangs_once)
    pid = fork(1.0)
    if pid == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(forks) > 1


def forked(world: Group) -> list[str]:
    failures = []
    before = sum_of_ranks(world)

    def child() -> int:
        expected = (
            f"all_reduce: group 'world' was created in process {os.getppid()}, this is its forked child {os.getpid()}"
        )
        try:
            sum_of_ranks(world)
        except fcomm.GroupClosedError as error:
            return 0 if str(error).startswith(expected) else 2
        return 3

    for turn in range(3):
        status = in_child(child)
        if status != 0:
            failures.append(f"turn {turn}: the child ended with {status}")
        if sum_of_ranks(world) != before:
            failures.append(f"turn {turn}: the parent's group does not work any more")
    return failures


def test_a_forked_child_is_told_and_leaves_its_parent_alone() -> None:
    run_ranks(forked, 2)


def exits(world: Group, times: int) -> list[str]:
    failures = []
    for turn in range(times):

        def program(turn: int = turn) -> int:
            group = fcomm.init(name=f"turn {turn}", timeout_s=45)
            right = sum_of_ranks(group) == 1
            if turn % 3 == 0:
                fcomm.close()
            if turn % 3 == 1:
                fcomm.send(torch.ones(3), group, fcomm.c10d)
                fcomm.recv(torch.ones(3), group, fcomm.c10d)
            return 0 if right else 4

        status = in_child(program)
        if status != 0:
            failures.append(f"turn {turn}: ended with {status}")
    return failures


def test_eight_processes_end_with_and_without_closing() -> None:
    run_ranks(exits, 2, 4)


def test_a_group_closes_at_the_exit_of_a_process_that_inherited_no_exit_functions(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As multiprocessing's children do from 3.13 on."""

    def program() -> int:
        atexit._clear()
        group = fcomm.init(name="left open")
        live(group).communicator("it", lambda: "it", lambda it: os.write(2, f"{it} closed".encode()))
        return 0

    assert in_child(program) == 0
    assert "it closed" in capfd.readouterr().err


@pytest.mark.long
def test_two_hundred_processes_end_with_and_without_closing() -> None:
    run_ranks(exits, 2, 100, timeout_s=500)
