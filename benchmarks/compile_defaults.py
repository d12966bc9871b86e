"""Compile every default configuration offline; needs no GPU.

    python -m frog_triton.benchmarks.compile_defaults --capability 90 --samples 64

prints a JSON line for each kernel: registers, spilled bytes, shared memory and
tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import triton

from ..autotune.offline import compile_launch
from ..cost import LayerShape, step_launches
from ..ops import triton_ops
from ..ops.launch import recording
from ..ops.types import Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def launches(samples: int, dtype: str, formulation: str) -> Iterator[Any]:
    """One launch of each kind in a step on two layers of 768 by 768."""
    shape = LayerShape("", 768, 768, samples)
    seen = set()
    for launch in step_launches(shape, 2, formulation, sample_dtype=DTYPES[dtype]):
        flags = {k: v for k, v in launch.args.items() if isinstance(v, bool)}
        kind = (launch.name, *sorted(flags.items()))
        if kind not in seen:
            seen.add(kind)
            yield launch
    yield from gather(samples, dtype)


def gather(samples: int, dtype: str) -> list[Any]:
    """The launch that draws positions of a 3x3 convolution."""
    x = torch.empty(128, 64, 32, 32, dtype=DTYPES[dtype], device="meta")
    index = torch.empty(samples, dtype=torch.int64, device="meta")
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), "zeros")
    with recording(run=False) as made:
        triton_ops.gather_patches(x, index, (32, 32), window)
    return made


def compile_one(job: tuple[int, int, str, str, int]) -> dict[str, Any]:
    """Compile one launch of a job ``(capability, samples, dtype, formulation, i)``."""
    capability, samples, dtype, formulation, i = job
    launch = list(launches(samples, dtype, formulation))[i]
    resources = compile_launch(
        launch.kernel, launch.args, launch.config.options(), capability
    )
    return {
        "kernel": launch.name,
        "capability": capability,
        "samples": samples,
        "dtype": dtype,
        "formulation": formulation,
        "triton": triton.__version__,
        "config": launch.config.options(),
        **asdict(resources),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--formulation", nargs="+", choices=("gram", "primal"), default=["gram"]
    )
    args = parser.parse_args(argv)
    jobs = [
        (capability, samples, dtype, formulation, i)
        for samples in args.samples
        for dtype in args.dtype
        for formulation in args.formulation
        for i in range(len(list(launches(samples, dtype, formulation))))
        for capability in args.capability
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(compile_one, jobs):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
