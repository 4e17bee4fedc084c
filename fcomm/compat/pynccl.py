"""FastVideo's and vLLM's PyNcclCommunicator, and PyHcclCommunicator: collectives into the caller's tensors.

As in the originals, results written into a tensor have no derivative; compat.fastvideo has functions that do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fcomm
from fcomm import backends
from fcomm.collectives import checks
from fcomm.compat.fastvideo import StatelessProcessGroup
from fcomm.compat.funcol import ReduceOp, op_name
from fcomm.compat.handles import GroupLike, as_backend, as_group
from fcomm.errors import ArgumentError
from fcomm.group import Backend

SUM = dist.ReduceOp.SUM


class PyNcclCommunicator:
    """The collectives of a group of processes for tensors of one device.

    group: a StatelessProcessGroup, or anything that funcol takes; ranks are numbered within it. backend: by default
    fcomm.nccl on cuda, fcomm.hccl on npu, else fcomm.c10d. library_path: that of a different NCCL or HCCL. stream: the
    call runs on it, by default on the current one. When disabled, as it initially is for a group of one, it does
    nothing and returns None. Only numbers of elements matter, not shapes, except in all_gatherv and reduce_scatterv,
    whose sizes are rows.
    """

    def __init__(
        self,
        group: StatelessProcessGroup | GroupLike,
        device: int | str | torch.device,
        library_path: str | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        self.group = group
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._group = group.group if isinstance(group, StatelessProcessGroup) else as_group(group)
        if backend is None and self.device.type == "cuda":
            backend = backends.nccl.open(library_path)
        elif backend is None and self.device.type == "npu":
            backend = backends.hccl.open(library_path)
        self._backend = as_backend(backend, self._group)
        self.rank, self.world_size = self._group.rank, self._group.size
        self.available = self.world_size > 1
        self.disabled = not self.available

    def all_reduce(
        self, in_tensor: Tensor, op: ReduceOp = SUM, stream: Any = None, *, out_tensor: Tensor | None = None
    ) -> Tensor | None:
        """Fold in_tensor over the group, into out_tensor or by default into a new tensor."""
        if self.disabled:
            return None
        out = torch.empty_like(in_tensor) if out_tensor is None else out_tensor
        self._fill(out, in_tensor.numel(), stream, fcomm.all_reduce, in_tensor, op=op_name(op))
        return out

    def all_gather(self, output_tensor: Tensor, input_tensor: Tensor, stream: Any = None) -> None:
        """Every rank's input_tensor, in rank order."""
        n = self.world_size * input_tensor.numel()
        self._fill(output_tensor, n, stream, fcomm.all_gather, input_tensor.reshape(-1))

    def all_gatherv(
        self, output_tensor: Tensor, input_tensor: Tensor, sizes: Sequence[int], stream: Any = None
    ) -> None:
        """Every rank's input_tensor, sizes[r] rows of rank r."""
        n = sum(sizes) * input_tensor.shape[1:].numel()
        self._fill(output_tensor, n, stream, fcomm.all_gather, input_tensor, sizes=sizes)

    def reduce_scatter(
        self, output_tensor: Tensor, input_tensor: Tensor, op: ReduceOp = SUM, stream: Any = None
    ) -> None:
        """Fold input_tensor over the group and keep this rank's part."""
        n = input_tensor.numel() // self.world_size
        self._fill(output_tensor, n, stream, fcomm.reduce_scatter, input_tensor.reshape(-1), op=op_name(op))

    def reduce_scatterv(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        sizes: Sequence[int],
        op: ReduceOp = SUM,
        stream: Any = None,
    ) -> None:
        """Fold input_tensor over the group and keep sizes[rank] rows."""
        n = sizes[self.rank or 0] * input_tensor.shape[1:].numel()
        self._fill(output_tensor, n, stream, fcomm.reduce_scatter, input_tensor, op=op_name(op), sizes=sizes)

    def reduce(
        self, output_tensor: Tensor, input_tensor: Tensor, root: int, op: ReduceOp = SUM, stream: Any = None
    ) -> None:
        """Fold input_tensor over the group, into rank root's output_tensor; the others' stay as they are."""
        if self.disabled:
            return
        if self.rank == root:
            self._check("reduce", output_tensor, input_tensor.numel())
        with torch.no_grad(), self._on(stream):
            y = fcomm.reduce(input_tensor, self._group, self._backend, dst=root, op=op_name(op))
            if self.rank == root:
                output_tensor.copy_(y.reshape(output_tensor.shape))

    def scatter(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        sizes: Sequence[int],
        root: int = 0,
        stream: Any = None,
    ) -> None:
        """Send sizes[r] rows of rank root's input_tensor to each rank r; that of the others is not read."""
        if self.disabled:
            return
        lengths = checks.canonical_sizes("scatter", "sizes", sizes, self._group)
        if self.rank != root:
            if lengths[self.rank or 0]:
                self.recv(output_tensor, root, stream)
            return
        checks.is_tensor("scatter", "input_tensor", input_tensor)
        checks.total_length("scatter", "sizes", lengths, input_tensor, 0, self._group)
        blocks = input_tensor.split(lengths)
        self._check("scatter", output_tensor, blocks[root].numel())
        with torch.no_grad(), self._on(stream):
            output_tensor.copy_(blocks[root].reshape(output_tensor.shape))
        for dst, block in enumerate(blocks):
            if dst != root and lengths[dst]:
                self.send(block, dst, stream)

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """tensor of rank src, into the others'."""
        self._fill(tensor, tensor.numel(), stream, fcomm.broadcast, tensor, src=src)

    def send(self, tensor: Tensor, dst: int, stream: Any = None) -> None:
        """Send tensor to rank dst; does not wait for that rank."""
        if not self.disabled:
            with torch.no_grad(), self._on(stream):
                fcomm.send(tensor.reshape(-1), self._group, self._backend, dst=dst)

    def recv(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """The elements that rank src sends, into tensor."""
        self._fill(tensor, tensor.numel(), stream, fcomm.recv, tensor.reshape(-1), src=src)

    def batch_isend_irecv(self, p2p_ops: Sequence[dist.P2POp], stream: Any = None) -> None:
        """The messages of a list of torch.distributed.P2POp: all are sent, then all are received."""
        for p2p in p2p_ops:
            if p2p.op is dist.isend:
                self.send(p2p.tensor, p2p.group_peer, stream)
        for p2p in p2p_ops:
            if p2p.op is not dist.isend:
                self.recv(p2p.tensor, p2p.group_peer, stream)

    def destroy(self) -> None:
        """Disable this communicator; what the backend holds for the group ends with the group, by fcomm.close."""
        self.available, self.disabled = False, True

    def group_start(self) -> None:
        """Nothing to do: a send does not wait."""

    def group_end(self) -> None:
        """Nothing to do."""

    def _fill(
        self, out: Tensor, n: int, stream: Any, collective: Callable[..., Tensor], x: Tensor, **options: Any
    ) -> None:
        if self.disabled:
            return
        self._check(collective.__name__, out, n)
        with torch.no_grad(), self._on(stream):
            out.copy_(collective(x, self._group, self._backend, **options).reshape(out.shape))

    def _check(self, name: str, out: Tensor, n: int) -> None:
        if out.numel() != n:
            raise ArgumentError(
                f"{name}: the output has {out.numel()} elements of shape {tuple(out.shape)}; "
                f"on group '{self._group.name}' of size {self.world_size} it needs {n}"
            )

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext() if stream is None else torch.get_device_module(self.device).stream(stream)


PyHcclCommunicator = PyNcclCommunicator
