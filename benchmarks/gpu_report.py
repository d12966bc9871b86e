"""Everything there is to know about a GPU, in one command that fits its time.

    python -m frog_triton.benchmarks.gpu_report --archive report.tar.gz
    python -m frog_triton.benchmarks.gpu_report --profile --data cifar10.npz
    python -m frog_triton.benchmarks.gpu_report --rehearse     # without a GPU

Stages: a smoke run of every kernel, the tests, the benches with default
configurations, the tuner, the benches again with what it found; with --profile a
profile of a step and the sanitizer; with --data a training. Results, logs and a
REPORT.md go to ``benchmarks/results/<gpu>/<commit>/``. The same command goes on after
an interruption: stages that ended well are not repeated, those that failed or ran out
of time are. Results of other commits are left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..cli.arguments import Parser, above_zero, output_file
from .environment import environment
from .limits import GRACE, run_within
from .records import write_json, write_text
from .stages import ROOT, Stage, Wanted, stages

SECONDS = 540.0
"""For a call: ten minutes, less what it takes to start and to come back."""

LEAST = 5.0
"""Seconds that a stage is started for."""

INTERRUPTED = 130


def folder(results: Path, found: dict[str, Any], rehearse: bool) -> Path:
    """Where the results of this GPU and commit go."""
    gpu = "rehearsal" if rehearse else str(found["gpu"])
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return results / name / str(found["commit"] or "no-commit")[:12]


class Run:
    """The stages of a call, and their records in the folder.

    Args:
        out: the folder.
        rehearse: whether there is no GPU.
        deadline: of `time.monotonic`.
    """

    def __init__(self, out: Path, rehearse: bool, deadline: float) -> None:
        self.out = out
        self.rehearse = rehearse
        self.deadline = deadline

    def known(self, name: str) -> dict[str, Any] | None:
        """The record of a stage of this call or an earlier one."""
        path = self._record(name)
        if not path.is_file():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def stage(self, stage: Stage) -> dict[str, Any]:
        """Run a stage if it needs to be; its record, whatever comes of it."""
        known = self.known(stage.name)
        if known is not None and known["status"] == "passed" and self._fresh(stage):
            return known
        given = min(stage.limit, self.deadline - time.monotonic() - GRACE)
        why = stage.missing or ("no time was left" if given < LEAST else "")
        if not why:
            return self._run(stage, given)
        if known is not None:  # what an earlier call has found out says more
            return known
        return self._keep(stage, "skipped", [], None, 0.0, why)

    def _run(self, stage: Stage, given: float) -> dict[str, Any]:
        budget = f"{max(1.0, given - GRACE):.0f}"
        words = stage.rehearsal if self.rehearse else stage.command
        command = [word.replace("{seconds}", budget) for word in words]
        interpreter = {"TRITON_INTERPRET": "1"} if self.rehearse else {}
        log = self.out / f"{stage.name}.log"
        begun = time.monotonic()
        try:
            ended = run_within([sys.executable, *command], log, given, interpreter)
        except KeyboardInterrupt:
            taken = time.monotonic() - begun
            self._keep(stage, "stopped", command, INTERRUPTED, taken, "interrupted")
            raise
        status = "passed" if ended.exit_code == 0 else "failed"
        reason = ""
        if ended.stopped:
            status, reason = "stopped", f"its {given:.0f} s were over"
        code, taken = ended.exit_code, ended.seconds
        return self._keep(stage, status, command, code, taken, reason)

    def _fresh(self, stage: Stage) -> bool:
        """Whether no stage whose results it uses was run after it."""
        mine = self.known(stage.name)
        assert mine is not None
        others = [self.known(name) for name in stage.after]
        return all(o is None or o["ended"] <= mine["ended"] for o in others)

    def _keep(
        self,
        stage: Stage,
        status: str,
        command: Sequence[str],
        exit_code: int | None,
        seconds: float,
        reason: str,
    ) -> dict[str, Any]:
        record = {
            "stage": stage.name,
            "status": status,
            "reason": reason,
            "command": list(command),
            "exit_code": exit_code,
            "seconds": round(seconds, 1),
            "ended": time.time(),
        }
        write_json(self._record(stage.name), record)
        return record

    def _record(self, name: str) -> Path:
        return self.out / f"{name}.stage.json"


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
    """REPORT.md from the stages' records and logs."""
    lines = [
        "# frog_triton on " + ("no GPU: a rehearsal" if rehearse else found["gpu"])
    ]
    if rehearse:
        lines += ["", "Nothing here was timed on a GPU."]
    names = ("gpu", "driver", "torch", "triton", "python", "commit")
    lines += ["", *(f"- {name}: {found.get(name)}" for name in names)]
    if found.get("clocks"):
        lines += ["", "```", found["clocks"], "```"]
    lines += ["", "| stage | | exit code | seconds |", "| --- | --- | --- | --- |"]
    for record in records:
        code = "-" if record["exit_code"] is None else record["exit_code"]
        cells = (record["stage"], told(record), code, record["seconds"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for record in records:
        log = out / f"{record['stage']}.log"
        if not log.is_file():
            continue
        tail = log.read_text(errors="replace").rstrip().splitlines()[-60:]
        lines += ["", f"## {record['stage']}", "", "```", *tail, "```"]
        picture = out / f"{record['stage']}.png"
        if picture.is_file():
            lines += ["", f"![{record['stage']}]({picture.name})"]
    return "\n".join(lines) + "\n"


def told(record: dict[str, Any]) -> str:
    """A stage's status, and the reason if there is one."""
    reason = record["reason"]
    return f"{record['status']}: {reason}" if reason else str(record["status"])


def pack(out: Path, archive: Path) -> None:
    """Write the folder's files to a ``.tar.gz``; it is there whole or as before."""
    unfinished = archive.with_name(f"{archive.name}.tmp")
    own = {archive.resolve(), unfinished.resolve()}
    with tarfile.open(unfinished, "w:gz", compresslevel=6) as tar:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path.resolve() not in own:
                name = path.relative_to(out.parents[1])
                tar.add(path, arcname=str(name), recursive=False)
    os.replace(unfinished, archive)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--rehearse", action="store_true", help="run without a GPU")
    add(
        "--seconds",
        type=above_zero,
        default=SECONDS,
        help=f"for all stages together (default: {SECONDS:.0f}); what did not fit is "
        "run by the next call",
    )
    results = ROOT / "benchmarks" / "results"
    add("--results", type=Path, default=results, metavar="DIR")
    add(
        "--archive",
        type=output_file,
        metavar="FILE",
        help="a .tar.gz of all results, renewed after each stage",
    )
    add(
        "--profile",
        action="store_true",
        help="profile a step and run compute-sanitizer, too",
    )
    add("--reference", type=Path, metavar="FROG.py", help="time that as well")
    add("--data", type=Path, metavar="PATH", help="train ResNet-18 on CIFAR-10, too")
    add(
        "--training",
        default=Wanted.training,
        metavar="WORDS",
        help=f"more arguments of `bench train` (default: {Wanted.training!r})",
    )
    add("--only", nargs="+", metavar="STAGE", help="leave out all other stages")
    return made


def problem(args: argparse.Namespace) -> str:
    """What is wrong with the arguments; empty if nothing is."""
    for name in ("reference", "data"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            return f"--{name}: there is no {path}"
    names = [stage.name for stage in stages(Path(), _wanted(args))]
    for name in args.only or ():
        if name not in names:
            return f"no stage {name!r}; there are: {', '.join(names)}"
    return ""


def _wanted(args: argparse.Namespace) -> Wanted:
    data = None if args.data is None else args.data.absolute()
    return Wanted(args.profile, args.reference, data, args.training)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing.

    Returns:
        0 if every stage ended well or cannot be run here, 1 if one did not, 2 for wrong
        arguments, 3 without a GPU, 130 if it was interrupted.
    """
    deadline = time.monotonic()
    args = parser().parse_args(argv)
    deadline += args.seconds
    wrong = problem(args)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not args.rehearse:
        print("error: there is no GPU here; --rehearse runs without", file=sys.stderr)
        return 3
    found = environment() | {"clocks": clocks()}
    out = folder(args.results.absolute(), found, args.rehearse)
    try:
        write_json(out / "environment.json", found)
    except OSError as error:
        print(f"error: --results: {out} cannot be written: {error}", file=sys.stderr)
        return 2
    planned = stages(out, _wanted(args))
    chosen = [s for s in planned if not args.only or s.name in args.only]
    run = Run(out, args.rehearse, deadline)
    try:
        for stage in chosen:
            print(f"{stage.name} ...", flush=True)
            record = run.stage(stage)
            print(f"{stage.name}: {told(record)}, {record['seconds']} s", flush=True)
            _publish(run, found, planned, args)
    except KeyboardInterrupt:
        _publish(run, found, planned, args)
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print(f"wrote {out / 'REPORT.md'}")
    ended = [run.known(stage.name) for stage in chosen if not stage.missing]
    return int(any(r is None or r["status"] != "passed" for r in ended))


def _publish(
    run: Run, found: dict[str, Any], planned: Sequence[Stage], args: argparse.Namespace
) -> None:
    """The report on all stages so far, and the archive."""
    known = [run.known(stage.name) for stage in planned]
    records = [record for record in known if record is not None]
    write_text(run.out / "REPORT.md", report(run.out, found, records, run.rehearse))
    if args.archive is not None:
        pack(run.out, args.archive)


def _end(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Also where a shell started this with interruptions ignored: stages inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    raise SystemExit(main())
