"""send and recv: one edge between two ranks. The cotangent travels it backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcomm.collectives import checks
from fcomm.errors import ArgumentError
from fcomm.group import Backend, Group
from fcomm.registration import apply, batched_as, define


def send(x: Tensor, group: Group, backend: Backend, *, dst: int | None = None) -> Tensor:
    """Send x to rank dst, by default the next rank; returns a token without waiting for the receiver.

        rank 0  send(x, .., dst=1)
        rank 1  recv(like, .., src=0)  ->  x

    The token is an empty tensor of x's dtype (on a simulated axis, and in a group of one, it carries x). Pass it to
    recv(after=token), or add token.sum() to the loss. A rank that never differentiates the token does not receive the
    cotangent that its receiver sends, and the next message from that rank raises MismatchError.
    dst: a rank within the group; on a simulated axis, where every rank runs this call, leave it out or use ppermute.
    Any dtype. vjp: recv from dst. Traffic: x's bytes.
    Raises FcommError if dst is not another rank of the group.
    """
    return apply("send", x, group, backend, _peer("send", "dst", dst, 1, group), 0)


def recv(
    like: Tensor, group: Group, backend: Backend, *, src: int | None = None, after: Tensor | None = None
) -> Tensor:
    """Receive the tensor that rank src, by default the previous rank, sends to this one; like has its shape and dtype.

    after: a token of send. The receive, and in backward its send, is then ordered after that send. In a ring, where all
    ranks send and then receive, always pass it.
    vjp: send to src. With after, the cotangent is sent if after is differentiated, that is, if the x of its send is.
    Without after, it is sent if like is differentiated, and always in backward(): detach the result if the sender wants
    no cotangent.
    Traffic: x's bytes.
    Raises FcommError if src is not another rank of the group, MismatchError if the message's shape or dtype differs
    from that of like, or if the message is a derivative that this rank did not receive when it came.
    """
    checks.is_tensor("recv", "like", like)
    peer = _peer("recv", "src", src, -1, group)
    if after is None:
        if group.simulated or group.size == 1:
            raise ArgumentError(f"recv: on group '{group.name}' the token carries the message; pass after=send(..)")
        real = like.dtype.is_floating_point or like.dtype.is_complex
        after = torch.empty(0, dtype=like.dtype, device=like.device, requires_grad=real and torch.is_grad_enabled())
    else:
        checks.is_tensor("recv", "after", after)
        # Its zero cotangent must not give a derivative to a message that has none at its sender.
        like = like.detach()
    y = apply("recv", (after, like), group, backend, peer, 0)
    if group.simulated or group.size == 1:  # elsewhere the machine compares
        checks.same_message("recv", y, like, group)
    return y


def _peer(name: str, option: str, peer: int | None, step: int, group: Group) -> int:
    """The peer's rank; on a simulated axis, where each rank has a different peer, the step to it."""
    checks.is_group(name, group)
    if group.simulated:
        if peer is not None:
            raise ArgumentError(
                f"{name}: {option} is {peer!r}, but every rank of simulated axis '{group.name}' makes this call; "
                "leave it out for the neighbour, or use ppermute(perm=[(source, destination)])"
            )
        return step
    if peer is None:
        return ((group.rank or 0) + step) % group.size
    peer = checks.rank_in_group(name, option, peer, group)
    if peer == group.rank and group.size > 1:
        raise ArgumentError(f"{name}: {option} is {peer}, this rank itself, on group '{group.name}'; use x as it is")
    return peer


# Each derivative of a call sends along the call's edge or back. So a message says which derivative it is, 0 for the
# call itself, and none is mistaken for another if only one of the two ranks differentiates.


def _of_vjp(derivative: int) -> int:
    return 2 * derivative + 1


def _of_jvp(derivative: int) -> int:
    return 2 * derivative + 2


def _send_batch(
    call: Callable[..., Tensor], size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[Tensor, int]:
    # The token is batched, though empty: its cotangent must know how many messages come back.
    (x,), (dim,) = tensors, in_dims
    token = call(x.movedim(dim or 0, 0))
    return token.expand(size, *token.shape) if token.numel() == 0 and token.dim() == 1 else token, 0


define(
    "send",
    schema="int dst, int derivative",
    spec=lambda xs, dst, derivative: [x.clone() for x in xs],
    shape=lambda s, group, dst, derivative: (0,) if group.size > 1 else s,
    # A new tensor, since a machine would make x's stand-in contiguous.
    vjp=lambda ct, group, backend, dst, derivative, x: apply(
        "recv", (ct, x.new_empty(x.shape)), group, backend, dst, _of_vjp(derivative)
    ),
    jvp=lambda t, group, backend, dst, derivative: apply("send", t, group, backend, dst, _of_jvp(derivative)),
    shape_of=("x",),
    batch=_send_batch,
    busbw=lambda n: 1.0,
)


def _recv_spec(afters: list[Tensor], likes: list[Tensor], src: int, derivative: int) -> list[Tensor]:
    n = len(afters)
    return [afters[(r + src) % n].clone() for r in range(n)]


def _recv_vjp(
    ct: Tensor, group: Group, backend: Backend, src: int, derivative: int, after: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    # A batch of messages may share one cotangent; their sender waits for as many as it sent.
    token = apply("send", batched_as(ct, after, like), group, backend, src, _of_vjp(derivative))
    # One token for a batch of messages, where `after` may be a batch of tokens.
    return token.reshape(after.shape), torch.zeros_like(ct)


def _recv_jvp(after: Tensor, like: Tensor, group: Group, backend: Backend, src: int, derivative: int) -> Tensor:
    return apply("recv", (after, like), group, backend, src, _of_jvp(derivative))


define(
    "recv",
    inputs=("after", "like"),
    schema="int src, int derivative",
    spec=_recv_spec,
    shape=lambda after, like, group, src, derivative: like,
    vjp=_recv_vjp,
    jvp=_recv_jvp,
    # For the shape, and because send saves a tensor: a checkpoint's second forward stops at the last saved tensor, and
    # if that is between a send and its recv, it leaves a message behind.
    shape_of=("after", "like"),
    busbw=lambda n: 1.0,
)
