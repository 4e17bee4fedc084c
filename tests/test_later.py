"""What goes on after a call has returned, where a device would be needed to see it: one moment, made by hand."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fcomm.backends import later
from fcomm.backends.worker import start_worker


def test_a_send_that_ends_just_after_the_wait_for_it_was_taken() -> None:
    class Late(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            if timeout is not None:
                self.set_result(None)
                raise TimeoutError

    nobody: Any = None
    assert later._was_taken(nobody, 1, Late(), deadline=time.monotonic() - 1)


def test_one_thread_watches_however_often_groups_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(query=lambda: True)
    module = SimpleNamespace(current_stream=lambda device: SimpleNamespace(record_event=lambda: event))

    def team() -> Any:
        return SimpleNamespace(device=torch.device("cuda"), lock=threading.Lock(), pending=deque())

    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
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
