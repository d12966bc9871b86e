"""What `gpu_report` runs, in order of worth."""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..cli.needs import missing_packages
from . import sanitize

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 12
"""Processes that run the tests side by side: each compiles kernels most of the time."""


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of its results.
        command: arguments of Python; ``{seconds}`` stands for what it may take.
        limit: seconds.
        rehearsal: arguments of Python where there is no GPU.
        after: stages whose results it uses: when one is run again, so is this.
        missing: why it cannot be run here; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    rehearsal: tuple[str, ...]
    after: tuple[str, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for beyond the usual stages.

    Attributes:
        profile: whether to profile a step and run the sanitizer.
        reference: the public reference's frog.py, to be timed as well.
        data: images to train on.
        training: more arguments of the training.
    """

    profile: bool = False
    reference: Path | None = None
    data: Path | None = None
    training: str = "--seeds 1"


def stages(out: Path, wanted: Wanted) -> list[Stage]:
    """All stages of a command.

    Args:
        out: folder of the results.
        wanted: by the command line.
    """
    found = [_smoke(out), _tests(out), _host(out), *_benches(out, "")]
    if wanted.profile:
        found += [_profile(out), _sanitizer()]
    found += [_autotune(out), *_benches(out, "-tuned")]
    if wanted.reference is not None:
        found.append(_reference(out, wanted.reference))
    if wanted.data is not None:
        found.append(_training(out, wanted.data, wanted.training))
    return found


def _module(name: str, *arguments: str | Path) -> tuple[str, ...]:
    return ("-m", f"{__package__}.{name}", *map(str, arguments))


def _smoke(out: Path) -> Stage:
    command = _module("smoke", "--json", out / "smoke.json")
    return Stage("smoke", command, 90, command)


def _tests(out: Path) -> Stage:
    tests = ROOT / "tests"
    spread = importlib.util.find_spec("xdist") is not None

    def command(workers: int, *rest: str) -> tuple[str, ...]:
        beside = ("-n", str(workers)) if spread else ()
        # The cache's folder may not be writable, and nothing here needs it.
        options = ("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
        kept = ("--continue-on-collection-errors", f"--junit-xml={out}/tests.xml")
        return ("-m", "pytest", *options, *kept, *beside, *rest)

    few = [str(tests / name) for name in ("test_kernels.py", "test_conv_kernels.py")]
    rehearsal = command(2, *few, "-k", "test_gather or signals or same_bits")
    return Stage("tests", command(WORKERS, str(tests), "-m", "gpu"), 240, rehearsal)


def _host(out: Path) -> Stage:
    command = _module("bench_host", "--json", out / "bench-host.json")
    brief = (*command, "--model", "resnet18", "--repeats", "1")
    return Stage("bench-host", (*command, "--repeats", "20"), 120, brief)


def _benches(out: Path, suffix: str) -> list[Stage]:
    found = []
    for bench in ("step", "kernels"):
        name = f"bench-{bench}{suffix}"
        files: list[str | Path] = ["--json", out / f"{name}.json"]
        if not missing_packages(("matplotlib",)):
            files += ["--plot", out / f"{name}.png"]
        tables: tuple[str, ...] = ("--autotune", "off")
        if suffix:
            tables = ("--autotune", "cached", "--cache-dir", str(out / "tables"))
        command = _module(f"bench_{bench}", *files, *tables)
        rehearsal = (*command, "--model", "tiny", "--check")
        if bench == "step":
            rehearsal = (*rehearsal, "--samples", "20")
        else:
            command = (*command, "--budget", "40")
        after = ("autotune",) if suffix else ()
        found.append(Stage(name, command, 120, rehearsal, after))
    return found


def _profile(out: Path) -> Stage:
    files = ("--json", out / "profile.json", "--traces", out)
    command = _module("profile_step", *files, "--autotune", "off")
    tiny = ("--model", "tiny", "--samples", "20")
    return Stage("profile", command, 90, (*command, *tiny))


def _sanitizer() -> Stage:
    missing = ""
    if sanitize.find() is None:
        missing = "compute-sanitizer is not installed here"
    command = _module("sanitize")
    return Stage("sanitizer", command, 240, command, missing=missing)


def _autotune(out: Path) -> Stage:
    files = ("--json", out / "autotune.json", "--cache-dir", out / "tables")
    command = _module("tune", *files, "--budget", "{seconds}")
    return Stage("autotune", command, 170, (*command, "--rehearse", "--top", "1"))


def _reference(out: Path, path: Path) -> Stage:
    command = _module("reference", path)
    kept = (*command, "--json", str(out / "reference.json"))
    return Stage("reference", kept, 120, (*command, "--batch", "4"))


def _training(out: Path, data: Path, more: str) -> Stage:
    def command(workload: str, *rest: str) -> tuple[str, ...]:
        return _module(
            "train.bench", workload, "--data", data, "--out", out / "training", *rest
        )

    peers = ("--peers", "FROG", "FROG plain", "AdamW", "Muon")
    return Stage(
        "training",
        command("cifar10-resnet18-short", *peers, *shlex.split(more)),
        1800,
        command(
            "cifar10-tiny",
            *("--peers", "FROG", "--lrs", "0.06", "--epochs", "1", "--seeds", "1"),
        ),
    )
