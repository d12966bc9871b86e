"""What a training step with FROG costs the host, beside fused AdamW in one process.

    frog-triton bench host
    frog-triton bench host --model resnet50 --json host.json

The step, and what hooks add to forward and backward. On a GPU models are real, and the
GPU's time stands beside the host's. Anywhere else models are as deep but narrow, so
that what is measured is the host's part, and FROG's kernels are counted but neither
compiled nor run, and a CUDA graph's replay takes no time. All is measured in turns, on
one thread; medians.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from .. import FROG, cli
from ..cli.arguments import positive
from ..cli.output import add_outputs
from .passes import (
    MODELS,
    Workload,
    counted,
    frog,
    interleaved,
    triton_anywhere,
    workload,
)
from .records import Results

LAUNCH_US = 5.0
"""What a launch may cost the host, in the bound that results stand beside."""

SHOWN = {
    "FROG": "FROG's step, recorded",
    "FROG anew": "FROG's step, launch by launch",
    "AdamW": "fused AdamW's step",
    "Muon": "torch's Muon's step",
    "FROG zero_grad": "FROG's zero_grad",
    "AdamW zero_grad": "AdamW's zero_grad",
    "with hooks": "forward and backward, hooks",
    "without hooks": "forward and backward",
}


def bench(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times and counts of a model's training step."""
    bare = workload(name, device)
    hooked = bare.twin()
    with triton_anywhere(device) as forget:
        optimizer = frog(hooked)
        for _ in range(2):  # the first decides on output layers and kinds of calls
            hooked.passes()
            optimizer.step()
            optimizer.zero_grad()
            forget()
        layers = _layers(optimizer)
        bare.passes()
        # With no rate all stays as it is, and finite.
        params = list(bare.model.parameters())
        adamw = torch.optim.AdamW(params, lr=0.0, fused=True)
        muon = torch.optim.Muon(_matrices(bare, layers), lr=0.0)
        graphs = optimizer._routines.graphs

        def anew() -> None:
            optimizer._routines.graphs = lambda device: None
            optimizer.step()
            optimizer._routines.graphs = graphs

        parts = {
            "AdamW zero_grad": adamw.zero_grad,
            "without hooks": bare.passes,
            "AdamW": adamw.step,
            "Muon": muon.step,
            "FROG zero_grad": optimizer.zero_grad,
            "with hooks": hooked.passes,
            "FROG": optimizer.step,
            "zero_grad": optimizer.zero_grad,
            "with hooks, once more": hooked.passes,
            "FROG anew": anew,
        }
        times = interleaved(parts, rounds, device, forget)
        recorded = list(optimizer._routines._kept.values())
        counts = {part: counted(run) for part, run in parts.items()}
        refused = optimizer._routines.refused
        forget()
        optimizer.close()
    counts["hooks"] = counts["with hooks"] - counts["without hooks"]
    ours, adam = times["FROG"].host, times["AdamW"].host
    hooks = times["with hooks"].host - times["without hooks"].host
    step = counts["FROG anew"]
    bound = adam + LAUNCH_US * (step.kernels + step.launches)
    return {
        "device": device.type,
        "samples": bare.sample_size,
        "tensors": len(params),
        "layers": len(layers),
        "formulations": dict(
            Counter(how.partition(",")[0] for how in optimizer._solved.values())
        ),
        "recorded_kernels": [r.routine.launches for r in recorded],
        "not_recorded": refused,
        "times_us": {part: time._asdict() for part, time in times.items()},
        "counts": {part: asdict(count) for part, count in counts.items()},
        "host_ratio_to_adamw": ours / adam,
        "host_bound_us": bound,
        "host_us_of_hooks_a_layer": hooks / len(layers),
    }


def _layers(optimizer: FROG) -> list[str]:
    """Names of the weights that FROG preconditions."""
    routes = optimizer.routes()
    return [r.name for r in routes if r.updated_by == "frog" and len(r.shape) > 1]


def _matrices(work: Workload, names: Sequence[str]) -> list[nn.Parameter]:
    """Weights as matrices, which Muon wants, with gradients that stay."""
    found = []
    for name in names:
        weight = nn.Parameter(work.model.get_parameter(name).detach().flatten(1))
        weight.grad = torch.randn_like(weight)
        found.append(weight)
    return found


def show(entry: Mapping[str, Any]) -> None:
    """Print a model's result."""
    layers, counts = entry["layers"], entry["counts"]
    solved = ", ".join(f"{n} {how}" for how, n in entry["formulations"].items())
    print(
        f"\n{entry['model']} on {entry['device']}: {layers} layers ({solved}), "
        f"{entry['tensors']} tensors, N = {entry['samples']}"
    )
    columns = ("host us", "device us", "kernels", "torch launches", "torch operations")
    print(f"{'':28}" + "".join(f" {column:>16}" for column in columns))
    for part, label in SHOWN.items():
        time, count = entry["times_us"][part], counts[part]
        device = f"{time['device']:.0f}" if entry["device"] == "cuda" else "-"
        cells = (f"{time['host']:.0f}", device, *count.values())
        print(f"{label:28}" + "".join(f" {cell:>16}" for cell in cells))
    if not entry["recorded_kernels"]:
        print(
            f"the step was not recorded: {entry['not_recorded'] or 'none twice alike'}"
        )
    for part, label in (("FROG anew", "step"), ("hooks", "hooks")):
        each = ", ".join(f"{n / layers:.1f} {what}" for what, n in counts[part].items())
        print(f"{label}, a layer: {each} of torch's")
    print(
        f"hooks: {entry['host_us_of_hooks_a_layer']:.1f} us of the host a layer; step: "
        f"{entry['host_ratio_to_adamw']:.1f} times AdamW's, or "
        f"{entry['times_us']['FROG']['host'] / entry['host_bound_us']:.2f} times what "
        f"AdamW's and {LAUNCH_US:.0f} us a launch make, "
        f"{entry['host_bound_us']:.0f} us"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=positive, default=50, help="(default: 50)")
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("No GPU here: narrow models, kernels counted and not run.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = Results(args.json)
        for name in args.model:

            def work(name: str = name) -> dict[str, Any]:
                return bench(name, device, args.repeats)

            entry = results.add({"model": name}, work)
            if "error" not in entry:
                show(entry)
    finally:
        torch.set_num_threads(threads)
    return results.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``frog-triton bench host``."""
    return cli.main([*["bench", "host"], *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
