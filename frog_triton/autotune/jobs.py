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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from queue import Empty, Queue
from typing import Any

import torch

from ..launches import LayerShape, step_launches
from ..layers.conv import ConvSpec
from ..ops.launch import Launch
from .config import Config
from .offline import Resources, compile_launch
from .table import Table, using
from .traffic import work


@dataclass(frozen=True)
class Geometry:
    """Layers of one geometry, as a step sees them.

    Attributes:
        shape: of each layer.
        count: how many.
        iters: k.
        nesterov: whether the momentum is Nesterov's.
        dtypes: of samples, parameters and momentum.
    """

    shape: LayerShape
    count: int
    iters: int
    nesterov: bool
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]

    def launches(self, formulation: str) -> list[Launch]:
        """A step's launches, on tensors without memory."""
        return step_launches(
            self.shape,
            self.count,
            formulation,
            self.iters,
            self.nesterov,
            *self.dtypes,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "dtypes": [str(d).split(".")[1] for d in self.dtypes]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Geometry:
        """What `to_json` gave."""
        shape = dict(values["shape"])
        if shape["conv"] is not None:
            conv = shape["conv"]
            lists = {k: tuple(v) if isinstance(v, list) else v for k, v in conv.items()}
            shape["conv"] = ConvSpec(**lists)
            shape["image"] = tuple(shape["image"])
        samples, params, momentum = (getattr(torch, d) for d in values["dtypes"])
        return cls(
            LayerShape(**shape),
            values["count"],
            values["iters"],
            values["nesterov"],
            (samples, params, momentum),
        )


@dataclass(frozen=True)
class Job:
    """A candidate to compile.

    Attributes:
        geometry: whose step launches it.
        formulation: ``"primal"`` or ``"gram"``.
        key: of the kernel.
        config: the candidate.
        capability: of the GPU.
    """

    geometry: Geometry
    formulation: str
    key: str
    config: Config
    capability: int

    def compile(self) -> Resources:
        """Resources of the costliest launch that has the key."""
        with using(Table({self.key: self.config})):
            launches = self.geometry.launches(self.formulation)
        launch = costliest([a for a in launches if a.config.key == self.key])
        options = launch.config.options()
        return compile_launch(launch.kernel, launch.args, options, self.capability)


def costliest(launches: Sequence[Launch]) -> Launch:
    """The one with most operations, then bytes: what a kernel's speed hangs on."""

    def cost(launch: Launch) -> tuple[int, int]:
        done = work(launch.name, launch.args, launch.grid)
        return done.operations, done.bytes

    return max(launches, key=cost)


def compile_jobs(
    jobs: Sequence[Job],
    workers: int | None = None,
    done: Callable[[], object] = lambda: None,
    timeout: float = float("inf"),
) -> list[Resources | None]:
    """Compile candidates side by side.

    Args:
        jobs: what to compile.
        workers: processes; None takes one a core.
        done: called after each.
        timeout: seconds after which no further job is begun.

    Returns:
        Resources in the order of jobs; None for what did not compile or was not begun.
    """
    import time

    results: list[Resources | None] = [None] * len(jobs)
    queue: Queue[int] = Queue()
    for i in range(len(jobs)):
        queue.put(i)
    deadline = time.monotonic() + timeout

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
                answer = _ask(process, jobs[i])
                if answer is None:  # the compiler crashed: the next job gets a new one
                    process.kill()
                    process = None
                elif "registers" in answer:
                    results[i] = Resources(**answer)
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
    return results


def _start() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _ask(process: subprocess.Popen[str], job: Job) -> dict[str, Any] | None:
    assert process.stdin is not None and process.stdout is not None
    question = {
        "geometry": job.geometry.to_json(),
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
        return None
    return json.loads(line) if line else None


def answer(line: str) -> str:
    """Compile the job on a line; returns its resources, or the error, as JSON."""
    from .space import SPACES
    from .table import kernel_of

    asked = json.loads(line)
    config = SPACES[kernel_of(asked["key"])].config(**asked["config"])
    geometry = Geometry.from_json(asked["geometry"])
    job = Job(geometry, asked["formulation"], asked["key"], config, asked["capability"])
    try:
        return json.dumps(asdict(job.compile()))
    except Exception as error:  # whatever a compiler raises
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})


def serve(lines: Iterable[str]) -> None:
    """Answer jobs until there are no more."""
    # The compiler may print to standard output; answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in lines:
        channel.write(answer(line) + "\n")
        channel.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.stdin)
