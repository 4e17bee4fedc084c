"""FastVideo's device communicators, as functions, and its StatelessProcessGroup.

Names, arguments, their order and defaults are those of DeviceCommunicatorBase's methods; reduce_scatter, broadcast, and
those with sizes, are vLLM's. Ranks are numbered within the group. Where the methods have self, these take group and
backend, as keywords or anywhere among the positional arguments: all_gather(x, group, backend, dim=1).
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import fcomm
from fcomm import processes
from fcomm.arithmetic import check_op, fold
from fcomm.bootstrap import NoAnswerError
from fcomm.collectives import checks
from fcomm.compat.funcol import ReduceOp, op_name
from fcomm.compat.handles import takes_handles
from fcomm.dtypes import CODES
from fcomm.errors import ArgumentError, CollectiveTimeoutError, FcommError, PeerDiedError
from fcomm.group import Backend, Group
from fcomm.rendezvous import live

T = TypeVar("T")

_LAST_S = 0.1  # for the answer to a last question, even if less of the deadline is left


@takes_handles
def all_reduce(input_: Tensor, op: ReduceOp | None = dist.ReduceOp.SUM, *, group: Group, backend: Backend) -> Tensor:
    """Fold input_ over the group; op is a torch.distributed.ReduceOp or its name, and every op has a derivative."""
    return fcomm.all_reduce(input_, group, backend, op="sum" if op is None else op_name(op))


@takes_handles
def all_gather(input_: Tensor, dim: int = -1, *, group: Group, backend: Backend) -> Tensor:
    """Concatenate every rank's input_ along dim."""
    return fcomm.all_gather(input_, group, backend, dim=dim)


@takes_handles
def all_gatherv(
    input_: Tensor | list[Tensor],
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    *,
    group: Group,
    backend: Backend,
) -> Tensor | list[Tensor]:
    """all_gather of blocks whose lengths are sizes; for a list, of every tensor, one by one."""
    if isinstance(input_, list):
        return [fcomm.all_gather(x, group, backend, dim=dim, sizes=sizes) for x in input_]
    return fcomm.all_gather(input_, group, backend, dim=dim, sizes=sizes)


@takes_handles
def reduce_scatter(input_: Tensor, dim: int = -1, *, group: Group, backend: Backend) -> Tensor:
    """Sum input_ over the group and keep this rank's block of dim."""
    return fcomm.reduce_scatter(input_, group, backend, dim=dim)


@takes_handles
def reduce_scatterv(
    input_: Tensor, dim: int = -1, sizes: Sequence[int] | None = None, *, group: Group, backend: Backend
) -> Tensor:
    """reduce_scatter into blocks whose lengths are sizes."""
    return fcomm.reduce_scatter(input_, group, backend, dim=dim, sizes=sizes)


@takes_handles
def broadcast(tensor: Tensor, src: int = 0, *, group: Group, backend: Backend) -> Tensor:
    """tensor of rank src, as a new tensor; the argument is not changed."""
    return fcomm.broadcast(tensor, group, backend, src=src)


@takes_handles
def slice(input_: Tensor, dim: int = -1, *, scale_grad: bool, group: Group, backend: Backend) -> Tensor:
    """This rank's slice of dim of a replicated value; its cotangents are gathered, and divided by n for scale_grad."""
    y = fcomm.shard(input_, group, backend, dim=dim)
    if not scale_grad or not (y.is_floating_point() or y.is_complex()):
        return y
    finite = y.masked_fill(~y.isfinite(), 0)  # inf - inf would be nan
    return y.detach() + (finite - finite.detach()) / group.size


@takes_handles
def all_to_all_4D(  # noqa: N802
    input_: Tensor, scatter_dim: int = 2, gather_dim: int = 1, *, group: Group, backend: Backend
) -> Tensor:
    """Between sequence shards and head shards of [batch, sequence, heads, head_dim].

    scatter_dim=2, gather_dim=1: [b, s / n, h, d] -> [b, s, h / n, d]; scatter_dim=1, gather_dim=2: back.
    Raises ArgumentError for other dims, a different number of dimensions, and lengths that n does not divide.
    """
    if input_.dim() != 4:
        raise ArgumentError(
            f"all_to_all_4D: input must be 4D tensor [batch, sequence, heads, head_dim], got {tuple(input_.shape)}; "
            "use fcomm.all_to_all for other shapes"
        )
    if (scatter_dim, gather_dim) not in ((2, 1), (1, 2)):
        raise ArgumentError(
            f"all_to_all_4D: Invalid scatter_dim={scatter_dim}, gather_dim={gather_dim}; "
            "choose (2, 1) or (1, 2), or use fcomm.all_to_all for other dims"
        )
    return fcomm.all_to_all(input_, group, backend, split_dim=scatter_dim, concat_dim=gather_dim)


@takes_handles
def gather(input_: Tensor, dst: int = 0, dim: int = -1, *, group: Group, backend: Backend) -> Tensor | None:
    """Concatenate every rank's input_ along dim on rank dst; None on the others.

    On a simulated axis, where the results of all ranks are one tensor, it is zeros on the others. To take part in
    backward, a rank other than the root must differentiate something made from its input_: use fcomm.gather, whose
    result there is zeros.
    """
    y = fcomm.gather(input_, group, backend, dst=dst, dim=dim)
    return y if group.simulated or group.rank == dst else None


@takes_handles
def send(tensor: Tensor, dst: int | None = None, *, group: Group, backend: Backend) -> Tensor:
    """Send tensor to rank dst, by default the next; returns fcomm.send's token, which carries the cotangent back."""
    return fcomm.send(tensor, group, backend, dst=dst)


@takes_handles
def recv(
    size: Sequence[int] | int,
    dtype: torch.dtype,
    src: int | None = None,
    *,
    group: Group,
    backend: Backend,
    device: torch.device | str | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Receive a tensor of that size and dtype from rank src, by default the previous.

    device: of the result, by default the backend's. after: a token of send, as in fcomm.recv; without it the result
    has no derivative, as in FastVideo.
    """
    where = device if device is not None else backend.devices[0] if backend.devices else "cpu"
    shape = (size,) if isinstance(size, int) else tuple(size)
    y = fcomm.recv(torch.empty(shape, dtype=dtype, device=where), group, backend, src=src, after=after)
    # A cotangent that the sender does not wait for would be taken as its next message.
    return y.detach() if after is None else y


# --- small values over the store ----------------------------------------------------------------------------------


@dataclass
class StatelessProcessGroup:
    """Exchanges small Python values between the ranks of a group, through the group's store; no pickle.

    Values are None, bool, int, float, str, bytes, torch.dtype, tensors on the CPU, without their gradient, and lists,
    tuples, sets, dicts, OrderedDicts and torch.Size of them. Anything else is a TypeError at its sender, and an
    FcommError at its receivers. Every message has a key made of its sender, receiver and number, and is deleted when it
    has been read. group is a Group with everything a Group has: pass it to collectives.
    """

    group: Group
    _numbers: dict[str, int] = field(default_factory=dict, repr=False)

    @staticmethod
    def create(
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: int = 3600,
        store_timeout: int = 300,
    ) -> StatelessProcessGroup:
        """A group with its own store at host:port, which rank 0 serves; no torch.distributed state is made.

        data_expiration_seconds, and vLLM's store_timeout: the smaller one is the deadline of every wait.
        Raises RendezvousError naming the ranks that are missing.
        """
        timeout_s = float(min(data_expiration_seconds, store_timeout))
        name = f"stateless:{host}:{port}"
        return StatelessProcessGroup(
            fcomm.stateless_group(host, port, rank, world_size, name=name, timeout_s=timeout_s)
        )

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return self.group.rank or 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.group.size

    @property
    def store(self) -> dist.Store:
        """The group's own store."""
        return live(self.group).store

    def send_obj(self, obj: Any, dst: int) -> None:
        """Send obj to rank dst; does not wait."""
        dst = checks.rank_in_group("send_obj", "dst", dst, self.group)
        self._write("send_obj", self._key("sent", f"send/{self.rank}/{dst}"), obj)

    def recv_obj(self, src: int) -> Any:
        """The next value that rank src sends to this rank."""
        src = checks.rank_in_group("recv_obj", "src", src, self.group)
        return self._read("recv_obj", self._key("received", f"send/{src}/{self.rank}"), src, readers=1)

    def broadcast_obj(self, obj: Any | None, src: int) -> Any:
        """obj of rank src, on every rank."""
        src = checks.rank_in_group("broadcast_obj", "src", src, self.group)
        return self._broadcast("broadcast_obj", obj, src)

    def all_gather_obj(self, obj: Any) -> list[Any]:
        """Every rank's obj, in rank order."""
        return [self.broadcast_obj(obj, src) for src in range(self.world_size)]

    # vLLM's methods, for small tensors on the CPU; gradients are not sent.

    def send(self, tensor: Tensor, dst: int) -> None:
        """Send tensor to rank dst, in sequence with the objects of send_obj; does not wait."""
        self.send_obj(tensor.detach(), dst)

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """The next tensor that rank src sends to this rank, into tensor, which is returned."""
        with torch.no_grad():
            return tensor.copy_(self.recv_obj(src))

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """tensor of rank src: on src the argument itself, on the others a new tensor."""
        got: Tensor = self.broadcast_obj(tensor.detach() if self.rank == src else None, src)
        return tensor if self.rank == src else got

    def all_reduce(self, tensor: Tensor, op: ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """Fold tensor over the ranks, in rank order; a new tensor."""
        name = op_name(op)
        check_op("all_reduce", name, tensor.dtype)
        return fold(self.all_gather_obj(tensor.detach()), name)

    def barrier(self, timeout: float | None = None) -> None:
        """Return when every rank has called it, and on rank 0 when all have left it: any may then end, with its store.

        timeout: seconds that each wait may take, by default the group's.
        """
        for r in range(self.world_size):
            self._broadcast("barrier", None, r, timeout)
        for r in range(1, self.world_size):
            key = self._key("both", f"left/{r}")
            if self.rank == 0:
                self._read("barrier", key, r, readers=1, timeout_s=timeout)
            elif self.rank == r:
                self._write("barrier", key, None)

    def expire_data(self) -> None:
        """Nothing to do: messages are deleted when they have been read."""

    def close(self) -> None:
        """Close the group; every rank calls it, after its last message."""
        fcomm.close(self.group)

    def _key(self, side: str, stream: str) -> str:
        """The key of the next message of a stream, counted separately at its two ends: a rank may send to itself."""
        number = self._numbers[side + stream] = self._numbers.get(side + stream, -1) + 1
        return f"objects/{stream}/{number}"

    def _broadcast(self, what: str, obj: Any, src: int, timeout_s: float | None = None) -> Any:
        key = self._key("both", f"broadcast/{src}")
        if self.rank != src:
            return self._read(what, key, src, readers=self.world_size - 1, timeout_s=timeout_s)
        if self.world_size > 1:
            self._write(what, key, obj)
        return obj

    def _write(self, what: str, key: str, obj: Any) -> None:
        """Set the message of a key, or an error if obj cannot be sent, so that readers do not wait for the deadline."""
        try:
            frame = encode(obj)
        except Exception as error:
            text = f"{what}: rank {self.rank} of group '{self.group.name}' could not send: {error}"
            self._ask(what, lambda store: store.set(key, json.dumps({"error": text})))
            raise
        self._ask(what, lambda store: store.set(key, frame))  # type: ignore[arg-type]  # str in torch's stub only

    def _read(self, what: str, key: str, src: int, readers: int, timeout_s: float | None = None) -> Any:
        timeout_s = live(self.group).timeout_s if timeout_s is None else timeout_s
        began, pause = time.monotonic(), 1e-3
        # Poll, since the store's client serves one call at a time, and other threads use it too.
        while not self._ask(what, lambda store: store.check([key]), src, timeout_s, began):
            if time.monotonic() > began + timeout_s:
                raise CollectiveTimeoutError(
                    f"{what}: nothing arrived from rank {src} of group '{self.group.name}' within {timeout_s} s; "
                    "see what that rank is doing",
                    op=what, group=self.group.name, rank=self.rank, culprits=(src,),
                )  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, 2e-2)

        def take(store: dist.Store) -> bytes:
            frame = store.get(key)
            with suppress(dist.DistNetworkError):  # if the store is lost now, so is the message
                if readers == 1 or store.add(f"{key}/read", 1) == readers:
                    store.delete_key(key)
                    store.delete_key(f"{key}/read")
            return frame

        return decode(self._ask(what, take, src, timeout_s, began))

    def _ask(
        self,
        what: str,
        call: Callable[[dist.Store], T],
        src: int | None = None,
        timeout_s: float | None = None,
        began: float | None = None,
    ) -> T:
        """The store's answer; timeout_s, by default the group's, counts from began. src: the awaited rank."""
        owner = live(self.group)
        limit_s = owner.timeout_s if timeout_s is None else timeout_s
        deadline = (time.monotonic() if began is None else began) + limit_s
        awaited = "" if src is None else f" while a value of rank {src} was awaited"
        try:
            return owner.ask(call, max(_LAST_S, deadline - time.monotonic()))
        except NoAnswerError as error:
            stopped, cause = processes.why_silent(owner.identities)
            raise CollectiveTimeoutError(
                f"{what}: the store of group '{self.group.name}' did not answer within {limit_s} s{awaited}; {cause}",
                op=what, group=self.group.name, rank=self.rank, culprits=stopped,
            ) from error  # fmt: skip
        except dist.DistNetworkError as error:
            raise PeerDiedError(
                f"{what}: the store of group '{self.group.name}' is lost{awaited}; "
                "rank 0 serves a store of create(): see its log, or let it end last, as after a barrier",
                op=what, group=self.group.name, rank=self.rank, culprits=processes.ended(owner.identities),
            ) from error  # fmt: skip


def encode(obj: Any) -> bytes:
    """A value as JSON that decode turns back into an equal value of the same types."""
    return json.dumps(_tagged(obj)).encode()


def decode(frame: bytes) -> Any:
    """The value that encode was given."""
    return _untagged(json.loads(frame))


# JSON has no bytes, tuples or tensors, and no keys except strings, so values of other types name their type.

_ROWS = {kind.__name__: kind for kind in (list, tuple, set, torch.Size)}
_MAPS = {kind.__name__: kind for kind in (dict, OrderedDict)}
_DTYPES = {str(dtype): dtype for dtype in CODES}


def _tagged(obj: Any) -> Any:
    kind = type(obj)
    if obj is None or kind in (bool, int, float, str):
        return obj
    if kind is bytes:
        return {"bytes": obj.hex()}
    if kind is torch.dtype:
        return {"dtype": str(obj)}
    if kind is Tensor and obj.is_cpu and obj.layout is torch.strided and not obj.is_quantized:
        # A copy: without conjugate and negative bits.
        raw = torch.empty(obj.numel(), dtype=obj.dtype).copy_(obj.detach().reshape(-1)).view(torch.uint8)
        return {"Tensor": [str(obj.dtype), list(obj.shape), bytes(raw.tolist()).hex()]}
    if kind in _ROWS.values():
        return {kind.__name__: [_tagged(v) for v in obj]}
    if kind in _MAPS.values():
        return {kind.__name__: [[_tagged(k), _tagged(v)] for k, v in obj.items()]}
    raise TypeError(
        f"a value of type {kind.__name__} cannot be sent over the store; send None, bool, int, float, str, bytes, "
        "torch.dtype, tensors on the CPU, and lists, tuples, sets, dicts and torch.Size of them; other tensors by a "
        "collective"
    )


def _untagged(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, body),) = value.items()
    if kind == "error":
        raise FcommError(body)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "dtype":
        return _DTYPES[body]
    if kind == "Tensor":
        dtype, shape, raw = body
        return torch.tensor(list(bytes.fromhex(raw)), dtype=torch.uint8).view(_DTYPES[dtype]).reshape(shape)
    if kind in _MAPS:
        return _MAPS[kind]((_untagged(k), _untagged(v)) for k, v in body)
    return _ROWS[kind](_untagged(v) for v in body)
