"""DeepSpeed's engine with FROG as its optimizer, on the ranks of a pool."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launched import launched
from rank_cases import error_of
from wrapping_cases import Net, batch

from frog_triton import FROG


def engine_of(config, late=False):
    """An engine around `Net`, with FROG as its optimizer.

    Args:
        config: beside the batch size.
        late: build FROG once the engine has converted the model.
    """
    import deepspeed

    net = Net()
    common = {"train_micro_batch_size_per_gpu": 6}
    common["zero_allow_untested_optimizer"] = True
    common["zero_force_ds_cpu_optimizer"] = False
    if late:
        deepspeed.zero.Init(module=net, config_dict_or_path=common | config)
    opt = FROG(net, sample_size=10_000)
    engine, *_ = deepspeed.initialize(model=net, optimizer=opt, config=common | config)
    return net, opt, engine


def train_engine(engine, steps=4, accumulate=1):
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        x, y = batch(step)
        parts = x.chunk(size * accumulate), y.chunk(size * accumulate)
        for x, y in list(zip(*parts, strict=True))[rank::size]:
            engine.backward(F.cross_entropy(engine(x.to(engine.first.weight)), y))
            engine.step()


def without_zero(accumulate):
    """Weights after steps of the engine, and of one process with the whole batch."""
    more = {"gradient_accumulation_steps": accumulate}
    more["train_micro_batch_size_per_gpu"] = 6 // accumulate
    with launched():
        net, opt, engine = engine_of(more)
        train_engine(engine, accumulate=accumulate)
    opt.close()
    alone = Net()
    lone = FROG(alone, sample_size=10_000, process_group=False)
    for step in range(4):
        x, y = batch(step)
        lone.zero_grad()
        F.cross_entropy(alone(x.float()), y).backward()
        lone.step()
    return [dict(n.state_dict()) for n in (net, alone)]


def error_with(config, late=False):
    """The error, and whether it left the weights as they were."""
    with launched():
        try:
            net, opt, engine = engine_of(config, late)
        except (RuntimeError, ValueError) as error:
            return str(error), True
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        error = error_of(train_engine, engine, 2)
    same = all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    opt.close()
    return error, same
