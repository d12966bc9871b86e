"""Every kernel of the smoke run under NVIDIA's compute-sanitizer.

    python -m frog_triton.benchmarks.sanitize

memcheck finds reads and writes out of bounds, racecheck those of shared memory that are
in no order. Where the sanitizer is not installed it says so, and nothing is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..cli.arguments import Parser
from .smoke import DETAIL, run_cases
from .smoke_cases import CASES

TOOLS = ("memcheck", "racecheck")
FOUND = 99
"""Exit code for errors that the sanitizer itself has found."""


def find() -> str | None:
    """The sanitizer, on the path or beside the CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    beside = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return str(beside[-1]) if beside else None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0 if nothing was found, or nothing could be run."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--kernel", metavar="NAME", help="cases that launch it alone")
    args = parser.parse_args(argv)
    sanitizer = find()
    if sanitizer is None:
        print("skipped: compute-sanitizer is not installed here")
        return 0
    wrong = 0
    for tool in args.tool:
        wrapper = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--"]
        for outcome in run_cases(list(CASES), wrapper, args.kernel):
            wrong += outcome.verdict != "ok"
            print(f"{tool:10} {outcome.case:26} {outcome.verdict}", flush=True)
            told = [line for line in outcome.detail.splitlines() if "=====" in line]
            print(*told[:DETAIL], sep="\n", end="\n" if told else "", flush=True)
    print(f"{wrong} cases with errors")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
