"""The convolution kernels on every convolution of ResNet-18 and ResNet-50.

    python -m frog_triton.benchmarks.bench_kernels --model resnet18

On a GPU: the whole solve in Triton beside the same solve composed of cuDNN's
convolutions (the torch backend), eager and under `torch.compile`, and beside cuDNN's
bare forward and weight-gradient convolutions, each checked before it is timed. Anywhere
else: launches, operations, bytes and the floor they imply, and no time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import cost
from ..autotune.traffic import GPUS
from ..cost import Cost, LayerShape
from ..layers import ConvMap
from ..ops import torch_ops, triton_ops
from ..ops.types import Rows
from ..preconditioner import solve
from ..solvers import Batch
from .environment import environment
from .models import resnet

# Model, examples sampled, image size.
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], int, int]] = {
    "resnet18": (lambda: resnet(18), 64, 32),
    "resnet50": (lambda: resnet(50, 1000, small_images=False), 32, 224),
}


def geometries(name: str, dtype: torch.dtype, gpu: str, formulation: str) -> Cost:
    """Counts of a model's convolutions, one layer of each geometry."""
    build, samples, size = MODELS[name]
    counted = cost(build(), torch.zeros(1, 3, size, size), sample_size=samples)
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


def microseconds(run: Callable[[], Any]) -> float:
    """Median of a GPU function's time."""
    import triton

    return 1e3 * float(triton.testing.do_bench(run, return_mode="median"))


def measure(shape: LayerShape, dtype: torch.dtype, formulation: str) -> dict[str, Any]:
    """Times of one geometry: the solve, its rivals, and cuDNN's bare convolutions."""
    batch, map_ = problem(shape, dtype, "cuda")
    options: dict[str, Any] = {"damping": 1e-4, "cg_iters": 4}

    def ours() -> Rows:
        return solve(triton_ops, batch, formulation=formulation, **options).rows()

    def eager() -> Rows:
        return solve(torch_ops, batch, formulation="primal", **options).rows()

    exact = Batch(batch.xs, batch.ys, [m.to(torch.float64) for m in batch.ms])
    expected = solve(torch_ops, exact, formulation="primal", **options).rows().weight
    error = float((ours().weight - expected).norm() / expected.norm())
    if not error < 0.1:
        raise RuntimeError(f"{shape.name}: the solve is off by {error:.1e}: not timed")
    spec, m = shape.conv, batch.ms[0]
    assert spec is not None
    weight = m.weight.view(shape.rows, -1, *spec.kernel).to(dtype)
    y = batch.ys[0].unflatten(2, map_.output_shape)
    settings = (spec.stride, spec.padding, spec.dilation, False, [0, 0], spec.groups)
    backward = torch.ops.aten.convolution_backward
    mask = (False, True, False)
    return {
        "error": error,
        "solve_us": microseconds(ours),
        "eager_us": microseconds(eager),
        "compiled_us": microseconds(torch.compile(eager)),
        "cudnn_forward_us": microseconds(
            lambda: torch.convolution(map_.x, weight, None, *settings)
        ),
        "cudnn_adjoint_us": microseconds(
            lambda: backward(y, map_.x, weight, None, *settings, mask)
        ),
    }


def bench(
    name: str, dtype: torch.dtype, gpu: str, formulation: str
) -> list[dict[str, Any]]:
    """Counts for each geometry of a model, and times where there is a GPU."""
    counted = geometries(name, dtype, gpu, formulation)
    results = []
    print(
        f"\n{name}, samples in {str(dtype).removeprefix('torch.')}, k = 4; floors for "
        f"{gpu}\n{'layer':16} {'R':>5} {'D':>5} {'N':>7} {'solve':7} {'launches':>8} "
        f"{'GFLOP':>7} {'MB':>7} {'floor us':>8} {'us':>13}"
    )
    for line in counted.layers:
        shape = line.layer
        result: dict[str, Any] = {
            "model": name,
            "layer": shape.name,
            "rows": shape.rows,
            "dim": shape.dim,
            "samples": shape.samples,
            "formulation": line.formulation,
            "launches": line.launches,
            "operations": line.operations,
            "bytes": line.bytes,
            "floor_us": line.floor_us,
        }
        if torch.cuda.is_available():
            result |= measure(shape, dtype, line.formulation)
        timed = f"{result['solve_us']:.0f}" if "solve_us" in result else "not measured"
        print(
            f"{shape.name:16} {shape.rows:5} {shape.dim:5} {shape.samples:7} "
            f"{line.formulation:7} {line.launches:8} {line.operations / 1e9:7.1f} "
            f"{line.bytes / 1e6:7.1f} {line.floor_us:8.1f} {timed:>13}"
        )
        results.append(result)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16"
    )
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="for the floors")
    parser.add_argument(
        "--formulation", choices=("auto", "primal", "gram"), default="auto"
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("No GPU here: counts and floors from datasheet rates; no time measured.")
    results = []
    for name in args.model:
        dtype = getattr(torch, args.dtype)
        results += bench(name, dtype, args.gpu, args.formulation)
    if args.json:
        content = {"environment": environment(), "results": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
