"""Processes that write tables of tuned configurations."""

from __future__ import annotations

import multiprocessing
import warnings

from frog_triton.autotune.cache import Cache, Machine
from frog_triton.kernels.gram import GramConfig
from frog_triton.kernels.table import Table


def _write(folder, name, count, told):
    warnings.simplefilter("error")
    cache, machine = Cache(folder), Machine("NVIDIA Test 1", 90, "3.7.1")
    for i in range(count):
        cache.store(machine, Table({f"gram n{i} p{name}": GramConfig()}))
        told.send(i)


def start(folder, name, count):
    """A process that stores `count` tables, and a connection that tells of each.

    It is a fork of a server that has imported the package, and holds no lock of ours.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["frog_triton"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_write, args=(str(folder), name, count, theirs), daemon=True
    )
    process.start()
    theirs.close()
    return process, ours
