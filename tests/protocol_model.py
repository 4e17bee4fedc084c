"""The engine's protocol as a model: the same steps as fcomm/csrc/comm.cpp and ring.cpp, over every interleaving.

A rank is a list of atomic steps; a state is the position of each rank and the contents of shared memory. `explore`
walks every state that some schedule reaches, with up to `crashes` ranks stopping dead at any step, and returns the
number of states; it raises ProtocolError with the first thing that went wrong. Planted faults must be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

TORN = "torn"  # what a reader sees of a slot that is being written


class ProtocolError(AssertionError):
    """Some schedule breaks the protocol's promise."""


def walk(first: S, successors: Callable[[S], list[S]], final: Callable[[S], None]) -> int:
    """Number of reachable states; final(state) judges those without successors."""
    seen, stack = {first}, [first]
    while stack:
        state = stack.pop()
        following = successors(state)
        if not following:
            final(state)
        for s in following:
            if s not in seen:
                seen.add(s)
                stack.append(s)
    return len(seen)


# ---- rounds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rounds:
    """Shared memory, and each rank's position in its program."""

    at: tuple[int, ...]  # next step of each rank; len(program) when it is done
    note: tuple[tuple[str, int] | None, ...]  # what a rank has seen on its way to blaming another
    ended: tuple[str | None, ...]  # "ok", "crashed", or the failure that the rank reports
    flags: tuple[int, ...]
    slots: tuple[tuple[object, ...], ...]
    results: tuple[tuple[object, ...], ...]  # what each rank's result holds, by writer
    prints: tuple[tuple[str, ...], ...]
    poison: str | None


Step = tuple[str, int, int]  # what, round, peer
DIRECT = -2  # and its two rounds


def program(rank: int, size: int, calls: Sequence[tuple[str, int]], fault: str | None) -> list[Step]:
    """calls: (fingerprint, rounds) of each collective in turn; DIRECT rounds: one that writes into results."""
    steps: list[Step] = []
    r = 0
    for _, rounds in calls:
        steps.append(("enter", r, rank))
        if rounds == DIRECT:
            peers = [p for p in range(size) if p != rank]
            meet = [step for p in peers for step in (("wait", r + 1, p), ("compare", r + 1, p))]
            steps += [("print", r + 1, rank), ("publish", r + 1, rank), *meet]
            steps += [(what, r + 1, p) for p in peers for what in ("begin writing", "write")]
            last = [("publish", r + 2, rank), *(("wait", r + 2, p) for p in peers)]
            steps += [*(last if fault != "no last round" else []), ("take", r + 1, rank)]
            r += 2
            continue
        for k in range(rounds):
            r += 1
            fill: list[Step] = [("begin", r, rank), ("fill", r, rank)]
            tell: list[Step] = ([("print", r, rank)] if k == 0 else []) + [("publish", r, rank)]
            steps += tell + fill if fault == "flag before data" else fill + tell
            for p in range(size):
                if p != rank:
                    steps += [("wait", r, p)] if k == 0 or fault != "no waiting" else []
                    steps += [("compare", r, p)] if k == 0 and fault != "no comparing" else []
            steps += [("read", r, p) for p in range(size) if p != rank]
    return steps


def _set(values: tuple[T, ...], i: int, value: T) -> tuple[T, ...]:
    return values[:i] + (value,) + values[i + 1 :]


def explore(
    calls: Sequence[Sequence[tuple[str, int]]],
    crashes: int = 0,
    fault: str | None = None,
    check: Callable[[Rounds], None] | None = None,
) -> int:
    """calls[rank] is what each rank asks for; equal lists are a correct program, others a mismatch to be reported."""
    size = len(calls)
    depth = 1 if fault == "one slot" else 2
    programs = [program(rank, size, calls[rank], fault) for rank in range(size)]
    asked = [[print_ for print_, rounds in calls[rank] for _ in range(abs(rounds))] for rank in range(size)]

    def fail(s: Rounds, rank: int, verdict: str) -> Rounds:
        """poison(): the first writer's verdict counts, and every rank reports it."""
        if s.poison is None or fault == "last verdict stands":
            s = replace(s, poison=verdict)
        return replace(s, ended=_set(s.ended, rank, s.poison), note=_set(s.note, rank, None))

    def wait(s: Rounds, rank: int, r: int, p: int) -> Iterator[Rounds]:
        # At each `note` other ranks may run in between, as between two loads in wait_slowly().
        note = s.note[rank]
        if note is None:
            if s.flags[p] >= r:
                yield replace(s, at=_set(s.at, rank, s.at[rank] + 1))
            elif s.poison is not None:
                yield fail(s, rank, s.poison)
            elif fault == "flags before lives":
                missing = [q for q in range(size) if s.flags[q] < r and q != rank]
                yield from (replace(s, note=_set(s.note, rank, ("missing", q))) for q in missing)
            else:
                yield replace(s, note=_set(s.note, rank, ("poll", p)))
        elif note[0] == "poll":  # which ranks are dead; which of those have published is looked up afterwards
            dead = [q for q in range(size) if s.ended[q] is not None and q != rank]
            yield from (replace(s, note=_set(s.note, rank, ("dead", q))) for q in dead)
            if s.flags[p] >= r or s.poison is not None:  # none is dead: look again
                yield replace(s, note=_set(s.note, rank, None))
        elif note[0] == "dead":
            q = note[1]
            yield replace(s, note=_set(s.note, rank, ("blame", q) if s.flags[q] < r else None))
        elif note[0] == "missing":
            q = note[1]
            if s.ended[q] is not None:
                yield replace(s, note=_set(s.note, rank, ("blame", q)))
            elif s.flags[p] >= r or s.poison is not None:
                yield replace(s, note=_set(s.note, rank, None))
        else:
            q = note[1]
            if s.flags[q] >= r:
                raise ProtocolError(f"rank {rank} blames rank {q}, which took part in round {r}")
            yield fail(s, rank, f"rank {q} died")

    def step(s: Rounds, rank: int) -> Iterator[Rounds]:
        what, r, p = programs[rank][s.at[rank]]
        then = replace(s, at=_set(s.at, rank, s.at[rank] + 1))
        if what == "enter":
            yield fail(s, rank, s.poison) if s.poison is not None else then
        elif what in ("begin", "fill"):
            value = TORN if what == "begin" else (rank, r)
            yield replace(then, slots=_set(s.slots, rank, _set(s.slots[rank], r % depth, value)))
        elif what == "print":
            yield replace(then, prints=_set(s.prints, rank, _set(s.prints[rank], r % depth, asked[rank][r - 1])))
        elif what == "publish":
            yield replace(then, flags=_set(s.flags, rank, r))
        elif what == "wait":
            yield from wait(s, rank, r, p)
        elif what in ("begin writing", "write"):
            # A peer whose call failed has taken its block away, so the kernel refuses the write; one that is done has
            # handed the result to its caller.
            failed = s.ended[p] not in (None, "ok", "crashed")
            taken = s.ended[p] == "ok" or (s.ended[p] is None and s.at[p] > programs[p].index(("take", r, p)))
            if taken or (failed and fault == "block used again"):
                raise ProtocolError(f"rank {rank} writes into memory that is no longer the result of rank {p}")
            value = TORN if what == "begin writing" else (rank, r)
            refused = s.ended[p] is not None
            yield then if refused else replace(then, results=_set(s.results, p, _set(s.results[p], rank, value)))
        elif what == "take":
            for q in range(size):
                if q != rank and s.results[rank][q] != (q, r):
                    raise ProtocolError(f"rank {rank} takes {s.results[rank][q]} where rank {q} writes its part")
            yield then
        elif what == "compare":
            mine, theirs = asked[rank][r - 1], s.prints[p][r % depth]
            yield then if mine == theirs else fail(s, rank, "mismatch")
        else:
            if s.slots[p][r % depth] != (p, r):
                raise ProtocolError(
                    f"rank {rank} reads {s.slots[p][r % depth]} where rank {p}'s data of round {r} belong"
                )
            if asked[rank][r - 1] != asked[p][r - 1]:
                raise ProtocolError(f"rank {rank} takes data of another collective for its own")
            yield then

    def successors(s: Rounds) -> list[Rounds]:
        following: list[Rounds] = []
        for rank in range(size):
            if s.ended[rank] is not None:
                continue
            if s.at[rank] == len(programs[rank]):
                following.append(replace(s, ended=_set(s.ended, rank, "ok")))
                continue
            following += step(s, rank)
            if s.ended.count("crashed") < crashes:
                following.append(replace(s, ended=_set(s.ended, rank, "crashed"), note=_set(s.note, rank, None)))
        return following

    def final(s: Rounds) -> None:
        if None in s.ended:
            raise ProtocolError(f"ranks {[r for r in range(size) if s.ended[r] is None]} wait for ever: {s}")
        verdicts = {e for e in s.ended if e not in ("ok", "crashed")}
        if len(verdicts) > 1:
            raise ProtocolError(f"survivors disagree: {sorted(map(str, verdicts))}")
        if check:
            check(s)

    nothing: tuple[object, ...] = (None,) * depth
    first = Rounds(
        at=(0,) * size,
        note=(None,) * size,
        ended=(None,) * size,
        flags=(0,) * size,
        slots=(nothing,) * size,
        results=((None,) * size,) * size,
        prints=(("",) * depth,) * size,
        poison=None,
    )
    return walk(first, successors, final)


# ---- sleeping on a flag ----------------------------------------------------------------------------------


WAITING = ("try", "announce", "look", "sleep", "leave")


def explore_sleep(fault: str | None = None) -> int:
    """One waiter and one publisher of rounds 1 and 2, without slices: a lost wake-up would be an endless wait.

    State: (waiter's step, target, seen, asleep; publisher's step; flag, waiters).
    """
    waiting = ("try", "look", "sleep", "announce", "leave") if fault == "sleep, then announce" else WAITING
    publishing = ("look", "publish", "wake") if fault == "look, then publish" else ("publish", "look", "wake")
    State = tuple[int, int, int, bool, int, int, int, bool]

    def successors(s: State) -> list[State]:
        step, target, seen, asleep, told, flag, waiters, sees = s
        out: list[State] = []
        if target <= 2 and not asleep:
            what = waiting[step]
            if what == "try":
                out.append((0, target + 1, 0, False, told, flag, waiters, sees) if flag >= target else (1, *s[1:]))
            elif what == "announce":
                out.append((step + 1, target, seen, False, told, flag, waiters + 1, sees))
            elif what == "look":
                out.append((step + 1, target, flag, False, told, flag, waiters, sees))
            elif what == "sleep":  # futex: sleeps only while the word is still what was seen
                out.append((step + 1, target, seen, seen < target and flag == seen, told, flag, waiters, sees))
            else:
                out.append((0, target, 0, False, told, flag, waiters - 1, sees))
        if told < 2 * len(publishing):
            what = publishing[told % len(publishing)]
            if what == "publish":
                out.append((step, target, seen, asleep, told + 1, flag + 1, waiters, sees))
            elif what == "look":
                out.append((step, target, seen, asleep, told + 1, flag, waiters, waiters > 0))
            else:
                out.append((step, target, seen, asleep and not sees, told + 1, flag, waiters, sees))
        return out

    def final(s: State) -> None:
        if s[1] <= 2:
            raise ProtocolError(f"the waiter sleeps for ever: {s}")

    return walk((0, 1, 0, False, 0, 0, 0, False), successors, final)


# ---- rings -----------------------------------------------------------------------------------------------


def explore_ring(pieces: int, room: int = 2, fault: str | None = None) -> int:
    """One writer and one reader of a ring of `room` pieces. State: (writer's step, head, reader's step, tail, ring)."""
    write = (
        ("room", "begin", "fill", "publish") if fault != "head before data" else ("room", "publish", "begin", "fill")
    )
    write = write[1:] if fault == "no looking for room" else write
    State = tuple[int, int, int, int, tuple[object, ...]]

    def successors(s: State) -> list[State]:
        w, head, r, tail, ring = s
        out: list[State] = []
        n, k = divmod(w, len(write))  # piece, step
        if n < pieces:
            what = write[k]
            if what == "room":
                if n - tail < room:
                    out.append((w + 1, head, r, tail, ring))
            elif what == "publish":
                out.append((w + 1, head + 1, r, tail, ring))
            else:
                out.append((w + 1, head, r, tail, _set(ring, n % room, TORN if what == "begin" else n)))
        if tail < pieces:
            if r == 0 and head > tail:
                out.append((w, head, 1, tail, ring))
            elif r == 1:
                if ring[tail % room] != tail:
                    raise ProtocolError(f"the reader takes {ring[tail % room]} for piece {tail}")
                out.append((w, head, 2, tail, ring))
            elif r == 2:
                out.append((w, head, 0, tail + 1, ring))
        return out

    def final(s: State) -> None:
        if s[3] != pieces:
            raise ProtocolError(f"stuck: {s}")

    return walk((0, 0, 0, 0, (None,) * room), successors, final)
