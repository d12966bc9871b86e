"""Errors that end a command with a message and a code."""

from __future__ import annotations


class CommandError(Exception):
    """Ends a command.

    Args:
        message: says what is wrong and what would be right.
        code: exit code; see `frog_triton.cli`.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
