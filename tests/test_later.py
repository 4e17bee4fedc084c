"""What goes on after a call has returned, in moments that only a device would show, each set up by hand."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import fcomm
from fcomm import processes
from fcomm.backends import communicator, failure, later
from fcomm.backends.machine import Channel, Team
from fcomm.backends.worker import start_worker


def test_a_send_that_ends_just_after_the_wait_for_it_was_taken() -> None:
    class Late(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            if timeout is not None:
                self.set_result(None)
                raise TimeoutError

    nobody: Any = None
    assert later._was_taken(nobody, 1, Late(), deadline=time.monotonic() - 1)


def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Team]:
    """Teams on a device that has finished all its work."""
    event = SimpleNamespace(query=lambda: True)
    stream = SimpleNamespace(record_event=lambda: event)
    module = SimpleNamespace(current_stream=lambda device: stream, device=nullcontext)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    machine: Any = SimpleNamespace(load=lambda: None)
    owner: Any = None
    return lambda: Team(machine, fcomm.Group("g", (0, 1), 0), torch.device("cuda"), owner, Channel("main", (0, 1)))


def test_one_thread_watches_however_often_groups_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    team = on_device(monkeypatch)
    for _ in range(5):
        on = team()
        later.watch(on, "all_reduce", 0.0)
        later.forget(on)
    assert sum(thread.name == "fcomm-watch" for thread in threading.enumerate()) == 1


def test_a_worker_without_a_thread_makes_its_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.12 starts no thread while it exits, when groups are closed."""

    def refuse(text: str) -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(threading.Thread, "start", start)

    refuse("can't create new thread at interpreter shutdown")
    worker, calls = start_worker(), []
    worker.submit(lambda: calls.append(1))
    assert worker.submit(lambda: calls.append(2) or len(calls)).result(0) == 2
    worker.stop()
    refuse("can't start new thread")
    with pytest.raises(RuntimeError):
        start_worker()


def test_a_call_at_the_exit_goes_without_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    on = on_device(monkeypatch)()
    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(later, "_watcher", None)
    later.watch(on, "all_reduce", 0.0)
    later.forget(on)
    assert later._watcher is None


def test_the_watch_goes_on_past_a_group_that_opens_and_one_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    team, looked = on_device(monkeypatch), threading.Semaphore(0)
    opens, breaks, last = team(), team(), team()
    gave_up: list[tuple[Team, str]] = []

    def look_around(on: Team, op: str, deadline: float, needed: set[int]) -> None:
        if on is breaks:
            raise RuntimeError("the driver does not answer")
        looked.release()

    monkeypatch.setattr(later, "look_around", look_around)
    monkeypatch.setattr(later, "give_up", lambda on, op, library, error, among, heard: gave_up.append((on, str(error))))
    with opens.main.lock:  # like a call that waits for the other ranks
        for on in (opens, breaks, last):
            later.watch(on, "all_reduce", 0.0)
        for _ in range(2):
            assert looked.acquire(timeout=10)
        for on in (opens, breaks, last):
            later.forget(on)
    assert gave_up[0] == (breaks, "the driver does not answer")


@pytest.mark.parametrize("ends", [True, False])
def test_what_the_device_finishes_during_the_look_at_the_others_is_done(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """A rank may end after its part of the last call, between another's checks of its device and of the ranks."""
    on, passed, library = on_device(monkeypatch)(), threading.Event(), SimpleNamespace(codes=None)

    def look_around(*args: object) -> None:
        if ends:
            passed.set()
        raise fcomm.PeerDiedError("rank 0 ended")

    monkeypatch.setattr(communicator, "look_around", look_around)
    event: Any = SimpleNamespace(query=passed.is_set)
    with nullcontext() if ends else pytest.raises(fcomm.PeerDiedError):
        communicator._settle(on, "close", on.main, library, time.monotonic() - 1, event)


def test_without_its_store_a_rank_that_ended_fails_the_calls_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that serves the store may close and end, while others close too, or have not called since."""

    class Lost:
        def check(self, *args: object) -> None:
            raise RuntimeError("Connection reset by peer")

    on = on_device(monkeypatch)()
    owner: Any = SimpleNamespace(
        identities=["here/1/1", "here/2/2"], ask=lambda call, *limits: call(Lost()), silent=False
    )
    on.live, on.machine = owner, cast("Any", SimpleNamespace(name="nccl"))
    asked: list[str] = []
    monkeypatch.setattr(processes, "has_ended", lambda who: asked.append(who) or who == "here/1/1")
    for op in ("close", "send", failure.BETWEEN):
        failure.look_around(on, op, math.inf, (0, 1))
    asked.clear()
    failure.look_around(on, "recv", math.inf, (1,))
    assert asked == ["here/2/2"]  # checking a rank costs reading a file
    with pytest.raises(fcomm.PeerDiedError, match=r"rank 0 \(process 1\) ended") as caught:
        failure.look_around(on, "recv", math.inf, (0, 1))
    assert caught.value.culprits == (0,)
