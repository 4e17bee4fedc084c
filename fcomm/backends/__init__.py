"""How a machine does a collective: one file per machine, the same functions in the same order in each.

    cpu.py            shared memory, by the engine in fcomm/csrc; pool.py, shm_opening.py, shm_failure.py
    c10d.py           torch.distributed; processgroup.py
    nccl.py, hccl.py  the vendors' tables: ccall.py makes the calls, library.py finds the library, vendors.py has the
                      handles; lowering.py has the collectives of both, machine.py lists what they build on
    stacked.py        a simulated axis
    rows.py           what c10d and the vendors share; worker.py has their threads

A lowering is `fn(x, group, **params) -> Tensor`, called with

* x: a strided tensor on one of the backend's devices, contiguous, conjugate and negative bits resolved, any dtype,
  possibly 0-d or empty. It is never written.
* group: a live group of two or more ranks, of which this process is one (a group of one rank needs no machine).
  `rendezvous.live(group)` gives its store, deadline and communicators.
* params: as in the collective's schema; dims are canonical (0 <= dim < x.dim(), or <= for a new dim), lists tuples,
  `perm` is a flat tuple (source, destination, source, destination, ...).

and returns a new contiguous tensor that is not a view of another. Results off the root, and of ranks that are not a
destination of ppermute, are zeros. Arithmetic is that of fcomm/arithmetic.py: sums in rank order, half types
accumulated in float32, NaN wins in max and min. Where a vendor's library sums natively, the order of summation is the
library's (notes/0050-device-lowerings.md).

barrier(x, group) returns a copy of x after all ranks have arrived; send(x, group, dst, derivative) returns an empty
tensor; recv(after, like, group, src, derivative) ignores after. derivative says which derivative of a call the message
belongs to (notes/0033-send-does-not-wait.md), and recv refuses a message of a different one. all_to_all's send_sizes
and recv_sizes are this rank's, along split_dim and concat_dim. If ranks disagree on sizes, all of them raise
MismatchError; they never wait for bytes that do not come.

What a machine lacks is composed of what it has, or has a row with the reason in the machine's `unsupported` table.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fcomm.backends import hccl as hccl
    from fcomm.backends import nccl as nccl
else:

    def __getattr__(name):
        """Import fcomm.backends.nccl and .hccl at first use: their tables would slow `import fcomm` down."""
        if name in ("nccl", "hccl"):
            from importlib import import_module

            return import_module(f"fcomm.backends.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
