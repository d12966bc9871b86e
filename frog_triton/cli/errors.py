"""Errors that end a command with a message and a code."""

from __future__ import annotations

import sys
from collections.abc import Callable


class CommandError(Exception):
    """Ends a command.

    Args:
        message: says what is wrong and what would be right.
        code: exit code; see `frog_triton.cli`.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def answered(work: Callable[[], int]) -> int:
    """Do a command's work; returns its exit code, its errors are one line each."""
    try:
        return work()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
