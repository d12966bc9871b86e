"""Tables in the terminal, and results in files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import CommandError


def add_outputs(parser: argparse.ArgumentParser, plot: bool = False) -> None:
    """Options that commands with results share."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results there")
    if plot:
        parser.add_argument(
            "--plot", type=Path, metavar="FILE.png", help="draw results there"
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
    """Standard output; wide enough for tables where it is no terminal."""
    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def write_json(path: Path | None, content: Any) -> None:
    """Write results, if a file was asked for."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error}", 1) from error
