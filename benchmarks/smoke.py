"""Every kernel once, on small inputs of `smoke_cases`, beside the torch backend.

    python -m frog_triton.benchmarks.smoke
    python -m frog_triton.benchmarks.smoke --kernel _gram_kernel

A line for each kernel: its largest error, and a verdict. Cases run in processes of
their own, so that a kernel that takes its process down leaves the others to be judged.
Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import Queue
from threading import Event
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..cli.arguments import Parser
from ..cli.output import add_outputs
from ..kernels.launch import recording
from ..kernels.registry import KERNELS
from .records import write_json
from .smoke_cases import CASES, Case

DETAIL = 12
"""Lines that are printed of what a failed process has said; the JSON has more."""


@dataclass
class Outcome:
    """How a case went.

    Attributes:
        case: its name.
        kernels: that it launches.
        error: of its step, relative; None if it did not end.
        verdict: ``"ok"``, or what went wrong, in a line.
        failed: the kernel whose launch raised, if one did.
        detail: more about that.
    """

    case: str
    kernels: list[str]
    error: float | None = None
    verdict: str = "ok"
    failed: str | None = None
    detail: str = ""


def all_kernels() -> list[str]:
    """Names of the project's kernels; the other functions of ``kernels`` serve them."""
    return sorted(KERNELS)


def launched(case: Case) -> list[str]:
    """Names of the kernels that a case launches, found out without running them."""
    with recording(run=False) as launches, _Zeros():
        case.result("triton")
    return sorted({launch.name for launch in launches})


class _Zeros(TorchDispatchMode):
    """Memory that nothing has written is zero.

    Kernels that are not run leave theirs so, and a step is skipped where the largest
    magnitude of its gradients, which one of them finds, is not finite.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        fresh = func.__name__.startswith(("empty", "new_empty"))
        return made.zero_() if fresh else made


def judge(name: str) -> Iterator[Outcome]:
    """Run a case in this process.

    Yields:
        What it launches, before anything is run; then how it went.
    """
    torch.backends.cudnn.allow_tf32 = False
    case = CASES[name]
    outcome = Outcome(name, launched(case))
    yield outcome
    with recording() as launches:
        try:
            ours, theirs = case.result("triton"), case.result("torch")
            error = float((ours - theirs).norm() / theirs.norm())
        except Exception as problem:  # whatever a compiler or a driver raises
            said = f"{type(problem).__name__}: {problem}"
            outcome.verdict = said.splitlines()[0][:200]
            outcome.detail = traceback.format_exc()[-8000:]
            outcome.failed = launches[-1].name if launches else None
        else:
            outcome.error = error
            if not error <= case.limit:
                outcome.verdict = f"off by {error:.1e}"
    yield outcome


def run_cases(
    names: Sequence[str],
    wrapper: Sequence[str] = (),
    kernel: str | None = None,
    seconds: float | None = None,
) -> Iterator[Outcome]:
    """Run cases in a few processes side by side, in order of ending.

    Args:
        names: of `CASES`.
        wrapper: command that the processes are started with.
        kernel: leave out cases that do not launch it.
        seconds: after which a process is killed.
    """
    count = min(len(names), os.cpu_count() or 1)
    outcomes: Queue[Outcome | None] = Queue()
    over = Event()

    def serve(share: list[str]) -> None:
        try:
            # A process ends with the first case that fails.
            while share and not over.is_set():
                done = _run_process(share, wrapper, kernel, seconds)
                for outcome in done:
                    outcomes.put(outcome)
                share = share[max(1, len(done)) :]
        finally:
            outcomes.put(None)

    with ThreadPoolExecutor(count) as pool:
        shares = [pool.submit(serve, list(names[i::count])) for i in range(count)]
        try:
            for _ in shares:
                yield from iter(outcomes.get, None)
        finally:
            over.set()
        for share in shares:
            share.result()


def _run_process(
    names: Sequence[str],
    wrapper: Sequence[str],
    kernel: str | None,
    seconds: float | None,
) -> list[Outcome]:
    """How the first cases went, up to the first that failed."""
    command = [*wrapper, sys.executable, "-X", "faulthandler"]
    command += ["-m", f"{__package__}.smoke", "--here", *names]
    command += ["--kernel", kernel] if kernel else []
    # Launches that wait, so that an error comes from the kernel that made it; and
    # tensors that are allocations, so that a sanitizer sees where they end.
    environment = {"CUDA_LAUNCH_BLOCKING": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **environment},
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, out, err = (
            -1,
            _text(error.stdout),
            f"took longer than {error.timeout:.0f} s",
        )
    lines = [line for line in out.splitlines() if line.startswith('{"case"')]
    outcomes = {o.case: o for o in (Outcome(**json.loads(line)) for line in lines)}
    last = next(reversed(outcomes.values()), Outcome(names[0], []))
    if code != 0 and last.verdict == "ok":
        under_way = last.kernels and last.error is None
        if outcomes and not under_way and len(outcomes) < len(names):
            last = Outcome(names[len(outcomes)], [])
        told = [line for line in out.splitlines() if line not in lines]
        told += err.splitlines()
        last.verdict = f"exit code {code}: {told[-1] if told else ''}"[:200]
        last.detail = "\n".join(told)[-8000:]
        outcomes[last.case] = last
    return list(outcomes.values())


def _text(output: str | bytes | None) -> str:
    if isinstance(output, bytes):
        return output.decode(errors="replace")
    return output or ""


def verdicts(outcomes: Iterable[Outcome]) -> dict[str, tuple[float | None, str]]:
    """Largest error and verdict of each kernel that was launched."""
    found: dict[str, tuple[float | None, str]] = {}
    for outcome in outcomes:
        for name in outcome.kernels:
            error, verdict = found.get(name, (None, "ok"))
            known = [e for e in (error, outcome.error) if e is not None]
            if outcome.verdict != "ok" and verdict == "ok":
                said = outcome.verdict
                if outcome.failed not in (name, None):
                    said = f"not judged: {outcome.failed} failed"
                verdict = f"FAILED in {outcome.case}: {said}"
            found[name] = max(known, default=None), verdict
    return found


def show(found: Mapping[str, tuple[float | None, str]]) -> None:
    """A line for each kernel."""
    for name, (error, verdict) in sorted(found.items()):
        print(f"{name:28} {'-' if error is None else f'{error:.1e}':>8}  {verdict}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0 if all kernels are right."""
    parser = Parser(description=__doc__)
    parser.add_argument("--kernel", metavar="NAME", help="that one alone")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    add_outputs(parser)
    parser.add_argument("--here", nargs="+", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = all_kernels()
    if args.kernel is not None and args.kernel not in names:
        parser.error(f"no kernel {args.kernel!r}; there are: {', '.join(names)}")
    if args.here:
        return _here(args.here, args.kernel)
    outcomes: list[Outcome] = []
    try:
        for outcome in run_cases(args.case, kernel=args.kernel):
            if outcome.kernels or outcome.verdict != "ok":
                outcomes.append(outcome)
                error = "-" if outcome.error is None else f"{outcome.error:.1e}"
                print(f"{outcome.case:28} {error:>8}  {outcome.verdict}", flush=True)
    finally:
        for detail in dict.fromkeys(o.detail for o in outcomes if o.detail):
            print("", *detail.splitlines()[-DETAIL:], sep="\n")
        found = verdicts(outcomes)
        if args.kernel is not None:
            found = {n: v for n, v in found.items() if n == args.kernel}
        print("\nkernels:")
        show(found)
    wanted = names if args.kernel is None else [args.kernel]
    if args.case != list(CASES):
        wanted = sorted(found)
    missing = [name for name in wanted if name not in found]
    if missing:
        print(f"not launched: {', '.join(missing)}")
    if args.json:
        write_json(args.json, [asdict(o) for o in outcomes])
    right = [name for name, (_, verdict) in found.items() if verdict == "ok"]
    wrong = [outcome for outcome in outcomes if outcome.verdict != "ok"]
    print(
        f"{len(right)} of {len(wanted)} kernels are right, "
        f"{len(wrong)} of {len(outcomes)} cases failed"
    )
    return int(len(right) < len(wanted) or bool(wrong))


def _here(names: Sequence[str], kernel: str | None) -> int:
    """Run cases in this process; their outcomes go to standard output.

    Ends with the first that fails: a GPU that has met a bad address serves the process
    no more.
    """
    for name in names:
        if kernel is not None and kernel not in launched(CASES[name]):
            print(json.dumps(asdict(Outcome(name, []))), flush=True)
            continue
        for outcome in judge(name):
            print(json.dumps(asdict(outcome)), flush=True)
        if outcome.verdict != "ok":
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
