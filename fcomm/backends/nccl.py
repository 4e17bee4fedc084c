"""nccl: NVIDIA's library, 2.21 to 2.32, through its C interface; any library with the same symbols will do.

Values, sizes and versions are those of nccl.h as released; tests compare them with the vendor's own bindings.
Same order as hccl.py: declarations, library, communicators, natives, backend.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, Structure, c_byte, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fcomm.backends import ccall, library
from fcomm.backends.ccall import Library, Symbol
from fcomm.backends.lowering import backend_on, table
from fcomm.backends.machine import LOG, Comm, Machine
from fcomm.backends.vendors import nccl
from fcomm.errors import BackendUnavailableError
from fcomm.group import Backend, Lowering

# --- declarations -------------------------------------------------------------------------------------------------

OLDEST = 22100

# ncclResult_t
CODES = {
    0: "ncclSuccess",
    1: "ncclUnhandledCudaError",
    2: "ncclSystemError",
    3: "ncclInternalError",
    4: "ncclInvalidArgument",
    5: "ncclInvalidUsage",
    6: "ncclRemoteError",
    7: "ncclInProgress",
    8: "ncclTimeout",  # since 2.30.3
}

# ncclDataType_t
DTYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.uint32: 3,
    torch.int64: 4,
    torch.uint64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
    torch.float8_e4m3fn: 10,  # since 2.24.3
    torch.float8_e5m2: 11,  # since 2.24.3
}

# ncclRedOp_t; ncclAvg, 4, is not used: lowering.py says why
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3}

# dtype -> the dtype it moves as. These are not here, so they are moved as bytes: int16 and uint16, which have no name
# in NCCL, and float8, which has none before 2.24.
MOVES = {d: d for d in DTYPES if d not in (torch.float8_e4m3fn, torch.float8_e5m2)} | {
    torch.bool: torch.uint8,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}

_INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.uint32, torch.int64, torch.uint64)
_FLOATS = (torch.float32, torch.float64)
# op -> dtype -> (dtype NCCL reduces it as, op), where that means the same. These are not here, so they are composed:
# max and min of floats (fmaxf drops NaN, reduce_kernel.h), half types (rounded at every step), bit operations, int16
# and uint16.
REDUCTIONS: dict[str, dict[torch.dtype, tuple[torch.dtype, str]]] = {
    "sum": {
        **{d: (d, "sum") for d in _INTEGERS + _FLOATS},
        torch.complex64: (torch.float32, "sum"),
        torch.complex128: (torch.float64, "sum"),
        torch.bool: (torch.uint8, "max"),
    },
    "prod": {**{d: (d, "prod") for d in _INTEGERS + _FLOATS}, torch.bool: (torch.uint8, "min")},
    "max": {**{d: (d, "max") for d in _INTEGERS}, torch.bool: (torch.uint8, "max")},
    "min": {**{d: (d, "min") for d in _INTEGERS}, torch.bool: (torch.uint8, "min")},
    "bor": {torch.bool: (torch.uint8, "max")},
    "band": {torch.bool: (torch.uint8, "min")},
}


class UniqueId(Structure):
    """ncclUniqueId: opaque, and passed by value."""

    _fields_ = (("internal", c_byte * 128),)


class Config(Structure):
    """ncclConfig_t of 2.26.5: every supported library accepts it, since its version field says what is filled in."""

    _fields_ = (
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cgaClusterSize", c_int),
        ("minCTAs", c_int),
        ("maxCTAs", c_int),
        ("netName", c_char_p),
        ("splitShare", c_int),
        ("trafficClass", c_int),
    )


_UNSET = -(2**31)


def config(*, blocking: bool) -> Config:
    """The defaults, except whether calls wait."""
    return Config(ctypes.sizeof(Config), 0xCAFEBEEF, 22605, int(blocking), _UNSET, _UNSET, _UNSET, None, _UNSET, _UNSET)


_COMM, _STREAM, _BUFFER, _DTYPE, _OP, _RANK = c_void_p, c_void_p, c_void_p, c_int, c_int, c_int

SYMBOLS = {
    # --- the library
    # ncclResult_t ncclGetVersion(int* version)
    "ncclGetVersion": Symbol((POINTER(c_int),)),
    # const char* ncclGetErrorString(ncclResult_t result)
    "ncclGetErrorString": Symbol((c_int,), result=c_char_p),
    # const char* ncclGetLastError(ncclComm_t comm)
    "ncclGetLastError": Symbol((_COMM,), optional=True, result=c_char_p),
    # --- communicators
    # ncclResult_t ncclGetUniqueId(ncclUniqueId* uniqueId)
    "ncclGetUniqueId": Symbol((POINTER(UniqueId),)),
    # ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId commId, int rank)
    "ncclCommInitRank": Symbol((POINTER(_COMM), c_int, UniqueId, _RANK)),
    # ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int nranks, ncclUniqueId commId, int rank,
    #                                     ncclConfig_t* config)
    "ncclCommInitRankConfig": Symbol((POINTER(_COMM), c_int, UniqueId, _RANK, POINTER(Config)), optional=True),
    # ncclResult_t ncclCommFinalize(ncclComm_t comm)
    "ncclCommFinalize": Symbol((_COMM,), optional=True),
    # ncclResult_t ncclCommDestroy(ncclComm_t comm)
    "ncclCommDestroy": Symbol((_COMM,)),
    # ncclResult_t ncclCommAbort(ncclComm_t comm)
    "ncclCommAbort": Symbol((_COMM,)),
    # ncclResult_t ncclCommRevoke(ncclComm_t comm, int revokeFlags)
    "ncclCommRevoke": Symbol((_COMM, c_int), since=22807),
    # ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config)
    "ncclCommSplit": Symbol((_COMM, c_int, c_int, POINTER(_COMM), POINTER(Config)), optional=True),
    # ncclResult_t ncclCommShrink(ncclComm_t comm, int* excludeRanksList, int excludeRanksCount, ncclComm_t* newcomm,
    #                             ncclConfig_t* config, int shrinkFlags)
    "ncclCommShrink": Symbol((_COMM, POINTER(c_int), c_int, POINTER(_COMM), POINTER(Config), c_int), since=22703),
    # ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* asyncError)
    "ncclCommGetAsyncError": Symbol((_COMM, POINTER(c_int))),
    # ncclResult_t ncclCommCount(const ncclComm_t comm, int* count)
    "ncclCommCount": Symbol((_COMM, POINTER(c_int)), optional=True),
    # ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device)
    "ncclCommCuDevice": Symbol((_COMM, POINTER(c_int)), optional=True),
    # ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank)
    "ncclCommUserRank": Symbol((_COMM, POINTER(c_int)), optional=True),
    # --- memory that NCCL may use without a copy
    # ncclResult_t ncclMemAlloc(void** ptr, size_t size)
    "ncclMemAlloc": Symbol((POINTER(c_void_p), c_size_t), optional=True),
    # ncclResult_t ncclMemFree(void* ptr)
    "ncclMemFree": Symbol((c_void_p,), optional=True),
    # ncclResult_t ncclCommRegister(const ncclComm_t comm, void* buff, size_t size, void** handle)
    "ncclCommRegister": Symbol((_COMM, _BUFFER, c_size_t, POINTER(c_void_p)), optional=True),
    # ncclResult_t ncclCommDeregister(const ncclComm_t comm, void* handle)
    "ncclCommDeregister": Symbol((_COMM, c_void_p), optional=True),
    # --- reductions
    # ncclResult_t ncclAllReduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
    #                            ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
    "ncclAllReduce": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _OP, _COMM, _STREAM)),
    # ncclResult_t ncclReduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
    #                         ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream)
    "ncclReduce": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _OP, _RANK, _COMM, _STREAM)),
    # ncclResult_t ncclReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount, ncclDataType_t datatype,
    #                                ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
    "ncclReduceScatter": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _OP, _COMM, _STREAM)),
    # --- movement
    # ncclResult_t ncclAllGather(const void* sendbuff, void* recvbuff, size_t sendcount, ncclDataType_t datatype,
    #                            ncclComm_t comm, cudaStream_t stream)
    "ncclAllGather": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _COMM, _STREAM)),
    # ncclResult_t ncclAlltoAll(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
    #                           ncclComm_t comm, cudaStream_t stream)
    "ncclAlltoAll": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _COMM, _STREAM), since=22803),
    # ncclResult_t ncclSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
    #                       cudaStream_t stream)
    "ncclSend": Symbol((_BUFFER, c_size_t, _DTYPE, _RANK, _COMM, _STREAM)),
    # ncclResult_t ncclRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
    #                       cudaStream_t stream)
    "ncclRecv": Symbol((_BUFFER, c_size_t, _DTYPE, _RANK, _COMM, _STREAM)),
    # ncclResult_t ncclBroadcast(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype, int root,
    #                            ncclComm_t comm, cudaStream_t stream)
    "ncclBroadcast": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _RANK, _COMM, _STREAM)),
    # ncclResult_t ncclGather(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype, int root,
    #                         ncclComm_t comm, cudaStream_t stream)
    "ncclGather": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _RANK, _COMM, _STREAM), since=22803),
    # ncclResult_t ncclScatter(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype, int root,
    #                          ncclComm_t comm, cudaStream_t stream)
    "ncclScatter": Symbol((_BUFFER, _BUFFER, c_size_t, _DTYPE, _RANK, _COMM, _STREAM), since=22803),
    # --- groups of calls, which start together
    # ncclResult_t ncclGroupStart()
    "ncclGroupStart": Symbol(()),
    # ncclResult_t ncclGroupEnd()
    "ncclGroupEnd": Symbol(()),
}


# --- library ------------------------------------------------------------------------------------------------------

SEARCH = library.Search(
    soname="libnccl.so.2",
    variable="FCOMM_NCCL_LIB",
    packages=(("nvidia", "nccl/lib/libnccl.so.2"),),
    directories=(),
    hint="install nvidia-nccl-cu12 or nvidia-nccl-cu13 (a torch with CUDA brings it), or set FCOMM_NCCL_LIB",
)


def _explain(lib: Library, code: int) -> str:
    # The last error is this thread's and stays after a success: it is worth reading only right after a failure.
    text = lib.functions["ncclGetErrorString"](code) or b""
    last = (lib.functions["ncclGetLastError"](None) if "ncclGetLastError" in lib else None) or b""
    return f"{text.decode(errors='replace')} ({last.decode(errors='replace').strip()[:300]})"


STATUS = ccall.Codes(CODES, timeout=(8,), remote=(6,), explain=_explain, pending=(7,))


def _version(functions: Mapping[str, Callable[..., Any]]) -> int:
    number = c_int()
    status = functions["ncclGetVersion"](ctypes.byref(number))
    if status:
        raise BackendUnavailableError(f"nccl: ncclGetVersion returned {STATUS.name(status)} ({status})")
    return number.value


def load(path: str | os.PathLike[str] | None = None) -> Library:
    """The library at path, or the one that fcomm/backends/library.py finds; its symbols checked.

    Raises BackendUnavailableError if there is none, it is older than 2.21, or lacks a symbol of its version.
    """
    handles, found = library.load(SEARCH, path)
    lib = ccall.bind("nccl", found, handles, SYMBOLS, STATUS, _version)
    if lib.version < OLDEST:
        raise BackendUnavailableError(
            f"nccl: {found} has version {lib.version}, older than {OLDEST} (2.21.0); install a newer one"
        )
    LOG.info("nccl: version %d at %s", lib.version, found)
    return lib


# --- communicators ------------------------------------------------------------------------------------------------


def _make_id(lib: Library) -> bytes:
    uid = UniqueId()
    lib.call("ncclGetUniqueId", ctypes.byref(uid))
    return bytes(uid)


def _connect(lib: Library, handle: c_void_p, size: int, uid: bytes, rank: int) -> None:
    arguments = ctypes.byref(handle), size, UniqueId.from_buffer_copy(uid), rank
    if "ncclCommInitRankConfig" in lib:
        # Non-blocking: only such a communicator can be aborted while a call is in progress.
        lib.call("ncclCommInitRankConfig", *arguments, ctypes.byref(config(blocking=False)))
    else:
        lib.call("ncclCommInitRank", *arguments)


def _poll(lib: Library, handle: c_void_p) -> int:
    code = c_int()
    pending: int = lib.call("ncclCommGetAsyncError", handle, ctypes.byref(code))
    return pending or code.value


def _finalize(lib: Library, handle: c_void_p, settle: Callable[[], None]) -> None:
    if "ncclCommFinalize" in lib:
        lib.call("ncclCommFinalize", handle)
        settle()


def _destroy(lib: Library, handle: c_void_p) -> None:
    lib.call("ncclCommDestroy", handle)


def _abort(lib: Library, handle: c_void_p) -> None:
    lib.call("ncclCommAbort", handle)


# --- natives ------------------------------------------------------------------------------------------------------


def _all_reduce(c: Comm, x: Tensor, y: Tensor, op: str) -> None:
    c.lib.call("ncclAllReduce", x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], OPS[op], c.handle, c.stream)


def _reduce(c: Comm, x: Tensor, y: Tensor, op: str, root: int) -> None:
    c.lib.call("ncclReduce", x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], OPS[op], root, c.handle, c.stream)


def _reduce_scatter(c: Comm, x: Tensor, y: Tensor, op: str) -> None:
    c.lib.call("ncclReduceScatter", x.data_ptr(), y.data_ptr(), y.numel(), DTYPES[x.dtype], OPS[op], c.handle, c.stream)


def _all_gather(c: Comm, x: Tensor, y: Tensor) -> None:
    c.lib.call("ncclAllGather", x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], c.handle, c.stream)


def _all_to_all(c: Comm, x: Tensor, y: Tensor) -> None:
    each = x.numel() // c.size
    if "ncclAlltoAll" in c.lib:
        c.lib.call("ncclAlltoAll", x.data_ptr(), y.data_ptr(), each, DTYPES[x.dtype], c.handle, c.stream)
    else:
        _exchange(c, x, [each] * c.size, y, [each] * c.size)


def _exchange(c: Comm, x: Tensor, sends: list[int], y: Tensor, recvs: list[int]) -> None:
    blocks = list(zip(x.split(sends), y.split(recvs), strict=True))
    _together(c, {r: b[0] for r, b in enumerate(blocks)}, {r: b[1] for r, b in enumerate(blocks)})


def _permute(c: Comm, x: Tensor, y: Tensor, dst: int | None, src: int | None) -> None:
    _together(c, {} if dst is None else {dst: x}, {} if src is None else {src: y})


def _together(c: Comm, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> None:
    """Grouped sends and receives: outside a group each would wait for its peer before the next one starts."""
    if c.rank in sends and c.rank in recvs:
        recvs[c.rank].copy_(sends[c.rank])
    peers = [r for r in range(c.size) if r != c.rank]
    to = [r for r in peers if r in sends and sends[r].numel()]
    of = [r for r in peers if r in recvs and recvs[r].numel()]
    if not to and not of:
        return
    c.lib.call("ncclGroupStart")
    try:
        for r in to:
            _send(c, sends[r], r)
        for r in of:
            _recv(c, recvs[r], r)
    except BaseException:
        # The group belongs to this thread; left open, it would swallow the calls that follow.
        c.lib.status("ncclGroupEnd")
        raise
    c.lib.call("ncclGroupEnd")


def _broadcast(c: Comm, x: Tensor, y: Tensor, root: int) -> None:
    c.lib.call("ncclBroadcast", x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], root, c.handle, c.stream)


def _gather(c: Comm, x: Tensor, rows: Tensor, root: int) -> None:
    each = x.numel()
    if "ncclGather" in c.lib:
        c.lib.call("ncclGather", x.data_ptr(), rows.data_ptr(), each, DTYPES[x.dtype], root, c.handle, c.stream)
    else:
        _together(c, {root: x}, dict(enumerate(rows.split(each))) if c.rank == root else {})


def _scatter(c: Comm, rows: Tensor, y: Tensor, root: int) -> None:
    each = y.numel()
    if "ncclScatter" in c.lib:
        c.lib.call("ncclScatter", rows.data_ptr(), y.data_ptr(), each, DTYPES[y.dtype], root, c.handle, c.stream)
    else:
        _together(c, dict(enumerate(rows.split(each))) if c.rank == root else {}, {root: y})


def _send(c: Comm, x: Tensor, peer: int) -> None:
    c.lib.call("ncclSend", x.data_ptr(), x.numel(), DTYPES[x.dtype], peer, c.handle, c.stream)


def _recv(c: Comm, y: Tensor, peer: int) -> None:
    c.lib.call("ncclRecv", y.data_ptr(), y.numel(), DTYPES[y.dtype], peer, c.handle, c.stream)


def _barrier(c: Comm, flags: Tensor) -> None:
    # NCCL has no barrier; the stream gets past a sum of one element when all ranks have reached it.
    _all_reduce(c, flags[:1], flags[1:], "sum")


# --- backend ------------------------------------------------------------------------------------------------------


def _machine(name: str, get: Callable[[], Library]) -> Machine:
    return Machine(
        name=name,
        load=get,
        id_nbytes=ctypes.sizeof(UniqueId),
        make_id=_make_id,
        connect=_connect,
        poll=_poll,
        finalize=_finalize,
        destroy=_destroy,
        abort=_abort,
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
    )


def open(library: str | os.PathLike[str] | None = None, device: str = "cuda") -> Backend:
    """A backend on the NCCL at path `library`, or on the one that is found; the library is loaded now.

    device: the type of the tensors it takes. "cpu" is for libraries that work on host memory, such as the tests'
    doubles. Called again with the same arguments, it returns the same backend. Every rank must pass the same path: it
    is part of the backend's name, by which graphs and ranks know it.
    Raises BackendUnavailableError if there is no such library, or its path is not safe (fcomm/backends/library.py).
    """
    lib = load(library)
    return nccl if library is None and device == "cuda" else backend_on(lib, device, _machine)


def lowerings() -> dict[str, Lowering]:
    """The table of fcomm.nccl, which looks for its library at the first call."""
    return table(_machine("nccl", cache(load)))
