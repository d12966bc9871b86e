"""The command line."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from . import __version__

_DEMO_NEEDS = {
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "rich": "rich",
    "sklearn": "scikit-learn",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m frog_triton", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train beside SGD and AdamW")
    missing = [
        package
        for module, package in _DEMO_NEEDS.items()
        if importlib.util.find_spec(module) is None
    ]
    # Imported late: a plain install without extras has no use for it.
    from .benchmarks.train import demo as demo_module

    demo_module.add_arguments(demo)
    args = parser.parse_args(argv)
    if missing:
        print(
            f"error: demo needs {', '.join(missing)}; "
            "install them with: pip install 'frog-triton[demo]'",
            file=sys.stderr,
        )
        return 2
    return demo_module.run(args)
