"""Who updates what in a model, how each layer is solved, and what a step costs.

    frog-triton describe resnet18
    frog-triton describe gpt2-small --sample-size 256 --dtype bfloat16
    frog-triton describe my_model.py:build --gpu a100 --json layers.json

The first line says how much of the model FROG preconditions. Counts are those of the
launches that a step makes; floors follow from datasheet rates. Nothing is run on a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..kernels.gpu import GPUS
from ..presets import SAMPLINGS
from . import models
from .errors import CommandError
from .output import add_outputs, console, print_table, write_json

if TYPE_CHECKING:
    from ..costs import Cost
    from ..model.table import RoutingTable

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model(parser)
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="for the floors")
    add_outputs(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that say which layers, and how they are sampled."""
    names = "|".join(models.BUILT_IN)
    parser.add_argument("model", metavar="MODEL", help=f"{names}|FILE.py:factory")
    parser.add_argument(
        "--sampling", choices=tuple(SAMPLINGS), default="positions", help="as FROG's"
    )
    parser.add_argument("--sample-size", type=int, metavar="N", help="as FROG's")
    parser.add_argument("--cg-iters", type=int, default=4, metavar="K")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the samples"
    )


def count(args: argparse.Namespace, loaded: models.Loaded, gpu: str) -> Cost:
    """The cost of a model's step with the options of `add_model`."""
    import torch

    from ..costs import cost

    size = args.sample_size
    if size is not None and size < 1:
        raise CommandError(f"--sample-size must be positive, got {size}")
    if args.cg_iters < 1:
        raise CommandError(f"--cg-iters must be positive, got {args.cg_iters}")
    try:
        return cost(
            loaded.model,
            loaded.inputs,
            sample_size=size,
            sampling=args.sampling,
            cg_iters=args.cg_iters,
            sample_dtype=getattr(torch, args.dtype),
            gpu=gpu,
        )
    except ValueError as error:
        raise CommandError(f"{loaded.name}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    loaded = models.load(args.model)
    counted = count(args, loaded, args.gpu)
    table = models.routing(loaded.model)
    coverage = table.coverage
    console().print(f"{loaded.name}: {coverage}", soft_wrap=True)
    if counted.layers:
        _print_layers(counted)
    _print_fallback(table)
    if counted.layers:
        console().print(str(counted).rsplit("\n", 1)[-1])
    layers = [
        {**asdict(line), "layer": line.layer.name, "rows": line.layer.rows}
        for line in counted.layers
    ]
    rest = [r for r in table if r.updated_by != "frog"]
    content = {
        "model": loaded.name,
        "gpu": args.gpu,
        "coverage": {
            "text": str(coverage),
            "share": coverage.share,
            "low": coverage.low,
            **asdict(coverage),
        },
        "launches": counted.launches,
        "bytes": counted.bytes,
        "operations": counted.operations,
        "floor_us": counted.floor_us,
        "layers": layers,
        "fallback": [{"parameter": r.name, "why": r.reason} for r in rest],
    }
    write_json(args.json, content)
    return 0


def _print_layers(counted: Cost) -> None:
    print_table(
        "Preconditioned by FROG",
        ("layer ", "R", "D", "N", "solve ", "shared by", "GFLOP", "MB", "floor us"),
        [
            (
                line.layer.name,
                line.layer.rows,
                line.layer.dim,
                line.layer.samples,
                line.formulation,
                line.shared_by,
                f"{line.operations / 1e9:.2f}",
                f"{line.bytes / 1e6:.2f}",
                f"{line.floor_us:.1f}",
            )
            for line in counted.layers
        ],
    )


def _print_fallback(table: RoutingTable) -> None:
    """What FROG leaves, like parameters in a line, and the totals of the whole."""
    left = [line for line in table.lines() if line.updated_by != "frog"]
    print_table(
        "Left to the fallback, and totals",
        ("parameter ", "shape ", "tensors", "elements", "updated by ", "why "),
        [line.cells() for line in [*left, *table.totals()]],
    )
