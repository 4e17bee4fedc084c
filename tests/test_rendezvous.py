"""Groups in real processes: from every launcher's environment, from torch.distributed, from stores, from each other."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fcomm
from fcomm import FcommError, Group, RendezvousError, bootstrap
from fcomm.backends.worker import apart
from fcomm.bootstrap import first_host, launcher_place
from fcomm.rendezvous import live
from fcomm.testing import run_ranks

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_",
    "TORCHELASTIC_",
    "OMPI_",
    "PMI",
    "SLURM_",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def sum_of_ranks(group: Group) -> int:
    return int(fcomm.all_reduce(torch.tensor(group.ranks[group.rank or 0]), group, fcomm.c10d))


def set_environment(**variables: object) -> None:
    for name in [n for n in os.environ if n.startswith(LAUNCHER_VARIABLES)]:
        del os.environ[name]
    os.environ.update({k: str(v) for k, v in variables.items()})


def test_closing_does_not_wait_for_a_thread_that_opens() -> None:
    group, opening, come, closed = fcomm.init(name="alone"), threading.Event(), threading.Event(), list[str]()

    def open_slowly() -> str:
        opening.set()
        come.wait(30)
        return "it"

    call = apart(lambda: live(group).communicator("slow", open_slowly, closed.append))
    opening.wait(30)
    start = time.monotonic()
    fcomm.close(group)
    assert time.monotonic() - start < 5
    come.set()
    with pytest.raises(fcomm.GroupClosedError, match="'alone' was closed while a thread opened it"):
        call.result(30)
    assert closed == ["it"]


# --- launchers ----------------------------------------------------------------------------------------------------


def variables_of(launcher: str, rank: int, size: int, job: str) -> dict[str, object]:
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job}
    return {
        "torchrun": {"RANK": rank, "WORLD_SIZE": size, **port},
        "open mpi": {
            "OMPI_COMM_WORLD_RANK": rank,
            "OMPI_COMM_WORLD_SIZE": size,
            "OMPI_COMM_WORLD_LOCAL_SIZE": size,
            "PMIX_NAMESPACE": job,
        },
        "mpich": {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALNRANKS": size, "PMI_FD": 7 + rank},
        "mpich with a job": {"PMI_RANK": rank, "PMI_SIZE": size, "PMI_JOBID": job},
        "slurm": {"SLURM_PROCID": rank, "SLURM_NTASKS": size, "SLURM_JOB_ID": job, **port},
        "slurm with a node list": {
            "SLURM_PROCID": rank,
            "SLURM_NTASKS": size,
            "SLURM_JOB_ID": job,
            "SLURM_STEP_ID": 0,
            "SLURM_STEP_NODELIST": "localhost",
        },
    }[launcher]


LAUNCHERS = ("torchrun", "open mpi", "mpich", "mpich with a job", "slurm", "slurm with a node list")


def launched(world: Group, ports: list[int]) -> list[str]:
    failures, rank = [], world.rank
    for launcher, port in zip(LAUNCHERS, ports, strict=True):
        fcomm.close()
        set_environment(**variables_of(launcher, rank or 0, 2, str(port)))
        again = fcomm.init(timeout_s=20)
        if again != Group("world", (0, 1), rank) or sum_of_ranks(again) != 1 or fcomm.init() is not again:
            failures.append(f"{launcher}: {again}")
        failures += [f"{launcher}: listens on {where}" for where in listening() if not where.startswith("127.")]
    fcomm.close()
    return failures


def test_every_launchers_environment() -> None:
    run_ranks(launched, 2, [free_port() for _ in LAUNCHERS])


def listening() -> list[str]:
    """Addresses on which sockets of this process listen."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address = bytes.fromhex(fields[1].split(":")[0])
                found.append(".".join(map(str, reversed(address))) if len(address) == 4 else address.hex())
    return found


def test_listening_sees_a_listener_on_all_interfaces() -> None:
    with socket.create_server(("", 0)):
        assert "0.0.0.0" in listening()
    with socket.create_server(("::", 0), family=socket.AF_INET6):
        assert "0" * 32 in listening()


def test_one_rank_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(LAUNCHER_VARIABLES)]:
        monkeypatch.delenv(name)
    world = fcomm.init(name="alone")
    assert world == Group("alone", (0,), 0)
    assert sum_of_ranks(world) == 0
    fcomm.close(world)
    fcomm.close(world)


PROGRAM = """
import os, sys
import torch, fcomm
world = fcomm.init(timeout_s=60)
y = fcomm.all_reduce(torch.tensor(world.rank + 1), world, fcomm.c10d)
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and "--fail-once" in sys.argv and world.rank == 1:
    os._exit(3)
sys.stdout.write(f"rank {world.rank} of {world.size}: {y.item()}\\n")
sys.stdout.flush()
"""


def output_of(command: list[str], tmp_path: Path, *arguments: str) -> str:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, timeout=120, env=clean, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BOTH = ["rank 0 of 2: 3", "rank 1 of 2: 3"]


@pytest.mark.long
def test_torchrun_restarts_a_failed_rank(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
    output = output_of([*torchrun, "--max-restarts", "1"], tmp_path, "--fail-once")
    # Rank 0 may have printed before the first attempt ended.
    assert set(BOTH) <= set(output.splitlines())


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on this machine")
def test_mpirun(tmp_path: Path) -> None:
    options = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in mpirun_version() else []
    output = output_of(["mpirun", *options, "-n", "2", sys.executable], tmp_path)
    assert sorted(output.split("\n"))[-2:] == BOTH


def mpirun_version() -> str:
    return subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("node[03-05,9],gpu1", "node03"),
        ("n[1,3]", "n1"),
        ("gpu-1-[2-4]", "gpu-1-2"),
        ("", ""),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "init: RANK is 'x' in the environment; set it to a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "init: RANK is '-1' in the environment; set it to a number"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "init: the environment says RANK=2 of WORLD_SIZE=2; correct or unset both",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "0"},
            "init: OMPI_COMM_WORLD_SIZE is None in the environment; set it to a number",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "init: RANK and WORLD_SIZE say rank 0 of 2, but not where the ranks meet; set MASTER_ADDR to the host of "
            "rank 0 and MASTER_PORT to a free port there, on every rank",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "init: OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE say rank 0 of 4, but not where the ranks meet; set "
            "MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, on every rank",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "http"},
            "init: MASTER_PORT is 'http' in the environment; set it to a number",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "65536"},
            "init: MASTER_PORT is 65536 in the environment; set it to a free port of rank 0's host, 1 .. 65535, the "
            "same on every rank",
        ),
    ],
)
def test_a_wrong_environment_is_named(env: dict[str, str], text: str) -> None:
    with pytest.raises(RendezvousError) as error:
        launcher_place(env)
    assert str(error.value) == text


# --- who did not come ---------------------------------------------------------------------------------------------


def meet(world: Group, places: list[tuple[int, int]], port: int, timeout_s: float) -> tuple[float, str]:
    rank, size = places[world.rank or 0]
    began = time.monotonic()
    try:
        fcomm.stateless_group("127.0.0.1", port, rank, size, name="own", timeout_s=timeout_s)
        text = "met"
    except RendezvousError as error:
        text = str(error)
    return time.monotonic() - began, text


def meet_together(world: Group, *args: Any) -> tuple[float, str]:
    fcomm.barrier(world, fcomm.c10d)
    return meet(world, *args)


def test_missing_ranks_are_named_at_the_deadline() -> None:
    results = run_ranks(meet_together, 2, [(0, 4), (2, 4)], free_port(), 2.0)
    expected = (
        "stateless_group: of 4 ranks of 'own', ranks [1, 3] did not arrive within 2.0 s; "
        "look at their logs, or raise timeout_s"
    )
    assert [text for _, text in results] == [expected] * 2
    assert 2.0 <= max(seconds for seconds, _ in results) < 40  # a later rank gets the error at the other's deadline


def test_a_missing_rank_0_is_named_by_its_address() -> None:
    port = free_port()
    ((seconds, text),) = run_ranks(meet, 1, [(1, 2)], port, 1.0)
    assert text.startswith(
        f"stateless_group: rank 1 of 2 got no store at 127.0.0.1:{port} within 1.0 s; check host, port and"
    )
    assert 0.9 < seconds < 40


def test_a_duplicate_rank_is_named_with_both_claims() -> None:
    results = run_ranks(meet, 3, [(0, 3), (1, 3), (1, 3)], free_port(), 60.0)
    for seconds, text in results:
        assert text.startswith("stateless_group: rank 1 of 'own' joined twice at 127.0.0.1:")
        assert text.count(", as process ") == text.count(" and process ") == 1
        assert text.endswith("give each process its own rank, or a fresh port to each run")
        assert seconds < 50


def test_ranks_that_disagree_on_the_size_are_named() -> None:
    results = run_ranks(meet, 2, [(0, 2), (1, 3)], free_port(), 60.0)
    for seconds, text in results:
        assert text == (
            "stateless_group: the ranks of 'own' disagree on its size: rank 0 says 2, rank 1 says 3; "
            "start all with the same size"
        )
        assert seconds < 50


def meet_late(world: Group, port: int, late_s: float) -> tuple[float, str]:
    """Rank 1 gets no core for late_s after it has looked for the claims; all deadlines are shorter than usual."""
    wait = bootstrap.wait_for_keys
    bootstrap._SLICE_S = 0.01

    def slow(*args: Any) -> bool:
        there = wait(*args)
        time.sleep(late_s)
        return there

    if world.rank == 1:
        bootstrap.wait_for_keys = slow
    return meet(world, [(0, 2), (1, 3)], port, 60.0)


def test_a_late_rank_is_told_the_error() -> None:
    for _, text in run_ranks(meet_late, 2, free_port(), 0.5):
        assert text.startswith("stateless_group: the ranks of 'own' disagree on its size: ")


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError) as error:
            fcomm.stateless_group("127.0.0.1", port, 0, 2, name="own", timeout_s=2)
    assert str(error.value) == (
        f"stateless_group: port {port} on 127.0.0.1 is taken or refused (Address already in use); "
        "set port to a free port, the same on every rank"
    )


def test_what_peers_write_is_shown_without_control_characters() -> None:
    from fcomm.bootstrap import _text

    assert _text(b"\x1b[31mred\n") == "?[31mred?"
    assert len(_text(b"x" * 9999)) == 500


# --- groups from torch.distributed --------------------------------------------------------------------------------


def with_torch_distributed(world: Group) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    failures: list[str] = []

    def expect(what: str, got: object, expected: object) -> None:
        if got != expected:
            failures.append(f"{what}: {got}, not {expected}")

    fcomm.close()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    again = fcomm.init()
    expect("init", again, Group("world", (0, 1, 2, 3), rank))
    expect("its sum", sum_of_ranks(again), 6)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp, tp = fcomm.from_device_mesh(mesh, "dp"), fcomm.from_device_mesh(mesh, 1, name="inner")
    expect("dp", dp, Group("dp", (rank % 2, rank % 2 + 2), rank // 2))
    expect("tp", tp, Group("inner", (rank // 2 * 2, rank // 2 * 2 + 1), rank % 2))
    expect("sum over dp", sum_of_ranks(dp), 2 * (rank % 2) + 2)
    expect("sum over tp", sum_of_ranks(tp), 4 * (rank // 2) + 1)
    x = torch.arange(3.0) + rank
    native = x.clone()
    dist.all_reduce(native, group=mesh.get_group("tp"))
    expect("as dist.all_reduce", fcomm.all_reduce(x, tp, fcomm.c10d).tolist(), native.tolist())
    for bad, text in (
        ("pp", "from_device_mesh: the mesh has no dimension 'pp'; it has ('dp', 'tp')"),
        (None, "from_device_mesh: the mesh has dimensions ('dp', 'tp'); name one of them"),
        (2, "from_device_mesh: dim is 2, the mesh has 2 dimensions; count from 0"),
        (0.5, "from_device_mesh: dim is 0.5; pass the name or the number of a dimension"),
    ):
        try:
            fcomm.from_device_mesh(mesh, bad, name="bad")
            failures.append(f"no error for dimension {bad}")
        except fcomm.FcommError as error:
            expect("error", str(error), text)

    some = dist.new_group([3, 1])  # torch sorts the ranks
    if rank in (1, 3):
        group = fcomm.from_process_group(some, name="some")
        expect("some", group, Group("some", (1, 3), (rank - 1) // 2))
        expect("sum over some", sum_of_ranks(group), 4)
        expect("sum over a part", sum_of_ranks(fcomm.subgroup(group, [1, 0], name="part")), 4)
        fcomm.close(group)
        expect("sum, made again", sum_of_ranks(fcomm.from_process_group(some, name="some")), 4)
    fcomm.close()
    dist.barrier()  # closing our groups does not touch the caller's
    dist.destroy_process_group()
    return failures


def test_torch_distributed_and_a_2d_device_mesh() -> None:
    run_ranks(with_torch_distributed, 4)


# --- groups from groups -------------------------------------------------------------------------------------------


def derived(world: Group) -> list[str]:
    failures: list[str] = []
    rank = world.rank or 0

    def expect(what: str, got: object, expected: object) -> None:
        if got != expected:
            failures.append(f"{what}: {got}, not {expected}")

    pairs = fcomm.split(world, 2, name="pair")
    expect("split", pairs, Group("pair", (rank // 2 * 2, rank // 2 * 2 + 1), rank % 2))
    expect("its sum", sum_of_ranks(pairs), 4 * (rank // 2) + 1)
    axes = fcomm.mesh(world, dp=2, tp=1, sp=2)
    expect("mesh", list(axes), ["dp", "tp", "sp"])
    expect("dp", axes["dp"].ranks, (rank % 2, rank % 2 + 2))
    expect("tp", axes["tp"], Group("tp", (rank,), 0))
    expect("sp", sum_of_ranks(axes["sp"]), 4 * (rank // 2) + 1)

    # Members are in the order given, numbered within the parent.
    backwards = fcomm.subgroup(world, np.array([3, 1, 0]), name="backwards")
    if rank == 2:
        expect("no member", backwards.rank, None)
        try:
            sum_of_ranks(fcomm.Group("backwards", (3, 1, 0), None))
        except (fcomm.FcommError, TypeError) as error:
            expect("its error", "none of them" in str(error), True)
        # A group that only others made must not change this rank's counts.
    else:
        order = fcomm.all_gather(torch.tensor([rank]), backwards, fcomm.c10d).tolist()
        expect("order", order, [3, 1, 0])
        inner = fcomm.subgroup(backwards, torch.tensor([2, 0]), name="inner")
        if inner.rank is not None:
            expect("inner", inner.ranks, (0, 3))
            expect("inner order", fcomm.all_gather(torch.tensor([rank]), inner, fcomm.c10d).tolist(), [0, 3])

    # Made again under the same name, a group gets a fresh epoch each time, however many others were made in between.
    for turn in range(4):
        if rank % 2 == 0:
            for _ in range(turn):
                fcomm.close(fcomm.subgroup(world, [rank], name="mine"))
        again = fcomm.subgroup(world, [0, 1, 2, 3], name="again", timeout_s=20)
        expect(f"turn {turn}", sum_of_ranks(again), 6)
        fcomm.close(again)
        try:
            sum_of_ranks(again)
            failures.append("a closed group was used")
        except fcomm.GroupClosedError as error:
            expect("closed", str(error), "all_reduce: group 'again' is closed; create it again")
        fcomm.close(again)

    closers = [threading.Thread(target=fcomm.close, args=(pairs,)) for _ in range(4)]
    for thread in closers:
        thread.start()
    for thread in closers:
        thread.join()
    expect("world after all", sum_of_ranks(world), 6)
    return failures


def test_subgroup_split_mesh_and_closing() -> None:
    run_ranks(derived, 4)


def test_closing_a_group_closes_all_its_communicators_and_raises_the_first_error() -> None:
    group, closed = fcomm.stateless_group("127.0.0.1", free_port(), 0, 1, name="own"), []

    def close(name: str) -> None:
        closed.append(name)
        if name != "first":
            raise FcommError(name)

    for name in ("first", "second", "third"):
        live(group).communicator(name, lambda: name, close)
    with pytest.raises(FcommError, match="third"):
        fcomm.close(group)
    assert closed == ["third", "second", "first"]


def stateless(world: Group, port: int) -> list[str]:
    failures = []
    for turn in range(5):  # all at one address: the store of the previous turn may still be there
        group = fcomm.stateless_group("127.0.0.1", port, world.rank or 0, world.size, name="own", timeout_s=30)
        if sum_of_ranks(group) != 1:
            failures.append(f"turn {turn}")
        failures += [f"turn {turn}: listens on {where}" for where in listening() if not where.startswith("127.")]
        fcomm.close(group)
    if dist.is_initialized():
        failures.append("torch.distributed has been initialised")
    return failures


def test_stateless_group_again_and_again_at_one_address() -> None:
    run_ranks(stateless, 2, free_port())


def restarted(world: Group) -> list[str]:
    failures = []
    for attempt in range(3):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        fcomm.close()
        if sum_of_ranks(fcomm.init(timeout_s=20)) != 1:
            failures.append(f"attempt {attempt}")
    return failures


def test_an_elastic_restart_has_keys_of_its_own() -> None:
    run_ranks(restarted, 2)


# --- bind ---------------------------------------------------------------------------------------------------------


def test_bind_fills_in_the_handles_and_compiles() -> None:
    axis = fcomm.axis("tp", 2)
    tp = fcomm.bind(axis, fcomm.sim)

    def program(x: torch.Tensor) -> torch.Tensor:
        return tp.all_gather(tp.all_reduce(x, op="max"), dim=0)

    x = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    expected = torch.tensor([[3.0, 5.0, 3.0, 5.0]] * 2)
    torch.testing.assert_close(fcomm.simulate(program, axis)(x), expected)

    def binding(x: torch.Tensor) -> torch.Tensor:
        on = fcomm.bind(axis, fcomm.sim)
        return on.all_gather(on.all_reduce(x, op="max"), dim=0)

    for fn in (program, binding):
        compiled = torch.compile(fcomm.simulate(fn, axis), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
