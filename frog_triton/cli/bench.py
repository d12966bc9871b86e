"""Compare kernels, optimizer steps or whole trainings with what one would else use.

    frog-triton bench kernels --model resnet18 --json kernels.json --plot kernels.png
    frog-triton bench step --model gpt2-small --samples 64
    frog-triton bench train cifar10-small --data DIR
    frog-triton bench stability
    frog-triton bench stability --case overfit-mlp gan
    frog-triton bench coverage

Without a GPU, kernels and step print counts and floors, and time nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from . import missing_packages, needed

_BENCHES = {
    "kernels": ("the convolution kernels beside cuDNN", "bench_kernels", ()),
    "step": ("FROG's step beside other optimizers'", "bench_step", ()),
    "train": ("optimizers on a workload", "train.bench", ("matplotlib",)),
    "coverage": ("how much of real models FROG preconditions", "coverage", ()),
    "stability": ("which optimizers survive", "train.stability", ("sklearn",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command and its words."""
    words = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    for name, (help_, module, needs) in _BENCHES.items():
        own = words.add_parser(
            name, help=help_, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        missing = missing_packages(needs)
        if missing:
            own.set_defaults(missing=missing)
            continue
        found = importlib.import_module(f"frog_triton.benchmarks.{module}")
        own.description = found.__doc__
        found.add_arguments(own)
        own.set_defaults(run=found.run)


def run(args: argparse.Namespace) -> int:
    """Run the bench."""
    if getattr(args, "missing", None):
        print(needed(f"bench {args.bench}", args.missing, "demo"), file=sys.stderr)
        return 2
    return int(args.run(args))
