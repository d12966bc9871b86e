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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .. import __version__
from .errors import CommandError


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
    try:
        run = add_commands(parser, COMMANDS, words)
        args = parser.parse_args(words)
        assert run is not None
        told = logging.getLogger("frog_triton")
        if not told.hasHandlers():  # commands tell by themselves what they are to tell
            told.addHandler(logging.NullHandler())
        return run(args)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


def add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Command],
    words: Sequence[str],
    before: str = "",
) -> Callable[[argparse.Namespace], int] | None:
    """Give a parser its commands; returns what runs the one asked for.

    Only that one is imported: the others may take long, or need more packages.

    Args:
        parser: of what stands before the commands.
        commands: by name.
        words: of the command line, from there on.
        before: names of the commands that these are words of.

    Raises:
        CommandError: packages are missing.
    """
    found = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    asked = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    run = None
    for name, command in commands.items():
        if asked is None or name != words[asked]:
            found.add_parser(name, help=command.help)
            continue
        missing = missing_packages(command.needs)
        if missing:
            raise CommandError(
                f"{before}{name} needs {', '.join(missing)}; "
                f"install them with: pip install 'frog-triton[{command.extra}]'"
            )
        module = importlib.import_module(command.module, __name__)
        own = found.add_parser(
            name,
            help=command.help,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if hasattr(module, "COMMANDS"):
            rest = words[asked + 1 :]
            run = add_commands(own, module.COMMANDS, rest, f"{before}{name} ")
        else:
            module.add_arguments(own)
            run = module.run
    return run


def missing_packages(modules: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""
    return [m for m in modules if importlib.util.find_spec(m) is None]
