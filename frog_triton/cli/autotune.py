"""Find the fastest kernel configurations for a model, and keep them.

    frog-triton autotune resnet18 --dtype bfloat16
    frog-triton autotune my_model.py:build --budget 120
    frog-triton autotune gpt2-small --dry-run --gpu h100

Configurations go to the user's cache folder (--cache-dir for another), where
FROG(model) finds them. With --dry-run nothing is timed and no GPU is needed: candidates
are listed with what they really compile to, and a predicted time.
"""

from __future__ import annotations

import argparse
import time

from ..kernels.gpu import GPUS
from .arguments import above_zero, output_folder, positive
from .describe import add_model
from .errors import CommandError
from .output import add_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model(parser)
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="examples in a batch, where that is fewer than the sample size",
    )
    parser.add_argument(
        "--budget",
        type=above_zero,
        default=300.0,
        metavar="SECONDS",
        help="for all of it (default: 300); what is not done by then is left",
    )
    parser.add_argument(
        "--top",
        type=positive,
        default=4,
        metavar="N",
        help="candidates a key (default: 4)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list, time nothing")
    parser.add_argument(
        "--gpu", choices=GPUS, help="of --dry-run (default: the one here, or h200)"
    )
    parser.add_argument(
        "--cache-dir",
        type=output_folder,
        metavar="DIR",
        help="(default: the user's cache)",
    )
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Tune, or list."""
    if args.gpu and not args.dry_run:
        raise CommandError("--gpu goes with --dry-run: only the GPU here can be timed")
    deadline = time.monotonic() + args.budget
    from . import candidates  # which imports torch and Triton: that counts, too

    run_ = candidates.list_ if args.dry_run else candidates.tune
    return run_(args, deadline)
