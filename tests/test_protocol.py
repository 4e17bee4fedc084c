"""The engine's protocol holds in every interleaving, and the model that says so finds planted faults."""

from __future__ import annotations

import pytest
from protocol_model import DIRECT, ProtocolError, Rounds, explore, explore_ring, explore_sleep

A, B = ("a", 1), ("b", 2)  # a collective of one round, and one of two
D = ("d", DIRECT)  # one that writes into the peers' results


def the_crashed_is_named(s: Rounds) -> None:
    culprit = f"rank {s.ended.index('crashed')} died" if "crashed" in s.ended else None
    assert all(verdict in ("ok", "crashed", culprit) for verdict in s.ended), s.ended


@pytest.mark.parametrize("calls", [[A], [A, A], [A, B], [B, A], [A, A, A], [D], [A, D], [D, A]], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_every_schedule_and_every_crash(size: int, calls: list[tuple[str, int]]) -> None:
    assert explore([calls] * size, crashes=1, check=the_crashed_is_named) > 50


@pytest.mark.long
def test_four_ranks() -> None:
    assert explore([[A, A]] * 4, crashes=1, check=the_crashed_is_named) > 10_000


@pytest.mark.parametrize("size", [2, 3])
def test_a_mismatch_is_reported_by_every_rank(size: int) -> None:
    def all_told(s: Rounds) -> None:
        assert set(s.ended) == {"mismatch"}

    odd = [("odd", 1)]
    explore([odd, *[[A]] * (size - 1)], check=all_told)
    explore([*[[A]] * (size - 1), [("odd", 2)]], check=all_told)
    explore([[A, *odd], *[[A, A]] * (size - 1)], check=all_told)


def test_a_mismatch_and_a_crash_at_once_have_one_verdict() -> None:
    assert explore([[A], [("odd", 1)], [A]], crashes=1) > 1000


@pytest.mark.parametrize("fault", ["one slot", "flag before data", "no waiting"])
def test_planted_faults_of_the_rounds(fault: str) -> None:
    with pytest.raises(ProtocolError, match="reads"):
        explore([[B]] * 2, fault=fault)


@pytest.mark.parametrize("calls", [[D, D], [D, D, A]], ids=str)
def test_two_ranks_write_into_results_in_turn(calls: list[tuple[str, int]]) -> None:
    assert explore([calls] * 2, crashes=1, check=the_crashed_is_named) > 50


def test_planted_faults_of_writing_into_results() -> None:
    with pytest.raises(ProtocolError, match=r"takes|no longer"):
        explore([[D]] * 2, fault="no last round")
    with pytest.raises(ProtocolError, match="no longer"):
        explore([[D]] * 3, crashes=1, fault="block used again")


def test_planted_comparing_left_out() -> None:
    with pytest.raises(ProtocolError, match="another collective"):
        explore([[A], [("odd", 1)]], fault="no comparing")


def test_planted_last_verdict_stands() -> None:
    with pytest.raises(ProtocolError, match="disagree"):
        explore([[A], [("odd", 1)], [A]], crashes=1, fault="last verdict stands")


def test_planted_flags_looked_up_before_lives() -> None:
    with pytest.raises(ProtocolError, match="took part"):
        explore([[A]] * 2, crashes=1, fault="flags before lives")


def test_no_wake_up_is_lost() -> None:
    assert explore_sleep() > 30
    for fault in ("sleep, then announce", "look, then publish"):
        with pytest.raises(ProtocolError, match="for ever"):
            explore_sleep(fault)


def test_rings() -> None:
    assert explore_ring(5) > 50
    for fault in ("head before data", "no looking for room"):
        with pytest.raises(ProtocolError):
            explore_ring(5, fault=fault)
