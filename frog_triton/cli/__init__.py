"""The command line: ``frog-triton``, or ``python -m frog_triton``.

Exit codes: 0 done; 1 something could not be done, the message says what; 2 wrong
arguments; 3 a GPU is needed and there is none.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from .. import __version__
from .arguments import Parser
from .errors import CommandError, answered
from .needs import missing_packages, remedy


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        help: in a line.
        module: with ``add_arguments(parser)`` and ``run(args) -> int``, or with more
            `COMMANDS` of its own.
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
        "optimizers learn a photograph, in a minute",
        "..benchmarks.train.demo",
        ("matplotlib", "PIL", "sklearn"),
        "demo",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="frog-triton",
        description="Fisher row-wise preconditioning for PyTorch.",
        epilog=__doc__.split("\n\n")[1],
    )
    parser.add_argument("--version", action="version", version=__version__)
    run = add_commands(parser, COMMANDS, words)
    args = parser.parse_args(words)
    assert run is not None
    told = logging.getLogger("frog_triton")
    if not told.hasHandlers():  # commands tell by themselves what they are to tell
        told.addHandler(logging.NullHandler())
    return answered(partial(run, args))


def add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Command],
    words: Sequence[str],
    before: str = "",
) -> Callable[[argparse.Namespace], int] | None:
    """Give a parser its commands; returns what runs the one asked for.

    Only that one is imported: the others may take long. What it needs is looked for
    when it runs, so that its help can be read without.

    Args:
        parser: of what stands before the commands.
        commands: by name.
        words: of the command line, from there on.
        before: names of the commands that these are words of.
    """
    found = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    asked = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    run = None
    for name, command in commands.items():
        if asked is None or name != words[asked]:
            found.add_parser(name, help=command.help)
            continue
        module = importlib.import_module(command.module, __name__)
        own = found.add_parser(name, help=command.help, description=module.__doc__)
        if hasattr(module, "COMMANDS"):
            rest = words[asked + 1 :]
            run = add_commands(own, module.COMMANDS, rest, f"{before}{name} ")
        else:
            module.add_arguments(own)
            run = partial(_run, module.run, command, f"{before}{name}")
    return run


def _run(
    run: Callable[[argparse.Namespace], int],
    command: Command,
    name: str,
    args: argparse.Namespace,
) -> int:
    """Run a command if what it needs is there."""
    missing = missing_packages(command.needs)
    if missing:
        raise CommandError(remedy(name, missing, command.extra))
    return run(args)
