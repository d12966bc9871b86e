"""Triton's interpreter, without what it does over and over."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec


class PatchOnce:
    """Puts interpreted functions into Triton's language once a launch.

    By itself the interpreter looks for them in each call of a device function, which
    was half of a kernel's time here. What is patched, and when it is taken back, stay.

    Args:
        patch: the interpreter's own, of a function for the modules that it sees.
    """

    def __init__(self, patch):
        self.patch = patch
        self.seen = set()
        """Modules whose functions were called in the launch that runs, if one does."""

    def __call__(self, fn):
        if fn.__module__ in self.seen:
            return None  # calls of device functions drop it
        outermost = not self.seen
        scope = self.patch(fn)
        self.seen.add(fn.__module__)
        if outermost:
            restore = scope.restore

            def restore_and_forget():
                self.seen.clear()
                restore()

            scope.restore = restore_and_forget
        return scope


def once_a_type(numpy_type):
    """The interpreter's own function, which makes a dictionary of all types a call."""

    found = {}

    def of(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = numpy_type(dtype)
        return found[name]

    return of


def hasten():
    """Have it so in this process, where Triton is installed."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if isinstance(interpreter._patch_lang, PatchOnce):
        return
    interpreter._patch_lang = PatchOnce(interpreter._patch_lang)
    interpreter._get_np_dtype = once_a_type(interpreter._get_np_dtype)
    # Whether sums of integers overflow is computed, and dropped unless it debugs.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
