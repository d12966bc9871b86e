"""Candidates compiled offline, in processes of their own.

A process reads jobs as JSON lines and answers each with a line. It is started with
Triton's interpreter off, whatever the parent does, and never runs the user's script.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
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
        timeout: seconds after which what is under way is ended, and no other begun.

    Returns:
        Resources in the order of jobs, or why there are none; None for what was not
        done in time.
    """
    results: list[Resources | Failure | None] = [None] * len(jobs)
    if timeout <= 0:
        return results
    queue: Queue[int] = Queue()
    for i in range(len(jobs)):
        queue.put(i)
    crew = _Crew()
    unstarted: list[int] = []

    def serve() -> None:
        process = None
        while not crew.dismissed.is_set():
            try:
                i = queue.get_nowait()
            except Empty:
                break
            process = process or crew.hire()
            if process is None:
                unstarted.append(i)
                break
            found = _ask(process, jobs[i])
            if found == CRASHED:
                crew.let_go(process)
                process = None  # the next job gets a new one
                if crew.dismissed.is_set():
                    break
            results[i] = found
            done()
        if process is not None:
            crew.let_go(process)

    count = min(workers or os.cpu_count() or 1, len(jobs))
    threads = [threading.Thread(target=serve) for _ in range(count)]
    timer = threading.Timer(min(timeout, threading.TIMEOUT_MAX), crew.dismiss)
    timer.start()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        timer.cancel()
        if any(thread.is_alive() for thread in threads):  # the user has had enough
            crew.dismiss()
    unstarted = [] if crew.dismissed.is_set() else unstarted
    if unstarted:
        warn(
            "a process to compile candidates in did not start (what it said is on "
            "standard error); those left are not compiled ahead"
        )
    return results


READY = "ready"
"""First line of a process, so that one that cannot start is no compiler's crash."""


class _Crew:
    """Processes that compile, and may all be ended at once.

    Attributes:
        dismissed: set once they were.
    """

    def __init__(self) -> None:
        self.dismissed = threading.Event()
        self._processes: set[subprocess.Popen[str]] = set()
        self._changing = threading.Lock()

    def hire(self) -> subprocess.Popen[str] | None:
        """One more, or None if it does not start."""
        with self._changing:
            if self.dismissed.is_set():
                return None
            process = _start()
            self._processes.add(process)
        assert process.stdout is not None
        if process.stdout.readline().strip() == READY:
            return process
        self.let_go(process)
        return None

    def let_go(self, process: subprocess.Popen[str]) -> None:
        """End one that has nothing to do."""
        with self._changing:
            self._processes.discard(process)
        _kill(process)
        process.communicate()

    def dismiss(self) -> None:
        """End all, whatever they do."""
        with self._changing:
            self.dismissed.set()
            for process in self._processes:
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """With the assembler that it may have started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _start() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


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
    if not line.endswith("\n"):
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
