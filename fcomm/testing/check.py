"""One collective through all transforms: simulated, or on a backend in real processes, against the oracle."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fcomm.backends.stacked import sim
from fcomm.errors import ArgumentError
from fcomm.group import BACKENDS, Backend, Group, axis
from fcomm.launch import run
from fcomm.record import Record, default_params
from fcomm.registration import RECORDS, apply, check_call, compiler_traces_derivatives
from fcomm.simulate import simulate
from fcomm.testing.transforms import TRANSFORMS, Meaning


def no_aux(size: int) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """A call of a collective, and the values to call it on.

    name: the collective.  label: what is special about the case.
    call: call(x, *aux, group, backend) -> y, one tensor.
    shape: size -> shape of x on each rank.
    aux: size -> further tensors, each with the ranks stacked in its leading dimension; no derivative by them.
    values: "normal", "ties" (few distinct values), "zeros" (some exact zeros), "integers".
    dtype: that of x.  replicated: "x" and "y" as in fcomm.define.
    sizes: the numbers of ranks on which it has a meaning; loops over cases read this, check_case does not.
    """

    name: str
    label: str
    call: Callable[..., Tensor]
    shape: Callable[[int], Sequence[int]]
    aux: Callable[[int], tuple[Tensor, ...]] = no_aux
    values: str = "normal"
    dtype: torch.dtype = torch.float64
    replicated: Sequence[str] = ()
    sizes: Sequence[int] = (1, 2, 3, 4)

    @property
    def id(self) -> str:
        """The case's name in the names of tests and in check_case's result."""
        return f"{self.name}-{self.label}" if self.label else self.name

    @property
    def differentiable(self) -> bool:
        """Whether x has a derivative: integers and bool have none."""
        return self.dtype.is_floating_point or self.dtype.is_complex


VALUES = ("normal", "ties", "zeros", "integers")


def draw(shape: Sequence[int], values: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Reproducible values of the kind that a Case names."""
    generator = torch.Generator().manual_seed(seed)
    if values == "integers" or not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2 if dtype == torch.bool else 7, tuple(shape), generator=generator).to(dtype)
    if values == "ties":
        return torch.randint(0, 3, tuple(shape), generator=generator).to(dtype)
    x = torch.randn(tuple(shape), generator=generator, dtype=dtype)
    if values == "zeros":
        x = x * (torch.rand(tuple(shape), generator=generator) < 0.5)
    return x


@dataclass(frozen=True)
class _Values:
    """x, ct, t in the form that the meaning takes, and the meaning."""

    meaning: Meaning
    x: Tensor
    ct: Tensor
    t: Tensor
    aux: tuple[Tensor, ...]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        m = self.meaning
        return m.rows_x(self.x), m.rows_y(self.ct), m.rows_x(self.t)


def _values(case: Case, size: int) -> _Values:
    group = axis(case.name, size)
    aux = case.aux(size)
    stacked = simulate(lambda x, *aux: case.call(x, *aux, group=group, backend=sim), group)
    x_replicated, y_replicated = "x" in case.replicated, "y" in case.replicated

    def fn(x: Tensor) -> Tensor:
        y: Tensor = stacked(x.expand(size, *x.shape) if x_replicated else x, *aux)
        return y[0] if y_replicated else y

    seed = zlib.crc32(case.id.encode())
    shape = tuple(case.shape(size)) if x_replicated else (size, *case.shape(size))
    x = draw(shape, case.values, case.dtype, seed)
    y = fn(x)
    plain = case.values if case.differentiable else "integers"
    ct = draw(y.shape, "normal" if case.differentiable else plain, y.dtype, seed + 1)
    t = draw(shape, "normal" if case.differentiable else plain, case.dtype, seed + 2)
    return _Values(Meaning(fn, size, x_replicated, y_replicated), x, ct, t, aux)


_JACOBIANS = ("jacrev", "jacfwd", "hessian", "reverse hessian")


def reason_to_leave_out(case: Case, transform: str, simulated: bool, compiled: bool) -> str | None:
    """Why a cell of the matrix is empty; None if it is checked."""
    rule = TRANSFORMS[transform]
    if rule.differentiates and not case.differentiable:
        return f"{case.dtype} has no derivative"
    if simulated and not rule.nests and case.replicated:
        return "around simulate, autograd sees one value for each rank, where the rule counts a replicated value once"
    if transform in _JACOBIANS and case.dtype.is_complex:
        return "torch.func takes Jacobians of real functions"
    if transform in _JACOBIANS and not draw(case.shape(2), "normal", case.dtype, 0).numel():
        return "a Jacobian of no elements"
    return _beyond_the_compiler(case, transform) if compiled and simulated else None


def _beyond_the_compiler(case: Case, transform: str) -> str | None:
    """What torch.compile cannot do under simulate, with or without a collective; test_limits.py shows each case."""
    has_product = case.values in ("ties", "zeros") or case.name == "axis_index"
    if transform == "hessian" or (transform == "jacfwd" and has_product):
        return "torch does not compile vmap of jacfwd of a product with a constant; reverse hessian is compiled"
    if transform == "inference mode" and case.aux is not no_aux:
        return "torch does not compile vmap over tensors made outside inference mode"
    return None


def _close(got: Any, expected: Any, what: str) -> list[str]:
    got, expected = ((v,) if isinstance(v, Tensor) else tuple(v) for v in (got, expected))
    failures = []
    for part, (a, b) in enumerate(zip(got, expected, strict=True)):
        try:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9, equal_nan=True)
        except AssertionError as error:
            failures.append(f"{what}, result {part}: {error}")
    return failures


def check_case(
    case: Case,
    backend: Backend,
    group: Group,
    transforms: Collection[str] = TRANSFORMS,
    *,
    compiler: str | None = None,
    device: str = "cpu",
) -> list[str]:
    """Run transforms of one case on this rank of a live group, or on a simulated axis; return what was wrong.

    compiler: None for eager, or a torch.compile backend; all transforms are then one program compiled with
    fullgraph=True, which takes half the time of one program each.
    device: where the programs' tensors are; the oracle's are on the CPU.
    Raises ArgumentError for unknown transforms and values and, if compiled, whatever the compiler raises.
    """
    if not isinstance(case, Case):
        raise TypeError(f"check_case: case is {case!r}; pass a Case, or call check_collective")
    check_call("check_case", (), group, backend)
    _refuse_unknown("check_case", case.name, transforms=(transforms, TRANSFORMS), values=([case.values], VALUES))
    values = _values(case, group.size)
    names = [n for n in transforms if not reason_to_leave_out(case, n, group.simulated, compiler is not None)]
    failures = []
    where, how = f"{case.id} on {backend.name}, {group.size} ranks", f"compiled by {compiler}" if compiler else "eager"
    for some in [names] if compiler else [[name] for name in names]:
        try:
            results = _results(case, backend, group, some, values, compiler, device)
        except Exception as error:
            if compiler:  # its report is pages long and about the whole program
                raise
            failures.append(f"{where}: {', '.join(some)}, {how}, raised {type(error).__name__}: {error}")
            continue
        for name, got in zip(some, results, strict=True):
            expected = TRANSFORMS[name].oracle(values.meaning, values.x, values.ct, values.t)
            if not group.simulated:
                rank = group.rank or 0
                expected = expected[rank] if isinstance(expected, Tensor) else tuple(e[rank] for e in expected)
            failures += _close(got, expected, f"{where}: {name}, {how}")
    return failures


def _refuse_unknown(function: str, name: str, **options: tuple[Iterable[str], Iterable[str]]) -> None:
    """Raise for unknown options, given as pairs: what was passed and what is known."""
    for option, (given, known) in options.items():
        if isinstance(given, str):
            raise TypeError(f"{function}: {option} is {given!r}; pass a list of names")
        if unknown := [value for value in given if value not in known]:
            raise ArgumentError(f"{function}: {option} has {unknown} for {name}; choose among {', '.join(known)}")


def _results(
    case: Case,
    backend: Backend,
    group: Group,
    names: Sequence[str],
    values: _Values,
    compiler: str | None,
    device: str,
) -> list[Any]:
    """What the programs of the transforms return, in the order of names."""

    def call(x: Tensor, *aux: Tensor) -> Tensor:
        return case.call(x, *aux, group=group, backend=backend)

    def run(f: Callable[..., Tensor], name: str, x: Tensor, ct: Tensor, t: Tensor, *aux: Tensor) -> Any:
        return TRANSFORMS[name].program(lambda x: f(x, *aux), x, ct, t)

    together = [name for name in names if not TRANSFORMS[name].around_compiled]
    inside = [name for name in together if TRANSFORMS[name].nests or not group.simulated]
    whole = simulate(call, group) if group.simulated else call

    def each(*args: Tensor) -> list[Any]:
        return [run(call, name, *args) for name in inside]

    def program(*args: Tensor) -> dict[str, Any]:
        results = (simulate(each, group) if group.simulated and inside else each)(*args)
        around = {name: run(whole, name, *args) for name in together if name not in inside}
        return around | dict(zip(inside, results, strict=True))

    arguments = (*values.rows(), *values.aux)
    if not group.simulated:
        arguments = tuple(v[group.rank or 0] for v in arguments)
    # A rule that writes into its cotangent must not spoil the next program's.
    arguments = tuple(v.to(device, copy=True) for v in arguments)
    results = _compiled(program, compiler)(*arguments)
    for name in names:
        if name not in together:
            results[name] = run(_compiled(whole, compiler), name, *arguments)
    return [results[name] for name in names]


def _compiled(fn: Callable[..., Any], compiler: str | None) -> Callable[..., Any]:
    if compiler is None:
        return fn
    torch.compiler.reset()
    return compiler_traces_derivatives()(torch.compile(fn, fullgraph=True, backend=compiler))


# --- a collective of one's own ------------------------------------------------------------------------------------


def check_collective(
    what: str | Record,
    backend: Backend,
    size: int,
    *,
    params: Mapping[str, Any] | None = None,
    shape: Sequence[int] | None = None,
    values: str = "normal",
    dtype: torch.dtype = torch.float64,
    transforms: Collection[str] = tuple(TRANSFORMS),
    compiler: str | None = None,
    timeout_s: float = 120.0,
) -> None:
    """Check every rule of a collective of one tensor; raise AssertionError with all differences from the oracle.

    what: its name, or the record that fcomm.define returned.
    backend: fcomm.sim, or a backend on which `size` processes are started; they import the module of the record's spec.
    params: the record's static parameters; by default dims are 0, bools True, op "sum", ranks 0, lists None.
    shape: that of x on each rank; by default (2 * size, 3).
    Raises ArgumentError for what it cannot check.
    """
    record = RECORDS.get(what) if isinstance(what, str) else what
    if not isinstance(record, Record):
        raise ArgumentError(f"check_collective: no collective is named {what!r}; import the module that defines it")
    if not isinstance(backend, Backend):
        raise TypeError(f"check_collective: backend is {backend!r}; pass a Backend, such as fcomm.sim or fcomm.c10d")
    _refuse_unknown(
        "check_collective",
        record.name,
        params=(params or {}, record.params),
        transforms=(transforms, TRANSFORMS),
        values=([values], VALUES),
    )
    if record.tensors != ("x",):
        raise ArgumentError(
            f"check_collective: {record.name} takes {record.tensors}; write a Case with a call of its own"
        )
    filled = {**default_params(record), **(params or {})}
    shape = tuple(shape if shape is not None else (2 * size, 3))
    described = (record.name, record.spec.__module__, filled, shape, values, dtype)
    case, simulated, compiled = _case(*described), backend.name == "sim", compiler is not None
    reasons = [reason_to_leave_out(case, name, simulated, compiled) for name in transforms]
    if None not in reasons:
        raise ArgumentError(
            f"check_collective: nothing of {record.name} would be checked by transforms={transforms!r}; "
            + ("; ".join(dict.fromkeys(map(str, reasons))) or f"choose among {', '.join(TRANSFORMS)}")
        )
    if simulated:
        group = axis(record.name, size)
        failures = _shape_failures(record, filled, shape, values, dtype, group)
        failures += check_case(case, backend, group, transforms, compiler=compiler)
    else:
        ranks = run(_check_on_rank, size, described, backend.name, tuple(transforms), compiler, timeout_s=timeout_s)
        failures = [f"rank {r}: {text}" for r, texts in enumerate(ranks) for text in texts]
    if failures:
        raise AssertionError("\n".join(failures))


def _shape_failures(
    record: Record, params: Mapping[str, Any], shape: Sequence[int], values: str, dtype: torch.dtype, group: Group
) -> list[str]:
    """Compare the shape rule with the meaning's results: only the compiler uses it, and does not check it."""
    ys = record.spec([draw(shape, values, dtype, rank) for rank in range(group.size)], **params)
    said = tuple(record.shape(torch.Size(shape), group, **params)), record.dtype or dtype
    is_ = tuple(ys[0].shape), ys[0].dtype
    return [] if said == is_ else [f"{record.name}: the shape rule and dtype say {said}, the result is {is_}"]


def _case(
    name: str, module: str, params: Mapping[str, Any], shape: Sequence[int], values: str, dtype: torch.dtype
) -> Case:
    importlib.import_module(module)
    replicated = RECORDS[name].replicated

    def call(x: Tensor, group: Group, backend: Backend) -> Tensor:
        return apply(name, x, group, backend, *params.values())

    return Case(name, "", call, lambda size: shape, values=values, dtype=dtype, replicated=replicated)


def _check_on_rank(world: Group, described: Any, backend: str, transforms: Sequence[str], compiler: Any) -> list[str]:
    return check_case(_case(*described), BACKENDS[backend], world, transforms, compiler=compiler)


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """fcomm.run for tests: fn(world, *args) on `size` processes; every rank's list of failures must be empty.

    fn may also return anything else; the results come back in rank order.
    """
    results = run(fn, size, *args, timeout_s=timeout_s)
    failures = [f"rank {r}: {text}" for r, texts in enumerate(results) if isinstance(texts, list) for text in texts]
    if failures:
        raise AssertionError("\n".join(map(str, failures)))
    return results
