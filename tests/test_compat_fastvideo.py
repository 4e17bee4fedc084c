"""FastVideo's communicators and its stateless group, as compat.fastvideo: every method, with its defaults."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections import OrderedDict, namedtuple
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fcomm
from fcomm.compat import fastvideo
from fcomm.compat.fastvideo import StatelessProcessGroup, decode, encode
from fcomm.rendezvous import live
from fcomm.testing import run_ranks


def tensors(world: fcomm.Group) -> None:
    n, rank = world.size, world.rank or 0
    handles: dict[str, Any] = {"group": world, "backend": fcomm.c10d}
    x = torch.full((2, 3), rank + 1.0)
    assert torch.equal(fastvideo.all_reduce(x, **handles), torch.full((2, 3), n * (n + 1) / 2))
    assert torch.equal(fastvideo.all_reduce(x, op=dist.ReduceOp.MAX, **handles), torch.full((2, 3), float(n)))
    assert torch.equal(fastvideo.all_reduce(x, None, **handles), torch.full((2, 3), n * (n + 1) / 2))
    whole = torch.cat([torch.full((2, 3), r + 1.0) for r in range(n)], 1)
    assert torch.equal(fastvideo.all_gather(x, **handles), whole)
    assert torch.equal(fastvideo.all_gather(x, 0, **handles), torch.cat(whole.chunk(n, 1)))

    sizes = [r + 1 for r in range(n)]
    uneven = torch.full((2, rank + 1), rank + 1.0)
    every = torch.cat([torch.full((2, s), float(s)) for s in sizes], 1)
    assert torch.equal(fastvideo.all_gatherv(uneven, dim=1, sizes=sizes, **handles), every)
    first, second = fastvideo.all_gatherv([uneven, 2 * uneven], 1, sizes, **handles)  # as vLLM's dispatch of tokens
    assert torch.equal(first, every)
    assert torch.equal(second, 2 * every)
    assert torch.equal(fastvideo.reduce_scatterv(every, sizes=sizes, **handles), n * uneven)

    gathered = fastvideo.gather(x, **handles)
    assert torch.equal(gathered, whole) if rank == 0 else gathered is None
    gathered = fastvideo.gather(x, dst=n - 1, dim=0, **handles)
    assert torch.equal(gathered, torch.cat(whole.chunk(n, 1))) if rank == n - 1 else gathered is None

    # The defaults form a ring: send to the next rank, receive from the previous one. The cotangent goes the other way.
    leaf = x.clone().requires_grad_()
    token = fastvideo.send(leaf, **handles)
    y = fastvideo.recv(torch.Size([2, 3]), torch.float32, after=token, **handles)
    assert torch.equal(y, torch.full((2, 3), (rank - 1) % n + 1.0))
    y.backward(torch.full_like(y, rank + 1.0))
    assert torch.equal(leaf.grad, torch.full((2, 3), (rank + 1) % n + 1.0))

    # One edge, without gradient: backward sends nothing that the next recv would take for a message.
    if rank == 0:
        fastvideo.send(torch.arange(4.0), dst=n - 1, **handles)
        assert fastvideo.recv(4, torch.float32, n - 1, **handles).tolist() == [7.0] * 4
    if rank == n - 1:
        y = fastvideo.recv((4,), torch.float32, 0, **handles)
        assert y.numpy().tolist() == [0, 1, 2, 3]
        leaf = torch.ones(4, requires_grad=True)
        (leaf * y).sum().backward()
        assert torch.equal(leaf.grad, y)
        fastvideo.send(torch.full((4,), 7.0), dst=0, **handles)


@pytest.mark.parametrize("size", [2, 3])
def test_tensors(size: int) -> None:
    run_ranks(tensors, size)


def test_ring_of_defaults_simulated() -> None:
    axis = fcomm.axis("sp", 3)

    def ring(x: Tensor) -> Tensor:
        return fastvideo.recv(x.shape, x.dtype, axis, fcomm.sim, after=fastvideo.send(x, axis, fcomm.sim))

    x = torch.randn(3, 2)
    assert torch.equal(fcomm.simulate(ring, axis)(x), x.roll(1, 0))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_slice_with_scale_grad_divides_the_derivative_alone(n: int) -> None:
    axis = fcomm.axis("sp", n)

    def program(x: Tensor, ct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def cut(x: Tensor) -> Tensor:
            return fastvideo.slice(x, axis, fcomm.sim, dim=-2, scale_grad=True)

        y, pull = torch.func.vjp(cut, x)
        return y, pull(ct)[0], torch.func.jvp(cut, (x,), (torch.ones_like(x),))[1]

    x, ct = torch.randn(2, 2, 2 * n, 3, dtype=torch.float64)
    x[0, 0, 0], ct[0, 0, 0] = -torch.inf, 0  # as in a mask
    run = fcomm.simulate(program, axis)
    arguments = x.repeat(n, 1, 1, 1), torch.stack(ct.chunk(n, 1))
    for y, grad, tangent in (run(*arguments), torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)):
        assert torch.equal(y, torch.stack(x.chunk(n, 1)))
        torch.testing.assert_close(grad, (ct / n).expand(n, *ct.shape))
        torch.testing.assert_close(tangent, torch.ones_like(y).where(y.isfinite(), 0) / n)
    ints = fcomm.simulate(lambda x: fastvideo.slice(x, axis, fcomm.sim, scale_grad=True, dim=0), axis)
    assert torch.equal(ints(torch.arange(n).expand(n, n)), torch.arange(n)[:, None])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_all_to_all_4d_is_attention_with_sequence_shards(n: int) -> None:
    """Its intended use: heads spread over the ranks see the whole sequence, and go back."""
    axis = fcomm.axis("sp", n)
    b, s, h, d = 2, 3, 2 * n, 5
    qkv = torch.randn(3, b, n * s, h, d, dtype=torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def sharded(qkv: Tensor) -> Tensor:
        q, k, v = (fastvideo.all_to_all_4D(t, axis, fcomm.sim, scatter_dim=2, gather_dim=1) for t in qkv)
        assert q.shape == (b, n * s, h // n, d)
        return fastvideo.all_to_all_4D(attend(q, k, v), axis, fcomm.sim, scatter_dim=1, gather_dim=2)

    got = fcomm.simulate(sharded, axis)(torch.stack(qkv.chunk(n, 2)))
    torch.testing.assert_close(torch.cat(list(got), 1), attend(*qkv))


@pytest.mark.parametrize(
    ("shape", "dims", "text"),
    [
        ((1, 4, 3, 2), (2, 1), r"x.shape\[2\] is 3, not divisible by group 'sp' of size 2"),
        ((1, 5, 4, 2), (1, 2), r"x.shape\[1\] is 5, not divisible by group 'sp' of size 2"),
        ((4, 4, 2), (2, 1), "input must be 4D tensor"),
        ((1, 4, 4, 2), (3, 1), "Invalid scatter_dim=3, gather_dim=1"),
    ],
)
def test_all_to_all_4d_refuses(shape: tuple[int, ...], dims: tuple[int, int], text: str) -> None:
    axis = fcomm.axis("sp", 2)
    with pytest.raises(RuntimeError, match=text):
        fcomm.simulate(lambda x: fastvideo.all_to_all_4D(x, axis, fcomm.sim, *dims), axis)(torch.zeros(2, *shape))


# --- the stateless group ------------------------------------------------------------------------------------------

SECRET = {"unique id": b"\x00\x01\xff", "shape": (2, [3, None]), 5: [True, 1.5, "ü", -math.inf]}


Point = namedtuple("Point", "x")
TYPED = [{1, (2, "x")}, set(), torch.Size([2, 3]), torch.bfloat16, {"shape": torch.Size([]), "dtype": torch.bool}]
TYPED += [OrderedDict(b=1, a=OrderedDict())]


def messages(world: fcomm.Group, port: int, other_port: int) -> None:
    n, rank = world.size, world.rank or 0
    pg = StatelessProcessGroup.create(host="127.0.0.1", port=port, rank=rank, world_size=n)
    assert (pg.rank, pg.world_size) == (rank, n)
    assert not dist.is_initialized()
    assert pg.broadcast_obj(SECRET if rank == n - 1 else None, src=n - 1) == SECRET
    assert pg.all_gather_obj({"rank": rank}) == [{"rank": r} for r in range(n)]
    pg.barrier()
    # Two senders to one receiver: in the original their messages have the same key.
    if rank > 0:
        for k in range(3):
            pg.send_obj((rank, k), dst=0)
    else:
        for k in range(3):
            for src in range(n - 1, 0, -1):
                assert pg.recv_obj(src) == (src, k)
    # Each rank to itself, and to all.
    pg.send_obj("me", dst=rank)
    assert pg.recv_obj(rank) == "me"
    pg.barrier()
    # Only undeleted messages would be left: every rank's last barrier may still have to be read, but nothing else.
    if rank == 0:
        left = pg.store.num_keys()
    for _ in range(20):
        pg.all_gather_obj(rank)
        pg.barrier()
    if rank == 0:
        assert pg.store.num_keys() <= left + 3 * n, "messages pile up"
    # A second group of some of the ranks, at the same time; and collectives work on the group.
    if rank < 2:
        part = StatelessProcessGroup.create("127.0.0.1", other_port, rank, 2)
        assert part.all_gather_obj(rank) == [0, 1]
        part.barrier()
        part.close()
    assert fcomm.all_reduce(torch.ones(2), pg.group, fcomm.c10d).tolist() == [n, n]
    with pytest.raises(ValueError, match=f"dst is {n}"):
        pg.send_obj("lost", dst=n)
    with pytest.raises(ValueError, match="recv_obj: src is '0', not a rank of group"):
        pg.recv_obj("0")
    # A tensor, as vLLM's test_utils.py broadcasts one.
    assert pg.broadcast_obj(torch.tensor([rank]), src=n - 1).item() == n - 1
    # Tensors sent by their own calls, in sequence with the objects: vLLM's coordinators send a shape before its tensor.
    weight = torch.nn.Parameter(torch.full((2,), rank + 1.0))
    pg.send_obj((2,), dst=(rank + 1) % n)
    pg.send(weight, dst=(rank + 1) % n)
    into = torch.nn.Parameter(torch.empty(pg.recv_obj((rank - 1) % n)))
    assert pg.recv(into, (rank - 1) % n) is into
    assert into.tolist() == [(rank - 1) % n + 1.0] * 2
    y = pg.broadcast(weight, src=n - 1)
    assert (y is weight) == (rank == n - 1)
    assert y.tolist() == [n] * 2
    assert pg.all_reduce(weight).tolist() == [n * (n + 1) / 2] * 2
    assert pg.all_reduce(torch.tensor(rank), dist.ReduceOp.MAX).item() == n - 1
    with pytest.raises(ValueError, match="op is 'nonsense'"):
        pg.all_reduce(torch.ones(1), "nonsense")
    # What cannot be sent is an error at both ends at once, and the next message is read correctly.
    before, after = (rank - 1) % n, (rank + 1) % n
    with pytest.raises(TypeError, match="object cannot be sent over the store"):
        pg.send_obj(object(), dst=after)
    pg.send_obj("next", dst=after)
    with pytest.raises(fcomm.FcommError, match=f"rank {before} of group .* could not send: .* object cannot be sent"):
        pg.recv_obj(before)
    assert pg.recv_obj(before) == "next"
    with pytest.raises(TypeError if rank == 0 else fcomm.FcommError, match="function cannot be sent"):
        pg.all_gather_obj(free_port)
    pg.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("size", [2, 4])
def test_messages(size: int) -> None:
    run_ranks(messages, size, free_port(), free_port())


@pytest.mark.parametrize(
    "obj", [None, True, 0, -1.5, "text", b"", b"\x80raw", [], (), {}, [(1, [b"x"])], SECRET, *TYPED]
)
def test_frames_keep_value_and_type(obj: Any) -> None:
    frame = encode(obj)
    assert isinstance(frame, bytes)
    assert decode(frame) == obj
    assert repr(decode(frame)) == repr(obj)


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(-1.5),
        torch.ones(0, 3, dtype=torch.float16),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.tensor([math.nan, -0.0], requires_grad=True),
        torch.ones(2).to(torch.float8_e4m3fn),
    ],
)
def test_frames_keep_tensors(x: Tensor) -> None:
    y = decode(encode({"x": x}))["x"]
    assert (y.dtype, y.shape, y.requires_grad) == (x.dtype, x.shape, False)
    assert y.tolist() == x.tolist() or repr(y) == repr(x.detach())


@pytest.mark.parametrize(
    "obj",
    [
        object(), print, np.int64(1), Point(1), [torch.nn.Parameter(torch.ones(1))], torch.empty(1, device="meta"),
        torch.ones(1).to_sparse(),
    ],
)  # fmt: skip
def test_frames_refuse_what_is_not_plain(obj: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent over the store"):
        encode(obj)


class Silent:
    """A store that does not answer, as if its server were stopped."""

    def check(self, *args: object) -> None:
        threading.Event().wait()

    set = check


def late(world: fcomm.Group, port: int) -> str:
    pg = StatelessProcessGroup.create("127.0.0.1", port, world.rank or 0, 2, data_expiration_seconds=40)
    assert live(pg.group).timeout_s == 40
    if world.rank == 0:
        pg.store.wait(["done"], timedelta(seconds=60))
        return ""
    live(pg.group).timeout_s = 2.0  # the rendezvous had 40
    with pytest.raises(TimeoutError, match=r"recv_obj: nothing arrived from rank 0 of group .* within 2.0 s") as caught:
        pg.recv_obj(src=0)
    with pytest.raises(TimeoutError, match=r"barrier: nothing arrived from rank 0 of group .* within 0.1 s"):
        pg.barrier(timeout=0.1)
    store, live(pg.group).timeout_s = pg.store, 0.3
    live(pg.group).store = Silent()  # type: ignore[assignment]
    for call in (lambda: pg.recv_obj(src=0), lambda: pg.send_obj(1, dst=0)):
        with pytest.raises(TimeoutError, match=r"_obj: the store of group .* did not answer within 0.3 s"):
            call()
    with pytest.raises(TimeoutError, match=r"barrier: the store of group .* did not answer within 0.1 s"):
        pg.barrier(timeout=0.1)
    store.set("done", "1")
    return str(caught.value)


def test_a_message_that_never_comes_is_named() -> None:
    assert "rank 0" in run_ranks(late, 2, free_port())[1]


def ends_after_a_barrier(world: fcomm.Group, port: int) -> None:
    pg = StatelessProcessGroup.create("127.0.0.1", port, world.rank or 0, world.size)
    if world.rank == 1:
        read = fastvideo.decode

        def slowly(frame: bytes) -> Any:
            time.sleep(0.3)
            return read(frame)

        fastvideo.decode = slowly
    pg.barrier()
    pg.close()  # with rank 0 ends the store


def test_after_a_barrier_every_rank_may_end() -> None:
    run_ranks(ends_after_a_barrier, 3, free_port())


def loses_its_store(world: fcomm.Group, port: int) -> None:
    pg = StatelessProcessGroup.create("127.0.0.1", port, world.rank or 0, 2, store_timeout=60)
    assert live(pg.group).timeout_s == 60
    if world.rank == 0:
        pg.send_obj("last", dst=1)
        pg.store.wait(["read"], timedelta(seconds=60))
        pg.close()
        return
    store = pg.store

    class Ends:
        """A store that ends when a message has been read."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def get(self, key: str) -> bytes:
            frame = store.get(key)
            store.set("read", "")
            while not lost(store):
                time.sleep(0.01)
            return frame

    live(pg.group).store = Ends()  # type: ignore[assignment]
    assert pg.recv_obj(src=0) == "last"
    with pytest.raises(fcomm.PeerDiedError, match=r"recv_obj: the store of group .* is lost .* rank 0") as caught:
        pg.recv_obj(src=0)
    assert not isinstance(caught.value, TimeoutError)


def lost(store: dist.Store) -> bool:
    try:
        store.check(["read"])
    except dist.DistNetworkError:
        return True
    return False


def test_a_lost_store_is_named() -> None:
    run_ranks(loses_its_store, 2, free_port())
