"""Who updates what in a model, how each layer is solved, and what a step costs.

    frog-triton describe resnet18
    frog-triton describe gpt2-small --sample-size 256 --dtype bfloat16
    frog-triton describe my_model.py:build --gpu a100 --json layers.json
    frog-triton describe gpt2-small --plot layers.png

The first line says how much of the model FROG preconditions. Alike layers are in one
line, with their number and what they sum up to; --full shows each. Counts are those of
the launches that a step makes; floors follow from datasheet rates. Nothing is run on a
GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..kernels.gpu import GPUS
from ..presets import SAMPLINGS
from . import models
from .arguments import positive
from .errors import CommandError
from .output import add_outputs, console, print_table, write_json

if TYPE_CHECKING:
    from ..costs import Cost
    from ..model.table import RoutingTable
    from .layer_lines import LayerLine

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model(parser)
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="for the floors")
    parser.add_argument(
        "--full", action="store_true", help="a line for every layer and parameter"
    )
    add_outputs(parser, plot=True)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that say which layers, and how they are sampled."""
    names = "|".join(models.BUILT_IN)
    parser.add_argument("model", metavar="MODEL", help=f"{names}|FILE.py:factory")
    parser.add_argument(
        "--sampling", choices=tuple(SAMPLINGS), default="positions", help="as FROG's"
    )
    parser.add_argument("--sample-size", type=positive, metavar="N", help="as FROG's")
    parser.add_argument(
        "--cg-iters", type=positive, default=4, metavar="K", help="as FROG's"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the samples"
    )


def count(args: argparse.Namespace, loaded: models.Loaded, gpu: str) -> Cost:
    """The cost of a model's step with the options of `add_model`."""
    import torch

    from ..costs import cost

    try:
        return cost(
            loaded.model,
            loaded.inputs,
            sample_size=args.sample_size,
            sampling=args.sampling,
            cg_iters=args.cg_iters,
            sample_dtype=getattr(torch, args.dtype),
            gpu=gpu,
        )
    except ValueError as error:
        raise CommandError(f"{loaded.name}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from .layer_lines import layer_lines

    loaded = models.load(args.model)
    counted = count(args, loaded, args.gpu)
    table = models.routing(loaded.model)
    coverage = table.coverage
    lines = layer_lines(counted, args.full)
    console().print(f"{loaded.name}: {coverage}", soft_wrap=True)
    if lines:
        _print_layers(lines, counted, args.gpu)
    _print_fallback(table, args.full)
    if lines:
        console().print(_whole_step(counted), soft_wrap=True)
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
    if args.plot is not None:
        _draw(args, loaded.name, counted, table)
    return 0


def _print_layers(lines: Sequence[LayerLine], counted: Cost, gpu: str) -> None:
    from .layer_lines import total

    columns = ("layer ", "layers", "R", "D", "N", "solve ", "elements", "GFLOP", "MB")
    rows = [_cells(line) for line in lines]
    in_all = _cells(total(counted))
    rows.append(tuple("" if 2 <= i <= 5 else cell for i, cell in enumerate(in_all)))
    title = f"Preconditioned by FROG; floors for {gpu}"
    print_table(title, (*columns, "floor us"), rows)


def _cells(line: LayerLine) -> tuple[object, ...]:
    """One layer's sizes, and the sums of all."""
    first = line.layers[0]
    return (
        line.name,
        len(line.layers),
        first.layer.rows,
        first.layer.dim,
        first.layer.samples,
        first.formulation,
        f"{line.parameters:,}",
        f"{line.operations / 1e9:.2f}",
        f"{line.bytes / 1e6:.2f}",
        f"{line.floor_us:.1f}",
    )


def _whole_step(counted: Cost) -> str:
    """The totals, and why they are not quite those of the layers."""
    *_, beside, whole = str(counted).splitlines()
    return f"{beside}\n{whole}"


def _print_fallback(table: RoutingTable, full: bool) -> None:
    """What FROG leaves, like parameters in a line, and the totals of the whole."""
    columns = ("parameter ", "shape ", "tensors", "elements", "updated by ", "why ")
    left = [line for line in table.lines(full) if line.updated_by != "frog"]
    print_table(
        "Left to the fallback, and totals",
        columns,
        [line.cells() for line in [*left, *table.totals()]],
    )


MOST_BARS = 16
"""Groups of layers in a picture; the cheapest are one bar."""


def _draw(
    args: argparse.Namespace, name: str, counted: Cost, table: RoutingTable
) -> None:
    from ..benchmarks.plot import draw_shares
    from .layer_lines import largest, layer_lines

    coverage = table.coverage
    bars = [
        (
            line.label,
            line.parameters / coverage.all_parameters,
            line.floor_us / counted.floor_us,
        )
        for line in largest(layer_lines(counted), MOST_BARS)
    ]
    beside = 1 - sum(share for *_, share in bars)
    if bars and beside > 0:
        bars.append(("beside the layers", 0.0, beside))
    left = [
        (group.what, group.parameters / coverage.all_parameters)
        for group in coverage.left_out
    ]
    cost = f"of {counted.floor_us:.0f} µs, the floor of FROG's step on {args.gpu}"
    try:
        draw_shares(args.plot, f"{name} with FROG, layer by layer", bars, left, cost)
    except OSError as error:
        raise CommandError(f"{args.plot} cannot be written: {error}", 1) from error
