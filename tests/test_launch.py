"""fcomm.run: results in rank order, the failing rank's own words, a deadline that holds, and nothing left behind."""

from __future__ import annotations

import copy
import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fcomm
from fcomm import Backend, CollectiveTimeoutError, FcommError, Group, launch
from fcomm.group import BACKENDS, register_backend


class Pair(NamedTuple):
    left: torch.Tensor
    right: dict[str, list[torch.Tensor]]


def nested(world: Group, x: torch.Tensor) -> Pair:
    x.add_(world.rank or 0)
    return Pair(x, {"a": [x * 2, x.to(torch.bfloat16)], "none": []})


def test_nested_results_in_rank_order_and_arguments_by_value() -> None:
    x = torch.zeros(3)
    results = fcomm.run(nested, 3, x)
    assert [type(r) for r in results] == [Pair] * 3
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.left, torch.full((3,), float(rank)))
        torch.testing.assert_close(result.right["a"][0], torch.full((3,), 2.0 * rank))
        assert result.right["a"][1].dtype == torch.bfloat16
    assert x.tolist() == [0, 0, 0]


def echoed(world: Group, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    return xs


def test_tensors_of_dtypes_that_pickle_fails_on_in_torch() -> None:
    xs = [torch.arange(8).to(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2)]
    xs = [*xs, xs[0][::2], xs[1].reshape(2, 4).T]
    for result in fcomm.run(echoed, 2, xs):
        assert [y.dtype for y in result] == [x.dtype for x in xs]
        assert [y.tolist() for y in result] == [x.tolist() for x in xs]


def variable(world: Group, name: str) -> tuple[str | None, int, str]:
    return os.environ.get(name), torch.get_num_threads(), os.environ["LOCAL_RANK"]


def test_ranks_have_the_present_environment_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    fcomm.run(variable, 1, "FCOMM_PRESENT")  # starts the server process, which keeps the environment of its start
    monkeypatch.setenv("FCOMM_PRESENT", "yes")
    assert fcomm.run(variable, 2, "FCOMM_PRESENT") == [("yes", 1, "0"), ("yes", 1, "1")]


# --- failures -----------------------------------------------------------------------------------------------------


def note_pid(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()


def all_gone(folder: Path, count: int, within_s: float = 30) -> bool:
    pids = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
    deadline = time.monotonic() + within_s
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return len(pids) == count and not any(_is_running(pid) for pid in pids)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def one_raises(world: Group, folder: str) -> None:
    note_pid(folder)
    if world.rank == 1:
        raise ValueError("the third weight is upside down")
    fcomm.barrier(world, fcomm.c10d)


def test_the_failing_ranks_own_traceback_comes_first(tmp_path: Path) -> None:
    with pytest.raises(FcommError) as error:
        fcomm.run(one_raises, 3, str(tmp_path), timeout_s=60)
    text = str(error.value)
    assert text.startswith("run: rank 1 of 3 failed:\nTraceback (most recent call last):\n")
    assert "in one_raises" in text
    assert "ValueError: the third weight is upside down" in text
    assert all_gone(tmp_path, 3)


def one_is_killed(world: Group) -> None:
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def one_exits(world: Group) -> None:
    if world.rank == 1:
        sys.exit("leaving early")


def test_a_killed_rank_and_one_that_exits() -> None:
    with pytest.raises(FcommError, match="rank 0 of 2 failed:\nthe process ended without a result: killed by SIGKILL"):
        fcomm.run(one_is_killed, 2)
    with pytest.raises(FcommError, match="SystemExit: leaving early"):
        fcomm.run(one_exits, 2)


class LateStatus:
    """A process whose exit code comes late, as if the fork server got no core for seconds."""

    exitcode: int | None = None

    def join(self, timeout_s: float) -> None:
        self.exitcode = -signal.SIGKILL if timeout_s > 5 else None


def test_the_exit_code_of_a_killed_rank_is_waited_for() -> None:
    ours, theirs = mp.Pipe(duplex=False)
    theirs.close()
    ok, failure = launch._receive(LateStatus(), ours)
    assert not ok
    assert failure.summary == "killed by SIGKILL"


def test_ctrl_c_while_ranks_start_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = launch.ForkServerProcess.start

    def interrupted(process: Any) -> None:
        start(process)
        started.append(process.pid)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(launch.ForkServerProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fcomm.run(nested, 3, torch.zeros(1))
    assert [_is_running(pid) for pid in started] == [False, False]


def one_sleeps(world: Group, folder: str) -> None:
    note_pid(folder)
    if world.rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)


def test_the_deadline_kills_and_names_who_was_late(tmp_path: Path) -> None:
    fcomm.run(variable, 2, "PATH")  # the server process takes seconds to start
    began = time.monotonic()
    with pytest.raises(CollectiveTimeoutError) as error:
        fcomm.run(one_sleeps, 2, str(tmp_path), timeout_s=6)
    assert str(error.value) == (
        "run: ranks [1] of 2 did not finish within 6 s and were killed; "
        "look for a collective that not every rank calls, or raise timeout_s"
    )
    assert 6 <= time.monotonic() - began < 40
    assert all_gone(tmp_path, 2)


def one_does_not_call(world: Group) -> None:
    if world.rank == 0:
        fcomm.all_reduce(torch.ones(1), world, fcomm.c10d)
    else:
        time.sleep(600)


@pytest.mark.long  # its margin for a busy machine is a quarter of the wait
def test_a_collective_that_waits_in_vain_says_so_before_the_deadline() -> None:
    with pytest.raises(FcommError, match=r"rank 1 of group 'world' made no call on backend 'c10d' within 30\.0 s"):
        fcomm.run(one_does_not_call, 2, timeout_s=40)


def returns_a_lambda(world: Group) -> Any:
    return lambda: None


def test_a_result_that_cannot_be_pickled_is_a_failure_of_its_rank() -> None:
    with pytest.raises(FcommError, match=r"rank 0 of 1 failed:[\s\S]*[pP]ickle"):
        fcomm.run(returns_a_lambda, 1)


# --- before anything is started -----------------------------------------------------------------------------------


def test_what_cannot_be_pickled_is_refused_before_anything_starts() -> None:
    def closure(world: Group) -> int:
        return len(children)

    children = mp.active_children()
    for fn, name in ((lambda world: 1, "<lambda>"), (closure, "closure")):
        with pytest.raises(FcommError) as error:
            fcomm.run(fn, 2)
        assert f"{name} or its arguments cannot be pickled (" in str(error.value)
        assert str(error.value).endswith(
            "pass a function defined at the top of a module, and what it closes over as arguments"
        )
    with pytest.raises(FcommError, match="nested or its arguments cannot be pickled"):
        fcomm.run(nested, 2, closure)
    with pytest.raises(TypeError, match="run: fn is 3; pass a function"):
        fcomm.run(3, 2)
    for size in (0, -1, True, "2", 1.0):
        with pytest.raises(FcommError, match=r"run: size is .*; pass a positive int"):
            fcomm.run(nested, size)
    for timeout_s in (0, -1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(FcommError, match=r"run: timeout_s is .*; pass a positive, finite number of seconds"):
            fcomm.run(nested, 1, timeout_s=timeout_s)
    assert mp.active_children() == children


# --- scripts ------------------------------------------------------------------------------------------------------

GUARDED = """
import os, signal, sys, time
import fcomm

def ranks(world, folder, sleep_s):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(sleep_s)
    return world.rank

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    try:
        print(fcomm.run(ranks, 2, sys.argv[1], float(sys.argv[2])))
    except KeyboardInterrupt:
        print("interrupted")
"""

UNGUARDED = """
import fcomm

def ranks(world):
    return world.rank

print(fcomm.run(ranks, 2))
"""


def script(tmp_path: Path, text: str, *arguments: object) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_function_of_a_script(tmp_path: Path) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    output, errors = script(tmp_path, GUARDED, folder, 0).communicate(timeout=120)
    assert output == "[0, 1]\n", errors


def test_a_script_without_a_guard_is_told_and_does_not_multiply(tmp_path: Path) -> None:
    _, errors = script(tmp_path, UNGUARDED).communicate(timeout=120)
    expected = (
        "FcommError: run: the script calls fcomm.run while its ranks import it; put the call under "
        '`if __name__ == "__main__":`'
    )
    assert errors.strip().splitlines()[-1].endswith(expected)


def test_a_function_that_is_in_no_file(tmp_path: Path) -> None:
    program = "import fcomm\ndef f(world): pass\nfcomm.run(f, 2)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("ArgumentError: run: f is not in a file, where the ranks could import it; put it into a module")
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_caller_takes_its_ranks_along(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    process = script(tmp_path, GUARDED, folder, 600)
    deadline = time.monotonic() + 90
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert number != signal.SIGINT or output == "interrupted\n", errors
    assert all_gone(folder, 2)


# --- backends -----------------------------------------------------------------------------------------------------


def named(world: Group, backend: fcomm.Backend, others: dict[str, fcomm.Backend]) -> list[Any]:
    x = fcomm.all_reduce(torch.ones(2), world, backend)
    return [x.tolist(), backend, backend is fcomm.cpu, [b is getattr(fcomm, name) for name, b in others.items()]]


def test_backends_travel_by_name() -> None:
    others = {name: getattr(fcomm, name) for name in ("c10d", "sim", "nccl", "hccl")}
    results = fcomm.run(named, 2, fcomm.cpu, others)
    assert results == [[[2.0, 2.0], fcomm.cpu, True, [True] * 4]] * 2
    assert results[0][1] is fcomm.cpu
    assert copy.deepcopy(fcomm.c10d) is fcomm.c10d


def test_a_backend_that_the_ranks_do_not_have_says_what_to_do() -> None:
    opened = register_backend(Backend("nccl@cpu:/elsewhere", lowerings={"all_reduce": lambda x, group, op: x}))
    text = r"a backend 'nccl@cpu:/elsewhere' was pickled, but this process has only .*cpu.*; open or register it where"
    try:
        with pytest.raises(FcommError, match=text):
            fcomm.run(named, 1, opened, {})
    finally:
        del BACKENDS[opened.name]
    # An unregistered backend is a value like any other.
    private = Backend("private", ("cpu",), {"barrier": test_backends_travel_by_name}, {"scan": "slow"})
    other = pickle.loads(pickle.dumps(private))
    assert (other, other.lowerings, other.unsupported) == (private, private.lowerings, private.unsupported)
