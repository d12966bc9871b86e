"""Triton's interpreter, without what it does over and over."""

from __future__ import annotations

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


def patch_once_a_launch():
    """Have it so in this process, where Triton is installed."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if not isinstance(interpreter._patch_lang, PatchOnce):
        interpreter._patch_lang = PatchOnce(interpreter._patch_lang)
