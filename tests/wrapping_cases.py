"""Wrappers that shard or split a model, on the ranks of a pool."""

from __future__ import annotations

import ast
import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_cases import error_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from frog_triton import FROG


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks that are split, between layers that are not."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


COLUMNS_THEN_ROWS = {
    "blocks.*.up": ColwiseParallel(),
    "blocks.*.down": RowwiseParallel(),
}


def mesh(*sizes, names=None):
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def split(plan, net=None):
    return parallelize_module(net or Net().double(), mesh(dist.get_world_size()), plan)


def parallelisms():
    """Errors at construction, by what has split the layers."""
    rows = {"blocks.*.down": RowwiseParallel(input_layouts=Replicate())}
    sequence = {"blocks.*.norm": SequenceParallel()}
    sequence["blocks.*.up"] = ColwiseParallel(input_layouts=Shard(0))
    whole = ColwiseParallel(output_layouts=Replicate())
    linear = {n: whole for n in ("first", "second", "blocks.*.up", "blocks.*.down")}
    models = {
        "columns and rows": lambda: split(COLUMNS_THEN_ROWS),
        "rows": lambda: split(rows),
        "columns": lambda: split(linear),
        "sequence": lambda: split(sequence),
        "replicated by hand": lambda: distribute_module(Net(), mesh(2)),
    }
    return {name: error_of(FROG, build()) for name, build in models.items()}


def with_fully_shard():
    """The error where fully_shard shards what tensor parallelism has split."""
    two = mesh(1, 2, names=("data", "tensor"))
    net = parallelize_module(Net(), two["tensor"], COLUMNS_THEN_ROWS)
    fully_shard(net, mesh=two["data"])
    return error_of(FROG, net)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (12,), generator=generator)


def excluded():
    """Weights of the split net and of one that is not, the split layers excluded."""
    split_net, whole_net = split(COLUMNS_THEN_ROWS), Net().double()
    message = error_of(FROG, split_net)
    advice = ast.literal_eval(message.partition("exclude=")[2])
    out = {"exclude": advice, "sample_size": 10_000}
    for net, kind in ((split_net, None), (whole_net, False)):
        opt = FROG(net, process_group=kind, **out)
        for step in range(3):
            x, y = batch(step)
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    served = opt.describe().updated_by("frog")
    weights = [
        {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in named}
        for named in (split_net.named_parameters(), whole_net.named_parameters())
    ]
    return *weights, served


def flattened():
    """Errors at construction, by the wrapper that flattens weights."""
    cpu = torch.device("cpu")
    models = {
        "flat": FullyShardedDataParallel(Net(), device_id=cpu),
        "views": FullyShardedDataParallel(Net(), device_id=cpu, use_orig_params=True),
    }
    errors = {name: error_of(FROG, model) for name, model in models.items()}
    inner = Net()
    inner.blocks[0] = FullyShardedDataParallel(inner.blocks[0], device_id=cpu)
    errors["inner"] = error_of(FROG, inner)
    try:
        ZeroRedundancyOptimizer(Net().parameters(), optimizer_class=FROG)
    except TypeError as error:
        errors["ZeroRedundancyOptimizer"] = str(error)
    return errors


def sharded_afterwards():
    """The error of the first step where fully_shard came after FROG."""
    net = Net()
    opt = FROG(net)
    fully_shard(net)
    x, y = batch(0)
    F.cross_entropy(net(x.float()), y).backward()
    return error_of(opt.step)


def pipeline():
    """The error of a stage a rank, then its weights with process_group=False.

    Beside these, what one process makes of the whole model.
    """
    rank, device = dist.get_rank(), torch.device("cpu")
    layers = [layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh())]
    whole = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    cut = slice(4 * rank, 4 * rank + 4)
    options = {"exclude_output_layer": rank == 1, "sample_size": 10_000}

    def train(part, group, steps):
        with FROG(part, process_group=group, **options) as opt:
            shape = torch.zeros(6, 4, dtype=torch.float64)
            stage = PipelineStage(part, rank, 2, device, input_args=(shape,))
            schedule = ScheduleGPipe(stage, 2, loss_fn=F.cross_entropy)
            for step in range(steps):
                x, y = batch(step)
                opt.zero_grad()
                schedule.step(x) if rank == 0 else schedule.step(target=y)
                opt.step()

    error = error_of(train, copy.deepcopy(whole)[cut], None, 1)
    part = copy.deepcopy(whole)[cut]
    train(part, False, 3)
    with FROG(whole, process_group=False, sample_size=10_000) as opt:
        for step in range(3):
            x, y = batch(step)
            opt.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            opt.step()
    parameters = (model.parameters() for model in (part, whole[cut]))
    return error, *([p.detach() for p in params] for params in parameters)
