"""What torch.compile and export cannot do without any collective: why a cell is empty, and what to write instead.

Each limit is shown in plain torch. When a new torch lifts one, its test fails, and the reason in fcomm/testing/check.py
can go. Every attempt runs in a separate process: a compilation that fails inside a transform leaves torch broken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fcomm

X = torch.arange(6, dtype=torch.float64).reshape(3, 2) / 5
RANKS = fcomm.axis("ranks", 3)

# Long, since each needs a process and a compilation; the results change only with torch.
pytestmark = pytest.mark.long


def _loss(x: Tensor) -> Tensor:
    return x.sin().prod()


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return vmap(lambda y: y * x[0])(x.clone())


def _dual(x: Tensor) -> Tensor:
    import torch.autograd.forward_ad as fwd

    with fwd.dual_level():
        return fwd.unpack_dual(fwd.make_dual(x, x).sin()).tangent.clone()


TABLE: dict[str, int] = {}


def _with_side_effect(x: Tensor) -> Tensor:
    TABLE["now"] = 1
    y = x.sin()
    TABLE.pop("now")
    return y


def _reduced(x: Tensor) -> Tensor:
    return fcomm.all_reduce(x.sin(), RANKS, fcomm.sim, op="prod")


def _around(x: Tensor) -> Tensor:
    """The Hessian of the whole simulated program: every rank's derivative with respect to every rank's x."""
    return hessian(lambda x: fcomm.simulate(_reduced, RANKS)(x).cos().sum())(x)


def _by_reverse(x: Tensor) -> Tensor:
    return fcomm.simulate(jacrev(jacrev(lambda x: _reduced(x).cos().sum())), RANKS)(x)


def _checkpoint(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(fn, x, use_reentrant=False)


def _twice_sum(x: Tensor) -> Tensor:
    return 2 * torch.stack([x, x]).sum(0)


def _vjp_of_jvp(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: vjp(lambda x: jvp(f, (x,), (x.detach(),))[1], x)[1](f(x))[0]


FORWARD_MODE = "InferenceMode::is_enabled"
ATTEMPTS: dict[str, tuple[Callable[[Tensor], Any], str | None]] = {
    # plain torch, and the text of its refusal; None if it compiles
    "vmap of jacfwd of a product with a constant": (vmap(jacfwd(lambda x: 2 * x)), FORWARD_MODE),
    "vmap of hessian": (vmap(hessian(_loss)), FORWARD_MODE),
    "vmap of jacfwd of grad": (vmap(jacfwd(grad(_loss))), FORWARD_MODE),
    "vmap of vjp of jvp of a sum times a constant": (vmap(_vjp_of_jvp(_twice_sum)), "Please convert all Tensors"),
    "checkpoint of a side effect": (_checkpoint(_with_side_effect), "Unsafe side effect"),
    "inference mode of vmap over an outer tensor": (_inference, "version_counter"),
    # neighbours of those that compile, so that the reasons claim no more than is true
    "vmap of jacfwd of a square": (vmap(jacfwd(lambda x: x * x)), None),
    "vjp of jvp of a sum times a constant": (_vjp_of_jvp(_twice_sum), None),
    "hessian": (lambda x: hessian(_loss)(x[0]), None),
    "hessian of vmap": (hessian(lambda x: vmap(_loss)(x).sum()), None),
    "vmap of jacrev of jacrev": (vmap(jacrev(jacrev(_loss))), None),
    "checkpoint of vmap": (_checkpoint(vmap(torch.sin)), None),
    "dual tensors": (_dual, None),
    # the same with a collective
    "hessian inside simulate": (
        fcomm.simulate(hessian(lambda x: _reduced(x).cos().sum()), RANKS), FORWARD_MODE,
    ),
    "hessian around simulate": (_around, None),
    "reverse hessian inside simulate": (_by_reverse, None),
    "checkpoint of simulate": (_checkpoint(fcomm.simulate(_reduced, RANKS)), "Unsafe side effect"),
    "checkpoint inside simulate": (fcomm.simulate(_checkpoint(_reduced), RANKS), None),
}  # fmt: skip


def _attempt(world: fcomm.Group, name: str) -> str | None:
    """Compile it; return the refusal, or None if the result equals the eager one."""
    fn, _ = ATTEMPTS[name]
    expected = fn(X.clone())
    try:
        got = torch.compile(fn, fullgraph=True, backend="aot_eager")(X.clone())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    torch.testing.assert_close(got, expected)
    return None


@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_torch_compiles(name: str) -> None:
    (said,) = fcomm.run(_attempt, 1, name)
    refusal = ATTEMPTS[name][1]
    if refusal is None:
        assert said is None
    else:
        assert said is not None, "torch compiles it now: remove the reason"
        assert refusal in said


def _hessian_in_processes(world: fcomm.Group) -> tuple[Tensor, Tensor]:
    def fn(x: Tensor) -> Tensor:
        return hessian(lambda x: fcomm.all_reduce(x.sin(), world, fcomm.c10d, op="prod").cos().sum())(x)

    x = X[world.rank].clone()
    return fn(x), torch.compile(fn, fullgraph=True, backend="aot_eager")(x)


def test_a_compiled_hessian_in_processes_and_around_simulate_agree() -> None:
    """All ranks run the same program, so a rank's Hessian is for a change of all ranks' x at once."""
    around = torch.compile(_around, fullgraph=True, backend="aot_eager")(X)
    for rank, (eager, compiled) in enumerate(fcomm.run(_hessian_in_processes, 3)):
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(compiled, around[rank].sum(1))


class _Program(torch.nn.Module):
    def __init__(self, fn: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


def _sine_and_sum(x: Tensor) -> Tensor:
    return fcomm.all_reduce(x.sin(), RANKS, fcomm.sim).sin().sum()


EXPORTS: dict[str, tuple[Callable[[Tensor], Any], str | None]] = {
    # plain torch, and the text of its refusal; None if it exports
    "vmap of grad": (vmap(grad(_loss)), "no attribute 'constant'"),
    "grad of vmap": (grad(lambda x: vmap(torch.sin)(x).sum()), "batched == nullptr"),
    "vmap with another dimension": (vmap(torch.sin, in_dims=1), "fake tensor in the exported program"),
    "vmap": (vmap(torch.sin), None),
    "jvp of vmap": (lambda x: jvp(vmap(torch.sin), (x,), (x,))[1], None),
    # the same with a collective
    "grad inside simulate": (fcomm.simulate(grad(_sine_and_sum), RANKS), "no attribute 'constant'"),
    "simulate": (fcomm.simulate(_sine_and_sum, RANKS), None),
}


def _export(world: fcomm.Group, name: str) -> tuple[str | None, bool, str | None]:
    """The refusal or None, whether it exports if make_fx traces it first, and the refusal of a vjp of the exported."""
    fn, _ = EXPORTS[name]
    other = X.flip(0) + 1
    traced = torch.export.export(make_fx(fn)(X.clone()), (X.clone(),)).module()
    right = torch.allclose(traced(other), fn(other))
    try:
        program = torch.export.export(_Program(fn), (X.clone(),))
        right = right and torch.allclose(program.module()(other), fn(other))
    except Exception as error:
        return f"{type(error).__name__}: {error}", right, None
    decomposed = program.run_decompositions().module()
    ct = torch.ones_like(fn(other))
    right = right and torch.allclose(vjp(decomposed, other)[1](ct)[0], vjp(fn, other)[1](ct)[0])
    try:
        vjp(program.module(), other)
    except RuntimeError as error:
        return None, right, str(error)
    return None, right, None


@pytest.mark.parametrize("name", EXPORTS)
def test_what_torch_exports(name: str) -> None:
    """Torch cannot export derivatives of vmap, unless make_fx traces them; what it exports names the level of vmap."""
    ((said, right, said_of_vjp),) = fcomm.run(_export, 1, name)
    assert right
    refusal = EXPORTS[name][1]
    if refusal is None:
        assert said is None
        assert said_of_vjp is not None, "torch differentiates an exported vmap now: remove the limit"
        assert "layer.key() == TransformType::Grad" in said_of_vjp
    else:
        assert said is not None, "torch exports it now: remove the limit"
        assert refusal in said


class _Copied(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.limits.copied(x, None)  # type: ignore[no-any-return]


def _draft_export(world: fcomm.Group) -> str | None:
    schema = "(Tensor x, Tensor? index) -> Tensor"
    copied = library.custom_op("limits::copied", lambda x, index: x.clone(), mutates_args=(), schema=schema)
    copied.register_fake(lambda x, index: torch.empty_like(x))
    assert torch.equal(torch.export.export(_Copied(), (X,)).module()(X), X)
    try:
        torch.export.draft_export(_Copied(), (X,))
    except RuntimeError as error:
        return str(error)
    return None


def test_draft_export_refuses_an_optional_tensor_that_is_none() -> None:
    (said,) = fcomm.run(_draft_export, 1)
    assert said is not None, "torch drafts it now: remove the limit"
    assert "for argument 'index'" in said
    assert "does not mutate the argument, but this seems to be empirically wrong" in said
