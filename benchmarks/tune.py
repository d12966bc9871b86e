"""Find the fastest configurations of just the launches that the benches make.

    python -m frog_triton.benchmarks.tune --budget 150

First the layers of the benches' steps, then those of their kernels, the costliest
first, within a budget; the table is kept as it grows, and the same command goes on with
what is left.
``frog-triton autotune`` does the same for a model of your own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..autotune.cache import Cache, Machine, shipped
from ..autotune.shortlist import keys
from ..autotune.tuner import CudaTimer, Timer, Tuner
from ..autotune.tuning import machine_of
from ..capture.capture import SAMPLINGS
from ..cli.arguments import Parser, above_zero, output_folder, positive
from ..cli.candidates import show, to_json
from ..cli.output import add_outputs
from ..kernels.gpu import GPU, GPUS, detect
from ..kernels.launch import Made
from ..kernels.table import Table
from ..solve.launches import Bucket
from . import bench_kernels, shapes
from .records import write_json

DTYPE = torch.bfloat16
"""Of the samples, the benches' default."""

BENCHES = ("step", "kernels")


def buckets(bench: str, rehearse: bool = False) -> list[Bucket]:
    """The layers of a bench, as it asks for them.

    Args:
        bench: of `BENCHES`.
        rehearse: only its tiny model.
    """
    found: list[Bucket] = []
    if bench == "step":
        for name in ("tiny",) if rehearse else shapes.REAL:
            size = 20 if rehearse else SAMPLINGS["positions"]
            found += shapes.grouped(shapes.MODELS[name](size), DTYPE)
        return found
    for name in ("tiny",) if rehearse else bench_kernels.REAL:
        lines = bench_kernels.geometries(name, DTYPE, "h200", "auto").layers
        found += bench_kernels.buckets(lines, DTYPE)
    return found


def count_launches(groups: Sequence[Sequence[Made]]) -> list[list[float]]:
    """A timer that times nothing: a microsecond a launch."""
    return [[float(len(launches))] for launches in groups]


def tune(
    found: Sequence[Bucket],
    device: torch.device,
    gpu: GPU,
    machine: Machine,
    cache: Cache,
    timer: Timer,
    args: argparse.Namespace,
) -> Table:
    """Tune what the cache lacks, and keep it there.

    Args:
        found: the layers.
        device: to run on.
        gpu: what is tuned for.
        machine: whose table it is.
        cache: of tables.
        timer: see `Timer`.
        args: the command line.
    """
    tuner = Tuner(
        gpu,
        device,
        timer,
        shipped(machine).merged(cache.load(machine)),
        args.top,
        args.budget,
        lambda what, share: print(what, flush=True),
        compile=not args.rehearse,
        keep=lambda table: cache.store(machine, table),
    )
    tuner.tune(found)
    show(tuner.reports, gpu)
    if args.json:
        write_json(args.json, to_json(tuner.reports, gpu))
    return tuner.table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0 if all is tuned, 1 if the budget was too small for it."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--bench", nargs="+", choices=BENCHES, default=list(BENCHES), metavar="BENCH"
    )
    parser.add_argument("--budget", type=above_zero, default=150.0, metavar="SECONDS")
    parser.add_argument("--top", type=positive, default=4, metavar="N")
    parser.add_argument("--cache-dir", type=output_folder, metavar="DIR")
    add_outputs(parser)
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="tiny layers in Triton's interpreter, and nothing timed",
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.rehearse:
        print("error: there is no GPU here; --rehearse runs without", file=sys.stderr)
        return 3
    timer: Timer = count_launches
    if args.rehearse:
        device, gpu = torch.device("cpu"), GPUS["h200"]
        machine = Machine("rehearsal", gpu.capability)
        print("A rehearsal: nothing was timed.")
    else:
        device = torch.device("cuda")
        here = detect(device)
        assert here is not None
        gpu, machine, timer = here, machine_of(device), CudaTimer(device)
    found: list[Bucket] = []
    for bench in args.bench:
        found += buckets(bench, args.rehearse)
    cache = Cache(args.cache_dir)
    table = tune(found, device, gpu, machine, cache, timer, args)
    left = sum(asked.key not in table.configs for asked in keys(found))
    print(f"{len(table.configs)} configurations in {cache.path(machine)}")
    if left:
        print(f"{left} keys are left: the same command goes on with them")
    return int(left > 0)


if __name__ == "__main__":
    raise SystemExit(main())
