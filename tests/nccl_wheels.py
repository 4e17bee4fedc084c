"""NVIDIA's own libnccl of several versions through our tables: python tests/nccl_wheels.py CACHE, or make nccl-wheels.

Downloads the wheels into CACHE (190 to 350 MB each) and needs no GPU: it checks what a library does without one. Exits
non-zero if anything is wrong.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

WHEELS = {
    "nvidia-nccl-cu12==2.21.5": 22105,
    "nvidia-nccl-cu12==2.27.7": 22707,
    "nvidia-nccl-cu12==2.29.7": 22907,
    "nvidia-nccl-cu13==2.32.3": 23203,
}
INSIDE = "nvidia/nccl/lib/libnccl.so.2"


def fetch(wheel: str, cache: Path) -> Path:
    to = cache / wheel.replace("==", "-")
    found = to / "libnccl.so.2"
    if not found.exists():
        to.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(to), wheel], check=True)
        (archive,) = to.glob("*.whl")
        with zipfile.ZipFile(archive) as files, files.open(INSIDE) as source:
            found.write_bytes(source.read())
        archive.unlink()
        found.chmod(0o755)
    return found


def raised(kind: type[Exception], fn: Any, *args: object) -> Any:
    try:
        fn(*args)
    except kind as error:
        return error
    raise AssertionError(f"{args} raised no {kind.__name__}")


def examine(path: str, expected: int) -> None:
    """Run in a separate process: two copies of NCCL in one process do not know of each other."""
    from fcomm.backends import nccl
    from fcomm.errors import BackendError, BackendUnavailableError

    start = time.monotonic()
    lib = nccl.load(path)
    loaded_ms = 1e3 * (time.monotonic() - start)
    assert lib.version == expected, f"version {lib.version}, not {expected}"
    missing = sorted(set(nccl.SYMBOLS) - set(lib.functions))
    late = sorted(s for s, row in nccl.SYMBOLS.items() if row.since > lib.version)
    assert missing == late, f"missing {missing}, by the table's versions {late}"
    for symbol in missing:
        assert symbol in str(raised(BackendUnavailableError, lib.call, symbol))
    start = time.monotonic()
    uid = nccl._make_id(lib)
    id_ms = 1e3 * (time.monotonic() - start)
    assert len(uid) == 128, len(uid)
    assert any(uid), "an id of zeros"
    texts = {code: lib.functions["ncclGetErrorString"](code).decode() for code in nccl.CODES}
    assert texts[0] == "no error", texts
    known = [code for code, text in texts.items() if "unknown" not in text.lower()]
    assert known == [code for code in nccl.CODES if code < 8 or lib.version >= 23003], texts

    assert lib.status("ncclAllReduce", None, None, 1, 7, 0, None, None) == 4
    assert lib.status("ncclSend", None, 1, 7, 0, None, None) == 4
    assert lib.status("ncclGroupEnd") == 5, "a group that was not started"
    assert lib.status("ncclCommDestroy", None) == lib.status("ncclCommAbort", None) == 0
    refused = raised(BackendError, lib.call, "ncclAllGather", None, None, 1, 7, None, None)
    assert (refused.code, refused.code_name) == (4, "ncclInvalidArgument"), refused
    handle = ctypes.c_void_p()
    try:
        nccl._connect(lib, handle, 1, uid, 0)
        opened = "opened (there is a GPU)"
    except BackendError as error:
        opened = f"{error.code_name}"
    print(f"  version {lib.version}: loaded in {loaded_ms:.0f} ms, unique id in {id_ms:.1f} ms, open: {opened}")
    print(f"  missing: {', '.join(missing) or 'nothing'}")
    print(f"  {str(refused)[:160]}")


def main() -> None:
    if sys.argv[1] == "--examine":
        return examine(sys.argv[2], int(sys.argv[3]))
    failed = []
    for wheel, expected in WHEELS.items():
        path = fetch(wheel, Path(sys.argv[1]).expanduser())
        print(f"{wheel} ({path.stat().st_size / 2**20:.0f} MB)", flush=True)
        if subprocess.run([sys.executable, __file__, "--examine", str(path), str(expected)], check=False).returncode:
            failed.append(wheel)
    print("failed: " + ", ".join(failed) if failed else f"all {len(WHEELS)} are as the table says")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
