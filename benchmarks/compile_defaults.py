"""Compile every default configuration offline; needs no GPU.

    python -m frog_triton.benchmarks.compile_defaults --capability 90 --samples 64

prints a JSON line for each kernel: registers, spilled bytes, shared memory,
tensor-core instructions, and instructions that approximate.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
import triton

from ..autotune.offline import compiled, inexact, resources
from ..cli.arguments import Parser, positive
from ..kernels.gpu import assuming, nearest
from ..kernels.launch import Launch, Made, recording
from ..layers.conv import ConvSpec
from ..linalg.rows import Reading, Window
from ..ops import triton_ops
from ..solve import FORMULATIONS
from ..solve.launches import (
    Bucket,
    LayerShape,
    step_launches,
    steps_launches,
    trial_step,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _conv(
    rows: int, channels: int, groups: int, samples: int, bias: bool, kernel: int = 3
) -> LayerShape:
    """A convolution, over maps of 8 by 8; of one tap, with a stride of two."""
    stride, pad = (1, 1) if kernel > 1 else (2, 0)
    spec = ConvSpec((kernel,) * 2, (stride,) * 2, (pad,) * 2, (1, 1), groups)
    dim = kernel**2 * channels // groups
    size = 8 * stride
    image = (channels, size, size)
    return LayerShape("", rows, dim, 64 * samples, groups, bias, image, spec)


SHAPES: dict[str, Callable[[int], LayerShape]] = {
    "linear": lambda n: LayerShape("", 768, 768, n),
    "ragged": lambda n: LayerShape("", 100, 147, n, bias=False),
    "grouped": lambda n: LayerShape("", 64, 9, n, groups=64),
    "conv": lambda n: _conv(128, 128, 1, n, True),
    "stem": lambda n: _conv(64, 3, 1, n, False),
    "grouped-conv": lambda n: _conv(128, 128, 4, n, True),
    "depthwise": lambda n: _conv(128, 128, 128, n, True),
    "pointwise": lambda n: _conv(128, 64, 1, n, False, kernel=1),
}
"""Layers by name, as functions of the samples (of a convolution: examples)."""

TOGETHER = "together"
"""Layers of two sizes, which share launches."""


@functools.lru_cache(maxsize=8)  # jobs of one list follow each other
def launches(
    capability: int,
    samples: int,
    dtype: str,
    formulation: str,
    shape: str,
    every_branch: bool = False,
) -> list[Made]:
    """One launch of each kind in a step on two layers of a shape.

    Args:
        capability: of the GPU that they are for.
        samples: N; of a convolution: examples.
        dtype: of the samples.
        formulation: ``"primal"`` or ``"gram"``.
        shape: a name of `SHAPES`, or `TOGETHER`.
        every_branch: with what other options of an optimizer launch.
    """
    with assuming(nearest(capability)):
        made = _made(samples, dtype, formulation, shape, every_branch)
    kinds: dict[Any, Made] = {}
    for launch in made:
        part = launch.parts[0]
        flags = {
            k: str(v)
            for k, v in part.args.items()
            if isinstance(v, bool) or k == "KEY" or k.endswith("DTYPE")
        }
        values = sorted((flags | part.config.values()).items(), key=str)
        kinds.setdefault((launch.name, *values), launch)
    return list(kinds.values())


def _made(
    samples: int, dtype: str, formulation: str, shape: str, every_branch: bool
) -> list[Made]:
    dtypes = (DTYPES[dtype], torch.float32, torch.float32)
    made: list[Made] = []
    if shape == TOGETHER:
        shapes = [LayerShape("", 768, dim, samples) for dim in (768, 320)]
        buckets = [Bucket(each, 2, dtypes=dtypes) for each in shapes]
        made += steps_launches(buckets, formulation)
        if every_branch:
            buckets = [replace(bucket, nesterov=True) for bucket in buckets]
            made += steps_launches(buckets, formulation)
    else:
        bucket = Bucket(SHAPES[shape](samples), 2, dtypes=dtypes)
        made += [*step_launches(bucket, formulation), *gather(samples, dtype)]
        made += look(dtype)
        if formulation == "gram":  # the update along a direction is the same for both
            made += step_launches(bucket, formulation, orthogonalize=True)
        if every_branch:
            made += step_launches(replace(bucket, nesterov=True), formulation)
            narrow = (DTYPES[dtype], torch.bfloat16, torch.bfloat16)
            for nesterov in (False, True):
                other = replace(bucket, nesterov=nesterov, dtypes=narrow)
                made += step_launches(other, formulation)
            made += rows(bucket, formulation)
    return made


def rows(bucket: Bucket, formulation: str) -> list[Launch]:
    """Of directions that are written out, and of what else there is.

    Args:
        bucket: the layers.
        formulation: ``"primal"`` or ``"gram"``.
    """
    trial = trial_step(bucket, formulation, _empty)
    batch = trial.batch
    with recording(run=False) as made:
        xs, ys = triton_ops.prepare(batch.xs, batch.ys, torch.float32)
        batch = replace(batch, xs=xs, ys=ys)
        solution = FORMULATIONS[formulation](triton_ops, batch, bucket.iters)
        solution.rows()
        FORMULATIONS[formulation](triton_ops, replace(batch, grads=None), bucket.iters)
        if batch.xs[0].window is not None:
            triton_ops.write_out(batch.xs, batch.ys)
    return made.parts


def _empty(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def look(dtype: str) -> list[Launch]:
    """Launches of the look at the gradients."""
    with recording(run=False) as made:
        triton_ops.magnitudes([_empty((8, 8), DTYPES[dtype])], {})
    return made.parts


def gather(samples: int, dtype: str) -> list[Any]:
    """Launches that take positions of a 3x3 convolution, and that draw them as well.

    By keys of the host's, of a counter on the device, and that were written there.
    """
    x = torch.empty(128, 64, 32, 32, dtype=DTYPES[dtype], device="meta")
    index = torch.empty(samples, dtype=torch.int64, device="meta")
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), "zeros")
    reading = Reading(1, window, (32, 32))
    drawing = triton_ops.drawing(x, reading, 128 * 32 * 32, samples)
    assert drawing is not None
    with recording(run=False) as made:
        triton_ops.gather_patches(x, index, (32, 32), window)
        drawing.given(x, 0)
        _, key = drawing.counted(x, 0, torch.empty((), device="meta"), 0)
        drawing.written(x, key)
    return made


Job = tuple[int, int, str, str, str, bool, int]
"""Arguments of `launches`, and which of them."""


def _launch(job: Job) -> Made:
    *arguments, i = job
    return launches(*arguments)[i]


def compile_one(job: Job) -> str:
    """Compile a launch; a hash of the machine code, which Triton keeps on disk."""
    kernel = compiled(_launch(job), job[0])
    return hashlib.sha256(kernel.asm["cubin"]).hexdigest()


def look_into(job: Job) -> dict[str, Any]:
    """What is in the machine code of a launch."""
    kernel = compiled(_launch(job), job[0])
    return {**asdict(resources(kernel)), "inexact": inexact(kernel)}


def _described(job: Job) -> dict[str, Any]:
    capability, samples, dtype, formulation, shape, _, _ = job
    launch = _launch(job)
    return {
        "kernel": launch.name,
        "capability": capability,
        "samples": samples,
        "dtype": dtype,
        "formulation": formulation,
        "shape": shape,
        "multiplies": _multiplies(launch.parts[0].args),
        "triton": triton.__version__,
        "config": launch.parts[0].config.options(),
    }


class Compiler:
    """Compiles launches in processes; the same machine code is looked into once."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    def results(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What each launch compiles to."""
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            codes = list(pool.map(compile_one, jobs))
            new = {
                code: job
                for code, job in zip(codes, jobs, strict=True)
                if code not in self._known
            }
            looks = pool.map(look_into, new.values())
            self._known |= zip(new, looks, strict=True)
        return [
            {**_described(job), **self._known[code]}
            for code, job in zip(codes, jobs, strict=True)
        ]


def _multiplies(args: Mapping[str, Any]) -> bool:
    """Whether the launch has matrix products."""
    return (
        "PRECISION" in args
        and args.get("PROJECT", True)
        and args.get("SAMPLES", 1) > 0
        and args.get("MULTIPLY", True)
        and not args.get("DEPTHWISE", False)
    )


def main(argv: Sequence[str] | None = None, compiler: Compiler | None = None) -> None:
    """Command line.

    Args:
        argv: of the command.
        compiler: of an earlier call, what it knows is not looked at again.
    """
    parser = Parser(description=__doc__)
    parser.add_argument("--capability", type=positive, nargs="+", default=[80, 90, 100])
    parser.add_argument(
        "--samples", type=positive, nargs="+", default=[16, 64, 128, 256]
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--formulation", nargs="+", choices=("gram", "primal"), default=["gram"]
    )
    parser.add_argument(
        "--shape", nargs="+", choices=(*SHAPES, TOGETHER), default=["linear"]
    )
    parser.add_argument(
        "--every-branch",
        action="store_true",
        help="compile what other options of an optimizer launch, too",
    )
    args = parser.parse_args(argv)
    jobs = [
        (capability, samples, dtype, formulation, shape, args.every_branch, i)
        for capability in args.capability
        for samples in args.samples
        for dtype in args.dtype
        for formulation in args.formulation
        for shape in args.shape
        for i in range(
            len(
                launches(
                    capability, samples, dtype, formulation, shape, args.every_branch
                )
            )
        )
    ]
    for result in (compiler or Compiler()).results(jobs):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
