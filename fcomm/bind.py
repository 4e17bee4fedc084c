"""bind: the collectives with their two handles filled in."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fcomm import collectives
from fcomm.group import Backend, Group


class Bound:
    """What bind returns: group, backend, and each collective under its name."""

    # Not a SimpleNamespace: torch.compile cannot make one in the function that it compiles.
    def __init__(self, group: Group, backend: Backend) -> None:
        self.group, self.backend = group, backend
        for name in collectives.__all__:
            setattr(self, name, partial(getattr(collectives, name), group=group, backend=backend))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def bind(group: Group, backend: Backend) -> Bound:
    """A namespace of all collectives on one group and backend: tp = bind(group, backend); tp.all_reduce(x, op="max").

    Only the two arguments are filled in; torch.compile traces through the namespace, and through bind itself.
    """
    return Bound(group, backend)
