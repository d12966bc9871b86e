"""The convolution kernels on every convolution of ResNet-18 and ResNet-50.

    python -m frog_triton.benchmarks.bench_kernels --model resnet18

On a GPU: the whole solve in Triton beside the same solve composed of cuDNN's
convolutions in the same dtype and layout, eager and under `torch.compile`, and its two
products beside cuDNN's bare forward and weight-gradient convolutions. The solve is
checked before it is timed. Anywhere else: launches, operations, bytes and the floor
they imply, and no time. A geometry that fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import cli, cost
from ..autotune.tuning import Tuning
from ..cli.arguments import above_zero
from ..cli.output import add_outputs
from ..costs import Cost, LayerCost
from ..kernels.gpu import GPUS, name_here
from ..kernels.launch import Launch, recording
from ..kernels.primal_adjoint import PRIMAL_ADJOINT
from ..kernels.primal_forward import PRIMAL_FORWARD
from ..layers import ConvMap
from ..linalg.numbers import Numbers
from ..linalg.rows import Rows
from ..ops import triton_ops
from ..preconditioner import solve
from ..solve import Batch
from ..solve.launches import Bucket, LayerShape
from .bench_step import add_tuning
from .eager import eager_solve
from .models import resnet
from .plot import MEASURED, Point, Roofline, draw_rooflines, try_to
from .records import Results
from .timing import matrix_rate, microseconds
from .warm import warm

DAMPING, ITERS = 1e-4, 4


def _tiny() -> nn.Module:
    """Two geometries, for a trial of what uses them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(128, 2),
    )


# Model, examples sampled, image size.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (lambda: resnet(18), 64, 32),
    "resnet50": (lambda: resnet(50, 1000, small_images=False), 32, 224),
    "tiny": (_tiny, 2, 8),
}
REAL = ("resnet18", "resnet50")
"""Those that results are about."""


def geometries(name: str, dtype: torch.dtype, gpu: str, formulation: str) -> Cost:
    """Counts of a model's convolutions, one layer of each geometry."""
    build, samples, size = MODELS[name]
    with torch.device("meta"):
        model, inputs = build(), torch.zeros(1, 3, size, size)
    counted = cost(model, inputs, sampling="examples", sample_size=samples)
    shapes = list(dict.fromkeys(line.layer for line in counted.layers))
    return cost(shapes, sample_dtype=dtype, gpu=gpu, formulation=formulation)


def buckets(lines: Sequence[LayerCost], dtype: torch.dtype) -> list[Bucket]:
    """Geometries as the bench solves them: one layer at a time."""
    dtypes = (dtype, torch.float32, torch.float32)
    return [Bucket(line.layer, iters=ITERS, dtypes=dtypes) for line in lines]


def random_batch(
    shape: LayerShape, dtype: torch.dtype, device: str
) -> tuple[Batch, ConvMap]:
    """A random system of one layer's geometry; on the device "meta" without numbers."""
    assert shape.image is not None and shape.conv is not None
    meta = device == "meta"
    generator = None if meta else torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    one = ConvMap(torch.empty(1, *shape.image, device="meta"), shape.conv, False)
    examples = shape.samples // one.positions
    x = randn(examples, *shape.image).to(dtype, memory_format=torch.channels_last)
    y = randn(examples, shape.rows, *one.output_shape)
    y = y.to(dtype, memory_format=torch.channels_last)
    map_ = ConvMap(x, shape.conv, shape.bias)
    bias = randn(shape.rows) if shape.bias else None
    m = Rows(randn(shape.rows, shape.dim), bias)
    numbers = Numbers(damping=DAMPING)
    return Batch([map_], [y.flatten(2)], [m], numbers=numbers), map_


def solved(batch: Batch, formulation: str, iters: int = ITERS) -> Tensor:
    """Directions of the kernels' solve."""
    solution = solve(triton_ops, batch, cg_iters=iters, formulation=formulation)
    return solution.rows().weight


def products(batch: Batch) -> dict[str, Launch]:
    """Launches of one forward and one adjoint product from the middle of a solve."""
    with recording() as launches:
        solved(batch, "primal", iters=3)
    products = [a for a in launches.parts if not a.args.get("LAST", False)]
    middle = [a for a in products if not a.args.get("FIRST", False)]
    named = {
        "forward": [a for a in middle if a.kernel is PRIMAL_FORWARD],
        "adjoint": [
            a for a in middle if a.kernel is PRIMAL_ADJOINT and a.args["MULTIPLY"]
        ],
    }
    return {name: found[0] for name, found in named.items()}


def measure(
    shape: LayerShape,
    dtype: torch.dtype,
    formulation: str,
    rate: float | None,
    deadline: float,
    device: str,
) -> dict[str, Any]:
    """Errors and times of one geometry: the solve, its rivals, the products alone.

    Args:
        shape: of a convolution without bias.
        dtype: of the samples.
        formulation: of the solve.
        rate: operations per second that a plain matrix product reaches; None without a
            GPU, where the solve is checked and nothing is timed.
        deadline: of `time.monotonic`, after which `torch.compile` is left out.
        device: to run on.
    """
    batch, map_ = random_batch(shape, dtype, device)
    spec, m = shape.conv, batch.ms[0].weight
    assert spec is not None
    weight = m.view(shape.rows, -1, *spec.kernel)
    y = batch.ys[0].unflatten(2, map_.output_shape)

    def ours() -> Tensor:
        return solved(batch, formulation)

    def eager() -> Tensor:
        return eager_solve(map_.x, y, weight, spec, DAMPING, ITERS)

    expected = eager_solve(
        map_.x.double(), y.double(), weight.double(), spec, DAMPING, ITERS
    ).view_as(m)
    result: dict[str, Any] = {}
    rivals = {"solve": ours, "eager": eager}
    if time.monotonic() < deadline and rate is not None:
        torch._dynamo.reset()  # a graph of its own for each geometry
        rivals["compiled"] = torch.compile(eager, dynamic=False)
    for name, run in rivals.items():
        error = float((run().view_as(m) - expected).norm() / expected.norm())
        if name == "solve" and not error < 0.1:
            raise RuntimeError(f"off by {error:.1e}: not timed")
        result[f"{name}_error"] = error
        if rate is not None:
            result[f"{name}_us"] = microseconds(run)
    if rate is None:
        return result
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
    for name, found in products(batch).items():
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
    name: str, args: argparse.Namespace, results: Results, deadline: float
) -> None:
    """Counts for each geometry of a model, checks if asked for, times with a GPU.

    Args:
        name: of the model.
        args: the command line.
        results: gets an entry for each geometry.
        deadline: as `measure`'s.
    """
    timed = torch.cuda.is_available()
    dtype: torch.dtype = getattr(torch, args.dtype)
    rate = matrix_rate(dtype) if timed else None
    lines = geometries(name, dtype, args.gpu, args.formulation).layers
    warm(buckets(lines, dtype), args.formulation)
    show_header(name, args, timed)
    for line in lines:
        names = {"model": name, "layer": line.layer.name, "autotune": args.autotune}

        def work(line: LayerCost = line) -> dict[str, Any]:
            found = counts(line, dtype)
            if timed or args.check:
                how, device = line.formulation, "cuda" if timed else "cpu"
                found |= measure(line.layer, dtype, how, rate, deadline, device)
            return found if rate is None else found | {"matrix_tflops": rate / 1e12}

        entry = results.add(names, work)
        if "error" not in entry:
            show(entry)


def counts(line: LayerCost, dtype: torch.dtype) -> dict[str, Any]:
    """What a geometry's solve launches, computes and moves at least."""
    return {
        "rows": line.layer.rows,
        "dim": line.layer.dim,
        "samples": line.layer.samples,
        "sample_dtype": str(dtype).removeprefix("torch."),
        "formulation": line.formulation,
        "launches": line.launches,
        "operations": line.operations,
        "bytes": line.bytes,
        "floor_us": line.floor_us,
    }


def show_header(name: str, args: argparse.Namespace, timed: bool) -> None:
    """Print the head of a model's table."""
    print(
        f"\n{name}, samples in {args.dtype}, k = {ITERS}; floors for "
        f"{args.gpu}\n{'layer':16} {'R':>5} {'D':>5} {'N':>7} {'solve':7} "
        f"{'launches':>8} {'GFLOP':>7} {'MB':>7} {'floor us':>8}",
        end="",
    )
    print("".join(f"{heading:>12}" for heading in COLUMNS.values()) if timed else "")


def show(r: Mapping[str, Any]) -> None:
    """Print a line of the table."""
    print(
        f"{r['layer']:16} {r['rows']:5} {r['dim']:5} {r['samples']:7} "
        f"{r['formulation']:7} {r['launches']:8} {r['operations'] / 1e9:7.1f} "
        f"{r['bytes'] / 1e6:7.1f} {r['floor_us']:8.1f}",
        end="",
    )
    timed = "".join(f"{r.get(column, math.nan):12.1f}" for column in COLUMNS)
    checked = f"  off by {r['solve_error']:.1e}" if "solve_error" in r else ""
    print(timed if "solve_us" in r else checked, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(REAL))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16"
    )
    parser.add_argument(
        "--gpu", choices=GPUS, default=name_here(), help="for the floors"
    )
    parser.add_argument(
        "--formulation", choices=("auto", "primal", "gram"), default="auto"
    )
    parser.add_argument(
        "--budget",
        type=above_zero,
        default=math.inf,
        metavar="SECONDS",
        help="after which torch.compile, which takes long, is left out",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the solve without a GPU, too; needs TRITON_INTERPRET=1",
    )
    add_tuning(parser)
    add_outputs(parser, plot=True)


def run(args: argparse.Namespace) -> int:
    """Count, time where there is a GPU, print and write; returns the exit code."""
    if not torch.cuda.is_available():
        print("No GPU here: counts and floors from datasheet rates; no time measured.")
    results = Results(args.json)
    deadline = time.monotonic() + args.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Tuning(args.autotune, args.cache_dir).applied(device, list):
        for name in args.model:
            bench(name, args, results, deadline)
    if args.plot:
        drawn = [_roofline(name, results.good) for name in dict.fromkeys(args.model)]
        title = f"the solve beside cuDNN's composition, samples in {args.dtype}"
        try_to(draw_rooflines, args.plot, title, drawn, GPUS[args.gpu], MEASURED)
    return results.exit_code


def _roofline(name: str, results: Sequence[Mapping[str, Any]]) -> Roofline:
    mine = [r for r in results if r["model"] == name]
    points = [
        Point(r["layer"], r["operations"], r["bytes"], r.get("solve_us")) for r in mine
    ]
    speedups = [
        (r["layer"], r["eager_us"] / r["solve_us"]) for r in mine if "eager_us" in r
    ]
    return Roofline(name, points, speedups)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``frog-triton bench kernels``."""
    return cli.main([*["bench", "kernels"], *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
