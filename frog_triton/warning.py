"""Warnings that point at the user's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import torch

_INSIDE = (
    os.path.join(os.path.dirname(__file__), ""),
    os.path.join(os.path.dirname(torch.__file__), ""),
    contextlib.__file__,
)
"""Code between the user and us: this package, and torch's wrappers of `step`."""


def warn(text: str) -> None:
    """Warn at the innermost line that is neither ours nor torch's.

    Args:
        text: of a `UserWarning`.
    """
    frame, level = sys._getframe().f_back, 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
