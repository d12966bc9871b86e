"""Processes that form a gloo group and run functions of `rank_cases` for the tests."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
from interpreter import hasten

START, CALL = 120, 90  # seconds


def _work(rank, size, folder, connection, timeout):
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        hasten()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    connection.send(("ready", None))
    while (job := connection.recv()) is not None:
        function, args = job
        torch.manual_seed(0)
        try:
            connection.send(("done", function(*args)))
        except Exception:
            connection.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """`size` processes; `run` calls a function on all of them and returns all results.

    A call that takes too long, a hang, kills the processes and fails the test.
    """

    def __init__(self, size, timeout=30):
        self.size, self.timeout = size, timeout
        self._processes = []

    def _start(self):
        self._folder = tempfile.TemporaryDirectory()
        # A server imports torch and the package once, and every rank is its fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["frog_triton"])
        self._connections, self._processes = [], []
        os.environ["OMP_NUM_THREADS"], before = "1", os.environ.get("OMP_NUM_THREADS")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (rank, self.size, self._folder.name, theirs, self.timeout)
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        self._collect(START)

    def run(self, function, *args):
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        return self._collect(CALL)

    def _collect(self, seconds):
        deadline = time.monotonic() + seconds
        results, failed = [], []
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(max(0, deadline - time.monotonic())):
                    raise TimeoutError(f"no answer after {seconds} s")
                kind, value = connection.recv()
            except (EOFError, TimeoutError) as error:
                kind, value = "lost", repr(error)
            if kind in ("failed", "lost"):
                failed.append(f"rank {rank} {kind}: {value}")
            results.append(value)
        if failed:
            self.close()  # ranks may be out of step: the next call starts new ones
            raise AssertionError("\n".join(failed))
        return results

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections if self._processes else []:
            connection.close()
        self._processes = []
