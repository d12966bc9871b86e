"""A pool's ranks as a launcher would have started them."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def launched():
    """What launchers put into the environment, for libraries that look there."""
    before = dict(os.environ)
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
