"""The convolution kernels on every convolution of ResNet-18 and ResNet-50.

    python -m frog_triton.benchmarks.bench_kernels --model resnet18

On a GPU: the whole solve in Triton beside the same solve composed of cuDNN's
convolutions in the same dtype and layout, eager and under `torch.compile`, and its two
products beside cuDNN's bare forward and weight-gradient convolutions. The solve is
checked before it is timed. Anywhere else: launches, operations, bytes and the floor
they imply, and no time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import cost
from ..autotune.traffic import GPUS, name_here
from ..autotune.tuning import Tuning
from ..cost import Cost
from ..launches import LayerShape
from ..layers import ConvMap
from ..ops import triton_ops
from ..ops.launch import Launch, recording
from ..ops.types import Rows
from ..preconditioner import solve
from ..solvers import Batch
from .eager import eager_solve
from .environment import environment
from .models import resnet
from .plot import draw
from .timing import matrix_rate, microseconds

# Model, examples sampled, image size.
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], int, int]] = {
    "resnet18": (lambda: resnet(18), 64, 32),
    "resnet50": (lambda: resnet(50, 1000, small_images=False), 32, 224),
}


def geometries(name: str, dtype: torch.dtype, gpu: str, formulation: str) -> Cost:
    """Counts of a model's convolutions, one layer of each geometry."""
    build, samples, size = MODELS[name]
    counted = cost(
        build(),
        torch.zeros(1, 3, size, size),
        sampling="examples",
        sample_size=samples,
    )
    shapes: dict[LayerShape, LayerShape] = {}
    for line in counted.layers:
        shapes.setdefault(replace(line.layer, name=""), line.layer)
    return cost(
        list(shapes.values()), sample_dtype=dtype, gpu=gpu, formulation=formulation
    )


def problem(
    shape: LayerShape, dtype: torch.dtype, device: str
) -> tuple[Batch, ConvMap]:
    """A random system of one layer's geometry."""
    assert shape.image is not None and shape.conv is not None
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    one = ConvMap(torch.empty(1, *shape.image, device="meta"), shape.conv, False)
    examples = shape.samples // one.positions
    x = randn(examples, *shape.image).to(dtype, memory_format=torch.channels_last)
    y = randn(examples, shape.rows, *one.output_shape)
    y = y.to(dtype, memory_format=torch.channels_last)
    map_ = ConvMap(x, shape.conv, shape.bias)
    bias = randn(shape.rows) if shape.bias else None
    m = Rows(randn(shape.rows, shape.dim), bias)
    return Batch([map_], [y.flatten(2)], [m]), map_


def products(batch: Batch, damping: float) -> dict[str, Launch]:
    """Launches of one forward and one adjoint product from the middle of a solve."""
    with recording() as launches:
        solve(
            triton_ops, batch, damping=damping, cg_iters=3, formulation="primal"
        ).rows()
    middle = [a for a in launches if not a.args.get("FIRST", True)]
    named = {
        "forward": [a for a in middle if a.name == "_primal_forward_kernel"],
        "adjoint": [
            a
            for a in middle
            if a.name == "_primal_adjoint_kernel" and a.args["MULTIPLY"]
        ],
    }
    return {name: found[0] for name, found in named.items()}


def measure(
    shape: LayerShape,
    dtype: torch.dtype,
    formulation: str,
    rate: float,
    deadline: float,
) -> dict[str, Any]:
    """Times of one geometry: the solve, its rivals, and the products alone.

    Args:
        shape: of a convolution without bias.
        dtype: of the samples.
        formulation: of the solve.
        rate: operations per second that a plain matrix product reaches.
        deadline: of `time.monotonic`, after which `torch.compile` is left out.
    """
    batch, map_ = problem(shape, dtype, "cuda")
    damping, iters = 1e-4, 4
    spec, m = shape.conv, batch.ms[0].weight
    assert spec is not None
    weight = m.view(shape.rows, -1, *spec.kernel)
    y = batch.ys[0].unflatten(2, map_.output_shape)

    def ours() -> torch.Tensor:
        options: dict[str, Any] = {"damping": damping, "cg_iters": iters}
        rows = solve(triton_ops, batch, formulation=formulation, **options).rows()
        return rows.weight

    def eager() -> torch.Tensor:
        return eager_solve(map_.x, y, weight, spec, damping, iters)

    expected = eager_solve(
        map_.x.double(), y.double(), weight.double(), spec, damping, iters
    ).view_as(m)
    result: dict[str, Any] = {}
    rivals = {"solve": ours, "eager": eager}
    if time.monotonic() < deadline:
        torch._dynamo.reset()  # a graph of its own for each geometry
        rivals["compiled"] = torch.compile(eager, dynamic=False)
    for name, run in rivals.items():
        error = float((run().view_as(m) - expected).norm() / expected.norm())
        if name == "solve" and not error < 0.1:
            raise RuntimeError(f"{shape.name}: off by {error:.1e}: not timed")
        result[f"{name}_error"] = error
        result[f"{name}_us"] = microseconds(run)
    settings = (spec.stride, spec.padding, spec.dilation, False, [0, 0], spec.groups)
    low = weight.to(dtype)
    backward = torch.ops.aten.convolution_backward
    result["cudnn_forward_us"] = microseconds(
        lambda: torch.convolution(map_.x, low, None, *settings)
    )
    result["cudnn_adjoint_us"] = microseconds(
        lambda: backward(y, map_.x, low, None, *settings, (False, True, False))
    )
    operations = 2 * shape.samples * shape.dim * shape.rows
    for name, found in products(batch, damping).items():
        taken = microseconds(found.run)
        result[f"{name}_us"] = taken
        result[f"{name}_tflops"] = operations / taken / 1e6
        result[f"{name}_percent"] = 1e8 * operations / taken / rate
    return result


COLUMNS = {
    "solve_us": "solve us",
    "eager_us": "eager us",
    "compiled_us": "compiled us",
    "forward_us": "X p us",
    "cudnn_forward_us": "cuDNN us",
    "forward_tflops": "TFLOP/s",
    "forward_percent": "% of mm",
    "adjoint_us": "X^T t us",
    "cudnn_adjoint_us": "cuDNN us",
    "adjoint_tflops": "TFLOP/s",
    "adjoint_percent": "% of mm",
}
"""What is timed, with its heading; the last column is of a plain matrix product."""


def bench(
    name: str, dtype: torch.dtype, gpu: str, formulation: str, deadline: float
) -> list[dict[str, Any]]:
    """Counts for each geometry of a model, and times where there is a GPU."""
    timed = torch.cuda.is_available()
    rate = matrix_rate(dtype) if timed else 0.0
    results = []
    for line in geometries(name, dtype, gpu, formulation).layers:
        shape = line.layer
        result: dict[str, Any] = {
            "model": name,
            "layer": shape.name,
            "rows": shape.rows,
            "dim": shape.dim,
            "samples": shape.samples,
            "sample_dtype": str(dtype).removeprefix("torch."),
            "formulation": line.formulation,
            "launches": line.launches,
            "operations": line.operations,
            "bytes": line.bytes,
            "floor_us": line.floor_us,
        }
        if timed:
            result["matrix_tflops"] = rate / 1e12
            result |= measure(shape, dtype, line.formulation, rate, deadline)
        results.append(result)
    return results


def show(results: Sequence[dict[str, Any]], gpu: str) -> None:
    """Print one model's results as a table."""
    first = results[0]
    print(
        f"\n{first['model']}, samples in {first['sample_dtype']}, k = 4; floors for "
        f"{gpu}\n{'layer':16} {'R':>5} {'D':>5} {'N':>7} {'solve':7} {'launches':>8} "
        f"{'GFLOP':>7} {'MB':>7} {'floor us':>8}",
        end="",
    )
    timed = "solve_us" in first
    print("".join(f"{heading:>12}" for heading in COLUMNS.values()) if timed else "")
    for r in results:
        print(
            f"{r['layer']:16} {r['rows']:5} {r['dim']:5} {r['samples']:7} "
            f"{r['formulation']:7} {r['launches']:8} {r['operations'] / 1e9:7.1f} "
            f"{r['bytes'] / 1e6:7.1f} {r['floor_us']:8.1f}",
            end="",
        )
        print(
            "".join(f"{r.get(column, math.nan):12.1f}" for column in COLUMNS)
            if timed
            else ""
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16"
    )
    parser.add_argument(
        "--gpu", choices=GPUS, default=name_here(), help="for the floors"
    )
    parser.add_argument(
        "--formulation", choices=("auto", "primal", "gram"), default="auto"
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="after which torch.compile, which takes long, is left out",
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="of tuned configurations"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them there")


def run(args: argparse.Namespace) -> int:
    """Count, time where there is a GPU, print and write; returns the exit code."""
    if not torch.cuda.is_available():
        print("No GPU here: counts and floors from datasheet rates; no time measured.")
    results = []
    deadline = time.monotonic() + args.budget
    tuning = Tuning("cached", args.cache_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in args.model:
        dtype = getattr(torch, args.dtype)
        with tuning.applied(device, list):
            found = bench(name, dtype, args.gpu, args.formulation, deadline)
        show(found, args.gpu)
        results += found
    if args.json:
        content = {"environment": environment(), "results": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        points = [
            (r["layer"], r["operations"], r["bytes"], r.get("solve_us"))
            for r in results
        ]
        speedups = [
            (r["layer"], r["eager_us"] / r["solve_us"])
            for r in results
            if "eager_us" in r
        ]
        title = "the solve beside cuDNN's composition"
        draw(args.plot, title, points, GPUS[args.gpu], speedups)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
