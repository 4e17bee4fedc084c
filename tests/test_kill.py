"""Ranks that die, stop, or raise: every survivor soon raises, names the culprit, and can start again.

A rank writes what happened to it into a file of its own, since its process may be the one that dies.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vendors
from deadlines import hasten

import fcomm
from fcomm import launch
from fcomm.backends import shm_opening
from fcomm.backends.pool import native
from fcomm.bootstrap import loopback_store
from fcomm.rendezvous import live

pytestmark = pytest.mark.skipif(native is None, reason="the engine is not built; test_cpu_without.py covers that")


def everyone(group: fcomm.Group) -> list[tuple[int, int]]:
    return [(r, (r + 1) % group.size) for r in range(group.size)]


CALLS: dict[str, Callable[[torch.Tensor, fcomm.Group], Any]] = {
    "all_reduce": lambda x, g: fcomm.all_reduce(x, g, fcomm.cpu),
    "all_gather": lambda x, g: fcomm.all_gather(x, g, fcomm.cpu),
    "reduce_scatter": lambda x, g: fcomm.reduce_scatter(x.repeat(g.size), g, fcomm.cpu),
    "all_to_all": lambda x, g: fcomm.all_to_all(x.repeat(g.size), g, fcomm.cpu),
    "ppermute": lambda x, g: fcomm.ppermute(x, g, fcomm.cpu, perm=everyone(g)),
    "broadcast": lambda x, g: fcomm.broadcast(x, g, fcomm.cpu),
    "barrier": lambda x, g: fcomm.barrier(g, fcomm.cpu, after=x),
    "recv": lambda x, g: fcomm.recv(x, g, fcomm.cpu, after=fcomm.send(x, g, fcomm.cpu)),
}


def shared_names() -> set[str]:
    # Other programs on the machine make these: Open MPI, and multiprocessing's locks.
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("vader_segment", "sem.mp-"))}


# --- one trial: processes that we may kill ----------------------------------------------------------------------------


def trial_main(rank: int, size: int, root: str, plan: dict[str, Any]) -> None:
    """Call collectives for ever; write to a file how that ends, and what a group made afterwards returns."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(plan["port"]))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the test serves the store, and outlives every rank
    world = fcomm.init(timeout_s=30.0)
    # Before anything can go wrong: the survivors' next group, which does not open before it is used.
    rest = [r for r in range(size) if r != plan["victim"]]
    after = fcomm.subgroup(world, rest, name="after")
    x = torch.full((plan["length"],), float(rank))
    call = CALLS[plan["call"]]
    hasten(world, fcomm.cpu, plan["timeout_s"])
    call(x, world)
    Path(root, f"ready{rank}").touch()
    try:
        for step in range(1_000_000):
            if rank == plan["victim"] and step == plan["step"]:
                Path(root, "struck").write_text(str(time.time()))
                if plan["act"] == "exit":
                    os._exit(3)
                raise ValueError("this rank has a bug of its own")
            call(x, world)
    except fcomm.FcommError as error:
        now = time.time()
        start = time.monotonic()
        with contextlib.suppress(fcomm.GroupPoisonedError):
            call(x, world)
            raise AssertionError("the group still works") from error
        again_s = time.monotonic() - start
        total = float(fcomm.all_reduce(torch.ones(3), after, fcomm.cpu)[0]) if rank in rest else 0.0
        about = [type(error).__name__, str(error), list(error.culprits), error.op, error.group, error.rank]
        result = json.dumps({"error": about, "at": now, "again_s": again_s, "total": total})
        Path(root, f"tmp{rank}").write_text(result)
        Path(root, f"tmp{rank}").rename(Path(root, f"end{rank}"))
    finally:
        fcomm.close()


@contextlib.contextmanager
def processes(
    size: int, root: Path, plan: dict[str, Any], main: Callable[..., None] = trial_main
) -> Iterator[list[Any]]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(launch._PRELOAD)
    started = [context.Process(target=main, args=(r, size, str(root), plan)) for r in range(size)]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.002)


ERRORS = {"kill": "PeerDiedError", "exit": "PeerDiedError", "raise": "PeerDiedError", "stop": "CollectiveTimeoutError"}


def trial(size: int, act: str, call: str, length: int, seed: int, root: Path) -> list[float]:
    """Run, strike one rank at a random moment, and check what the others say; return the seconds it took each."""
    root.mkdir()
    draw = random.Random(seed)
    victim = draw.randrange(size)
    timeout_s = 1.5 if act == "stop" else 30.0
    step = draw.randrange(50) if act in ("exit", "raise") else -1
    store, port = loopback_store(60.0)
    plan = {"victim": victim, "act": act, "step": step, "call": call, "length": length}
    plan |= {"timeout_s": timeout_s, "port": port}
    before = shared_names()
    with processes(size, root, plan) as ranks:
        wait_until(lambda: all((root / f"ready{r}").exists() for r in range(size)), 60, "all ranks ready")
        if step < 0:
            time.sleep(draw.random() * 0.02)
            os.kill(ranks[victim].pid, signal.SIGKILL if act == "kill" else signal.SIGSTOP)
            struck = time.time()
        survivors = [r for r in range(size) if r != victim]
        limit = timeout_s + 20
        wait_until(lambda: all((root / f"end{r}").exists() for r in survivors), limit, f"survivors of {plan} raise")
    if step >= 0:
        struck = float((root / "struck").read_text())
    del store
    took = []
    for r in survivors:
        end = json.loads((root / f"end{r}").read_text())
        kind, text, culprits, op, group, rank = end["error"]
        assert kind == ERRORS[act], (plan, text)
        assert culprits == [victim], (plan, text)
        assert f"rank {victim} (pid {ranks[victim].pid})" in text, text
        assert (op, group, rank) == (call, "world", r), (plan, end)
        assert end["again_s"] < 0.9 * timeout_s, "an unusable group says so at once"
        assert end["total"] == len(survivors), "the next group of the survivors works"
        took.append(end["at"] - struck)
    # A third of the deadline, unless they have to wait for it.
    assert sorted(took)[len(took) // 2] < (timeout_s if act == "stop" else 0.0) + 5.0, (plan, took)
    assert max(took) < (timeout_s if act == "stop" else 0.0) + 10.0, (plan, took)
    assert shared_names() <= before
    return took


PLANS = [
    (2, "kill", "all_reduce", 2),
    (3, "kill", "all_to_all", 300_000),
    (4, "kill", "all_gather", 1000),
    (3, "exit", "reduce_scatter", 5000),
    (3, "raise", "broadcast", 100_000),
    (3, "stop", "all_reduce", 1000),
    (2, "kill", "recv", 50_000),
    (3, "kill", "all_reduce", 1_000_000),
    (3, "stop", "ppermute", 1_000_000),
]


@pytest.mark.parametrize(("size", "act", "call", "length"), PLANS)
def test_survivors_raise_and_name_the_dead(size: int, act: str, call: str, length: int, tmp_path: Path) -> None:
    for seed in range(2):
        trial(size, act, call, length, seed, tmp_path / str(seed))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
def test_two_hundred_random_deaths(size: int, tmp_path: Path) -> None:
    draw, took = random.Random(size), []
    calls = [name for name in CALLS if name != "recv" or size == 2]  # in a ring, the first to end would end others
    for k in range(70):
        act = draw.choice(["kill", "kill", "kill", "exit", "raise"])
        took += trial(size, act, draw.choice(calls), draw.choice([1, 1000, 400_000]), k, tmp_path / str(k))
    took.sort()
    print(f"{size} ranks: median {took[len(took) // 2] * 1e3:.1f} ms, longest {took[-1] * 1e3:.1f} ms")


def opening_main(rank: int, size: int, root: str, plan: dict[str, Any]) -> None:
    """One rank dies before its first collective, which for the others opens the group."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(plan["port"]))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(not plan["serves"])
    world = fcomm.init(timeout_s=30.0)
    if rank == plan["victim"]:
        if plan["claims"]:  # it dies one step later
            shm_opening.why_not_shared(live(world), native.ABI)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        fcomm.all_reduce(torch.ones(3), world, fcomm.cpu)
    except fcomm.FcommError as error:
        end = [type(error).__name__, str(error), list(error.culprits), time.monotonic() - start]
        Path(root, f"tmp{rank}").write_text(json.dumps(end))
        Path(root, f"tmp{rank}").rename(Path(root, f"end{rank}"))
        signal.pause()  # or it would be dead too


@pytest.mark.parametrize("claims", [False, True])
@pytest.mark.parametrize(("victim", "serves"), [(0, False), (1, False), (2, False), (0, True)])
def test_a_rank_that_dies_before_the_group_opens(victim: int, serves: bool, claims: bool, tmp_path: Path) -> None:
    store, port = loopback_store(60.0)
    if serves:
        del store  # the first rank takes its place
    survivors = {0, 1, 2} - {victim}
    plan = {"victim": victim, "serves": serves, "claims": claims, "port": port}
    with processes(3, tmp_path, plan, opening_main):
        wait_until(lambda: all((tmp_path / f"end{r}").exists() for r in survivors), 40, "the survivors raise")
    for r in survivors:
        kind, text, culprits, took_s = json.loads((tmp_path / f"end{r}").read_text())
        assert (kind, culprits) == ("PeerDiedError", [victim]), text
        assert took_s < 15.0  # half the deadline


def serving_main(rank: int, size: int, root: str, plan: dict[str, Any]) -> None:
    """Rank 0, whose process serves the store, stops, or dies while a forked child of it holds its sockets."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(plan["port"]))
    backend = {"cpu": fcomm.cpu, "c10d": fcomm.c10d}.get(plan["backend"]) or vendors.backend(plan["backend"])
    group = fcomm.subgroup(fcomm.init(timeout_s=60.0), range(size), name="served", timeout_s=60.0)
    if plan["opened"]:
        hasten(group, backend, 2.0)
    live(group).timeout_s = 2.0
    if rank == 0 and plan["act"] == signal.SIGKILL and os.fork() == 0:
        wait_until(Path(root, "over").exists, 60, "the end of the test")
        os._exit(0)
    Path(root, f"ready{rank}").touch()
    wait_until(Path(root, "struck").exists, 60, "rank 0 struck")
    start = time.monotonic()
    try:
        fcomm.all_reduce(torch.ones(3), group, backend)
    except fcomm.FcommError as error:
        end = [type(error).__name__, str(error), list(error.culprits), time.monotonic() - start]
        Path(root, f"tmp{rank}").write_text(json.dumps(end))
        Path(root, f"tmp{rank}").rename(Path(root, f"end{rank}"))
        signal.pause()


@pytest.mark.parametrize("act", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize(
    ("backend", "opened"), [("cpu", False), ("c10d", False), ("c10d", True), ("nccl", False), ("hccl", True)]
)
def test_a_store_that_does_not_answer_holds_nobody(
    backend: str, opened: bool, act: signal.Signals, tmp_path: Path
) -> None:
    store, port = loopback_store(60.0)
    del store  # the first rank takes its place
    plan = {"backend": backend, "opened": opened, "act": act, "port": port}
    with processes(3, tmp_path, plan, serving_main) as ranks:
        wait_until(lambda: all((tmp_path / f"ready{r}").exists() for r in range(3)), 60, "all ranks ready")
        os.kill(ranks[0].pid, act)
        (tmp_path / "struck").touch()
        wait_until(lambda: all((tmp_path / f"end{r}").exists() for r in (1, 2)), 40, "the survivors raise")
        (tmp_path / "over").touch()
    ends = [json.loads((tmp_path / f"end{r}").read_text()) for r in (1, 2)]
    for kind, text, culprits, took_s in ends:
        late = ("CollectiveTimeoutError", "RendezvousError") if act == signal.SIGSTOP else ("PeerDiedError",)
        assert kind in late, text
        assert kind == ends[0][0]
        assert culprits == [0], text
        assert took_s < 15.0
        if backend in vendors.DOUBLES and act == signal.SIGSTOP:
            assert "the group's store does not answer: rank 0" in text
