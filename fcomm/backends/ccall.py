"""Prototypes -> callables, and the one place where a C library's status code becomes an error.

A table has one row for each symbol, with the C declaration above it. A call is

    library.call("ncclAllReduce", send, recv, count, dtype, op, comm, stream)

and raises unless the status is success or one of `pending`. Calling a symbol that this library lacks raises an error
that names it; `"ncclAlltoAll" in library` asks first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fcomm.errors import BackendError, BackendPeerError, BackendTimeoutError, BackendUnavailableError

_OTHER_VERSION = "use another version"


@dataclass(frozen=True)
class Symbol:
    """A row: the argument types of a function, and the version that introduced it.

    since: a version in the library's own numbering; an older library's symbol of that name is not used.
    optional: the library works without it. Rows with `since` are optional, whatever version the library reports.
    result: None for a status code, otherwise the type.
    """

    args: tuple[Any, ...]
    since: int = 0
    optional: bool = False
    result: Any = None

    @property
    def required(self) -> bool:
        return not (self.since or self.optional)


@dataclass(frozen=True)
class Codes:
    """What a library's status codes mean.

    names: code -> the library's name for it.  pending: codes that are not errors.  timeout, remote: codes for
    the library's own deadline, and for a lost peer.
    explain: (library, code) -> the library's own text about it.
    """

    names: Mapping[int, str]
    timeout: tuple[int, ...]
    remote: tuple[int, ...]
    explain: Callable[[Library, int], str]
    pending: tuple[int, ...] = ()

    def name(self, code: int) -> str:
        return self.names.get(code, f"unknown code {code}")


@dataclass(frozen=True)
class Library:
    """A loaded library: its callables by name, and the meaning of their status codes."""

    name: str
    path: str
    version: int
    codes: Codes
    symbols: Mapping[str, Symbol] = field(repr=False)
    functions: Mapping[str, Callable[..., Any]] = field(repr=False)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self.functions

    def call(self, symbol: str, *args: Any) -> Any:
        """Call symbol; return its status if that is success or pending, or its result if it has another type.

        Raises the error of check(), or BackendUnavailableError if this library has no such symbol.
        """
        function = self.functions.get(symbol)
        if function is None:
            raise self._lacks(symbol)
        result = function(*args)
        if self.symbols[symbol].result is None and result != 0:
            check(self, result, symbol)
        return result

    def status(self, symbol: str, *args: Any) -> int:
        """Call symbol and return its status, whatever it is."""
        if symbol not in self.functions:
            raise self._lacks(symbol)
        return int(self.functions[symbol](*args))

    def _lacks(self, symbol: str) -> BackendUnavailableError:
        return BackendUnavailableError(_without(self.name, self.path, self.version, [symbol], self.symbols))


def check(library: Library, code: int, call: str) -> None:
    """Raise the error that a status code means, with code and code_name: see error_of.

    call: what returned the code, for the text. failure.py, which knows them, adds collective, group and rank.
    """
    codes = library.codes
    if code == 0 or code in codes.pending:
        return
    # Ask at once: the library's text is about the thread's last failure.
    name, text = codes.name(code), codes.explain(library, code)
    raise error_of(library.codes, code, f"{call} returned {name} ({code}): {text}")


def error_of(codes: Codes, code: int, text: str) -> BackendError:
    """The error of a status code, from this rank or reported by another: a deadline, a lost peer, or any other."""
    kind = BackendTimeoutError if code in codes.timeout else BackendPeerError if code in codes.remote else BackendError
    return kind(text, code=code, code_name=codes.name(code))


def bind(
    name: str,
    path: str,
    handles: Sequence[ctypes.CDLL],
    symbols: Mapping[str, Symbol],
    codes: Codes,
    version: Callable[[Mapping[str, Callable[..., Any]]], int],
    hint: str = _OTHER_VERSION,
) -> Library:
    """Look each row up in the first of the handles that has it, and give the functions their types.

    version: asks the bound functions for the library's version.  hint: what to do if some are missing.
    Raises BackendUnavailableError naming the required symbols that the library lacks.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for symbol, row in symbols.items():
        found = next((handle[symbol] for handle in handles if hasattr(handle, symbol)), None)
        if found is not None:
            found.argtypes, found.restype = list(row.args), ctypes.c_int if row.result is None else row.result
            functions[symbol] = found
    missing = [symbol for symbol, row in symbols.items() if row.required and symbol not in functions]
    if missing:
        raise BackendUnavailableError(_without(name, path, 0, missing, symbols, hint))
    number = version(functions)
    usable = {symbol: function for symbol, function in functions.items() if symbols[symbol].since <= number}
    return Library(name, path, number, codes, symbols, usable)


def _without(
    name: str,
    path: str,
    version: int,
    missing: Sequence[str],
    symbols: Mapping[str, Symbol],
    hint: str = _OTHER_VERSION,
) -> str:
    since = {s: symbols[s].since for s in missing if symbols[s].since}
    needs = "".join(f"; {s} exists since version {v}" for s, v in since.items())
    of = f" of version {version}" if version else ""
    return f"{name}: the library{of} at {path} has no {', '.join(missing)}{needs}; {hint}"
