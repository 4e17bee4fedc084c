"""jax.lax's parallel operators for PyTorch: pure collectives that take a group and a backend, and differentiate.

What a collective means and how it differentiates is in fcomm.collectives; how a machine does it is in
fcomm.backends.<machine>; how torch sees it is in fcomm.registration. Who takes part is in fcomm.group.

    rendezvous  groups of processes, and what a live one owns; bootstrap and processes are its helpers
    launch      run: a function on N processes       simulate    N ranks in this process
    record      what define() takes and refuses      arithmetic  what "sum" and "max" mean on every dtype of dtypes
    errors      one type for each kind of failure    bind        collectives with their two handles filled in

Built on these: layers, compat, testing, bench, demo.
"""

from typing import TYPE_CHECKING

from fcomm import compat
from fcomm.backends.c10d import c10d
from fcomm.backends.cpu import cpu
from fcomm.backends.pool import empty_cache, memory_stats
from fcomm.backends.stacked import sim
from fcomm.backends.vendors import hccl, nccl
from fcomm.bind import bind
from fcomm.collectives import (
    all_gather,
    all_gather_coalesced,
    all_gather_invariant,
    all_reduce,
    all_reduce_coalesced,
    all_reduce_invariant,
    all_to_all,
    axis_index,
    axis_size,
    barrier,
    broadcast,
    gather,
    ppermute,
    pvary,
    ragged_all_to_all,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_coalesced,
    scan,
    scatter,
    send,
    shard,
)
from fcomm.errors import (
    ArgumentError,
    BackendError,
    BackendUnavailableError,
    CollectiveTimeoutError,
    FcommError,
    GroupClosedError,
    GroupPoisonedError,
    MismatchError,
    PeerDiedError,
    RendezvousError,
)
from fcomm.group import Backend, Group, axis
from fcomm.launch import run
from fcomm.registration import apply, define
from fcomm.rendezvous import close, from_device_mesh, from_process_group, init, mesh, split, stateless_group, subgroup
from fcomm.simulate import simulate

__all__ = [
    "ArgumentError",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "CollectiveTimeoutError",
    "FcommError",
    "Group",
    "GroupClosedError",
    "GroupPoisonedError",
    "MismatchError",
    "PeerDiedError",
    "RendezvousError",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_invariant",
    "all_reduce",
    "all_reduce_coalesced",
    "all_reduce_invariant",
    "all_to_all",
    "apply",
    "axis",
    "axis_index",
    "axis_size",
    "barrier",
    "bind",
    "broadcast",
    "c10d",
    "close",
    "compat",
    "cpu",
    "define",
    "empty_cache",
    "from_device_mesh",
    "from_process_group",
    "gather",
    "hccl",
    "init",
    "memory_stats",
    "mesh",
    "nccl",
    "ppermute",
    "pvary",
    "ragged_all_to_all",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_coalesced",
    "run",
    "scan",
    "scatter",
    "send",
    "shard",
    "sim",
    "simulate",
    "split",
    "stateless_group",
    "subgroup",
]

if TYPE_CHECKING:
    from fcomm import backends as backends
    from fcomm import layers as layers
    from fcomm import testing as testing
else:

    def __getattr__(name):
        """Import fcomm.layers and fcomm.testing at first use, so that importing fcomm does not pay for them."""
        if name in ("layers", "testing"):
            from importlib import import_module

            return import_module(f"fcomm.{name}")
        raise AttributeError(f"module 'fcomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, and the packages that have more."""
    return sorted([*__all__, "backends", "layers", "testing"])
