"""What a GPU does during one optimizer step, and what the host does meanwhile.

    python -m frog_triton.benchmarks.profile_step --model gpt2-small

One step of `bench step`'s models under torch.profiler: kernels by time, gaps between
them, launches; and the host's time for the step without the profiler. Without a GPU the
operators of a CPU take the kernels' place, and no time of a GPU is known.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..autotune.tuning import Tuning
from ..capture.capture import SAMPLINGS
from ..cli.arguments import Parser, output_folder, positive
from ..cli.errors import answered
from ..cli.output import add_outputs
from .bench_step import Step, add_tuning
from .records import Results
from .shapes import MODELS, REAL, grouped
from .warm import warm

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_CPU = ("cpu_op",)
SHOWN = 15
STEPS = 10
"""Whose host time is taken; the median counts."""


def summary(
    trace: Sequence[Mapping[str, Any]], categories: Sequence[str]
) -> dict[str, Any]:
    """Kernels by time, and the gaps between them.

    Args:
        trace: events as torch.profiler exports them.
        categories: of those that count.

    Raises:
        RuntimeError: there are none.
    """
    events = [e for e in trace if e.get("ph") == "X" and e.get("cat") in categories]
    if not events:
        raise RuntimeError("the profiler saw no kernel; may it use the GPU's counters?")
    events.sort(key=lambda event: event["ts"])
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event["name"], []).append(float(event["dur"]))
    gaps = []
    end = events[0]["ts"]
    for before, after in pairwise(events):
        end = max(end, before["ts"] + before["dur"])
        if after["ts"] > end:
            gap = {"us": after["ts"] - end}
            gaps.append(gap | {"after": before["name"], "before": after["name"]})
    last = max(event["ts"] + event["dur"] for event in events)
    span, idle = last - events[0]["ts"], sum(gap["us"] for gap in gaps)
    kernels = [
        {
            "name": name,
            "launches": len(found),
            "total_us": sum(found),
            "longest_us": max(found),
        }
        for name, found in times.items()
    ]
    return {
        "launches": len(events),
        "span_us": span,
        "busy_us": span - idle,
        "gaps_us": idle,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["total_us"]),
        "longest_gaps": sorted(gaps, key=lambda gap: -gap["us"])[:SHOWN],
    }


def profiled(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Profile one step of a model; the trace is kept beside the results."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    shapes, dtype = MODELS[name](args.samples), torch.bfloat16
    with Tuning(args.autotune, args.cache_dir).applied(torch.device(device), list):
        warm(grouped(shapes, dtype))
    step = Step(shapes, dtype, device, args.autotune, args.cache_dir)
    host = []
    for i in range(3 + STEPS):
        step.fill()
        _wait()
        begun = time.perf_counter()
        step.frogs["FROG"].step()
        if i >= 3:  # the first compile and warm up
            host.append(1e6 * (time.perf_counter() - begun))
        _wait()
    step.fill()
    activities = [ProfilerActivity.CUDA] if on_gpu else []
    with profile(activities=[ProfilerActivity.CPU, *activities]) as seen:
        step.frogs["FROG"].step()
        _wait()
    path = args.traces / f"{name}-{args.autotune}.trace.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        trace = json.load(file)["traceEvents"]
    found = {"host_us": statistics.median(host), "trace": path.name}
    return found | summary(trace, ON_GPU if on_gpu else ON_CPU)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(entry: Mapping[str, Any]) -> None:
    """Print a model's profile."""
    print(
        f"\n{entry['model']}: host {entry['host_us']:.0f} us; {entry['launches']} "
        f"launches in {entry['span_us']:.0f} us, {entry['busy_us']:.0f} us of them "
        f"busy, {entry['gaps_us']:.0f} us in gaps"
    )
    print(f"{'total us':>9} {'launches':>8} {'longest us':>10}  kernel")
    for kernel in entry["kernels"][:SHOWN]:
        print(
            f"{kernel['total_us']:9.1f} {kernel['launches']:8} "
            f"{kernel['longest_us']:10.1f}  {kernel['name'][:60]}"
        )
    print(f"{'gap us':>9}  between")
    for gap in entry["longest_gaps"][:5]:
        print(f"{gap['us']:9.1f}  {gap['after'][:40]} and {gap['before'][:40]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a model could not be profiled."""
    parser = Parser(description=__doc__)
    size = SAMPLINGS["positions"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(REAL))
    parser.add_argument(
        "--samples", type=positive, default=size, help=f"(default: {size})"
    )
    add_tuning(parser)
    add_outputs(parser)
    parser.add_argument("--traces", type=output_folder, default=".", metavar="DIR")
    args = parser.parse_args(argv)
    return answered(partial(run, args))


def run(args: argparse.Namespace) -> int:
    """Profile, print and write."""
    if not torch.cuda.is_available():
        print("No GPU here: operators of the CPU, no time of a GPU.")
    results = Results(args.json)
    for name in args.model:
        names = {"model": name, "samples": args.samples, "autotune": args.autotune}

        def work(name: str = name) -> dict[str, Any]:
            return profiled(name, args)

        entry = results.add(names, work)
        if "error" not in entry:
            show(entry)
    return results.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
