"""What a step's kernels would take on an H200, estimated from their machine code.

    frog-triton bench estimate --model gpt2-small --samples 128 --plot roofline.png
    frog-triton bench estimate --images resnet18 resnet50

The second solves on whole images, one geometry at a time.

More than 400 lines: how often each kernel's loops run stands beside what is made of it.

Needs no GPU: kernels are compiled for sm_90, and their registers, shared memory,
tensor-core instructions and instruction mix read. **No time here is a measurement.** A
kernel is taken for as long as its bytes take, from memory or through the L2 cache, and
beside that its instructions, stretched by what warps wait. The stretch was found by
compiling prototypes whose time on an H200 is known (`benchmarks/results/nvidia-h200`):
26 estimates were 0.76 to 1.75 times what was measured.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import cli
from ..autotune.machine import Loop, Trips, code_of, slots
from ..autotune.model import count_trips, occupancy
from ..autotune.offline import Resources, compiled, resources
from ..capture.capture import SAMPLINGS
from ..cli.arguments import positive
from ..cli.output import add_outputs
from ..kernels.gpu import GPUS, assuming
from ..kernels.kernel import blocks
from ..kernels.launch import Launch
from ..kernels.work import Sizes, work
from ..solve import FORMULATIONS
from ..solve.formulation import choose
from ..solve.launches import Bucket, step_launches
from . import bench_kernels
from .plot import ESTIMATED, Point, Roofline, draw_rooflines, try_to
from .records import Results
from .shapes import MODELS, grouped

H200 = GPUS["h200"]
CAPABILITY = 90

# Measured on an H200 by `environment` and `timing.matrix_rate`.
MEMORY, BF16 = 4.27e12, 790e12

# An assumption, and the clock of NVIDIA's datasheet.
L2, CLOCK = 5.5e12, 1.755e9

WAITING = {1: 2.3, 2: 1.6}
"""Cycles that pass for an instruction issued, by programs that a processor holds."""

LAUNCH_US = 3.0
"""From a kernel's end to the next one's work, in a recorded step; an assumption."""

ADAMW = 7
"""Passes of fused AdamW over the parameters: p, g, m and v in, p, m and v out."""

ADAMW_MEASURED = 1.67
"""Times as long as its bytes took it on an H200, for GPT-2 small."""


def _momentum(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    main, never = Loop(blocks(args["D"], v["BLOCK_D"])), Loop(0)
    if not args["UPDATE"]:
        return [main, never]
    vectors = v["BLOCK_R"] * v["BLOCK_G"] // (4 * 32 * v["num_warps"])
    ahead = Loop(blocks(args["D"], v["BLOCK_G"]), loads=vectors)
    # Those that do not run are of rows with huge gradients, and of other scales.
    return [ahead, never, main, never]


def _gram(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    # The second is of samples whose scale is not one.
    main = Loop(blocks(min(args["split_length"], args["D"]), v["BLOCK_D"]))
    return [main, Loop(0)]


def _gram_cg(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    inner: Trips = ()
    if v["BLOCK_K"] < v["BLOCK_N"]:
        inner = [Loop(blocks(args["N"], v["BLOCK_K"]))]
    rows = blocks(args["R"], v["BLOCK_R"])
    iterations = Loop(args["ITERS"] - 1, inner)
    return [Loop(blocks(rows, args["block_step"]), [iterations])]


def _gram_cg_tiled(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    tile = Loop(blocks(args["N"], v["BLOCK_N"]))
    product = Loop(tile.count, [Loop(blocks(args["N"], v["BLOCK_K"]))])
    return [tile, tile, Loop(args["ITERS"], [tile, tile, product]), tile]


def _update(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    columns = blocks(min(args["piece_length"], args["D"]), v["BLOCK_D"])
    if args["SAMPLES"] < 2:
        return [Loop(columns)]
    tile = Loop(blocks(args["N"], v["BLOCK_N"]))
    return [tile, Loop(columns, [tile])]


def _primal_direction(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    main = Loop(blocks(args["D"], v["BLOCK_D"]))
    if args["FIRST"]:
        return [main]
    # Of partial sums, four at a time, and those that are left.
    sums = [Loop(args["rho_blocks"] // 4), Loop(args["rho_blocks"] % 4)]
    return [*sums, main]


def _newton_gram(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    return [Loop(blocks(args["R" if args["TALL"] else "ROW"], v["BLOCK_K"]))]


def _newton_polynomial(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    main, side = Loop(blocks(args["SIDE"], v["BLOCK_K"])), args["SIDE"]
    if not args["FIRST"]:
        return [main]
    trace = Loop(
        blocks(side, v["BLOCK"]), loads=-(-v["BLOCK"] // (32 * v["num_warps"]))
    )
    return [trace, main]


def _newton_step(args: Mapping[str, Any], v: Mapping[str, int]) -> Trips:
    return [Loop(blocks(args["ROW" if args["TALL"] else "R"], v["BLOCK_K"]))]


TRIPS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, int]], Trips]] = {
    "_momentum_project_kernel": _momentum,
    "_gram_kernel": _gram,
    "_gram_cg_kernel": _gram_cg,
    "_gram_cg_tiled_kernel": _gram_cg_tiled,
    "_primal_direction_kernel": _primal_direction,
    "_newton_gram_kernel": _newton_gram,
    "_newton_polynomial_kernel": _newton_polynomial,
    "_newton_step_kernel": _newton_step,
    "_update_kernel": _update,
}
"""How often the loops of a kernel run; of others, each as often as the main one."""


@dataclass(frozen=True)
class Line:
    """All launches of a kernel in a step, of every geometry.

    Attributes:
        kernel: its name.
        programs: of all.
        registers: most of a thread.
        spilled: most bytes of a thread.
        shared: most bytes of a program.
        held: programs that a processor holds, the fewest.
        operations: of matrix products.
        bytes: through memory.
        cache_bytes: through the L2 cache.
        executed: instructions of all warps, by kind.
        memory_us: what the bytes take.
        cache_us: what those of the cache take.
        tensor_us: what the products take at the rate of large ones.
        issue_us: what the instructions take, if no warp waits.
        time_us: the estimate.
        floor_us: of bytes and products at the datasheet's rates.
    """

    kernel: str
    programs: int
    registers: int
    spilled: int
    shared: int
    held: int
    operations: int
    bytes: int
    cache_bytes: float
    executed: Mapping[str, int]
    memory_us: float
    cache_us: float
    tensor_us: float
    issue_us: float
    time_us: float
    floor_us: float


Look = tuple[Resources, Counter[str]]
"""Of a launch: what it takes, and what a warp of it executes."""


def look_at(job: tuple[Bucket, str, bool, int]) -> Look:
    """Compile a launch of a geometry's step, and read its machine code."""
    *how, i = job
    launch = _launches(*how)[i]
    kernel = compiled(launch, CAPABILITY)
    values = launch.config.values()
    known = TRIPS.get(launch.name)
    trips = known(launch.args, values) if known else [Loop(count_trips(launch))] * 8
    return resources(kernel), code_of(kernel).executed(trips)


@functools.lru_cache(maxsize=8)  # jobs of one geometry follow each other
def _launches(bucket: Bucket, formulation: str, orthogonalize: bool) -> list[Launch]:
    with assuming(H200):
        return step_launches(bucket, formulation, orthogonalize)


def estimate(
    buckets: Iterable[Bucket],
    formulation: str,
    orthogonalize: bool,
    pool: ProcessPoolExecutor,
) -> list[Line]:
    """A step's kernels, in the order in which they first run.

    Args:
        buckets: the layers.
        formulation: ``"gram"``, ``"primal"`` or ``"auto"``.
        orthogonalize: as for `FROG`.
        pool: compiles.
    """
    jobs = []
    for bucket in buckets:
        how = choose(bucket, H200) if formulation == "auto" else formulation
        count = len(_launches(bucket, how, orthogonalize))
        jobs += [(bucket, how, orthogonalize, i) for i in range(count)]
    found: dict[str, list[tuple[Launch, Look]]] = defaultdict(list)
    for job, look in zip(jobs, pool.map(look_at, jobs), strict=True):
        launch = _launches(*job[:-1])[job[-1]]
        found[launch.name].append((launch, look))
    return [_line(name, made) for name, made in found.items()]


def _line(name: str, made: Sequence[tuple[Launch, Look]]) -> Line:
    """Geometries share a launch: their programs follow each other."""
    executed: Counter[str] = Counter()
    issue = 0.0
    held = []
    for launch, (takes, per_warp) in made:
        warps = launch.config.num_warps
        programs = math.prod(launch.grid)
        held.append(occupancy(H200, warps, takes))
        for kind, count in per_warp.items():
            executed[kind] += count * warps * programs
        issued = slots(per_warp) * warps * programs / 4  # schedulers of a processor
        issue += issued / CLOCK * WAITING[min(held[-1], 2)]
    programs = sum(math.prod(launch.grid) for launch, _ in made)
    done = [work(launch) for launch, _ in made]
    moved = sum(w.bytes for w in done)
    again = sum(
        launch.kernel.again(Sizes(launch), launch.config.values()) for launch, _ in made
    )
    busy = min(programs, H200.processors)
    tensor = sum(w.tf32_operations for w in done) / (BF16 / 2)
    memory, cache = moved / MEMORY, (moved + again) / L2
    time = max(memory, cache, tensor) + issue / busy
    return Line(
        name,
        programs,
        max(look[0].registers for _, look in made),
        max(look[0].spilled for _, look in made),
        max(look[0].shared for _, look in made),
        min(held),
        sum(w.operations for w in done),
        moved,
        moved + again,
        dict(executed),
        1e6 * memory,
        1e6 * cache,
        1e6 * tensor,
        1e6 * sum(
            slots(look[1]) * launch.config.num_warps * math.prod(launch.grid) / 4
            for launch, look in made
        ) / CLOCK / busy,
        1e6 * time + LAUNCH_US,
        sum(w.floor(H200) for w in done),
    )  # fmt: skip


def show(model: str, samples: int, lines: Sequence[Line], parameters: int) -> None:
    """Print a model's kernels and their sum, beside AdamW's."""
    print(f"\n{model}, N = {samples}: estimated for an H200, nothing measured")
    print(
        f"{'kernel':24} {'regs':>4} {'spill':>5} {'KiB':>5} {'held':>4} {'MB':>6} "
        f"{'memory':>6} {'L2':>5} {'tensor':>6} {'issue':>5} {'us':>6} {'floor':>6}"
    )
    for line in lines:
        print(
            f"{short(line.kernel):24} {line.registers:4} "
            f"{line.spilled:5} {line.shared / 1024:5.0f} {line.held:4} "
            f"{line.bytes / 1e6:6.0f} {line.memory_us:6.0f} {line.cache_us:5.0f} "
            f"{line.tensor_us:6.0f} {line.issue_us:5.0f} {line.time_us:6.0f} "
            f"{line.floor_us:6.0f}"
        )
    total, floor = totals(lines)
    adamw = 1e6 * ADAMW * 4 * parameters / MEMORY
    passes = sum(line.bytes for line in lines) / (4 * parameters)
    print(
        f"{passes:.2f} passes; {total:.0f} us (floor {floor:.0f}), "
        f"{total / adamw:.2f} times AdamW's bytes ({adamw:.0f} us), "
        f"{total / (adamw * ADAMW_MEASURED):.2f} times fused AdamW as it was measured"
    )


def show_geometry(name: str, lines: Sequence[Line]) -> None:
    """Print what a geometry's solve and its two products take, and their floors."""
    total, floor = totals(lines)
    parts = [f"{name:28} {total:7.0f} {floor / total:6.0%}"]
    for line in lines:
        if line.kernel in PRODUCTS:
            parts.append(
                f"{line.registers:5} {line.spilled:5} {line.held:4} "
                f"{line.time_us:7.0f} "
                f"{line.floor_us / line.time_us:6.0%}"
            )
    print("  ".join(parts))


PRODUCTS = ("_primal_forward_kernel", "_primal_adjoint_kernel")
"""With samples that are images."""


def totals(lines: Sequence[Line]) -> tuple[float, float]:
    """Estimate and floor of all kernels, microseconds."""
    return sum(line.time_us for line in lines), sum(line.floor_us for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    size = SAMPLINGS["positions"]
    models = ["gpt2-small", "llama-1b", "resnet50"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=models)
    parser.add_argument(
        "--images", nargs="+", choices=bench_kernels.MODELS, default=[], help="instead"
    )
    parser.add_argument(
        "--samples",
        type=positive,
        nargs="+",
        default=[size, 2 * size],
        help="N of each",
    )
    parser.add_argument(
        "--formulation", choices=(*FORMULATIONS, "auto"), default="gram"
    )
    parser.add_argument(
        "--orthogonalize", action="store_true", help="as by default; else a plain step"
    )
    add_outputs(parser, plot=True)


def run(args: argparse.Namespace) -> int:
    """Estimate, print and write; returns 1 if a model could not be estimated."""
    results = Results(args.json)
    with ProcessPoolExecutor() as pool:
        if args.images:
            estimate_images(args.images, results, pool)
        else:
            estimate_steps(args, results, pool)
    if args.plot:
        step = "FROG's step" if args.orthogonalize else "FROG's step, plain"
        what = "its solve on whole images" if args.images else step
        title = f"{what}: kernels on an H200, estimated and never measured"
        drawn = rooflines(results.good)
        try_to(draw_rooflines, args.plot, title, drawn, H200, ESTIMATED)
    return results.exit_code


def rooflines(results: Iterable[Mapping[str, Any]]) -> list[Roofline]:
    """A picture's panels: one for each step, all geometries of images in one."""
    panels: dict[str, list[Point]] = {}
    for r in results:
        title = r["model"]
        if "samples" in r:
            title += f", N = {r['samples']}: {r['estimate_us']:.0f} µs, estimated"
        points = panels.setdefault(title, [])
        for kernel in r["kernels"]:
            name = f"{short(kernel['kernel'])} {r.get('geometry', '')}".strip()
            done = (kernel["operations"], kernel["bytes"], kernel["time_us"])
            if "geometry" not in r or kernel["kernel"] in PRODUCTS:
                points.append(Point(name, *done))
    return [Roofline(title, points) for title, points in panels.items()]


def short(kernel: str) -> str:
    """The name without what all have."""
    return kernel.removeprefix("_").removesuffix("_kernel")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``frog-triton bench estimate``."""
    return cli.main(["bench", "estimate", *(sys.argv[1:] if argv is None else argv)])


def estimate_steps(
    args: argparse.Namespace, results: Results, pool: ProcessPoolExecutor
) -> None:
    """Of models, layers of all geometries together."""
    how = (args.formulation, args.orthogonalize)
    for model, samples in itertools.product(args.model, args.samples):
        names = {"model": model, "samples": samples}
        shapes = MODELS[model](samples)
        parameters = sum(s.rows * s.row_length for s in shapes)
        buckets = grouped(shapes, torch.bfloat16)
        lines: list[Line] = []
        if "error" not in results.add(names, _work(buckets, *how, pool, lines)):
            show(model, samples, lines, parameters)


def estimate_images(
    models: Sequence[str], results: Results, pool: ProcessPoolExecutor
) -> None:
    """Of convolutions on whole images, a layer of each geometry by itself."""
    heading = f"{'regs':>5} {'spill':>5} {'held':>4} {'us':>7} {'floor':>6}"
    for model in models:
        print(f"\n{model}, whole images: estimated for an H200, nothing measured")
        print(f"{'':46}{'X p':>31}  {'X^T t':>31}")
        print(f"{'geometry':28} {'us':>7} {'floor':>6}  {heading}  {heading}")
        counted = bench_kernels.geometries(model, torch.bfloat16, "h200", "primal")
        for line in counted.layers:
            (bucket,) = bench_kernels.buckets([line], torch.bfloat16)
            names = {"model": model, "geometry": line.layer.name}
            lines: list[Line] = []
            done = _work([bucket], "primal", False, pool, lines)
            if "error" not in results.add(names, done):
                show_geometry(line.layer.name, lines)


def _work(
    buckets: Iterable[Bucket],
    formulation: str,
    orthogonalize: bool,
    pool: ProcessPoolExecutor,
    lines: list[Line],
) -> Callable[[], dict[str, Any]]:
    """What makes a result, and puts its lines in a list."""

    def estimated() -> dict[str, Any]:
        lines.extend(estimate(buckets, formulation, orthogonalize, pool))
        time, floor = totals(lines)
        kernels = [asdict(line) for line in lines]
        return {"estimate_us": time, "floor_us": floor, "kernels": kernels}

    return estimated


if __name__ == "__main__":
    raise SystemExit(main())
