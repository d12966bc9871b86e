"""One optimizer step on the parameter shapes of well-known models.

    python -m frog_triton.benchmarks.bench_step --model gpt2-small --samples 64

On a GPU: FROG's step beside fused AdamW, SGD and Muon on the same tensors, with random
gradients and samples, medians and spread. Anywhere else: launches, bytes, operations
and the floor they imply, and no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import FROG, cost
from ..autotune.traffic import GPUS, name_here
from ..launches import LayerShape
from .environment import environment
from .plot import draw
from .shapes import MODELS
from .timing import milliseconds

# Passes over the parameters (4 bytes each): reads and writes of p, g and the state.
PASSES = {"AdamW (fused)": 7, "SGD (foreach)": 5, "Muon": None}


class Step:
    """A model of the given shapes with gradients and samples that are all random."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        dtype: torch.dtype,
        device: str = "cuda",
        cache_dir: Path | None = None,
    ) -> None:
        self.device = device
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
        self.frog = FROG(
            self.layers,
            backend="triton",
            sampling="positions",
            sample_size=shapes[0].samples,
            exclude_output_layer=False,
            autotune_dir=cache_dir,
        )

    def fill(self) -> None:
        """Hand FROG its samples, as forward and backward passes would."""
        for i, (x, y) in enumerate(self.samples):
            name, module = str(i), self.layers[i]
            self.frog.capture.fired.add(name)
            self.frog.capture.add(name, module, x, y, len(x))

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
        """Largest relative error of FROG's step against torch in float64."""
        layer, (x, y) = self.layers[0], self.samples[0]
        grad = layer.weight.grad
        assert isinstance(layer, nn.Linear) and grad is not None
        twin = nn.Linear(layer.in_features, layer.out_features, device=self.device)
        twin = twin.double()
        twin.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
        for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.double()
        options: dict[str, Any] = {"sampling": "positions", "sample_size": len(x)}
        exact = FROG(twin, backend="torch", exclude_output_layer=False, **options)
        exact.capture.fired.add("weight")
        exact.capture.add("weight", twin, x.double(), y.double(), len(x))
        before = layer.weight.detach().double().clone()
        exact.step()
        self.fill()
        self.frog.step()
        step = layer.weight.detach().double() - before
        expected = twin.weight.detach() - before
        return float((step - expected).norm() / expected.norm())


def bench(
    name: str,
    samples: int,
    dtype: torch.dtype,
    gpu: str,
    repeats: int,
    cache_dir: Path | None = None,
) -> Any:
    """Counts for a model, and times where there is a GPU."""
    shapes = MODELS[name](samples)
    counted = cost(shapes, sample_dtype=dtype, gpu=gpu)
    params = sum(s.rows * (s.dim + s.bias) for s in shapes)
    result: dict[str, Any] = {
        "model": name,
        "samples": samples,
        "sample_dtype": str(dtype),
        "layers": len(shapes),
        "parameters": params,
        "floor_gpu": gpu,
        "FROG": {
            "launches": counted.launches,
            "operations": counted.operations,
            "bytes": counted.bytes,
            "passes": counted.bytes / (4 * params),
            "state_bytes": counted.state_bytes,
            "floor_us": counted.floor_us,
        },
    }
    for peer, passes in PASSES.items():
        if passes is not None:
            moved = 4 * passes * params
            result[peer] = {
                "bytes": moved,
                "passes": passes,
                "floor_us": 1e6 * moved / GPUS[gpu].bandwidth,
            }
    if torch.cuda.is_available():
        step = Step(shapes, dtype, cache_dir=cache_dir)
        error = step.check()
        if not error < 1e-3:
            raise RuntimeError(f"FROG's step is off by {error:.1e}: nothing is timed")
        result["error"] = error
        runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "FROG": (step.frog.step, step.fill)
        }
        for peer, optimizer in step.peers().items():
            runs[peer] = (optimizer.step, lambda: None)
        for peer, (run, before) in runs.items():
            times = milliseconds(run, before, repeats)
            entry = result.setdefault(peer, {})
            entry["median_us"] = 1e3 * statistics.median(times)
            entry["min_us"], entry["max_us"] = 1e3 * min(times), 1e3 * max(times)
            if "floor_us" in entry:
                entry["percent_of_floor"] = 100 * entry["floor_us"] / entry["median_us"]
    return result


def show(result: dict[str, Any]) -> None:
    """Print one model's result as a table."""
    print(
        f"\n{result['model']}: {result['layers']} layers, "
        f"{result['parameters'] / 1e6:.1f} M parameters, N = {result['samples']}, "
        f"samples in {result['sample_dtype'].removeprefix('torch.')}; "
        f"floors for {result['floor_gpu']}"
    )
    print(f"{'':14} {'launches':>8} {'MB':>8} {'passes':>7} {'floor us':>9} {'us':>18}")
    for name, entry in result.items():
        if not isinstance(entry, dict):
            continue
        timed = "not measured"
        if "median_us" in entry:
            timed = (
                f"{entry['median_us']:.0f} "
                f"({entry['min_us']:.0f} - {entry['max_us']:.0f})"
            )
        moved = f"{entry['bytes'] / 1e6:.0f}" if "bytes" in entry else "-"
        passes = f"{entry['passes']:.2f}" if "passes" in entry else "-"
        floor = f"{entry['floor_us']:.0f}" if "floor_us" in entry else "-"
        launches = entry.get("launches", "-")
        print(f"{name:14} {launches:>8} {moved:>8} {passes:>7} {floor:>9} {timed:>18}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=int, default=64, help="N (default: 64)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16",
        help="of the samples (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", choices=GPUS, default=name_here(), help="for the floors"
    )
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="of tuned configurations"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them there")


def run(args: argparse.Namespace) -> int:
    """Count, time where there is a GPU, print and write; returns the exit code."""
    if not torch.cuda.is_available():
        print("No GPU here: counts and floors from datasheet rates; no time measured.")
    results = [
        bench(
            name,
            args.samples,
            getattr(torch, args.dtype),
            args.gpu,
            args.repeats,
            args.cache_dir,
        )
        for name in args.model
    ]
    for result in results:
        show(result)
    if args.json:
        content = {"environment": environment(), "results": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        points, speedups = [], []
        for r in results:
            ours = r["FROG"]
            counts = (ours["operations"], ours["bytes"], ours.get("median_us"))
            points.append((r["model"], *counts))
            for peer in PASSES:
                if "median_us" in r.get(peer, {}):
                    ratio = r[peer]["median_us"] / ours["median_us"]
                    speedups.append((f"{r['model']}: {peer}", ratio))
        draw(args.plot, "FROG's step", points, GPUS[args.gpu], speedups)
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
