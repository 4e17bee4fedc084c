"""The C tables: values and layouts against the vendors' own bindings, errors for codes, paths before dlopen."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from doubles import build
from torch._subclasses.fake_tensor import FakeTensorMode
from vendors import DOUBLES, calls, control, module, plant

import fcomm
from fcomm.backends import ccall, hccl, library, nccl
from fcomm.errors import BackendPeerError, BackendTimeoutError

# --- against the vendors' own bindings ----------------------------------------------------------------------------


def test_nccl_values_are_the_vendors() -> None:
    vendor = import_module("nccl.bindings.nccl")
    counts = ("NumResults", "NumTypes", "NumOps", "MaxRedOp")
    assert {f"nccl{m.name}": m.value for m in vendor.Result if m.name not in counts} == {
        name: code for code, name in nccl.CODES.items()
    }
    names = {"float8_e4m3fn": "Float8e4m3", "float8_e5m2": "Float8e5m2"}
    ours = {str(d).removeprefix("torch."): code for d, code in nccl.DTYPES.items()}
    assert {names.get(n, n.capitalize()): c for n, c in ours.items()} == {
        m.name: m.value for m in vendor.DataType if m.name not in counts
    }
    assert {op.capitalize(): code for op, code in nccl.OPS.items()} == {
        m.name: m.value for m in vendor.RedOp if m.name not in (*counts, "Avg")
    }


def test_nccl_structures_are_the_vendors() -> None:
    vendor = import_module("nccl.bindings.nccl")
    assert ctypes.sizeof(nccl.UniqueId) == vendor.unique_id_dtype.itemsize == 128
    theirs = vendor.config_dtype.fields
    ours = {name: getattr(nccl.Config, name).offset for name, _ in nccl.Config._fields_}
    renamed = {
        "size": "size_", "cgaClusterSize": "cga_cluster_size", "minCTAs": "min_ctas", "maxCTAs": "max_ctas",
        "netName": "net_name", "splitShare": "split_share", "trafficClass": "traffic_class",
    }  # fmt: skip
    assert {renamed.get(name, name): offset for name, offset in ours.items()} == {
        renamed.get(name, name): theirs[renamed.get(name, name)][1] for name in ours
    }
    # Later versions added the fields after our last one.
    assert ctypes.sizeof(nccl.Config) == theirs["comm_name"][1] == 48


def test_hccl_values_are_the_vendors() -> None:
    vendor = import_module("pyhccl")

    def members(enum: type, prefix: str) -> dict[str, int]:
        names = (n for n in dir(enum) if n.startswith(prefix) and not n.endswith("RESERVED"))
        return {n: int(getattr(enum, n)) for n in names}

    assert members(vendor.HcclResult, "HCCL_") == {name: code for code, name in hccl.CODES.items()}
    spelled = {
        torch.float16: "FP16", torch.float32: "FP32", torch.float64: "FP64", torch.bfloat16: "BFP16",
        torch.float8_e4m3fn: "FP8E4M3", torch.float8_e5m2: "FP8E5M2", torch.float8_e8m0fnu: "FP8E8M0",
    }  # fmt: skip
    ours = {spelled.get(d, str(d).removeprefix("torch.").upper()): code for d, code in hccl.DTYPES.items()}
    theirs = members(vendor.HcclDataType, "HCCL_DATA_TYPE_")
    assert ours == {
        n.removeprefix("HCCL_DATA_TYPE_"): c for n, c in theirs.items() if not n.endswith(("INT128", "HIF8"))
    }
    assert {f"HCCL_REDUCE_{op.upper()}": code for op, code in hccl.OPS.items()} == members(
        vendor.HcclReduceOp, "HCCL_REDUCE_"
    )
    assert int(vendor.HcclSendRecvType.HCCL_SEND) == 0
    assert int(vendor.HcclSendRecvType.HCCL_RECV) == 1


def test_hccl_structures_are_the_vendors() -> None:
    vendor = import_module("pyhccl")
    assert ctypes.sizeof(hccl.RootInfo) == vendor.HCCL_ROOT_INFO_BYTES == 4108
    assert ctypes.sizeof(hccl.Config) == 300
    theirs = vendor.HcclCommConfig()
    vendor.HcclCommConfigInit(theirs)
    names = ("hcclBufferSize", "hcclOpExpansionMode", "hcclRdmaTrafficClass", "hcclRdmaServiceLevel")
    for value, name in enumerate(names, 0x11223344):
        setattr(theirs, name, value)
    theirs.hcclDeterministic, theirs.hcclCommName, theirs.hcclUdi = 1, "a name", "an id"
    # pybind11 keeps the address of the C structure behind an object's header.
    address = ctypes.c_void_p.from_address(id(theirs) + 16).value
    assert address is not None
    ours = hccl.Config.from_address(address)
    assert [getattr(ours, name) for name in names] == [0x11223344 + i for i in range(4)]
    assert (ours.hcclDeterministic, ours.hcclCommName, ours.hcclUdi) == (1, b"a name", b"an id")
    assert (ours.magic, ours.reserved) == (0xF0F0F0F0, 0)


def test_hccl_item_is_the_vendors() -> None:
    vendor = import_module("pyhccl")
    theirs = vendor.HcclSendRecvItem()
    theirs.sendRecvType = vendor.HcclSendRecvType.HCCL_RECV
    theirs.count, theirs.dataType, theirs.remoteRank = 2**40, vendor.HcclDataType.HCCL_DATA_TYPE_BFP16, 7
    address = ctypes.c_void_p.from_address(id(theirs) + 16).value
    assert address is not None
    ours = hccl.SendRecvItem.from_address(address)
    assert (ours.kind, ours.count, ours.dtype, ours.peer, ctypes.sizeof(ours)) == (1, 2**40, 11, 7, 32)


def test_defaults_are_the_vendors() -> None:
    vendor = import_module("pyhccl")
    theirs = vendor.HcclCommConfig()
    vendor.HcclCommConfigInit(theirs)
    ours = hccl.config(deterministic=False)
    ours.hcclDeterministic = 0xFFFFFFFF
    address = ctypes.c_void_p.from_address(id(theirs) + 16).value
    assert address is not None
    assert bytes(ours)[24:] == ctypes.string_at(address, 300)[24:]


# --- status codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", ["nccl", "hccl"])
def test_every_code_is_an_error_that_names_it(double: str) -> None:
    vendor = module(double)
    lib = vendor.load(build.path(DOUBLES[double]))
    first = "ncclGetUniqueId" if double == "nccl" else "HcclGetRootInfo"
    for code, name in vendor.CODES.items():
        if code in (0, *lib.codes.pending):
            continue
        plant(double, first, 1, code)
        with pytest.raises(fcomm.BackendError, match=rf"{first} returned {name} \({code}\): \w") as caught:
            vendor._make_id(lib)
        assert (caught.value.code, caught.value.code_name) == (code, name)
        assert isinstance(caught.value, fcomm.CollectiveTimeoutError) == (code in lib.codes.timeout)
        assert isinstance(caught.value, fcomm.PeerDiedError) == (code in lib.codes.remote)


def test_timeouts_and_lost_peers_are_what_python_calls_them() -> None:
    assert isinstance(ccall.error_of(nccl.STATUS, 8, ""), BackendTimeoutError | TimeoutError)
    assert isinstance(ccall.error_of(nccl.STATUS, 6, ""), BackendPeerError | ConnectionError)
    assert ccall.error_of(hccl.STATUS, 9, "").code_name == "HCCL_E_TIMEOUT"
    assert type(ccall.error_of(hccl.STATUS, 4711, "")) is fcomm.BackendError
    assert ccall.error_of(hccl.STATUS, 4711, "").code_name == "unknown code 4711"


def test_the_text_of_an_old_failure_is_not_shown_for_a_success() -> None:
    lib = nccl.load(build.path(DOUBLES["nccl"]))
    assert lib.status("ncclAllReduce", None, None, 1, 7, 0, None, None) == 4
    assert lib.call("ncclGroupStart") == 0
    assert lib.call("ncclGroupEnd") == 0
    with pytest.raises(fcomm.BackendError, match="comm argument is NULL"):
        lib.call("ncclAllReduce", None, None, 1, 7, 0, None, None)


# --- symbols ------------------------------------------------------------------------------------------------------


def test_what_an_old_version_lacks_is_named() -> None:
    lib = nccl.load(build.path(DOUBLES["nccl-2.21"]))
    assert lib.version == 22105
    for symbol in ("ncclAlltoAll", "ncclGather", "ncclScatter", "ncclCommShrink", "ncclCommRevoke"):
        assert symbol not in lib
        with pytest.raises(fcomm.BackendUnavailableError, match=f"has no {symbol}; {symbol} exists since version 2"):
            lib.call(symbol)


def test_a_missing_symbol_is_named_with_the_path() -> None:
    here = ctypes.CDLL(None)
    with pytest.raises(
        fcomm.BackendUnavailableError, match=r"no ncclGetVersion, ncclGetErrorString.*use another version"
    ):
        ccall.bind("nccl", "/nowhere", [here], nccl.SYMBOLS, nccl.STATUS, nccl._version)
    with pytest.raises(fcomm.BackendUnavailableError, match="HcclGetRootInfo, HcclCommInitRootInfo, HcclCommDestroy"):
        ccall.bind("hccl", "/nowhere", [here], hccl.SYMBOLS, hccl.STATUS, hccl._version)


def test_a_version_that_claims_more_than_it_has_still_opens() -> None:
    """A symbol counts only if the library has it and its version should."""
    handle = ctypes.CDLL(build.path(DOUBLES["nccl-2.21"]))
    newest = ccall.bind("nccl", "here", [handle], nccl.SYMBOLS, nccl.STATUS, lambda functions: 23203)
    assert "ncclAlltoAll" not in newest
    handle = ctypes.CDLL(build.path(DOUBLES["nccl"]))
    oldest = ccall.bind("nccl", "here", [handle], nccl.SYMBOLS, nccl.STATUS, lambda functions: 22105)
    assert "ncclAlltoAll" not in oldest


def test_a_version_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "OLDEST", 22200)
    with pytest.raises(fcomm.BackendUnavailableError, match=r"has version 22105, older than 22200"):
        nccl.load(build.path(DOUBLES["nccl-2.21"]))


def test_a_version_that_cannot_be_asked_is_refused() -> None:
    plant("nccl", "ncclGetVersion", 1, 3)
    with pytest.raises(fcomm.BackendUnavailableError, match=r"ncclGetVersion returned ncclInternalError \(3\)"):
        nccl.load(build.path(DOUBLES["nccl"]))


@pytest.mark.parametrize("double", ["hccl", "hccl-split"])
def test_each_hccl_symbol_is_found_in_the_part_that_has_it(double: str) -> None:
    lib = hccl.load(build.path(DOUBLES[double]))
    assert set(lib.functions) == set(hccl.SYMBOLS)


def test_the_parts_of_hccl_are_found_on_the_system_s_path(tmp_path: Path) -> None:
    for part in ("libhccl.so", "libhcomm.so"):
        (tmp_path / part[:-3]).mkdir()
        shutil.copy(build.path(f"hccl-split/{part}"), tmp_path / part[:-3])
    alone = tmp_path / "libhccl" / "libhccl.so"
    with pytest.raises(fcomm.BackendUnavailableError, match=r"no HcclGetRootInfo, .*, or put libhcomm\.so beside it"):
        hccl.load(alone)
    code = "from fcomm.backends import hccl; assert set(hccl.load().functions) == set(hccl.SYMBOLS)"
    found = {"LD_LIBRARY_PATH": f"{alone.parent}:{tmp_path / 'libhcomm'}"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | found, check=True)


def test_the_symbols_that_no_collective_uses_work_too() -> None:
    """One rank, straight through the tables: what test_nccl.py and test_hccl.py do not call."""
    lib = nccl.load(build.path(DOUBLES["nccl"]))
    comm, part, other = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    uid = nccl.UniqueId.from_buffer_copy(nccl._make_id(lib))
    lib.call("ncclCommInitRank", ctypes.byref(comm), 1, uid, 0)
    number = ctypes.c_int(-1)
    for symbol, expected in (("ncclCommCount", 1), ("ncclCommUserRank", 0), ("ncclCommCuDevice", 0)):
        lib.call(symbol, comm, ctypes.byref(number))
        assert number.value == expected
    lib.call("ncclCommSplit", comm, 0, 0, ctypes.byref(part), None)
    options = nccl.config(blocking=True)
    lib.call("ncclCommSplit", comm, -1, 0, ctypes.byref(other), ctypes.byref(options))
    assert part.value
    assert not other.value
    with pytest.raises(fcomm.BackendError, match="exclude, count"):
        lib.call("ncclCommShrink", comm, (ctypes.c_int * 1)(0), 0, ctypes.byref(other), None, 0)
    memory, handle = ctypes.c_void_p(), ctypes.c_void_p()
    lib.call("ncclMemAlloc", ctypes.byref(memory), 64)
    lib.call("ncclCommRegister", comm, memory, 64, ctypes.byref(handle))
    lib.call("ncclCommDeregister", comm, handle)
    lib.call("ncclMemFree", memory)
    lib.call("ncclCommRevoke", part, 0)
    with pytest.raises(fcomm.BackendError, match="revoked"):
        lib.call("ncclCommFinalize", part)
    lib.call("ncclCommDestroy", part)
    lib.call("ncclCommDestroy", comm)

    lib = hccl.load(build.path(DOUBLES["hccl"]))
    comm = ctypes.c_void_p()
    root = hccl.RootInfo.from_buffer_copy(hccl._make_id(lib))
    lib.call("HcclCommInitRootInfo", 1, ctypes.byref(root), 0, ctypes.byref(comm))
    unsigned = ctypes.c_uint32(9)
    for symbol, expected in (("HcclGetRankSize", 1), ("HcclGetRankId", 0)):
        lib.call(symbol, comm, ctypes.byref(unsigned))
        assert unsigned.value == expected
    name = (ctypes.c_char * 128)()
    lib.call("HcclGetCommName", comm, name)
    assert name.value == b"hccl_world"
    lib.call("HcclSetConfig", 0, hccl.ConfigValue(1))
    value = hccl.ConfigValue(0)
    lib.call("HcclGetConfig", 0, ctypes.byref(value))
    assert value.value == 1
    lib.call("HcclCommSuspend", comm)
    x, y = torch.arange(4.0), torch.zeros(4)
    one, zero = (ctypes.c_uint64 * 1)(4), (ctypes.c_uint64 * 1)(0)
    stream = ctypes.create_string_buffer(8)
    end = comm, ctypes.addressof(stream)
    arguments = {
        "HcclAllGatherV": (x.data_ptr(), 4, y.data_ptr(), one, zero, 4, *end),
        "HcclReduceScatterV": (x.data_ptr(), one, zero, y.data_ptr(), 4, 4, 0, *end),
        "HcclAlltoAllVC": (x.data_ptr(), one, 4, y.data_ptr(), 4, *end),
    }
    with pytest.raises(fcomm.BackendError, match=r"HCCL_E_SUSPENDING"):
        lib.call("HcclAllGatherV", *arguments["HcclAllGatherV"])
    lib.call("HcclCommResume", comm)
    for symbol, args in arguments.items():
        y.zero_()
        lib.call(symbol, *args)
        assert torch.equal(x, y), symbol
    lib.call("HcclCommDestroy", comm)
    assert control("nccl").double_live() == control("hccl").double_live() == 0
    assert calls("nccl", "ncclCommSplit") == 2


# --- finding the library ------------------------------------------------------------------------------------------


def _hostile(tmp_path: Path) -> dict[str, tuple[str, str]]:
    good = Path(shutil.copy(build.path(DOUBLES["nccl"]), tmp_path / "good.so"))
    good.chmod(0o755)
    open_to_all = Path(shutil.copy(good, tmp_path / "open.so"))
    open_to_all.chmod(0o777)
    link = tmp_path / "link.so"
    link.symlink_to(open_to_all)
    others = tmp_path / "others"
    others.mkdir()
    others.chmod(0o777)
    inside = shutil.copy(good, others / "lib.so")
    return {
        "relative": ("libnccl.so.2", "is relative"),
        "link to what others may write": (str(link), "others may write"),
        "in a directory that others may write": (str(inside), "others may write"),
        "a directory": (str(tmp_path), "not a regular file"),
        "a line break": (str(good) + "\n", "control characters"),
        "a NUL": (str(good) + "\0", "control characters"),
        "empty": ("", "empty"),
        "missing": (str(tmp_path / "none.so"), "cannot be read"),
    }


@pytest.mark.parametrize("vendor", [nccl, hccl])
def test_hostile_paths_are_refused_before_dlopen(
    vendor: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = _hostile(tmp_path)
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kw: loaded.append(args[0]))
    monkeypatch.setattr(library, "_is_privileged", lambda: False)
    for path, text in hostile.values():
        with pytest.raises(fcomm.BackendUnavailableError, match=text):
            vendor.open(library=path, device="cpu")  # type: ignore[attr-defined]
        if path and "\0" not in path:
            monkeypatch.setenv(vendor.SEARCH.variable, path)  # type: ignore[attr-defined]
            with pytest.raises(fcomm.BackendUnavailableError, match=text):
                vendor.open(device="cpu")  # type: ignore[attr-defined]
    assert not loaded


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_refused(tmp_path: Path) -> None:
    path = shutil.copy(build.path(DOUBLES["nccl"]), tmp_path / "lib.so")
    os.chown(path, 12345, 12345)
    with pytest.raises(fcomm.BackendUnavailableError, match="belongs to user 12345"):
        nccl.open(library=path, device="cpu")


def test_a_variable_is_ignored_in_a_privileged_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCOMM_NCCL_LIB", build.path(DOUBLES["nccl"]))
    monkeypatch.setattr(library, "_is_privileged", lambda: True)
    with pytest.raises(fcomm.BackendUnavailableError, match="FCOMM_NCCL_LIB is ignored in a privileged process"):
        library.find(nccl.SEARCH)


def test_a_library_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("not ELF")
    path.chmod(0o600)
    with pytest.raises(fcomm.BackendUnavailableError, match=r"cannot load .*text\.so.*FCOMM_NCCL_LIB"):
        nccl.open(library=path, device="cpu")


def test_the_order_in_which_a_library_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "vendor_wheel"
    (package / "lib").mkdir(parents=True)
    (package / "lib" / "libodd.so.1").write_text("")
    directory = tmp_path / "installed"
    directory.mkdir()
    (directory / "libodd.so.1").write_text("")
    monkeypatch.setenv("ODD_HOME", str(directory))
    monkeypatch.syspath_prepend(str(tmp_path))
    search = library.Search("libodd.so.1", "ODD_LIB", (), ("$ODD_UNSET/lib", "relative", "$ODD_HOME"), "get it")
    assert library.find(search) == str(directory / "libodd.so.1")
    wheel = library.Search("libodd.so.1", "ODD_LIB", (("vendor_wheel", "lib/libodd.so.1"),), ("$ODD_HOME",), "get it")
    assert library.find(wheel) == str(package / "lib" / "libodd.so.1")
    # A copy in the process takes precedence over both, a variable over that, an argument over everything.
    monkeypatch.setattr(library, "_loaded", lambda soname: "/loaded")
    assert library.find(wheel) == "/loaded"
    monkeypatch.setenv("ODD_LIB", build.path(DOUBLES["nccl"]))
    assert library.find(wheel) == build.path(DOUBLES["nccl"])
    assert library.find(wheel, build.path(DOUBLES["hccl"])) == build.path(DOUBLES["hccl"])
    nowhere = library.Search("libnowhere-fcomm.so", "NOWHERE_LIB", (), ("/nowhere",), "get it")
    monkeypatch.setattr(library, "_loaded", lambda soname: None)
    with pytest.raises(fcomm.BackendUnavailableError, match=r"looked in NOWHERE_LIB \(unset\), /nowhere, .*get it"):
        library.load(nowhere)


def test_a_loaded_copy_is_found() -> None:
    control("nccl")
    found = library._loaded("libnccl.so.2")
    if torch.version.cuda is None:
        assert found in {build.path(DOUBLES[d]) for d in ("nccl", "nccl-2.21")}
    else:  # torch has already loaded its own
        assert found is not None
        assert Path(found).name == "libnccl.so.2"
    assert library._loaded("libnowhere-fcomm.so.1") is None


# --- handles ------------------------------------------------------------------------------------------------------


def test_the_same_library_is_the_same_backend() -> None:
    path = build.path(DOUBLES["nccl"])
    assert nccl.open(library=path, device="cpu") is nccl.open(library=Path(path), device="cpu")
    assert nccl.open(library=path, device="cpu").devices == ("cpu",)
    assert nccl.open(library=path, device="cpu") is not nccl.open(library=path, device="cuda")
    assert (fcomm.nccl.name, fcomm.nccl.devices) == ("nccl", ("cuda",))
    assert (fcomm.hccl.name, fcomm.hccl.devices) == ("hccl", ("npu",))


def test_a_tensor_of_another_device_is_refused() -> None:
    world = fcomm.init(name="alone")
    try:
        with pytest.raises(fcomm.FcommError, match="x is on device 'cpu', but backend 'nccl' takes cuda"):
            fcomm.all_reduce(torch.ones(1), world, fcomm.nccl)
        with FakeTensorMode():
            assert fcomm.barrier(world, fcomm.nccl).device.type == "cuda"  # it makes its tensor where it is accepted
        # One rank needs no library.
        assert fcomm.all_reduce(torch.ones(1), world, nccl.open(build.path(DOUBLES["nccl"]), "cpu")).item() == 1
    finally:
        fcomm.close(world)
