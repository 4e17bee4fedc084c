"""The cpu backend if its engine cannot serve a group: there was no compiler, or the ranks are on several hosts."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fcomm
from fcomm.backends import cpu as machine
from fcomm.backends import pool, shm_opening
from fcomm.backends.pool import native
from fcomm.rendezvous import Live
from fcomm.testing import run_ranks


def results(world: fcomm.Group) -> list[str]:
    x = torch.arange(6.0).reshape(3, 2) + (world.rank or 0)
    n = world.size
    token = fcomm.send(x, world, fcomm.cpu)
    got = {
        "all_reduce": fcomm.all_reduce(x, world, fcomm.cpu).sum().item() == n * 15.0 + 6 * sum(range(n)),
        "all_gather": fcomm.all_gather(x, world, fcomm.cpu, dim=1).shape == (3, 2 * n),
        "recv": fcomm.recv(x, world, fcomm.cpu, after=token)[0, 0] == ((world.rank or 0) - 1) % n,
    }
    return [f"{name} is wrong" for name, right in got.items() if not right]


def warned(world: fcomm.Group, expected: str) -> list[str]:
    """Right results, and one warning that says why they are slow."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failures = results(world)
    texts = [str(w.message) for w in caught if "fcomm.cpu" in str(w.message)]
    if len(texts) != 1 or expected not in texts[0]:
        failures.append(f"warnings: {texts}")
    return failures


def check_no_engine(world: fcomm.Group, ranks: list[int], expected: str) -> list[str]:
    replaced = None if world.rank in ranks else native
    with mock.patch.object(machine, "native", replaced), mock.patch.object(machine, "why_no_native", "no such file"):
        return warned(world, expected)


def test_no_rank_has_the_engine() -> None:
    run_ranks(
        check_no_engine, 2, [0, 1], "the engine is not built (no such file); install a C++ compiler", timeout_s=60
    )


@pytest.mark.skipif(native is None, reason="the engine is not built")
def test_one_rank_lacks_the_engine() -> None:
    run_ranks(check_no_engine, 2, [1], "ranks [1] have no engine", timeout_s=60)


def check_hosts(world: fcomm.Group) -> list[str]:
    host = bytes([(world.rank or 0) // 2]) * 32
    with mock.patch.object(shm_opening, "host_identity", return_value=host):
        return warned(world, "its 3 ranks are on 2 hosts")


@pytest.mark.skipif(native is None, reason="the engine is not built")
def test_a_group_that_spans_hosts() -> None:
    run_ranks(check_hosts, 3, timeout_s=60)


def check_stranger(world: fcomm.Group) -> list[str]:
    """Strangers that connect without the nonce are turned away, and the group opens, though they came first and filled
    the queue."""
    publish, accept = shm_opening._set, shm_opening._accept
    strangers: list[socket.socket] = []

    def preceded(owner: Live, key: str, value: bytes) -> None:
        if key == "cpu/address":
            name, _ = shm_opening._ADDRESS.unpack(value)
            with contextlib.suppress(BlockingIOError):
                for greeting in itertools.cycle((b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(16))):
                    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    strangers.append(stranger)
                    stranger.setblocking(False)
                    stranger.connect(shm_opening._abstract(name))
                    stranger.sendall(greeting)
                    stranger.shutdown(socket.SHUT_WR)
        publish(owner, key, value)

    def late(*args: Any) -> socket.socket:
        time.sleep(0.1)  # until the ranks have reached the full queue
        return accept(*args)

    with mock.patch.object(shm_opening, "_set", preceded), mock.patch.object(shm_opening, "_accept", late):
        failures = results(world)
    if world.rank == 0 and len(strangers) <= 3:
        failures.append(f"{len(strangers)} strangers came")
    for stranger in strangers:
        stranger.close()
    return failures


@pytest.mark.skipif(native is None, reason="the engine is not built")
def test_strangers_are_turned_away() -> None:
    run_ranks(check_stranger, 3, timeout_s=60)


def check_hello(world: fcomm.Group) -> list[str]:
    """Rank 1 gets no core for a while after it has connected."""
    connect = shm_opening._connect

    def slow(*args: Any) -> None:
        connect(*args)
        time.sleep(5.5)

    with mock.patch.object(shm_opening, "_connect", slow if world.rank == 1 else connect):
        return results(world)


@pytest.mark.long
@pytest.mark.skipif(native is None, reason="the engine is not built")
def test_a_rank_that_is_slow_to_say_who_it_is() -> None:
    run_ranks(check_hello, 2, timeout_s=60)


def check_pipes(world: fcomm.Group, found: str) -> None:
    """Without pidfd_open (an old kernel, a filter) a pipe shows a rank's end."""
    with mock.patch.object(os, "pidfd_open", side_effect=OSError):
        failures = results(world)
    if world.rank == 1:
        os._exit(0)
    try:
        fcomm.all_reduce(torch.ones(3), world, fcomm.cpu)
        failures.append("no error")
    except fcomm.PeerDiedError as error:
        failures += [] if error.culprits == (1,) else [str(error)]
    Path(found).write_text("\n".join(failures))


@pytest.mark.skipif(native is None, reason="the engine is not built")
def test_a_pipe_in_place_of_a_pidfd(tmp_path: Path) -> None:
    with pytest.raises(fcomm.FcommError, match="rank 1 of 2 failed:\nthe process ended without a result: exit code 0"):
        run_ranks(check_pipes, 2, str(tmp_path / "found"), timeout_s=60)
    assert (tmp_path / "found").read_text() == ""


def test_more_ranks_than_the_engine_has_places_for() -> None:
    header = (Path(pool.__file__).parent.parent / "csrc" / "fcomm.h").read_text()
    assert re.findall(r"#define FCOMM_MAX_(?:DIMS|RANKS) (\d+)", header) == [str(pool.MAX_RANKS), str(pool.MAX_DIMS)]
    many = fcomm.Group("many", tuple(range(pool.MAX_RANKS + 1)), 0)
    reason = shm_opening.why_not_shared(Live(many, dist.HashStore(), 5.0), 1)
    assert reason == "its 241 ranks are more than the 240 that share memory"
