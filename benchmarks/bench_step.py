"""One optimizer step on the parameter shapes of well-known models.

    python -m frog_triton.benchmarks.bench_step --model gpt2-small --samples 64

On a GPU: FROG's step, orthogonalized as by default and plain, beside fused AdamW, SGD
and Muon on the same tensors, with random gradients and samples, medians and spread; the
plain step is checked first; then forward and backward passes of the model itself, with
FROG's hooks and without, and what of that is the host's. Anywhere else:
launches, bytes, operations and the floor they imply, and no time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import FROG, cli, cost
from ..autotune.tuning import Tuning
from ..capture.capture import SAMPLINGS
from ..cli.arguments import output_folder, positive
from ..cli.output import add_outputs
from ..kernels.gpu import GPUS, name_here
from ..solve.launches import LayerShape
from .passes import MODELS as MODELLED
from .passes import hook_times
from .plot import MEASURED, Point, Roofline, draw_rooflines, try_to
from .records import Results
from .shapes import MODELS, REAL, grouped
from .timing import milliseconds
from .warm import warm

# Passes over the parameters (4 bytes each): reads and writes of p, g and the state.
PASSES = {"AdamW (fused)": 7, "SGD (foreach)": 5, "Muon": None}

FROGS: dict[str, dict[str, Any]] = {"FROG": {}, "FROG plain": {"orthogonalize": False}}
"""Options of the steps of ours that are counted and timed."""

LIMIT = 1e-3
"""Of the relative error of FROG's plain step, beyond which nothing is timed."""


class Step:
    """A model of the given shapes with gradients and samples that are all random.

    Args:
        shapes: of its Linear layers.
        dtype: of the samples.
        device: of everything.
        autotune: as FROG's.
        cache_dir: of tuned configurations.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        dtype: torch.dtype,
        device: str = "cuda",
        autotune: str = "cached",
        cache_dir: Path | None = None,
    ) -> None:
        self.device = device
        self.shapes = list(shapes)
        self.layers = nn.ModuleList(
            nn.Linear(s.dim, s.rows, bias=s.bias, device=device) for s in shapes
        )
        for param in self.layers.parameters():
            param.grad = torch.randn_like(param)
        self.samples = [
            (
                torch.randn(s.samples, s.dim, device=device, dtype=dtype),
                torch.randn(s.samples, s.rows, device=device, dtype=dtype),
            )
            for s in shapes
        ]
        self.frogs = {
            name: FROG(
                self.layers,
                backend="triton",
                sampling="positions",
                sample_size=shapes[0].samples,
                exclude_output_layer=False,
                autotune=autotune,
                autotune_dir=cache_dir,
                **options,
            )
            for name, options in FROGS.items()
        }

    def fill(self, name: str = "FROG") -> None:
        """Hand one of `frogs` its samples, as forward and backward passes would."""
        hand_over(self.frogs[name], self.layers, self.samples)

    def peers(self) -> dict[str, torch.optim.Optimizer]:
        """What a user would pick instead, on the same parameters."""
        params = list(self.layers.parameters())
        matrices = [p for p in params if p.ndim == 2]
        return {
            "AdamW (fused)": torch.optim.AdamW(params, fused=True),
            "SGD (foreach)": torch.optim.SGD(
                params, lr=1e-3, momentum=0.9, foreach=True
            ),
            "Muon": torch.optim.Muon(matrices),
        }

    def check(self) -> float:
        """Largest relative error of a plain first step against torch in float64.

        One layer of each geometry is compared.
        """
        first: dict[tuple[int, int, bool], int] = {}
        for i, s in enumerate(self.shapes):
            first.setdefault((s.rows, s.dim, s.bias), i)
        compared = list(first.values())
        twins = nn.ModuleList(self._twin(i) for i in compared)
        exact = FROG(
            twins,
            backend="torch",
            sampling="positions",
            sample_size=self.shapes[0].samples,
            exclude_output_layer=False,
            **FROGS["FROG plain"],
        )
        wide = [tuple(t.double() for t in self.samples[i]) for i in compared]
        hand_over(exact, twins, wide)
        before = [_vector(twin).clone() for twin in twins]
        exact.step()
        self.fill("FROG plain")
        self.frogs["FROG plain"].step()
        errors = []
        for i, twin, old in zip(compared, twins, before, strict=True):
            expected = _vector(twin) - old
            step = _vector(self.layers[i]).double() - old
            errors.append(float((step - expected).norm() / expected.norm()))
        return max(errors)

    def _twin(self, i: int) -> nn.Linear:
        """A layer in float64, its gradients included."""
        shape, layer = self.shapes[i], self.layers[i]
        twin = nn.Linear(shape.dim, shape.rows, bias=shape.bias, device=self.device)
        twin = twin.double()
        twin.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
        for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.double()
        return twin


def hand_over(optimizer: FROG, layers: nn.ModuleList, samples: Sequence[Any]) -> None:
    """Give an optimizer samples of each layer, all of a batch."""
    for i, (x, y) in enumerate(samples):
        optimizer.capture.called.add(str(i))
        optimizer.capture.add(str(i), layers[i], x, y, len(x))


def _vector(layer: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in layer.parameters()])


def counts(
    shapes: Sequence[LayerShape], dtype: torch.dtype, gpu: str
) -> dict[str, Any]:
    """What the steps of FROG and its peers launch, compute and move at least."""
    params = sum(s.rows * (s.dim + s.bias) for s in shapes)
    result: dict[str, Any] = {
        "layers": len(shapes),
        "parameters": params,
        "floor_gpu": gpu,
    }
    for name, options in FROGS.items():
        counted = cost(shapes, sample_dtype=dtype, gpu=gpu, **options)
        result[name] = {
            "launches": counted.launches,
            "operations": counted.operations,
            "bytes": counted.bytes,
            "passes": counted.bytes / (4 * params),
            "state_bytes": counted.state_bytes,
            "floor_us": counted.floor_us,
        }
    for peer, passes in PASSES.items():
        if passes is not None:
            moved = 4 * passes * params
            result[peer] = {
                "bytes": moved,
                "passes": passes,
                "floor_us": 1e6 * moved / GPUS[gpu].bandwidth,
            }
    return result


def bench(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Counts for a model, a check if asked for, and times where there is a GPU."""
    timed = torch.cuda.is_available()
    dtype: torch.dtype = getattr(torch, args.dtype)
    shapes = MODELS[name](args.samples)
    device = "cuda" if timed else "cpu"
    # Cost and warming up see the table, too: it has formulations in it.
    with Tuning(args.autotune, args.cache_dir).applied(torch.device(device), list):
        result = counts(shapes, dtype, args.gpu)
        warm(grouped(shapes, dtype))
    if not timed and not args.check:
        return result
    step = Step(shapes, dtype, device, args.autotune, args.cache_dir)
    result["relative_error"] = step.check()
    if not result["relative_error"] < LIMIT:
        error = f"FROG's step is off by {result['relative_error']:.1e}"
        raise RuntimeError(f"{error}: nothing is timed")
    if timed:
        add_times(result, step, args.repeats)
        if name in MODELLED:
            del step  # its tensors
            how = {"autotune": args.autotune, "autotune_dir": args.cache_dir}
            here = torch.device(device)
            result["passes"] = hook_times(name, here, args.repeats, **how)
    return result


def add_times(result: dict[str, Any], step: Step, repeats: int) -> None:
    """Time the step of each optimizer, and set it beside the floor."""
    for peer, times in _times(step, repeats).items():
        entry = result.setdefault(peer, {})
        entry.update(times)
        if "floor_us" in entry:
            entry["percent_of_floor"] = 100 * entry["floor_us"] / entry["median_us"]


def _times(step: Step, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of the step of each optimizer."""
    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        name: (frog.step, partial(step.fill, name)) for name, frog in step.frogs.items()
    }
    for peer, optimizer in step.peers().items():
        runs[peer] = (optimizer.step, lambda: None)
    found = {}
    for peer, (run_, before) in runs.items():
        times = milliseconds(run_, before, repeats)
        found[peer] = {
            "median_us": 1e3 * statistics.median(times),
            "min_us": 1e3 * min(times),
            "max_us": 1e3 * max(times),
        }
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print one model's result as a table."""
    print(
        f"\n{result['model']}: {result['layers']} layers, "
        f"{result['parameters'] / 1e6:.1f} M parameters, N = {result['samples']}, "
        f"samples in {result['sample_dtype'].removeprefix('torch.')}; "
        f"floors for {result['floor_gpu']}"
    )
    if "relative_error" in result:
        print(f"FROG's step is off by {result['relative_error']:.1e}")
    print(f"{'':14} {'launches':>8} {'MB':>8} {'passes':>7} {'floor us':>9} {'us':>18}")
    for name, entry in result.items():
        if not isinstance(entry, dict) or name == "passes":
            continue
        timed = "not measured"
        if "median_us" in entry:
            timed = (
                f"{entry['median_us']:.0f} "
                f"({entry['min_us']:.0f} - {entry['max_us']:.0f})"
            )
        moved = f"{entry['bytes'] / 1e6:.0f}" if "bytes" in entry else "-"
        over = f"{entry['passes']:.2f}" if "passes" in entry else "-"
        floor = f"{entry['floor_us']:.0f}" if "floor_us" in entry else "-"
        launches = entry.get("launches", "-")
        print(f"{name:14} {launches:>8} {moved:>8} {over:>7} {floor:>9} {timed:>18}")
    for part, time in result.get("passes", {}).items():
        print(
            f"forward and backward {part}: host {time['host']:.0f} us, "
            f"device {time['device']:.0f} us"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    size = SAMPLINGS["positions"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(REAL))
    parser.add_argument(
        "--samples", type=positive, default=size, help=f"N (default: FROG's, {size})"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16",
        help="of the samples (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", choices=GPUS, default=name_here(), help="for the floors"
    )
    parser.add_argument("--repeats", type=positive, default=50, help="(default: 50)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the step without a GPU, too; needs TRITON_INTERPRET=1",
    )
    add_tuning(parser)
    add_outputs(parser, plot=True)


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which configurations kernels have."""
    parser.add_argument(
        "--autotune",
        choices=("off", "cached"),
        default="cached",
        help="default configurations, or tuned ones where there are (default)",
    )
    parser.add_argument(
        "--cache-dir", type=output_folder, metavar="DIR", help="of tuned configurations"
    )


def run(args: argparse.Namespace) -> int:
    """Count, time where there is a GPU, print and write; returns the exit code."""
    if not torch.cuda.is_available():
        print("No GPU here: counts and floors from datasheet rates; no time measured.")
    results = Results(args.json)
    for name in args.model:
        names = {"model": name, "samples": args.samples, "autotune": args.autotune}
        names["sample_dtype"] = f"torch.{args.dtype}"

        def work(name: str = name) -> dict[str, Any]:
            return bench(name, args)

        entry = results.add(names, work)
        if "error" not in entry:
            show(entry)
    if args.plot:
        _draw(args, results.good)
    return results.exit_code


def _draw(args: argparse.Namespace, results: Sequence[Mapping[str, Any]]) -> None:
    points, speedups = [], []
    for r in results:
        ours = r["FROG"]
        counted = (ours["operations"], ours["bytes"], ours.get("median_us"))
        points.append(Point(r["model"], *counted))
        for peer in PASSES:
            if "median_us" in r.get(peer, {}):
                ratio = r[peer]["median_us"] / ours["median_us"]
                speedups.append((f"{r['model']}: {peer}", ratio))
    drawn = [Roofline("all models", points, speedups)]
    title = f"FROG's step, N = {args.samples}, samples in {args.dtype}"
    try_to(draw_rooflines, args.plot, title, drawn, GPUS[args.gpu], MEASURED)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``frog-triton bench step``."""
    return cli.main([*["bench", "step"], *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
