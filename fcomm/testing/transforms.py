"""What each transform of torch does with a collective on one rank, and what the result must be on all of them.

A transform is a pair. Its program runs on every rank, where derivatives are the hand-written rules; its oracle runs
once, on the stack of all ranks' values, where derivatives are torch's own derivatives of the executable meaning. x is
the argument, ct a cotangent, t a tangent. Simulated or in processes, eager or compiled, the program must return the
oracle's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Meaning:
    """A collective as one function of all ranks' values, in differentiable torch, without its rules.

    fn: the stack of x -> the stack of y, [size, ..] both. A replicated x (y) is one value instead, without the stack.
    """

    fn: Map
    size: int
    x_replicated: bool = False
    y_replicated: bool = False

    def rows_x(self, x: Tensor) -> Tensor:
        """Each rank's value of something shaped like x."""
        return x.expand(self.size, *x.shape) if self.x_replicated else x

    def rows_y(self, y: Tensor) -> Tensor:
        """Each rank's value of something shaped like y."""
        return y.expand(self.size, *y.shape) if self.y_replicated else y

    def spread_x(self, x: Tensor) -> Tensor:
        """One value given to all ranks, in the form of the argument."""
        return x if self.x_replicated else x.expand(self.size, *x.shape)

    def spread_y(self, y: Tensor) -> Tensor:
        """One value given to all ranks, in the form of the result."""
        return y if self.y_replicated else y.expand(self.size, *y.shape)


@dataclass(frozen=True)
class Transform:
    """program(f, x, ct, t) on one rank; oracle(meaning, x, ct, t) -> the rows of all ranks.

    differentiates: whether it takes a derivative.
    nests: whether it runs under another transform. simulate is one, so a transform that does not nest is put around it.
    around_compiled: whether torch.compile gets the function that is passed to the program, not the whole program.
    """

    program: Callable[[Map, Tensor, Tensor, Tensor], Any]
    oracle: Callable[[Meaning, Tensor, Tensor, Tensor], Any]
    differentiates: bool = True
    nests: bool = True
    around_compiled: bool = False


def _loss(f: Map) -> Map:
    """The whole result as one real number, with derivatives of every order."""

    def loss(x: Tensor) -> Tensor:
        y = f(x)
        return (torch.view_as_real(y) if y.is_complex() else y).sin().sum()

    return loss


def _pull(f: Map, x: Tensor, ct: Tensor) -> Tensor:
    return vjp(f, x)[1](ct)[0]  # type: ignore[no-any-return]


def _push(f: Map, x: Tensor, t: Tensor) -> Tensor:
    return jvp(f, (x,), (t,))[1]  # type: ignore[no-any-return]


def _examples(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two different examples for vmap, made elementwise so that they work for a rank and for the stack of ranks."""
    return x, ~x if x.dtype == torch.bool else 2 * x + 1


def _each(rows: Callable[[Tensor], Tensor], f: Map, x: Tensor) -> Tensor:
    """f of each example, one call after the other; the examples follow the rank in the result."""
    return torch.stack([rows(f(e)) for e in _examples(x)], 1)


def _basis(like: Tensor) -> list[Tensor]:
    return list(torch.eye(like.numel(), dtype=like.dtype).reshape(like.numel(), *like.shape).unbind(0))


def _columns(rows: list[Tensor], shape: torch.Size) -> Tensor:
    """Derivatives along each element of a basis -> a Jacobian, [.., *shape]."""
    return torch.stack(rows, -1).reshape(*rows[0].shape, *shape)


def _one_x(m: Meaning, x: Tensor) -> Tensor:
    return m.rows_x(x)[0]


def _one_y(m: Meaning, ct: Tensor) -> Tensor:
    return m.rows_y(ct)[0]


def _jacrev_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    """Row i is the pull of the i-th basis cotangent on all ranks at once: all ranks run the same program."""
    like, pull = _one_y(m, ct), vjp(m.fn, x)[1]
    rows = [m.rows_x(pull(m.spread_y(e))[0]) for e in _basis(like)]
    return torch.stack(rows, 1).reshape(m.size, *like.shape, *rows[0].shape[1:])


def _jacfwd_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    like = _one_x(m, x)
    return _columns([m.rows_y(_push(m.fn, x, m.spread_x(e))) for e in _basis(like)], like.shape)


def _hessian_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    """The Hessian over all ranks' values is symmetric: pulls equal pushes, and need the gradient's graph only once."""
    like, pull = _one_x(m, x), vjp(grad(_loss(m.fn)), x)[1]
    return _columns([m.rows_x(pull(m.spread_x(e))[0]) for e in _basis(like)], like.shape)


def _reverse_hessian_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    """The same numbers, with the basis of the outer derivative in the leading dimensions."""
    hessian, dim = _hessian_oracle(m, x, ct, t), _one_x(m, x).dim()
    return hessian.permute(0, *range(1 + dim, 1 + 2 * dim), *range(1, 1 + dim))


def _double_vjp_program(f: Map, x: Tensor, ct: Tensor, t: Tensor) -> Any:
    return vjp(lambda x, ct: _pull(f, x, ct), x, ct)[1](t)


def _double_vjp_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Any:
    of_x, of_ct = vjp(lambda x, ct: _pull(m.fn, x, ct), x, ct)[1](t)
    return m.rows_x(of_x), m.rows_y(of_ct)


def _backward_program(f: Map, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = f(x)
    before = ct.clone()
    y.backward(ct)
    assert torch.equal(before, ct), "a cotangent was written into"
    assert x.grad is not None, "no gradient arrived"
    return x.grad


def _double_backward_program(f: Map, x: Tensor, ct: Tensor, t: Tensor) -> Any:
    x, ct = x.detach().requires_grad_(), ct.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, ct, create_graph=True)
    if not g.requires_grad:
        return torch.zeros_like(x), torch.zeros_like(ct)
    return tuple(
        torch.zeros_like(v) if d is None else d
        for d, v in zip(torch.autograd.grad(g, (x, ct), t, allow_unused=True), (x, ct), strict=True)
    )


def _dual_program(f: Map, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    with fwd.dual_level():
        tangent: Tensor | None = fwd.unpack_dual(f(fwd.make_dual(x, t))).tangent
        assert tangent is not None, "no tangent arrived"
        return tangent.clone()


def _checkpoint_program(f: Map, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = checkpoint(lambda x: f(x.sin()), x, use_reentrant=False)
    return torch.autograd.grad(y, x, ct)[0]


def _inference_program(f: Map, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return f(x.clone())


def _autocast_program(f: Map, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return f(x)


def _forward_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    return m.rows_y(m.fn(x))


def _vjp_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    return m.rows_x(_pull(m.fn, x, ct))


def _jvp_oracle(m: Meaning, x: Tensor, ct: Tensor, t: Tensor) -> Tensor:
    return m.rows_y(_push(m.fn, x, t))


TRANSFORMS: dict[str, Transform] = {
    "forward": Transform(lambda f, x, ct, t: f(x), _forward_oracle, differentiates=False),
    "grad": Transform(
        lambda f, x, ct, t: grad(_loss(f))(x),
        lambda m, x, ct, t: m.rows_x(grad(_loss(m.fn))(x)),
    ),
    "vjp": Transform(lambda f, x, ct, t: _pull(f, x, ct), _vjp_oracle),
    "jvp": Transform(lambda f, x, ct, t: _push(f, x, t), _jvp_oracle),
    "jacrev": Transform(lambda f, x, ct, t: jacrev(f)(x), _jacrev_oracle),
    "jacfwd": Transform(lambda f, x, ct, t: jacfwd(f)(x), _jacfwd_oracle),
    "hessian": Transform(lambda f, x, ct, t: hessian(_loss(f))(x), _hessian_oracle),
    "reverse hessian": Transform(lambda f, x, ct, t: jacrev(jacrev(_loss(f)))(x), _reverse_hessian_oracle),
    "vjp of vjp": Transform(_double_vjp_program, _double_vjp_oracle),
    "jvp of vjp": Transform(
        lambda f, x, ct, t: _push(lambda x: _pull(f, x, ct), x, t),
        lambda m, x, ct, t: m.rows_x(_push(lambda x: _pull(m.fn, x, ct), x, t)),
    ),
    "vjp of jvp": Transform(
        lambda f, x, ct, t: _pull(lambda x: _push(f, x, t), x, ct),
        lambda m, x, ct, t: m.rows_x(_pull(lambda x: _push(m.fn, x, t), x, ct)),
    ),
    "jvp of jvp": Transform(
        lambda f, x, ct, t: _push(lambda x: _push(f, x, x.sin()), x, t),
        lambda m, x, ct, t: m.rows_y(_push(lambda x: _push(m.fn, x, x.sin()), x, t)),
    ),
    "vmap": Transform(
        lambda f, x, ct, t: vmap(f, in_dims=-1)(torch.stack(_examples(x), -1)),
        lambda m, x, ct, t: _each(m.rows_y, m.fn, x),
        differentiates=False,
    ),
    "vmap of grad": Transform(
        lambda f, x, ct, t: vmap(grad(_loss(f)), in_dims=-1)(torch.stack(_examples(x), -1)),
        lambda m, x, ct, t: _each(m.rows_x, grad(_loss(m.fn)), x),
    ),
    "grad of vmap": Transform(
        lambda f, x, ct, t: grad(_loss(vmap(f, in_dims=-1)))(torch.stack(_examples(x), -1)).movedim(-1, 0),
        lambda m, x, ct, t: _each(m.rows_x, grad(_loss(m.fn)), x),
    ),
    "vmap of vjp": Transform(
        lambda f, x, ct, t: vmap(lambda x, ct: _pull(f, x, ct), in_dims=(-1, None))(torch.stack(_examples(x), -1), ct),
        lambda m, x, ct, t: _each(m.rows_x, lambda e: _pull(m.fn, e, ct), x),
    ),
    "vmap of jvp": Transform(
        lambda f, x, ct, t: vmap(lambda x, t: _push(f, x, t), in_dims=(-1, None))(torch.stack(_examples(x), -1), t),
        lambda m, x, ct, t: _each(m.rows_y, lambda e: _push(m.fn, e, t), x),
    ),
    "backward": Transform(_backward_program, _vjp_oracle, nests=False, around_compiled=True),
    "double backward": Transform(_double_backward_program, _double_vjp_oracle, nests=False),
    "forward mode": Transform(_dual_program, _jvp_oracle, nests=False),
    "checkpoint": Transform(
        _checkpoint_program,
        lambda m, x, ct, t: m.rows_x(_pull(lambda x: m.fn(x.sin()), x, ct)),
        nests=False,
    ),
    "inference mode": Transform(_inference_program, _forward_oracle, differentiates=False, nests=False),
    "autocast": Transform(_autocast_program, _forward_oracle, differentiates=False, nests=False),
}
