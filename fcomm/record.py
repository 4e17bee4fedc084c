"""What makes a collective: the record that define() takes, and what it refuses before anything is registered."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fcomm.errors import ArgumentError

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Record:
    """Everything that makes a collective; the fields of fcomm.define, which documents them."""

    name: str
    schema: str
    spec: Rule
    shape: Rule
    vjp: Rule | None
    jvp: Rule | str | None
    dims: tuple[str, ...]
    inputs: tuple[str, ...]
    aux: tuple[str, ...]
    nonlinear: Callable[..., bool]
    shape_of: tuple[str, ...]
    replicated: tuple[str, ...]
    busbw: Callable[[int], float] | None
    compose: Rule | None
    batch: Rule | None
    dtype: torch.dtype | None

    # Cached, since every call needs them.
    @cached_property
    def params(self) -> tuple[str, ...]:
        """Names of the static parameters, in schema order."""
        return tuple(name for _, name in self.declared)

    @cached_property
    def declared(self) -> tuple[tuple[str, str], ...]:
        """(type, name) of the static parameters, in schema order."""
        return tuple((kind.strip(), name) for kind, _, name in (p.rpartition(" ") for p in _parts(self.schema)))

    @cached_property
    def has_lists(self) -> bool:
        """Whether a static parameter is a list."""
        return "[]" in self.schema

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensor arguments, in schema order."""
        return self.inputs + self.aux

    def named(self, params: Sequence[Any]) -> dict[str, Any]:
        """The static parameters in the form that rules and lowerings get: by name, lists as tuples."""
        named = dict(zip(self.params, params, strict=True))
        return {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()} if self.has_lists else named


def default_params(record: Record) -> dict[str, Any]:
    """Defaults for the static parameters: dims and ranks 0, bools True, op "sum", lists None."""
    values = {"int": 0, "SymInt": 0, "bool": True, "str": "sum"}
    return {name: values.get(kind) for kind, name in record.declared}


def always_linear(**_: Any) -> bool:
    """The default of `nonlinear`."""
    return False


def _parts(schema: str) -> list[str]:
    return [part.strip() for part in schema.split(",") if part.strip()]


_TYPE = re.compile(r"(int|SymInt|float|bool|str)(\[\])?\??")
# Names already used by the op, the rules or a residual.
_TAKEN = ("index", "group", "backend", "ct", "y")


def check_record(record: Record) -> None:
    """Raise ArgumentError for the first invalid field of a record that is not registered yet."""

    def refuse(text: str) -> ArgumentError:
        return ArgumentError(f"define: {record.name}: {text}", op=record.name)

    if not isinstance(record.name, str) or not _is_name(record.name):
        raise ArgumentError(
            f"define: name is {record.name!r}; pass a Python identifier, it becomes the op fcomm::<name>"
        )
    if not isinstance(record.schema, str):
        raise refuse(f"schema is {record.schema!r}; pass a string such as 'int dim, bool tiled'")
    for part in _parts(record.schema):
        kind, _, name = part.rpartition(" ")
        if "=" in part:
            raise refuse(f"schema has the default {part!r}; defaults belong into the public function")
        if not _TYPE.fullmatch(kind.strip()) or not _is_name(name):
            raise refuse(
                f"schema has the entry {part!r}; write a type and a name, such as 'int dim'; types are int, SymInt, "
                "float, bool and str, with [] for a list and ? for None"
            )
    _check_names(record, refuse)
    for dim in record.dims:
        if ("int", dim) not in record.declared:
            raise refuse(f"dims names {dim!r}, which schema {record.schema!r} does not declare as 'int {dim}'; add it")
    for value in record.shape_of:
        if value not in record.inputs:
            raise refuse(f"shape_of names {value!r}, which is not among inputs {record.inputs}; add it there")
    if record.shape_of and record.nonlinear is not always_linear:
        raise refuse("both nonlinear and shape_of are given; where nonlinear holds, vjp gets all tensors, so give one")
    for value in record.replicated:
        if value not in ("x", "y"):
            raise refuse(f"replicated names {value!r}; choose among 'x', the argument, and 'y', the result")
    if record.dtype is not None and not isinstance(record.dtype, torch.dtype):
        raise refuse(f"dtype is {record.dtype!r}; pass a torch.dtype, or leave it out where it is x's")
    if isinstance(record.jvp, str) and record.jvp != "linear":
        raise refuse(f"jvp is {record.jvp!r}; pass 'linear', a function, or None")
    if record.vjp is None and record.jvp is not None:
        raise refuse("vjp is None but jvp is not; give both, or jvp=None for a collective without derivative")
    _check_rules(record, refuse)


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")


def _check_names(record: Record, refuse: Callable[[str], ArgumentError]) -> None:
    seen: set[str] = set(_TAKEN)
    for what, names in (("inputs", record.inputs), ("aux", record.aux), ("schema", record.params)):
        for name in names:
            if not isinstance(name, str) or not _is_name(name):
                raise refuse(f"{what} has the name {name!r}; pass Python identifiers")
            if name in seen:
                raise refuse(f"{what} has the name {name!r}, which is taken already; choose another")
            seen.add(name)


def _check_rules(record: Record, refuse: Callable[[str], ArgumentError]) -> None:
    """Every rule must be a function that accepts the call it will get."""
    tensors, inputs, aux, params = record.tensors, record.inputs, record.aux, record.params
    handles = ("group", "backend")
    whole = (*aux, *inputs, "y") if record.nonlinear is not always_linear else aux
    residuals = (*whole, *record.shape_of)
    calls: Iterable[tuple[str, Any, Sequence[str], Sequence[str]]] = (
        ("spec", record.spec, tensors or ("index",), params),
        ("shape", record.shape, (*tensors, "group"), params),
        ("vjp", record.vjp, ("ct", *handles), (*residuals, *params)),
        ("jvp", record.jvp, (*(f"tangent of {name}" for name in inputs), *handles), (*whole, *params)),
        ("nonlinear", record.nonlinear, (), params),
        ("compose", record.compose, (*tensors, *handles), params),
        ("batch", record.batch, ("call", "size", "in_dims", "tensors"), ()),
        ("busbw", record.busbw, ("size",), ()),
    )
    for what, rule, by_position, by_keyword in calls:
        if rule is None and what not in ("spec", "shape"):
            continue
        if what == "jvp" and rule == "linear":
            continue
        if not callable(rule):
            raise refuse(f"{what} is {rule!r}; pass a function")
        _check_signature(what, rule, by_position, by_keyword, refuse)


def _check_signature(
    what: str, rule: Rule, by_position: Sequence[str], by_keyword: Sequence[str], refuse: Callable[[str], ArgumentError]
) -> None:
    try:
        signature = inspect.signature(rule)
    except ValueError:  # a builtin without one
        return
    try:
        signature.bind(*by_position, **dict.fromkeys(by_keyword))
    except TypeError as error:
        call = ", ".join((*by_position, *(f"{name}=" for name in by_keyword)))
        raise refuse(f"{what} takes {signature} and is called as {what}({call}): {error}; correct it") from error
