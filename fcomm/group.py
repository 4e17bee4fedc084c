"""Who takes part (Group) and which machine carries it out (Backend): frozen values that describe, and do nothing.

Both cross torch's dispatcher as names; the two tables below turn a name back into its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fcomm.errors import ArgumentError, FcommError

Lowering = Callable[..., Tensor]


@dataclass(frozen=True)
class Group:
    """An ordered set of ranks.

    name: the axis name, the same on every member; graphs and errors show it.
    ranks: the members in group order, numbered as in the world they come from.
    rank: this process's index in ranks; None on a simulated axis, and in a process that is not a member.
    simulated: True for an axis of fcomm.simulate, False for processes.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int | None
    simulated: bool = False

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    @property
    def key(self) -> str:
        """The name under which torch's dispatcher knows the group: axes of one name may have different sizes."""
        return f"{self.name}[{len(self.ranks)}]" if self.simulated else self.name

    @property
    def graph_keys(self) -> tuple[str, str]:
        """Its names in graphs: for calls whose shapes depend on the size only, and for those that depend on the rank.

        Compilers cache graphs on disk by their content, and a graph of two ranks must not serve a world of three
        (notes/0014). No axis has such a name.
        """
        if self.simulated:
            return self.key, self.key
        return f"{self.name} ({self.size} ranks)", f"{self.name} (rank {self.rank} of {self.size})"

    def __reduce__(self) -> tuple[object, ...]:
        if self.simulated:
            return (axis, (self.name, self.size))
        raise TypeError(
            f"group '{self.name}' is a live handle of this process and cannot be pickled or copied; "
            "pass its name and ranks, and rebuild it there with fcomm.init and fcomm.subgroup"
        )


@dataclass(frozen=True)
class Backend:
    """A machine: for each collective the function that lowers it, or the written reason why there is none.

    name: unique among the backends of a process; graphs and errors show it.
    devices: torch device types whose tensors it takes; empty means any.
    lowerings: {collective: fn(x, group, **params) -> Tensor}; the contract is in fcomm/backends/__init__.py.
    unsupported: {collective: reason}, quoted by the error.
    """

    name: str
    devices: tuple[str, ...] = ()
    lowerings: Mapping[str, Lowering] = field(default_factory=dict, compare=False, repr=False)
    unsupported: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        # By name, as everywhere: its table holds things that only this process has, such as libraries and partial
        # functions.
        if BACKENDS.get(self.name) is self:
            return (_backend_named, (self.name,))
        return (Backend, (self.name, self.devices, self.lowerings, self.unsupported))


def _backend_named(name: str) -> Backend:
    backend = BACKENDS.get(name)
    if backend is None:
        known = ", ".join(BACKENDS)
        raise FcommError(
            f"a backend '{name}' was pickled, but this process has only {known}; open or register it where it is "
            "unpickled, in a module that is imported first, or pass what it is opened with and open it there"
        )
    return backend


GROUPS: dict[str, Group] = {}
BACKENDS: dict[str, Backend] = {}
# graph_keys of the groups by key: a compiler may make symbols of a group's numbers, and no text can hold those.
GRAPH_KEYS: dict[str, tuple[str, str]] = {}
# Tables in which calls remember what they found under these names; a name that changes hands empties them.
FOUND: list[dict[Any, Any]] = []


def register_group(group: Group) -> Group:
    """Make the group known to the dispatcher under its keys; returns it."""
    GRAPH_KEYS[group.key] = group.graph_keys
    GROUPS.update(dict.fromkeys((group.key, *group.graph_keys), group))
    forget_found()
    return group


def forget_group(group: Group) -> None:
    """The opposite of register_group."""
    GRAPH_KEYS.pop(group.key, None)
    for key in (group.key, *group.graph_keys):
        GROUPS.pop(key, None)
    forget_found()


def forget_found() -> None:
    """Empty the tables in FOUND."""
    for found in FOUND:
        found.clear()


def register_backend(backend: Backend) -> Backend:
    """Make the backend known to the dispatcher under its name; returns it."""
    BACKENDS[backend.name] = backend
    forget_found()
    return backend


def axis(name: str, size: int) -> Group:
    """A simulated group of `size` ranks, to be bound by fcomm.simulate.

    Raises ArgumentError unless name is a non-empty string and size a positive int.
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"axis: name is {name!r}; pass a non-empty string")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(f"axis: size of '{name}' is {size!r}; pass a positive int")
    return register_group(Group(name, tuple(range(size)), None, simulated=True))
