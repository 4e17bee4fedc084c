"""A thread that runs calls in order, for those that may wait for another rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Worker:
    """A thread that runs calls one after the other. A daemon: a call that never returns must not keep the process."""

    tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = field(default_factory=SimpleQueue)
    started: bool = False

    def submit(self, fn: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        if self.started:
            self.tasks.put((fn, future))
        else:
            _do(fn, future)
        return future

    def stop(self) -> None:
        """Let the thread end after the calls it was given."""
        self.tasks.put(None)


def _do(fn: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(fn())
    except BaseException as error:
        future.set_exception(error)


def started(thread: threading.Thread) -> bool:
    """Start the thread; False if that is impossible: CPython 3.12 starts no thread while it exits."""
    try:
        thread.start()
    except RuntimeError as error:
        if "interpreter shutdown" not in str(error):
            raise
        return False
    return True


def start_worker() -> Worker:
    """A worker. At the exit of the process, where groups close, it has no thread: the caller makes the calls."""
    worker = Worker()

    def work() -> None:
        # Each thread has its own mode; outside it, torch refuses a copy into the caller's inference tensor.
        with torch.inference_mode():
            while (task := worker.tasks.get()) is not None:
                _do(*task)
                del task  # or it would keep a call's tensors until the next one

    worker.started = started(threading.Thread(target=work, name="fcomm", daemon=True))
    return worker


def apart(fn: Callable[[], T]) -> Future[T]:
    """fn() in a thread of its own, or in the caller's if none can be started."""
    try:
        worker = start_worker()
    except RuntimeError:  # a limit on memory or threads
        worker = Worker()
    future = worker.submit(fn)
    worker.stop()
    return future


def submit_behind(worker: Worker, x: Tensor, fn: Callable[[], T]) -> Future[T]:
    """Have the worker run fn, which reads x, on a stream of its own, after what the current stream has so far."""
    if x.device.type == "cpu":
        return worker.submit(fn)
    module = torch.get_device_module(x.device)
    before = module.current_stream(x.device).record_event()

    def task() -> T:
        with module.device(x.device):
            side = module.Stream()
            with module.stream(side):
                side.wait_event(before)
                result = fn()
        x.record_stream(side)
        return result

    return worker.submit(task)
