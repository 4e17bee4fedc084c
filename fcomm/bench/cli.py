"""python -m fcomm bench: the command line, with nccl-tests' flags."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import fcomm
from fcomm.arithmetic import OPS, check_op
from fcomm.bench import compiled, launch, plot, report
from fcomm.bench.plan import DTYPES, Plan, machines, measurable
from fcomm.bench.programs import build
from fcomm.registration import RECORDS

_EXAMPLES = """\
examples:
  python -m fcomm bench all_reduce -b 8 -e 64M -f 8 --vs c10d --limit
  python -m fcomm bench all --ranks 4 --vs c10d --vs mpi --plot out.png --json out.json
  python -m fcomm bench all_reduce -b 8 -e 8 --compiled --vs funcol
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest flag named in its error."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            message += _did_you_mean(unknown[1], flags)
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help shows all options\n")


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def nbytes(text: str) -> int:
    """8, 64K, 16M, 1G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or 64K, 16M, 1G")
    return int(float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " "))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """All options; those that nccl-tests also has mean the same."""
    p = _Parser(
        prog="python -m fcomm bench",
        description="Measure collectives as nccl-tests does, beside competitors in the same processes; "
        "every result is checked.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "collectives", nargs="*", default=["all_reduce"], metavar="collective", help=f"all, or some of: {_names()}"
    )
    sizes = p.add_argument_group("sizes and calls")
    sizes.add_argument("-b", "--minbytes", type=nbytes, default=1024, help="smallest size (1K)")
    sizes.add_argument("-e", "--maxbytes", type=nbytes, default=64 << 20, help="largest size (64M)")
    sizes.add_argument("-f", "--stepfactor", type=_positive, default=4, help="factor between sizes (4)")
    sizes.add_argument("-i", "--stepbytes", type=nbytes, help="or the difference between sizes")
    sizes.add_argument("-d", "--datatype", default="float", help=f"one of: {' '.join(DTYPES)}")
    sizes.add_argument("-o", "--op", default="sum", help=f"where the collective reduces, one of: {' '.join(OPS)} (sum)")
    sizes.add_argument("-r", "--root", type=int, default=0, help="root, where it has one (0)")
    sizes.add_argument("-n", "--iters", type=_positive, default=0, help="calls per round (as many as fit in 10 ms)")
    sizes.add_argument("-w", "--warmup_iters", type=_positive, default=2, help="calls before the rounds (2)")
    sizes.add_argument("-c", "--check", type=_positive, default=1, help="calls compared with the spec beforehand (1)")
    sizes.add_argument("--rounds", type=_positive, default=9, help="rounds; medians are over them (9)")
    who = p.add_argument_group("who")
    who.add_argument("--backend", default="cpu", help=f"one of: {' '.join(machines())} (cpu)")
    who.add_argument("--ranks", type=_positive, default=2, help="processes on this machine (2); a launcher's own win")
    who.add_argument("--vs", action="append", default=[], metavar="RIVAL", help="c10d, funcol or mpi; may be repeated")
    who.add_argument(
        "--limit", action="store_true", help="beside a copy of the same bytes by all ranks at once, and x + x"
    )
    who.add_argument("--compiled", action="store_true", help="the cost of one call inside a compiled graph")
    who.add_argument("--import", dest="modules", action="append", default=[], help="a module that defines collectives")
    out = p.add_argument_group("output")
    out.add_argument("--json", type=Path, help="write nccl-tests' JSON to this file")
    out.add_argument("--csv", type=Path, help="write one line per size and contestant")
    out.add_argument("--plot", type=Path, help="draw ratio and bandwidth against size (needs matplotlib)")
    out.add_argument("--timeout", type=float, default=600.0, help="seconds after which all ranks are ended (600)")
    return p


def _names() -> str:
    return " ".join(measurable())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 if a result was wrong, 2 for a wrong command line."""
    p = parser()
    options = p.parse_args(argv)
    try:
        for module in options.modules:
            importlib.import_module(module)
        plan = _plan(options)
        if options.plot:
            plot.require()
        start = time.time()
        first = _is_first()
        if first:
            print(report.header(plan, plan.sizes), flush=True)
    except (ValueError, TypeError, ImportError, fcomm.FcommError) as error:
        p.exit(2, f"{p.prog}: {error}\n")
    try:
        rows = launch.collect(plan)
    except fcomm.FcommError as error:
        p.exit(1, f"{p.prog}: {error}\n")
    if first:
        if options.json:
            report.write_json(options.json, plan, rows, start)
        if options.csv:
            report.write_csv(options.csv, rows)
        if options.plot:
            plot.draw(rows, options.plot)
    return 1 if any(row.wrong[row.ours] for row in rows) else 0


def _is_first() -> bool:
    """Whether this process prints: it is the only one, or rank 0 of those that a launcher started."""
    return not launch.launched() or fcomm.init().rank == 0


def _plan(options: argparse.Namespace) -> Plan:
    sizes = []
    size = options.minbytes
    while size <= options.maxbytes:
        sizes.append(size)
        size = size + options.stepbytes if options.stepbytes else max(size + 1, size * options.stepfactor)
        if not options.stepbytes and options.stepfactor == 1:
            break
    if not sizes:
        raise ValueError(f"-b {options.minbytes} is more than -e {options.maxbytes}; there is no size to measure")
    _one_of("--backend", options.backend, machines(), "sim has no machine to measure, and programs are on the CPU")
    for rival in options.vs:
        _one_of("--vs", rival, ("c10d", "funcol", "mpi"))
    if "mpi" in options.vs and (missing := launch.why_no_mpi()):
        raise ValueError(f"--vs mpi: {missing}")
    _one_of("-d", options.datatype, DTYPES)
    rivals = (*dict.fromkeys(options.vs), *(("copy", "add") if options.limit else ()))
    plan = Plan(
        _collectives(options.collectives),
        tuple(sizes),
        options.backend,
        ranks=fcomm.init().size if launch.launched() else options.ranks,
        dtype=options.datatype,
        op=options.op,
        root=options.root,
        iters=options.iters,
        warmup=options.warmup_iters,
        check=options.check,
        rounds=options.rounds,
        rivals=rivals,
        compiled=options.compiled,
        modules=tuple(options.modules),
        timeout_s=options.timeout,
    )
    for name in plan.collectives:
        if "op" in RECORDS[name].params:
            check_op(name, plan.op, DTYPES[plan.dtype])
        if plan.compiled:
            compiled.check_shape(build(name, 8, DTYPES[plan.dtype], plan.op, 0, fcomm.axis("bench", 2), fcomm.sim))
    if not 0 <= plan.root < plan.ranks:
        raise ValueError(f"-r {plan.root} is not a rank of {plan.ranks}; choose 0 .. {plan.ranks - 1}")
    return plan


def _collectives(names: Sequence[str]) -> tuple[str, ...]:
    known = measurable()
    if list(names) == ["all"]:
        return tuple(known)
    for name in names:
        if name in RECORDS and name not in known:
            how = (
                "it is measured with send, so name that"
                if name == "recv"
                else "its record states no bus traffic (busbw)"
            )
            raise ValueError(f"{name} cannot be measured by itself: {how}")
        _one_of("collective", name, known)
    return tuple(dict.fromkeys(names))


def _one_of(what: str, got: str, known: Iterable[str], note: str = "") -> None:
    if got not in known:
        listed = " ".join(known)
        nearest = _did_you_mean(got, known) or ";"
        raise ValueError(f"{what} {got!r} is unknown{nearest} choose one of: {listed}" + (note and f" ({note})"))


if __name__ == "__main__":
    sys.exit(main())
