"""Short deadlines for calls on groups with a long deadline to open, and a way to wait for ranks outside a group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import fcomm
from fcomm import Backend, Group
from fcomm.backends import processgroup, shm_opening
from fcomm.bootstrap import wait_for_keys
from fcomm.rendezvous import Live, live


def hasten(group: Group, backend: Backend, timeout_s: float) -> None:
    """Open group on backend with its original deadline, and call a barrier there; later calls have this deadline.

    So ranks may come together late, but must be quick from then on.
    """
    map_ = shm_opening._map

    def hasty(owner: Live, *args: Any) -> Any:
        owner.timeout_s = timeout_s
        return map_(owner, *args)

    with mock.patch.object(shm_opening, "_map", hasty):
        fcomm.barrier(group, backend)
    live(group).timeout_s = timeout_s
    if backend is fcomm.c10d:
        processgroup.communicator(group, "cpu").pg._set_default_timeout(timedelta(seconds=timeout_s))


def tell(group: Group, what: object) -> None:
    """Let ranks of group that wait for this in wait_for_word go on."""
    live(group).store.set(f"test/{what}", "")


def wait_for_word(group: Group, *words: object) -> None:
    """Wait until ranks have told all of these, without a call on group."""
    if not wait_for_keys(live(group).store, [f"test/{what}" for what in words], 60):
        raise AssertionError(f"nobody told {words}")
