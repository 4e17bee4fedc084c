"""hccl: Huawei's library through its C interface; any library with the same symbols will do, whole or split in two.

Values and sizes are those of hccl.h and hccl_types.h as released; tests compare them with the vendor's own bindings.
Same order as nccl.py: declarations, library, communicators, natives, backend.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, Structure, Union, c_char, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fcomm.backends import ccall, library
from fcomm.backends.ccall import Library, Symbol
from fcomm.backends.lowering import backend_on, table
from fcomm.backends.machine import LOG, Comm, Machine
from fcomm.backends.vendors import hccl
from fcomm.group import Backend, Lowering

# --- declarations -------------------------------------------------------------------------------------------------

_AGAIN = 20
_IN_USE_S = 60.0  # how long ending a communicator waits for a call in progress; then both are left, with their memory

# HcclResult
CODES = {
    0: "HCCL_SUCCESS",
    1: "HCCL_E_PARA",
    2: "HCCL_E_PTR",
    3: "HCCL_E_MEMORY",
    4: "HCCL_E_INTERNAL",
    5: "HCCL_E_NOT_SUPPORT",
    6: "HCCL_E_NOT_FOUND",
    7: "HCCL_E_UNAVAIL",
    8: "HCCL_E_SYSCALL",
    9: "HCCL_E_TIMEOUT",
    10: "HCCL_E_OPEN_FILE_FAILURE",
    11: "HCCL_E_TCP_CONNECT",
    12: "HCCL_E_ROCE_CONNECT",
    13: "HCCL_E_TCP_TRANSFER",
    14: "HCCL_E_ROCE_TRANSFER",
    15: "HCCL_E_RUNTIME",
    16: "HCCL_E_DRV",
    17: "HCCL_E_PROFILING",
    18: "HCCL_E_CCE",
    19: "HCCL_E_NETWORK",
    _AGAIN: "HCCL_E_AGAIN",
    21: "HCCL_E_REMOTE",
    22: "HCCL_E_SUSPENDING",
    23: "HCCL_E_OPRETRY_FAIL",
    24: "HCCL_E_OOM",
    1041: "HCCL_E_IN_STATUS",
}

# HcclDataType
DTYPES = {
    torch.int8: 0,
    torch.int16: 1,
    torch.int32: 2,
    torch.float16: 3,
    torch.float32: 4,
    torch.int64: 5,
    torch.uint64: 6,
    torch.uint8: 7,
    torch.uint16: 8,
    torch.uint32: 9,
    torch.float64: 10,
    torch.bfloat16: 11,
    torch.float8_e4m3fn: 15,  # absent in older versions
    torch.float8_e5m2: 16,
    torch.float8_e8m0fnu: 17,
}

# HcclReduceOp
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3}

# dtype -> the dtype it moves as. float8 is not here, so it is moved as bytes: older versions do not know it.
MOVES = {d: d for d, code in DTYPES.items() if code < 15} | {
    torch.bool: torch.uint8,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}

_INTEGERS = (torch.int8, torch.int32, torch.int64)
# op -> dtype -> (dtype HCCL reduces it as, op), where that means the same on Atlas A2, A3 and Ascend 950 (the training
# series 910 does not reduce int16). These are not here, so they are composed: unsigned integers and float64 (refused),
# int16 by prod (refused), max and min of floats (NaN is not documented), half types (rounded at every step), bit
# operations. bool is reduced as int8: HCCL reduces no unsigned type.
REDUCTIONS: dict[str, dict[torch.dtype, tuple[torch.dtype, str]]] = {
    "sum": {
        **{d: (d, "sum") for d in (*_INTEGERS, torch.int16, torch.float32)},
        torch.complex64: (torch.float32, "sum"),
        torch.bool: (torch.int8, "max"),
    },
    "prod": {**{d: (d, "prod") for d in (*_INTEGERS, torch.float32)}, torch.bool: (torch.int8, "min")},
    "max": {**{d: (d, "max") for d in (*_INTEGERS, torch.int16)}, torch.bool: (torch.int8, "max")},
    "min": {**{d: (d, "min") for d in (*_INTEGERS, torch.int16)}, torch.bool: (torch.int8, "min")},
    "bor": {torch.bool: (torch.int8, "max")},
    "band": {torch.bool: (torch.int8, "min")},
}


class RootInfo(Structure):
    """HcclRootInfo: opaque, and passed by pointer."""

    _fields_ = (("internal", c_char * 4108),)


class Config(Structure):
    """HcclCommConfig of version 5, the smallest with all we set. Its head is bytes, so its end has no padding."""

    _pack_ = 4
    _fields_ = (
        ("size", c_size_t),
        ("magic", c_uint32),
        ("version", c_uint32),
        ("reserved", c_uint64),
        ("hcclBufferSize", c_uint32),
        ("hcclDeterministic", c_uint32),
        ("hcclCommName", c_char * 128),
        ("hcclUdi", c_char * 128),
        ("hcclOpExpansionMode", c_uint32),
        ("hcclRdmaTrafficClass", c_uint32),
        ("hcclRdmaServiceLevel", c_uint32),
    )


_UNSET = 0xFFFFFFFF


def config(*, deterministic: bool) -> Config:
    """The defaults, except whether reductions give the same bits in every run."""
    size = ctypes.sizeof(Config)
    return Config(size, 0xF0F0F0F0, 5, 0, _UNSET, int(deterministic), b"", b"", 0, _UNSET, _UNSET)


class SendRecvItem(Structure):
    """HcclSendRecvItem: one message of HcclBatchSendRecv; kind 0 sends and 1 receives."""

    _fields_ = (("kind", c_int), ("buf", c_void_p), ("count", c_uint64), ("dtype", c_int), ("peer", c_uint32))


class ConfigValue(Union):
    """HcclConfigValue."""

    _fields_ = (("value", c_int32),)


_COMM, _STREAM, _BUFFER, _DTYPE, _OP, _RANK = c_void_p, c_void_p, c_void_p, c_int, c_int, c_uint32
_COUNT, _COUNTS = c_uint64, POINTER(c_uint64)

SYMBOLS = {
    # --- the library
    # const char *HcclGetErrorString(HcclResult code)
    "HcclGetErrorString": Symbol((c_int,), optional=True, result=c_char_p),
    # HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue configValue)
    "HcclSetConfig": Symbol((c_int, ConfigValue), optional=True),
    # HcclResult HcclGetConfig(HcclConfig config, HcclConfigValue *configValue)
    "HcclGetConfig": Symbol((c_int, POINTER(ConfigValue)), optional=True),
    # --- communicators
    # HcclResult HcclGetRootInfo(HcclRootInfo *rootInfo)
    "HcclGetRootInfo": Symbol((POINTER(RootInfo),)),
    # HcclResult HcclCommInitRootInfo(uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank, HcclComm *comm)
    "HcclCommInitRootInfo": Symbol((c_uint32, POINTER(RootInfo), _RANK, POINTER(_COMM))),
    # HcclResult HcclCommInitRootInfoConfig(uint32_t nRanks, const HcclRootInfo *rootInfo, uint32_t rank,
    #                                       const HcclCommConfig *config, HcclComm *comm)
    "HcclCommInitRootInfoConfig": Symbol(
        (c_uint32, POINTER(RootInfo), _RANK, POINTER(Config), POINTER(_COMM)), optional=True
    ),
    # HcclResult HcclCommDestroy(HcclComm comm)
    "HcclCommDestroy": Symbol((_COMM,)),
    # HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *asyncError)
    "HcclGetCommAsyncError": Symbol((_COMM, POINTER(c_int)), optional=True),
    # HcclResult HcclCommSuspend(HcclComm comm)
    "HcclCommSuspend": Symbol((_COMM,), optional=True),
    # HcclResult HcclCommResume(HcclComm comm)
    "HcclCommResume": Symbol((_COMM,), optional=True),
    # HcclResult HcclGetRankSize(HcclComm comm, uint32_t *rankSize)
    "HcclGetRankSize": Symbol((_COMM, POINTER(c_uint32)), optional=True),
    # HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank)
    "HcclGetRankId": Symbol((_COMM, POINTER(c_uint32)), optional=True),
    # HcclResult HcclGetCommName(HcclComm comm, char *commName)
    "HcclGetCommName": Symbol((_COMM, c_char * 128), optional=True),
    # --- reductions
    # HcclResult HcclAllReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
    #                          HcclComm comm, aclrtStream stream)
    "HcclAllReduce": Symbol((_BUFFER, _BUFFER, _COUNT, _DTYPE, _OP, _COMM, _STREAM)),
    # HcclResult HcclReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
    #                       uint32_t root, HcclComm comm, aclrtStream stream)
    "HcclReduce": Symbol((_BUFFER, _BUFFER, _COUNT, _DTYPE, _OP, _RANK, _COMM, _STREAM)),
    # HcclResult HcclReduceScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType,
    #                              HcclReduceOp op, HcclComm comm, aclrtStream stream)
    "HcclReduceScatter": Symbol((_BUFFER, _BUFFER, _COUNT, _DTYPE, _OP, _COMM, _STREAM)),
    # HcclResult HcclReduceScatterV(void *sendBuf, const uint64_t *sendCounts, const uint64_t *sendDispls,
    #                               void *recvBuf, uint64_t recvCount, HcclDataType dataType, HcclReduceOp op,
    #                               HcclComm comm, aclrtStream stream)
    "HcclReduceScatterV": Symbol(
        (_BUFFER, _COUNTS, _COUNTS, _BUFFER, _COUNT, _DTYPE, _OP, _COMM, _STREAM), optional=True
    ),
    # --- movement
    # HcclResult HcclAllGather(void *sendBuf, void *recvBuf, uint64_t sendCount, HcclDataType dataType, HcclComm comm,
    #                          aclrtStream stream)
    "HcclAllGather": Symbol((_BUFFER, _BUFFER, _COUNT, _DTYPE, _COMM, _STREAM)),
    # HcclResult HcclAllGatherV(void *sendBuf, uint64_t sendCount, void *recvBuf, const uint64_t *recvCounts,
    #                           const uint64_t *recvDispls, HcclDataType dataType, HcclComm comm, aclrtStream stream)
    "HcclAllGatherV": Symbol((_BUFFER, _COUNT, _BUFFER, _COUNTS, _COUNTS, _DTYPE, _COMM, _STREAM), optional=True),
    # HcclResult HcclAlltoAll(const void *sendBuf, uint64_t sendCount, HcclDataType sendType, const void *recvBuf,
    #                         uint64_t recvCount, HcclDataType recvType, HcclComm comm, aclrtStream stream)
    "HcclAlltoAll": Symbol((_BUFFER, _COUNT, _DTYPE, _BUFFER, _COUNT, _DTYPE, _COMM, _STREAM)),
    # HcclResult HcclAlltoAllV(const void *sendBuf, const void *sendCounts, const void *sdispls, HcclDataType sendType,
    #                          const void *recvBuf, const void *recvCounts, const void *rdispls, HcclDataType recvType,
    #                          HcclComm comm, aclrtStream stream)
    "HcclAlltoAllV": Symbol((_BUFFER, _COUNTS, _COUNTS, _DTYPE, _BUFFER, _COUNTS, _COUNTS, _DTYPE, _COMM, _STREAM)),
    # HcclResult HcclAlltoAllVC(const void *sendBuf, const void *sendCountMatrix, HcclDataType sendType,
    #                           const void *recvBuf, HcclDataType recvType, HcclComm comm, aclrtStream stream)
    "HcclAlltoAllVC": Symbol((_BUFFER, _COUNTS, _DTYPE, _BUFFER, _DTYPE, _COMM, _STREAM), optional=True),
    # HcclResult HcclSend(void *sendBuf, uint64_t count, HcclDataType dataType, uint32_t destRank, HcclComm comm,
    #                     aclrtStream stream)
    "HcclSend": Symbol((_BUFFER, _COUNT, _DTYPE, _RANK, _COMM, _STREAM)),
    # HcclResult HcclRecv(void *recvBuf, uint64_t count, HcclDataType dataType, uint32_t srcRank, HcclComm comm,
    #                     aclrtStream stream)
    "HcclRecv": Symbol((_BUFFER, _COUNT, _DTYPE, _RANK, _COMM, _STREAM)),
    # HcclResult HcclBatchSendRecv(HcclSendRecvItem *sendRecvInfo, uint32_t itemNum, HcclComm comm, aclrtStream stream)
    "HcclBatchSendRecv": Symbol((POINTER(SendRecvItem), c_uint32, _COMM, _STREAM)),
    # HcclResult HcclBroadcast(void *buf, uint64_t count, HcclDataType dataType, uint32_t root, HcclComm comm,
    #                          aclrtStream stream)
    "HcclBroadcast": Symbol((_BUFFER, _COUNT, _DTYPE, _RANK, _COMM, _STREAM)),
    # HcclResult HcclScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType, uint32_t root,
    #                        HcclComm comm, aclrtStream stream)
    "HcclScatter": Symbol((_BUFFER, _BUFFER, _COUNT, _DTYPE, _RANK, _COMM, _STREAM), optional=True),
    # HcclResult HcclBarrier(HcclComm comm, aclrtStream stream)
    "HcclBarrier": Symbol((_COMM, _STREAM), optional=True),
}


# --- library ------------------------------------------------------------------------------------------------------

SEARCH = library.Search(
    soname="libhccl.so",
    variable="FCOMM_HCCL_LIB",
    packages=(),
    directories=(
        "$ASCEND_HOME_PATH/lib64",
        "/usr/local/Ascend/cann/lib64",
        "/usr/local/Ascend/ascend-toolkit/latest/lib64",
    ),
    # Newer CANN has data types and communicators in this one, and the collectives in libhccl.
    companion="libhcomm.so",
    hint="install Ascend CANN and source its set_env.sh, or set FCOMM_HCCL_LIB",
)


def _explain(lib: Library, code: int) -> str:
    text = (lib.functions["HcclGetErrorString"](code) if "HcclGetErrorString" in lib else None) or b"no text"
    return str(text.decode(errors="replace"))


STATUS = ccall.Codes(CODES, timeout=(9,), remote=(21,), explain=_explain)


def _version(functions: Mapping[str, Callable[..., Any]]) -> int:
    return 0  # HCCL does not report one; what it lacks is found by symbol


def load(path: str | os.PathLike[str] | None = None) -> Library:
    """The library at path, or the one that fcomm/backends/library.py finds; its symbols checked.

    Raises BackendUnavailableError if there is none, or it lacks a symbol that every version has.
    """
    handles, found = library.load(SEARCH, path)
    hint = f"use another version, or put {SEARCH.companion} beside it or on the system's library path"
    lib = ccall.bind("hccl", found, handles, SYMBOLS, STATUS, _version, hint)
    LOG.info("hccl: %s", found)
    return lib


# --- communicators ------------------------------------------------------------------------------------------------


def _make_id(lib: Library) -> bytes:
    root = RootInfo()
    lib.call("HcclGetRootInfo", ctypes.byref(root))
    return bytes(root)


def _connect(lib: Library, handle: c_void_p, size: int, uid: bytes, rank: int) -> None:
    root = RootInfo.from_buffer_copy(uid)
    if "HcclCommInitRootInfoConfig" in lib:
        options = ctypes.byref(config(deterministic=True))
        lib.call("HcclCommInitRootInfoConfig", size, ctypes.byref(root), rank, options, ctypes.byref(handle))
    else:
        lib.call("HcclCommInitRootInfo", size, ctypes.byref(root), rank, ctypes.byref(handle))


def _poll(lib: Library, handle: c_void_p) -> int:
    if "HcclGetCommAsyncError" not in lib:
        return 0
    code = c_int()
    lib.call("HcclGetCommAsyncError", handle, ctypes.byref(code))
    return code.value


def _finalize(lib: Library, handle: c_void_p, settle: Callable[[], None]) -> None:
    pass  # HCCL has no such call, nor an abort, only destroy


def _destroy(lib: Library, handle: c_void_p) -> None:
    # CANN documents that any thread may call this. A call that waits for links to its peers then ends with an error;
    # while another call is working, nothing is destroyed and the answer is "again".
    until, pause = time.monotonic() + _IN_USE_S, 1e-2
    while (code := lib.status("HcclCommDestroy", handle)) == _AGAIN and time.monotonic() < until:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    if code == _AGAIN:
        LOG.warning("hccl: a communicator is left, a call has been in progress on it for %s s", _IN_USE_S)
    ccall.check(lib, code, "HcclCommDestroy")


# --- natives ------------------------------------------------------------------------------------------------------


def _all_reduce(c: Comm, x: Tensor, y: Tensor, op: str) -> None:
    c.lib.call("HcclAllReduce", x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], OPS[op], c.handle, c.stream)


def _reduce(c: Comm, x: Tensor, y: Tensor, op: str, root: int) -> None:
    c.lib.call("HcclReduce", x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], OPS[op], root, c.handle, c.stream)


def _reduce_scatter(c: Comm, x: Tensor, y: Tensor, op: str) -> None:
    c.lib.call("HcclReduceScatter", x.data_ptr(), y.data_ptr(), y.numel(), DTYPES[x.dtype], OPS[op], c.handle, c.stream)


def _all_gather(c: Comm, x: Tensor, y: Tensor) -> None:
    c.lib.call("HcclAllGather", x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], c.handle, c.stream)


def _all_to_all(c: Comm, x: Tensor, y: Tensor) -> None:
    each, dtype = x.numel() // c.size, DTYPES[x.dtype]
    c.lib.call("HcclAlltoAll", x.data_ptr(), each, dtype, y.data_ptr(), each, dtype, c.handle, c.stream)


def _exchange(c: Comm, x: Tensor, sends: list[int], y: Tensor, recvs: list[int]) -> None:
    # A tensor without elements has no address, and HCCL refuses a null one.
    x, y = (t if t.numel() else t.new_empty(1) for t in (x, y))
    dtype = DTYPES[x.dtype]
    c.lib.call(
        *("HcclAlltoAllV", x.data_ptr(), *_blocks(sends), dtype, y.data_ptr(), *_blocks(recvs), dtype),
        *(c.handle, c.stream),
    )


def _blocks(counts: Sequence[int]) -> tuple[Any, Any]:
    """Counts and offsets of blocks that follow one another, for C."""
    numbers = c_uint64 * len(counts)
    return numbers(*counts), numbers(*accumulate(counts[:-1], initial=0))


def _all_gather_uneven(c: Comm, x: Tensor, y: Tensor, counts: list[int]) -> None:
    n = x.numel()
    x = x if n else x.new_empty(1)  # as above
    c.lib.call("HcclAllGatherV", x.data_ptr(), n, y.data_ptr(), *_blocks(counts), DTYPES[x.dtype], c.handle, c.stream)


def _reduce_scatter_uneven(c: Comm, x: Tensor, counts: list[int], y: Tensor, op: str) -> None:
    n = y.numel()
    y = y if n else y.new_empty(1)
    c.lib.call(
        *("HcclReduceScatterV", x.data_ptr(), *_blocks(counts), y.data_ptr(), n, DTYPES[x.dtype], OPS[op]),
        *(c.handle, c.stream),
    )


def _permute(c: Comm, x: Tensor, y: Tensor, dst: int | None, src: int | None) -> None:
    _together(c, {} if dst is None else {dst: x}, {} if src is None else {src: y})


def _together(c: Comm, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> None:
    """Sends and receives in one call: a separate HcclSend would wait for its peer before the next one starts."""
    if c.rank in sends and c.rank in recvs:
        recvs[c.rank].copy_(sends[c.rank])
    messages = [(0, r, x) for r, x in sends.items()] + [(1, r, y) for r, y in recvs.items()]
    items = [
        SendRecvItem(kind, t.data_ptr(), t.numel(), DTYPES[t.dtype], r)
        for kind, r, t in messages
        if r != c.rank and t.numel()
    ]
    if items:
        c.lib.call("HcclBatchSendRecv", (SendRecvItem * len(items))(*items), len(items), c.handle, c.stream)


def _broadcast(c: Comm, x: Tensor, y: Tensor, root: int) -> None:
    # In place: the one buffer is the source at the root and the destination elsewhere.
    if c.rank == root:
        y.copy_(x)
    c.lib.call("HcclBroadcast", y.data_ptr(), y.numel(), DTYPES[y.dtype], root, c.handle, c.stream)


def _gather(c: Comm, x: Tensor, rows: Tensor, root: int) -> None:
    _together(c, {root: x}, dict(enumerate(rows.split(x.numel()))) if c.rank == root else {})


def _scatter(c: Comm, rows: Tensor, y: Tensor, root: int) -> None:
    each = y.numel()
    if "HcclScatter" in c.lib:
        c.lib.call("HcclScatter", rows.data_ptr(), y.data_ptr(), each, DTYPES[y.dtype], root, c.handle, c.stream)
    else:
        _together(c, dict(enumerate(rows.split(each))) if c.rank == root else {}, {root: y})


def _send(c: Comm, x: Tensor, peer: int) -> None:
    c.lib.call("HcclSend", x.data_ptr(), x.numel(), DTYPES[x.dtype], peer, c.handle, c.stream)


def _recv(c: Comm, y: Tensor, peer: int) -> None:
    c.lib.call("HcclRecv", y.data_ptr(), y.numel(), DTYPES[y.dtype], peer, c.handle, c.stream)


def _barrier(c: Comm, flags: Tensor) -> None:
    if "HcclBarrier" in c.lib:
        c.lib.call("HcclBarrier", c.handle, c.stream)
    else:
        _all_reduce(c, flags[:1], flags[1:], "sum")


# --- backend ------------------------------------------------------------------------------------------------------


def _machine(name: str, get: Callable[[], Library]) -> Machine:
    return Machine(
        name=name,
        load=get,
        id_nbytes=ctypes.sizeof(RootInfo),
        make_id=_make_id,
        connect=_connect,
        poll=_poll,
        finalize=_finalize,
        destroy=_destroy,
        abort=_destroy,
        moves=MOVES,
        reductions=REDUCTIONS,
        all_reduce=_all_reduce,
        reduce=_reduce,
        reduce_scatter=_reduce_scatter,
        all_gather=_all_gather,
        all_to_all=_all_to_all,
        exchange=_exchange,
        permute=_permute,
        broadcast=_broadcast,
        gather=_gather,
        scatter=_scatter,
        send=_send,
        recv=_recv,
        barrier=_barrier,
        uneven={"all_gather": "HcclAllGatherV", "reduce_scatter": "HcclReduceScatterV"},
        uneven_refuses=(torch.int64,),  # on Atlas A2
        all_gather_uneven=_all_gather_uneven,
        reduce_scatter_uneven=_reduce_scatter_uneven,
    )


def open(library: str | os.PathLike[str] | None = None, device: str = "npu") -> Backend:
    """A backend on the HCCL at path `library`, or on the one that is found; the library is loaded now.

    device: the type of the tensors it takes; "npu" needs torch_npu. "cpu" is for libraries that work on host memory,
    such as the tests' doubles. A libhcomm.so beside the library, or else on the system's library path, is loaded with
    it. Called again with the same arguments, it returns the same backend. Every rank must pass the same path: it is
    part of the backend's name, by which graphs and ranks know it.
    Raises BackendUnavailableError if there is no such library, or its path is not safe (fcomm/backends/library.py).
    """
    lib = load(library)
    return hccl if library is None and device == "npu" else backend_on(lib, device, _machine)


def lowerings() -> dict[str, Lowering]:
    """The table of fcomm.hccl, which looks for its library at the first call."""
    return table(_machine("hccl", cache(load)))
