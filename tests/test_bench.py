"""The benchmark: it prints nccl-tests' lines, checks its results, and compares the same work."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fcomm
from fcomm.bench import compiled, launch, report, standard
from fcomm.bench.cli import main, nbytes
from fcomm.bench.plan import Row, measurable
from fcomm.bench.programs import build, count_wrong
from fcomm.registration import RECORDS

# size count type redop root, then time algbw busbw #wrong, and N/A for in-place calls.
LINE = re.compile(r"^ +(\d+) +(\d+) +(\w+) +(\w+) +(-?\d+)((?: +[\d.e+-]+){3}) +(\d+)(?: +N/A){4}$")


def _bench(folder, *arguments):
    command = [sys.executable, "-m", "fcomm", "bench", "--rounds", "3", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def _lines(text):
    return [found.groups() for line in text.splitlines() if (found := LINE.match(line))]


def test_table_files_and_comparison(tmp_path):
    names = ["all_reduce", "all_gather", "broadcast", "scan", "send", "ragged_all_to_all"]
    files = ["--json", "out.json", "--csv", "out.csv"]
    done = _bench(
        tmp_path, *names, "-b", "8", "-e", "4K", "-f", "512", "--vs", "c10d", "--vs", "funcol", "--limit", *files
    )
    assert done.returncode == 0, done.stderr
    lines = _lines(done.stdout)
    assert [int(line[0]) for line in lines] == [8, 4096] * len(names)
    assert all(line[6] == "0" for line in lines)
    head = ["size", "count", "type", "redop", "root", *["time", "algbw", "busbw", "#wrong"] * 2]
    assert [line.split()[1:] for line in done.stdout.splitlines() if "size" in line.split()[1:2]].count(head) == len(
        names
    )
    assert done.stdout.count("# Avg bus bandwidth    : ") == len(names)
    assert "c10d has no scan" in done.stdout

    document = json.loads((tmp_path / "out.json").read_text())
    assert document["out_of_bounds"] == {"count": 0, "okay": "true"}
    first = document["results"][0]
    assert (first["size"], first["count"], first["type"], first["redop"], first["root"]) == (8, 2, "float", "sum", "-1")
    assert set(first["out_of_place"]) == {"time", "alg_bw", "bus_bw", "nwrong"}
    assert set(first["ratios"]) == {"c10d", "funcol", "copy", "add"}
    # All contestants did the same work: rivals are checked too.
    assert all(wrong == 0 for result in document["results"] for wrong in result["wrong"].values())
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert {row["contestant"] for row in rows} == {"fcomm.cpu", "c10d", "funcol", "copy", "add"}


def test_a_wrong_result_is_counted_and_fails(tmp_path):
    done = _bench(tmp_path, "doubled", "--import", "doubled", "-b", "64", "-e", "64")
    assert done.returncode == 1
    (line,) = _lines(done.stdout)
    # Of 16 elements on each of 2 ranks, all except the zeros are wrong, before and after the rounds.
    assert 32 < int(line[6]) <= 64
    assert re.search(r"# Out of bounds values : \d+ FAILED", done.stdout)


@pytest.mark.skipif(launch.why_no_mpi() is not None, reason=f"no comparison with MPI: {launch.why_no_mpi()}")
@pytest.mark.long
def test_mpi_in_the_same_processes(tmp_path):
    done = _bench(tmp_path, "all_reduce", "-b", "64", "-e", "64", "--vs", "mpi", "--vs", "c10d", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(result["times_us"]) == {"fcomm.cpu", "mpi", "c10d"}
    assert set(result["wrong"].values()) == {0}


@pytest.mark.long
def test_compiled(tmp_path):
    done = _bench(tmp_path, "all_reduce", "-b", "8", "-e", "8", "--compiled", "--vs", "funcol", "-o", "prod")
    assert done.returncode == 0, done.stderr
    assert len(_lines(done.stdout)) == 1
    assert "in x + x" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["all_reduc"], "collective 'all_reduc' is unknown; did you mean all_reduce?"),
        (["--bakend", "cpu"], "unrecognized arguments: --bakend; did you mean --backend?"),
        (["--backend", "sim"], "sim has no machine to measure"),
        (["--backend", "nccl"], "choose one of: c10d cpu"),
        (["--vs", "gloo"], "--vs 'gloo' is unknown"),
        (["-d", "floot"], "did you mean float?"),
        (["-b", "1X"], "'1X' is not a size; write bytes, or 64K, 16M, 1G"),
        (["-b", "2K", "-e", "1K"], "there is no size to measure"),
        (["-r", "2", "broadcast"], "-r 2 is not a rank of 2; choose 0 .. 1"),
        (["-o", "band"], "op 'band' is defined on integers and bool"),
        (["recv"], "it is measured with send"),
        (["pvary"], "its record states no bus traffic"),
        (["all_gather", "--compiled"], "all_gather changes the shape of x"),
        (["--rounds", "0"], "'0' is not a positive whole number"),
    ],
)
def test_wrong_command_lines_say_what_to_do(arguments, expected, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [name for name in measurable() if name not in ("send", "ragged_all_to_all")])
def test_programs_count_as_nccl_tests_does(name, size):
    """send and ragged_all_to_all have arguments that differ by rank: they are measured only in processes."""
    group = fcomm.axis("bench", size)
    program = build(name, 4 * 24, torch.float32, "sum", size - 1, group, fcomm.sim)
    y = fcomm.simulate(program.call, group)(program.x.expand(size, -1))
    assert y.shape[1:] == program.expected.shape
    # nccl-tests' size is the larger one of input and output.
    assert max(program.x.numel(), program.expected.numel()) == program.count == 24


def test_every_record_with_traffic_is_measurable():
    assert set(measurable()) == {name for name, record in RECORDS.items() if record.busbw} - {"recv"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool, torch.complex64])
def test_count_wrong(dtype):
    expected = torch.tensor([0, 1, 1, 0]).to(dtype)
    assert count_wrong(expected.clone(), expected) == 0
    assert count_wrong(torch.tensor([0, 1, 0, 1]).to(dtype), expected) == 2
    assert count_wrong(expected[:3], expected) == 4
    if dtype.is_floating_point:
        assert count_wrong(torch.full_like(expected, torch.nan), expected) == 4


TIMES = {"fcomm.cpu": [1.0, 2.0, 4.0], "c10d": [8.0, 10.0, 12.0]}
ROW = Row("all_reduce", 1000, 250, "float", "sum", -1, 2, "fcomm.cpu", TIMES, {"fcomm.cpu": 0, "c10d": 0})


def test_figures_are_medians_of_rounds():
    assert ROW.time_us("c10d") == 10.0
    assert ROW.ratio("c10d") == 5.0  # the median of 8, 5, 3
    assert ROW.bandwidth("fcomm.cpu") == (0.5, 0.5)
    assert compiled.marginal({"a": [32.0, 48.0], "a/without": [16.0, 16.0], "add": [1.0, 2.0]}) == {
        "a": [1.0, 2.0],
        "add": [1.0, 2.0],
    }


def test_targets_are_judged_on_the_measured_side():
    at_least = standard.Target("gloo / ours", 5.0, lambda results: [4.0, 5.5, 6.0])
    at_most = standard.Target("ours / copy", 1.3, lambda results: [1.0, 1.4, 2.0], at_least=False)
    absent = standard.Target("MPI / ours", 2.0, lambda results: [])
    table = standard.verdicts([at_least, at_most, absent], {})
    assert [line.split("|")[-2].strip() for line in table[2:]] == ["yes", "**no**", "no"]
    names = {target.what for target in standard.targets()}
    assert len(names) == len(standard.targets())


def test_numbers():
    assert [nbytes(text) for text in ("8", "64K", "16M", "1G", "1.5k", "2MiB")] == [8, 2**16, 2**24, 2**30, 1536, 2**21]
    assert [report.fixed(value, 7) for value in (1.234, 123.456, 12345.6, 1234567.0)] == [
        "1.23",
        "123.46",
        "12345.6",
        "1234567",
    ]
    assert [report.short_size(size) for size in (8, 1000, 2**16, 2**24)] == ["8", "1000", "64K", "16M"]


def test_usage_names_the_commands():
    for arguments, status in ((["--help"], 0), (["benhc"], 2)):
        done = subprocess.run([sys.executable, "-m", "fcomm", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert "bench" in done.stdout + done.stderr
        assert "demo" in done.stdout + done.stderr
