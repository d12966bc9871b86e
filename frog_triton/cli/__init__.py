"""The command line: ``frog-triton``, or ``python -m frog_triton``.

Exit codes: 0 done; 1 something could not be done, the message says what; 2 wrong
arguments; 3 a GPU is needed and there is none.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__
from .errors import CommandError


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        help: in a line.
        module: with ``add_arguments(parser)`` and ``run(args) -> int``.
        needs: packages beyond the plain install, by the module they provide.
        extra: of this package that brings them.
    """

    help: str
    module: str
    needs: tuple[str, ...] = ()
    extra: str = ""


COMMANDS = {
    "autotune": Command("find the fastest kernels for a model", ".autotune"),
    "bench": Command("compare kernels, steps or whole trainings", ".bench"),
    "describe": Command("who updates what in a model, and what it costs", ".describe"),
    "cache": Command("show, clear or export tuned configurations", ".cache"),
    "doctor": Command("what is installed, what would run, what is missing", ".doctor"),
    "demo": Command(
        "train beside SGD and AdamW",
        "..benchmarks.train.demo",
        ("matplotlib", "PIL", "sklearn"),
        "demo",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="frog-triton",
        description="Fisher row-wise preconditioning for PyTorch.",
        epilog=__doc__.split("\n\n")[1],
    )
    parser.add_argument("--version", action="version", version=__version__)
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    run = None
    for name, command in COMMANDS.items():
        # Only the command that is run is imported: the others may need more packages.
        if name != asked:
            found.add_parser(name, help=command.help)
            continue
        missing = missing_packages(command.needs)
        if missing:
            print(needed(name, missing, command.extra), file=sys.stderr)
            return 2
        module = importlib.import_module(command.module, __name__)
        own = found.add_parser(
            name,
            help=command.help,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(own)
        run = module.run
    args = parser.parse_args(words)
    assert run is not None
    told = logging.getLogger("frog_triton")
    if not told.hasHandlers():  # commands tell by themselves what they are to tell
        told.addHandler(logging.NullHandler())
    try:
        return int(run(args))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


def missing_packages(modules: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""
    return [m for m in modules if importlib.util.find_spec(m) is None]


def needed(name: str, missing: Sequence[str], extra: str) -> str:
    """What to say where packages are missing."""
    return (
        f"error: {name} needs {', '.join(missing)}; "
        f"install them with: pip install 'frog-triton[{extra}]'"
    )
