"""Finding a vendor's library, and refusing a path that someone else could have put a library at.

Loading a library runs its code. A path from an argument or a variable must therefore be absolute, and only its owner,
who must be this user or root, may be able to write to it or to a directory above it. The process's own search path
(LD_LIBRARY_PATH, site-packages) is trusted like python itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fcomm.errors import BackendUnavailableError, printable


@dataclass(frozen=True)
class Search:
    """Where a library may be.

    soname: what the system's loader knows it as.  variable: the environment variable that may name its path.
    packages: (package, path inside it) of the vendor's wheels.  directories: of the vendor's own installation, where
    $VARIABLE stands for its value.
    companion: the soname of a second library that may have some of the symbols. It is beside the first, or else where
    the system's loader finds it.
    hint: how to install it, quoted by the error.
    """

    soname: str
    variable: str
    packages: tuple[tuple[str, str], ...]
    directories: tuple[str, ...]
    hint: str
    companion: str | None = None


def find(search: Search, argument: str | os.PathLike[str] | None = None) -> str:
    """What to pass to dlopen: an absolute path, or the soname if only the system's loader may know it.

    It tries, in this order: the argument; the variable; the copy that this process has already loaded, since two copies
    of one library do not know of each other; the vendor's wheel; the vendor's directories; the soname.
    Raises BackendUnavailableError if the argument or the variable names a path that is wrong or not safe.
    """
    if argument is not None:
        return check_path(os.fspath(argument), "library")
    variable = os.environ.get(search.variable)
    if variable:
        if _is_privileged():
            raise BackendUnavailableError(f"{search.variable} is ignored in a privileged process; pass library=PATH")
        return check_path(variable, search.variable)
    loaded = _loaded(search.soname)
    if loaded is not None:
        return loaded
    installed = [_in_package(*entry) for entry in search.packages]
    expanded = [os.path.expandvars(directory) for directory in search.directories]
    installed += [os.path.join(directory, search.soname) for directory in expanded if os.path.isabs(directory)]
    return next((path for path in installed if path is not None and os.path.isfile(path)), search.soname)


def load(search: Search, argument: str | os.PathLike[str] | None = None) -> tuple[list[ctypes.CDLL], str]:
    """The library, its companion if there is one, and the library's path.

    They are CDLLs, not PyDLLs, so that waiting calls let other threads run.
    """
    path = find(search, argument)
    try:
        # Load it before the library, with global symbols: the library looks them up by name.
        companion = _companion(search, path)
        return [ctypes.CDLL(path), *companion], path
    except OSError as error:
        looked = [f"{search.variable} (unset)"] if argument is None and search.variable not in os.environ else []
        if path == search.soname:
            looked += [f"{package}/{inside}" for package, inside in search.packages]
            looked += [*search.directories, "the system's library path"]
        raise BackendUnavailableError(
            f"cannot load {printable(f'{path}: {error}')}; looked in {', '.join(looked) or path}; {search.hint}"
        ) from error


def _companion(search: Search, path: str) -> list[ctypes.CDLL]:
    """The second library, beside the first or where the system's loader finds it; none if the first has everything."""
    if search.companion is None:
        return []
    beside = os.path.join(os.path.dirname(path), search.companion)
    if os.path.isabs(path) and os.path.isfile(beside):
        return [ctypes.CDLL(check_path(beside, "companion"), mode=ctypes.RTLD_GLOBAL)]
    with suppress(OSError):
        return [ctypes.CDLL(search.companion, mode=ctypes.RTLD_GLOBAL)]
    return []


def check_path(path: str, source: str) -> str:
    """The path, links resolved, if it is a regular file that only this user or root can have written.

    source: the name of the argument or variable it came from, for the error.
    """
    shown = f"{source}={printable(path)!r}"
    if not path or any(ord(c) < 32 for c in path):
        raise BackendUnavailableError(f"{shown} is empty or has control characters; pass an absolute path")
    if not os.path.isabs(path):
        raise BackendUnavailableError(
            f"{shown} is relative, and would depend on the current directory; pass an absolute path"
        )
    try:
        real = os.path.realpath(path, strict=True)
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise BackendUnavailableError(f"{shown} is not a regular file; pass the library itself")
        # Check the directories of the given name too: whoever can write to one can put another link there.
        for place in (real, *Path(real).parents, *Path(path).parents):
            _check_owner(str(place), shown)
    except OSError as error:
        raise BackendUnavailableError(f"{shown} cannot be read ({error.strerror}); pass an existing file") from error
    return real


def _check_owner(place: str, shown: str) -> None:
    status = os.stat(place)
    if status.st_uid not in (0, os.geteuid()):
        raise BackendUnavailableError(f"{shown}: {place} belongs to user {status.st_uid}; use a copy of your own")
    # In a sticky directory others may add files but not replace ours.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise BackendUnavailableError(f"{shown}: others may write {place}; chmod go-w it")


def _loaded(soname: str) -> str | None:
    """Path of the copy of soname that is mapped into this process, for example torch's."""
    stem = soname.split(".so", maxsplit=1)[0] + ".so"
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[-1]
            name = os.path.basename(path)
            if (name == stem or name.startswith(stem + ".")) and "x" in line.split()[1] and os.path.isfile(path):
                return path
    return None


def _in_package(package: str, inside: str) -> str | None:
    """Path of a file of an installed package, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places: Sequence[str] = list(spec.submodule_search_locations or ()) if spec is not None else ()
    return next((path for place in places if os.path.isfile(path := os.path.join(place, inside))), None)


def _is_privileged() -> bool:
    """Whether this process has more rights than its user (setuid and the like), as the loader sees it: AT_SECURE."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return bool(getauxval(23))
