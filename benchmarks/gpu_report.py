"""Everything there is to know about a GPU, in one command of under eight minutes.

    python -m frog_triton.benchmarks.gpu_report
    python -m frog_triton.benchmarks.gpu_report --rehearse     # without a GPU

Runs the tests that need a GPU, tunes ResNet-18, ResNet-50 and GPT-2 small, and runs the
benches; writes each stage's JSON, pictures and a REPORT.md to
``benchmarks/results/<gpu>/<commit>/``. A stage whose result is there is not run again,
so that the same command goes on after an interruption; results of other commits are
left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .environment import environment

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 470
"""For all stages together; what did not fit is run by the next call."""

TUNED = ("resnet18", "resnet50", "gpt2-small")


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of its results.
        command: arguments of Python.
        timeout: seconds.
        rehearsal: arguments of Python where there is no GPU.
    """

    name: str
    command: tuple[str, ...]
    timeout: int
    rehearsal: tuple[str, ...]


def stages(out: Path, reference: Path | None) -> list[Stage]:
    """What is run, in order of worth.

    Args:
        out: folder of the results.
        reference: the public reference's frog.py, to be timed as well.
    """
    pytest = ("-m", "pytest", "-q", "-m", "gpu")
    tests = (*pytest, str(ROOT / "tests" / "test_gpu.py"))
    # Many small kernels to compile: last, with what time is left.
    kernels = (*pytest, "-x", str(ROOT / "tests"))
    cli = ("-m", "frog_triton")
    tables = str(out / "tables")
    command: tuple[str, ...]
    found = [Stage("tests", tests, 300, (*tests, "--collect-only"))]
    for model in TUNED:
        json_ = ("--json", str(out / f"autotune-{model}.json"), "--dtype", "bfloat16")
        tune = (*cli, "autotune", model, *json_)
        found.append(
            Stage(
                f"autotune-{model}",
                (*tune, "--budget", "50", "--cache-dir", tables),
                120,
                (*tune, "--dry-run", "--top", "1", "--budget", "5"),
            )
        )
    for bench in ("step", "kernels"):
        files = (f"--json={out / bench}.json", f"--plot={out / bench}.png")
        command = (*cli, "bench", bench, *files, "--cache-dir", tables)
        if bench == "kernels":
            command = (*command, "--budget", "60")
        found.append(Stage(f"bench-{bench}", command, 240, command))
    if reference is not None:
        command = ("-m", "frog_triton.benchmarks.reference", str(reference))
        kept = (*command, "--json", str(out / "reference.json"))
        found.append(Stage("reference", kept, 120, (*command, "--batch", "4")))
    collect = (*kernels, "--collect-only")
    found.append(Stage("kernel-tests", kernels, 300, collect))
    return found


def folder(results: Path, found: dict[str, Any], rehearse: bool) -> Path:
    """Where the results of this GPU and commit go."""
    gpu = "rehearsal" if rehearse else str(found["gpu"])
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return results / name / str(found["commit"] or "no-commit")[:12]


def run_stage(
    stage: Stage, out: Path, rehearse: bool, left: float = float("inf")
) -> dict[str, Any]:
    """Run a stage and keep what it printed; its record, also if it failed.

    Args:
        stage: the stage.
        out: folder of the results.
        rehearse: whether to run its rehearsal.
        left: seconds that it may take, if that is less than its own limit.
    """
    path = out / f"{stage.name}.stage.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["exit_code"] == 0:
            return known
    command = stage.rehearsal if rehearse else stage.command
    begun = time.monotonic()
    limit = max(1.0, min(stage.timeout, left))
    try:
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            timeout=limit,
        )
        code, printed = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code = -1
        printed = f"stopped after {limit:.0f} s\n{_text(error.stdout)}"
    record = {
        "stage": stage.name,
        "command": list(command),
        "exit_code": code,
        "seconds": round(time.monotonic() - begun, 1),
        "printed": printed[-20000:],
    }
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, path)
    return record


def _text(output: str | bytes | None) -> str:
    if isinstance(output, bytes):
        return output.decode(errors="replace")
    return output or ""


def clocks() -> str | None:
    """Clocks, power and temperature as found."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def report(
    out: Path,
    found: dict[str, Any],
    records: Sequence[dict[str, Any]],
    rehearse: bool,
) -> str:
    """REPORT.md from the stages' records."""
    lines = [
        "# frog_triton on " + ("no GPU: a rehearsal" if rehearse else found["gpu"])
    ]
    if rehearse:
        lines += ["", "Nothing here was timed on a GPU."]
    names = ("gpu", "driver", "torch", "triton", "python", "commit")
    lines += ["", *(f"- {name}: {found.get(name)}" for name in names)]
    if found.get("clocks"):
        lines += ["", "```", found["clocks"], "```"]
    lines += ["", "| stage | exit code | seconds |", "| --- | --- | --- |"]
    for record in records:
        cells = (record["stage"], record["exit_code"], record["seconds"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for record in records:
        tail = record["printed"].rstrip().splitlines()[-60:]
        lines += ["", f"## {record['stage']}", "", "```", *tail, "```"]
        picture = out / f"{record['stage'].removeprefix('bench-')}.png"
        if picture.is_file():
            lines += ["", f"![{record['stage']}]({picture.name})"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing; returns 0 if every stage ended well, 3 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR"
    )
    parser.add_argument("--reference", type=Path, metavar="FROG.py")
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help="leave out all other stages"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.rehearse:
        print("error: there is no GPU here; --rehearse runs without", file=sys.stderr)
        return 3
    found = environment() | {"clocks": clocks()}
    out = folder(args.results, found, args.rehearse)
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    planned = stages(out, args.reference)
    names = [stage.name for stage in planned]
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        print(
            f"error: no stage {unknown[0]!r}; there are: {', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    records = []
    begun = time.monotonic()
    for stage in planned:
        if args.only and stage.name not in args.only:
            continue
        print(f"{stage.name} ...", flush=True)
        left = begun + SECONDS - time.monotonic()
        record = run_stage(stage, out, args.rehearse, left)
        print(f"{stage.name}: exit code {record['exit_code']}, {record['seconds']} s")
        records.append(record)
        text = report(out, found, records, args.rehearse)
        (out / "REPORT.md").write_text(text)
    print(f"wrote {out / 'REPORT.md'}")
    return 0 if all(record["exit_code"] == 0 for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
