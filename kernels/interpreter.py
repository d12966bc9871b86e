"""Triton's interpreter, which runs the kernels on a CPU (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

from .common import ordered_sum


def interpreted() -> bool:
    """Whether the kernels were built for the interpreter."""
    return isinstance(ordered_sum, interpreter.InterpretedFunction)


def bear_new_numpy() -> None:
    """Let loops run up to a number that a kernel has computed, or been given.

    The interpreter of Triton 3.6 makes an integer of an array of one, which numpy
    refuses since 2.4.
    """
    patch: Any = interpreter._patch_lang_tensor
    if getattr(patch, "bears_new_numpy", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.bears_new_numpy = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
