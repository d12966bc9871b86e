"""Packages beyond the plain install, and how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def missing_packages(modules: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""
    return [m for m in modules if importlib.util.find_spec(m) is None]


def remedy(what: str, missing: Sequence[str], extra: str) -> str:
    """Says what needs packages, and the extra of this package that brings them."""
    them = "it" if len(missing) == 1 else "them"
    return (
        f"{what} needs {', '.join(missing)}; "
        f"install {them} with: pip install 'frog-triton[{extra}]'"
    )
