"""Candidates compiled offline, in processes of their own.

A process reads jobs as JSON lines and answers each with a line. It is started with
Triton's interpreter off, whatever the parent does, and never runs the user's script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from queue import Empty, Queue
from typing import TypeVar

import torch

from ..kernels.config import Config
from ..kernels.launch import Made
from ..kernels.table import Table, using
from ..kernels.work import work
from ..solve.launches import Bucket, steps_launches
from ..warning import warn
from .offline import Resources, compile_launch


@dataclass(frozen=True)
class Job:
    """A candidate to compile.

    Attributes:
        buckets: whose step launches it.
        formulation: ``"primal"`` or ``"gram"``.
        key: of the kernel.
        config: the candidate.
        capability: of the GPU.
    """

    buckets: tuple[Bucket, ...]
    formulation: str
    key: str
    config: Config
    capability: int

    def compile(self) -> Resources:
        """Resources of the costliest launch that has the key.

        Spills and shared memory are the largest of all its launches: each of them is
        compiled, so that Triton's cache has what the tuner will launch.
        """
        with using(Table({self.key: self.config})):
            made = steps_launches(self.buckets, self.formulation)
        launches = [a for a in made if a.parts[0].config.key == self.key]
        found = [compile_launch(launch, self.capability) for launch in launches]
        return replace(
            found[launches.index(costliest(launches))],
            spilled=max(usage.spilled for usage in found),
            shared=max(usage.shared for usage in found),
        )


@dataclass(frozen=True)
class Failure:
    """What became of a candidate that did not compile.

    Attributes:
        reason: in words.
    """

    reason: str


CRASHED = Failure("the compiler crashed")


def price(launch: Made) -> tuple[int, int]:
    """Operations, then bytes: what a kernel's speed hangs on."""
    done = work(launch)
    return done.operations, done.bytes


M = TypeVar("M", bound=Made)


def costliest(launches: Sequence[M]) -> M:
    """The one with the highest price."""
    return max((a for a in launches if a.parts[0].leads), key=price)


def compile_jobs(
    jobs: Sequence[Job],
    workers: int | None = None,
    done: Callable[[], object] = lambda: None,
    timeout: float = float("inf"),
) -> list[Resources | Failure | None]:
    """Compile candidates side by side.

    Args:
        jobs: what to compile.
        workers: processes; None takes one a core.
        done: called after each.
        timeout: seconds after which no further job is begun.

    Returns:
        Resources in the order of jobs, or why there are none; None for what was not
        begun.
    """
    results: list[Resources | Failure | None] = [None] * len(jobs)
    queue: Queue[int] = Queue()
    for i in range(len(jobs)):
        queue.put(i)
    deadline = time.monotonic() + timeout
    unstarted: list[int] = []

    def serve() -> None:
        process = None
        try:
            while time.monotonic() < deadline:
                try:
                    i = queue.get_nowait()
                except Empty:
                    break
                if process is None:
                    process = _start()
                if process is None:
                    unstarted.append(i)
                    break
                results[i] = found = _ask(process, jobs[i])
                if found == CRASHED:  # the next job gets a new process
                    process.kill()
                    process.wait()
                    process = None
                done()
        finally:
            if process is not None:
                assert process.stdin is not None
                process.stdin.close()
                process.wait()

    count = min(workers or os.cpu_count() or 1, len(jobs))
    threads = [threading.Thread(target=serve) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if unstarted:
        warn(
            "a process to compile candidates in did not start (what it said is on "
            "standard error); those left are not compiled ahead"
        )
    return results


READY = "ready"
"""First line of a process, so that one that cannot start is no compiler's crash."""


def _start() -> subprocess.Popen[str] | None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() == READY:
        return process
    process.kill()
    process.wait()
    return None


def _ask(process: subprocess.Popen[str], job: Job) -> Resources | Failure:
    assert process.stdin is not None and process.stdout is not None
    question = {
        "buckets": [bucket.to_json() for bucket in job.buckets],
        "formulation": job.formulation,
        "key": job.key,
        "config": job.config.values(),
        "capability": job.capability,
    }
    try:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        return CRASHED
    if not line:
        return CRASHED
    found = json.loads(line)
    return Failure(found["error"]) if "error" in found else Resources(**found)


def _innermost(error: BaseException) -> BaseException:
    """What is wrong: errors in functions that kernels call are causes of others."""
    return error if error.__cause__ is None else _innermost(error.__cause__)


def answer(line: str) -> str:
    """Compile the job on a line; returns its resources, or the error, as JSON."""
    from ..kernels.registry import kernel_of

    asked = json.loads(line)
    kernel = kernel_of(asked["key"])
    assert kernel is not None
    config = kernel.config(**asked["config"])
    buckets = tuple(map(Bucket.from_json, asked["buckets"]))
    job = Job(buckets, asked["formulation"], asked["key"], config, asked["capability"])
    try:
        return json.dumps(asdict(job.compile()))
    except Exception as error:  # whatever a compiler raises
        reason = f"{type(error).__name__}: {_innermost(error)}"
        if len(reason) > 500:  # what it is comes first, what is wrong last
            reason = f"{reason[:100]} ... {reason[-400:]}"
        return json.dumps({"error": reason})


def serve(lines: Iterable[str]) -> None:
    """Answer jobs until there are no more."""
    # The compiler may print to standard output; answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(READY, file=channel, flush=True)
    for line in lines:
        print(answer(line), file=channel, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.stdin)
