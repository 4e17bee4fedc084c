"""What each collective means and how it differentiates: one chapter per collective, function first, then its record.

    reductions.py all_reduce, scan
    blocks.py     all_gather, reduce_scatter        each other's derivative
    exchange.py   all_to_all, ppermute              their own
    ragged.py     ragged_all_to_all                 sizes known to the device only
    rooted.py     broadcast, reduce, gather, scatter
    point.py      send, recv                        the cotangent travels back
    typed.py      pvary, all_reduce_invariant, all_gather_invariant, shard
    place.py      axis_index, axis_size, barrier
    coalesced.py  lists of tensors, one message per dtype
    checks.py     the arguments that all of them refuse, and the error texts

Derivatives count every rank's output: the loss is the sum of all ranks' losses. In typed.py a value that is the same on
all ranks counts once. Rules call the dual collectives by their public functions, so derivatives of any order follow.
"""

from fcomm.collectives.blocks import all_gather, reduce_scatter
from fcomm.collectives.coalesced import all_gather_coalesced, all_reduce_coalesced, reduce_scatter_coalesced
from fcomm.collectives.exchange import all_to_all, ppermute
from fcomm.collectives.place import axis_index, axis_size, barrier
from fcomm.collectives.point import recv, send
from fcomm.collectives.ragged import ragged_all_to_all
from fcomm.collectives.reductions import all_reduce, scan
from fcomm.collectives.rooted import broadcast, gather, reduce, scatter
from fcomm.collectives.typed import all_gather_invariant, all_reduce_invariant, pvary, shard

__all__ = [
    "all_gather",
    "all_gather_coalesced",
    "all_gather_invariant",
    "all_reduce",
    "all_reduce_coalesced",
    "all_reduce_invariant",
    "all_to_all",
    "axis_index",
    "axis_size",
    "barrier",
    "broadcast",
    "gather",
    "ppermute",
    "pvary",
    "ragged_all_to_all",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_coalesced",
    "scan",
    "scatter",
    "send",
    "shard",
]
