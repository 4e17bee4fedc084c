"""python -m fcomm: the commands."""

from __future__ import annotations

import difflib
import sys

_USAGE = """\
usage: python -m fcomm COMMAND [options]

  bench    measure collectives: nccl-tests' table, with competitors in the same processes
  demo     train a small language model with tensor and sequence parallelism, against one process

python -m fcomm COMMAND --help shows the options of a command.
"""


def main(argv: list[str]) -> int:
    """Run a command and return its exit status, 2 for an unknown one."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    command, rest = argv[0], argv[1:]
    if command == "bench":
        from fcomm.bench.cli import main as bench

        return bench(rest)
    if command == "demo":
        from fcomm.demo.__main__ import main as demo

        return demo(rest)
    near = difflib.get_close_matches(command, ["bench", "demo"], n=1)
    print(
        f"python -m fcomm: there is no command {command!r}" + (f"; did you mean {near[0]}?" if near else ""),
        file=sys.stderr,
    )
    print(_USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
