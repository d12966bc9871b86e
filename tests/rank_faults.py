"""A rank that dies, or stops answering, in the middle of training.

Run as ``python rank_faults.py RANK STORE DEED SHARDED``; rank 1 does the deed after
its second step.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist
from fsdp_cases import KINDS
from rank_cases import Net, batch, mine
from torch.nn.functional import cross_entropy

from frog_triton import FROG

TIMEOUT = 5  # seconds


def main(rank, store, deed, kind):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    model = KINDS[kind](Net().double())
    opt = FROG(model, sample_size=8)
    for step in range(3):
        x, y = batch(step)
        opt.zero_grad()
        cross_entropy(model(mine(x)), mine(y)).backward()
        if step == 2:
            print("step", flush=True)
            if rank == 1:
                os.kill(os.getpid(), getattr(signal, deed))
        opt.step()
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
