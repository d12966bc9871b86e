"""Tables in the terminal, and results in files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .arguments import output_file, picture
from .errors import CommandError


def add_outputs(parser: argparse.ArgumentParser, plot: bool = False) -> None:
    """Options that commands with results share."""
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write results there"
    )
    if plot:
        parser.add_argument(
            "--plot", type=picture, metavar="FILE.png", help="draw results there"
        )


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """A table; columns whose name ends in a space are aligned to the left."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        left = column.endswith(" ")
        table.add_column(
            column.strip(), justify="left" if left else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(str, row))
    console().print(table)


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal.

    Text is printed as it is: what stands in brackets is no markup, but an extra of a
    package, an index or a shape.
    """
    found = Console(highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = 160
    return found


def write_json(path: Path | None, content: Any) -> None:
    """Write results, if a file was asked for."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error}", 1) from error
