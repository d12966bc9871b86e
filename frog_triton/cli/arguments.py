"""Command lines: a parser whose errors are one line, and what arguments may be.

Arguments are checked while the line is read, so that nothing is run in vain.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .needs import missing_packages, remedy

MOST = 2**31 - 1
"""Of whole numbers: they are sizes and counts, which kernels hold in 32 bits."""

PICTURES = (".png", ".svg", ".pdf")
"""Endings of pictures, which say their form."""


class Parser(argparse.ArgumentParser):
    """One whose errors are one line, and whose description keeps its own lines."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """End with code 2."""
        self.exit(2, f"error: {message} (see: {self.prog} --help)\n")


N = TypeVar("N", int, float)


def _number(kind: Callable[[str], N], text: str) -> N:
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"invalid {what}: {text!r}") from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {text}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = _number(float, text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def output_file(text: str) -> Path:
    """A file to write, in a folder that is there."""
    path = Path(text)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, not a file")
    if not all(os.access(p, os.W_OK) for p in (folder, path) if p.exists()):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


def picture(text: str) -> Path:
    """A picture to draw."""
    path = output_file(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"a picture's name ends in {', '.join(PICTURES)}; got {text}"
        )
    missing = missing_packages(("matplotlib",))
    if missing:
        raise argparse.ArgumentTypeError(remedy("a picture", missing, "demo"))
    return path


def output_folder(text: str) -> Path:
    """A folder to write to, which is made where it is missing."""
    path = Path(text)
    own = path.absolute()
    there = next(folder for folder in (own, *own.parents) if folder.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written")
    return path
