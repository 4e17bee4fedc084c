"""send and recv: messages that come late, that are changed in place, that have many dimensions."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from deadlines import tell, wait_for_word
from torch import Tensor

import fcomm
from fcomm.backends.pool import native
from fcomm.testing import run_ranks

# A message may come long after its receiver started to wait: the delay is longer than the interval of its checks.


def _late(world: fcomm.Group, backend: str) -> Tensor:
    handles = world, getattr(fcomm, backend)
    x = fcomm.all_reduce(torch.ones(3), *handles)
    if world.rank == 0:
        time.sleep(1.0)
        fcomm.send(x, *handles, dst=1)
        return x
    return fcomm.recv(torch.zeros(3), *handles, src=0)


@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_a_late_message_arrives(backend: str) -> None:
    for x in fcomm.run(_late, 2, backend):
        torch.testing.assert_close(x, torch.full((3,), 2.0))


def test_a_like_of_another_shape_is_a_mismatch_also_where_the_token_carries_the_message() -> None:
    axis, alone = fcomm.axis("i", 2), fcomm.subgroup(fcomm.init(), [0], name="alone")
    for group, backend, run in ((axis, fcomm.sim, fcomm.simulate), (alone, fcomm.cpu, lambda fn, _: fn)):
        for like in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
            on = group, backend
            call = run(lambda x, like=like, on=on: fcomm.recv(like, *on, after=fcomm.send(x, *on)), group)
            with pytest.raises(fcomm.MismatchError, match=r"is torch.float32 \(2,\), like is torch.float"):
                call(torch.ones(2, 2) if group is axis else torch.ones(2))
    fcomm.close(alone)


# --- in line while its sender waits for its receiver elsewhere --------------------------------------------------------


def _elsewhere(world: fcomm.Group, backend: str, closes: bool) -> list[str]:
    on, x = getattr(fcomm, backend), torch.arange(2.0**18)
    edge, other = (fcomm.subgroup(world, range(2), name=name, timeout_s=20) for name in ("edge", "other"))
    for group in (edge, other):
        fcomm.barrier(group, on)
    y = x
    if world.rank == 0:
        fcomm.send(x, edge, on, dst=1)
        if closes:
            fcomm.send(x, other, on, dst=1)
        tell(world, "sent")  # it does not fit into a ring, and nobody receives it yet
    else:
        wait_for_word(world, "sent")
        y = fcomm.recv(x, edge, on, src=0)
        if closes:
            y = y + fcomm.recv(x, other, on, src=0) - x
    if closes:
        fcomm.close(other)
    else:
        fcomm.barrier(other, on)
    fcomm.barrier(edge, on)
    return [] if torch.equal(x, y) else ["wrong"]


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_a_message_moves_on_while_its_sender_is_in_another_group(backend: str, closes: bool) -> None:
    run_ranks(_elsewhere, 2, backend, closes, timeout_s=60)


# --- changed in place: the rules read no data, so what is sent, received and given as like is the caller's again ------


def _changed(x: Tensor, on: tuple[fcomm.Group, fcomm.Backend]) -> Tensor:
    """3 * the neighbour's 2x, with every tensor of the calls overwritten after them."""
    sent, like = 2 * x, torch.zeros_like(x)
    token = fcomm.send(sent, *on)
    received = fcomm.recv(like, *on, after=token)
    sent.fill_(torch.nan)
    like.fill_(torch.nan)
    return received.mul_(3)


def _derivatives(fn: Callable[..., Tensor], x: Tensor, on: tuple[fcomm.Group, fcomm.Backend]) -> list[Tensor]:
    x.requires_grad_()
    y = fn(x, on)
    (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad((g**2).sum(), x, retain_graph=True)
    (each,) = torch.autograd.grad(g, x, torch.eye(len(x)), is_grads_batched=True)
    return [y.detach(), g.detach(), h, each]


def check_changed(world: fcomm.Group, backend: str) -> list[str]:
    on, rank = (world, getattr(fcomm, backend)), world.rank or 0
    own, left = torch.full((3,), rank + 1.0), torch.full((3,), (rank - 1) % world.size + 1.0)
    expected = [6 * left, 72 * own, 2 * 72**2 * own, 72 * torch.eye(3)]
    for text, fn in (("eager", _changed), ("compiled", torch.compile(_changed, fullgraph=True, backend="aot_eager"))):
        x = own.clone().requires_grad_()
        y = fn(x, on)
        (y**2).sum().backward()
        torch.testing.assert_close([y.detach(), x.grad], expected[:2], msg=lambda m, text=text: f"{text}: {m}")
    torch.testing.assert_close(_derivatives(_changed, own.clone(), on), expected)
    return []


@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_messages_changed_in_place_have_a_derivative(backend: str) -> None:
    run_ranks(check_changed, 3, backend, timeout_s=100)


def test_simulated_messages_changed_in_place_have_a_derivative() -> None:
    axis = fcomm.axis("ring", 3)
    x = torch.arange(1.0, 4.0)[:, None].expand(3, 2).clone().requires_grad_()
    y = fcomm.simulate(lambda x: _changed(x, (axis, fcomm.sim)), axis)(x)
    (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    torch.testing.assert_close(y.detach(), 6 * x.detach().roll(1, 0))
    torch.testing.assert_close(g.detach(), 72 * x.detach())
    torch.testing.assert_close(torch.autograd.grad((g**2).sum(), x)[0], 2 * 72**2 * x.detach())


# --- a batch of messages whose cotangent is one for all: as many travel back as came ------------------------------


def _pulled(x: Tensor, ct: Tensor, on: tuple[fcomm.Group, fcomm.Backend]) -> Tensor:
    return torch.func.vjp(lambda x: fcomm.recv(torch.zeros_like(x), *on, after=fcomm.send(x.sin(), *on)), x)[1](ct)[0]  # type: ignore[no-any-return]


def check_one_cotangent(world: fcomm.Group, backend: str) -> list[str]:
    on, rank = (world, getattr(fcomm, backend)), world.rank or 0
    batch = torch.arange(6.0).reshape(2, 3) + rank
    ct, right = torch.full((3,), rank + 1.0), torch.full((3,), (rank + 1) % world.size + 1.0)
    each = torch.vmap(lambda x: _pulled(x, ct, on))
    torch.testing.assert_close(each(batch), batch.cos() * right)
    torch.testing.assert_close(torch.func.jvp(each, (batch,), (batch,))[1], -batch.sin() * batch * right)
    torch.testing.assert_close(torch.compile(each, fullgraph=True, backend="aot_eager")(batch), batch.cos() * right)
    if rank == 0:  # no token: only like is batched
        torch.vmap(lambda x: torch.func.vjp(lambda x: fcomm.send(x, *on, dst=1), x)[1](torch.zeros(0)))(batch)
    elif rank == 1:
        torch.vmap(lambda x: torch.func.vjp(lambda x: fcomm.recv(x, *on, src=0), x)[1](ct))(batch)
    return []


@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_a_batch_of_messages_has_one_cotangent(backend: str) -> None:
    run_ranks(check_one_cotangent, 3, backend, timeout_s=60)


# --- more dimensions than the engine of fcomm.cpu carries: 16 -----------------------------------------------------


def _many(*lengths: int) -> Tensor:
    """17 dimensions or more: 14 of length 1, then those."""
    return torch.arange(24.0).reshape(*[1] * 14, *lengths)


def check_many(world: fcomm.Group) -> list[str]:
    for shape in ((4, 6), (2, 3, 4), (2, 1, 3, 4), (1,) * 40 + (24,)):
        x = _many(*shape)
        token = fcomm.send(x + (world.rank or 0), world, fcomm.cpu)
        y = fcomm.recv(x, world, fcomm.cpu, after=token)
        torch.testing.assert_close(y, x + 1 - (world.rank or 0))
    if world.rank == 0:
        fcomm.send(_many(2, 3, 4), world, fcomm.cpu)
        return []
    with pytest.raises(fcomm.MismatchError) as caught:
        fcomm.recv(_many(2, 4, 3), world, fcomm.cpu)
    lengths = ", ".join(["1"] * 14)
    return [] if f"sent='float32[{lengths}, 2, ...]'" in str(caught.value) else [str(caught.value)]


@pytest.mark.skipif(native is None, reason="the engine is not built; torch.distributed's errors have other words")
def test_messages_of_many_dimensions_arrive_and_are_compared() -> None:
    run_ranks(check_many, 2, timeout_s=60)


# --- derivatives that one rank sends and the other does not take --------------------------------------------------


def _data_beside(v: Tensor, step: int, world: fcomm.Group, backend: str) -> Tensor:
    """A ring in which the messages have no derivative, but the tensors beside them have one."""
    data = torch.full((3,), 10.0 * step + (world.rank or 0))
    return fcomm.recv(v, world, getattr(fcomm, backend), after=fcomm.send(data, world, getattr(fcomm, backend)))


def check_data_beside(world: fcomm.Group, backend: str) -> list[str]:
    left = (1 - (world.rank or 0)) * torch.ones(3)
    for step in range(3):
        v = torch.ones(3, requires_grad=True)
        (got := _data_beside(v, step, world, backend) * v).sum().backward()
        primal, tangent = torch.func.jvp(lambda v, step=step: _data_beside(v, step, world, backend) * v, (v,), (3 * v,))
        torch.testing.assert_close([got, v.grad, primal], [10 * step + left] * 3)
        torch.testing.assert_close(tangent, 3 * (10 * step + left))
    return []


@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_messages_that_are_data_have_no_derivative(backend: str) -> None:
    run_ranks(check_data_beside, 2, backend, timeout_s=60)


def check_not_taken(world: fcomm.Group, backend: str) -> list[str]:
    """Rank 1 differentiates a batch that is data on rank 0, which then waits for a result."""
    on, batch = (world, getattr(fcomm, backend)), torch.ones(3)
    if world.rank == 0:
        fcomm.send(batch, *on, dst=1)
        with pytest.raises(fcomm.MismatchError, match=r"the cotangent of a recv.*or detach both"):
            fcomm.recv(batch, *on, src=1)
        return []
    (fcomm.recv(batch, *on, src=0) ** 2).sum().backward()
    return []


@pytest.mark.parametrize("backend", ["cpu", "c10d"])
def test_a_cotangent_is_not_taken_for_a_message(backend: str) -> None:
    run_ranks(check_not_taken, 2, backend, timeout_s=60)
