"""bind: the collectives with their two handles filled in."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from fcomm import collectives
from fcomm.group import Backend, Group


def bind(group: Group, backend: Backend) -> SimpleNamespace:
    """A namespace of all collectives on one group and backend: tp = bind(group, backend); tp.all_reduce(x, op="max").

    Nothing but the two arguments is filled in; torch.compile traces through it.
    """
    functions = {
        name: partial(getattr(collectives, name), group=group, backend=backend) for name in collectives.__all__
    }
    return SimpleNamespace(group=group, backend=backend, **functions)
