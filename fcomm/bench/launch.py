"""The ranks of a benchmark: fcomm.run, mpirun if MPI takes part, or the launcher that started this process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fcomm
from fcomm.bench.measure import on_this_rank
from fcomm.bench.plan import Plan, Row
from fcomm.bootstrap import launcher_place


def launched() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return launcher_place(os.environ) is not None


def why_no_mpi() -> str | None:
    """What is missing for --vs mpi, or None."""
    if importlib.util.find_spec("mpi4py") is None:
        return 'mpi4py is not installed; pip install "fcomm[bench]"'
    if not launched() and shutil.which("mpirun") is None:
        return "there is no mpirun; install Open MPI or MPICH (Debian: apt install openmpi-bin libopenmpi-dev)"
    return None


def collect(plan: Plan) -> list[Row]:
    """Measure the plan on its ranks."""
    if launched():
        torch.set_num_threads(1)
        return on_this_rank(fcomm.init(timeout_s=plan.timeout_s), plan)
    if "mpi" in plan.rivals:
        return _under_mpirun(plan)
    return fcomm.run(on_this_rank, plan.ranks, plan, timeout_s=plan.timeout_s)[0]


def _under_mpirun(plan: Plan) -> list[Row]:
    """MPI starts its own ranks; fcomm.init then reads its environment, and all contestants share the processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Containers run as root, which Open MPI wants confirmed twice.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    placement = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    with tempfile.TemporaryDirectory(prefix="fcomm-bench-") as folder:
        out = Path(folder) / "rows.json"
        rank = [sys.executable, "-m", "fcomm.bench.launch", json.dumps(asdict(plan)), str(out)]
        command = ["mpirun", "-n", str(plan.ranks), *placement, *rank]
        process = subprocess.Popen(command, env={**os.environ, **environment})
        try:
            status = process.wait(plan.timeout_s)
        except BaseException as error:
            # mpirun ends its ranks when it is terminated; if killed, it would leave them.
            process.terminate()
            process.wait(10)
            if isinstance(error, subprocess.TimeoutExpired):
                raise fcomm.CollectiveTimeoutError(f"bench: mpirun did not end within {plan.timeout_s} s") from error
            raise
        if status:
            raise fcomm.FcommError(f"bench: mpirun ended with status {status}; its ranks' own errors are above")
        return [Row(**row) for row in json.loads(out.read_text())]


def plan_from_json(text: str) -> Plan:
    """The inverse of json.dumps(asdict(plan)): lists become tuples again."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
    return Plan(**fields)


def _main() -> None:
    plan, out = plan_from_json(sys.argv[1]), Path(sys.argv[2])
    rows = collect(plan)
    if fcomm.init().rank == 0:
        out.write_text(json.dumps([asdict(row) for row in rows]))
    fcomm.close()


if __name__ == "__main__":
    _main()
