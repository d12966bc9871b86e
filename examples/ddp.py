"""FROG under DistributedDataParallel, or sharded by fully_shard.

torchrun --nproc-per-node 2 examples/ddp.py [--shard]
"""

import gc
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from frog_triton import FROG


def build(device: torch.device, shard: bool) -> nn.Module:
    """A small net, the same on all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, 1),
    ).to(device)
    return fully_shard(model) if shard else DistributedDataParallel(model)


def main(shard: bool) -> None:
    """Learn the distance of two points in eight dimensions."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    model = build(device, shard)
    optimizer = FROG(model)  # the wrapped model; no more to do

    torch.manual_seed(dist.get_rank())  # every rank has data of its own
    for _ in range(100):
        x = torch.randn(64, 16, device=device)
        target = (x[:, :8] - x[:, 8:]).norm(dim=1, keepdim=True)
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dist.all_reduce(loss := loss.detach(), dist.ReduceOp.SUM)
    if dist.get_rank() == 0:
        optimizer.describe()
        print(f"loss {loss.item() / dist.get_world_size():.3f}")
    del model, optimizer, loss  # what holds process groups goes before they do
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--shard" in sys.argv)
