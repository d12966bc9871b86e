"""What ranks run for `test_fate_on_ranks`: gradients dropped, layers let go, loads."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings

import oracles
import torch
import torch.distributed as dist
from algorithm1 import Algorithm1
from rank_cases import bits, error_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from frog_triton import FROG

EVERYTHING = 1000


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.experts = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)])
        self.head = nn.Linear(4, 2)
        self.routed = True

    def forward(self, x, expert=0):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.experts[expert](x))
        loss = self.head(x).square().sum()
        if self.routed:  # all parameters get a gradient, as DDP wants
            return loss + 0 * sum(p.sum() for p in self.parameters())
        return loss


def batch(seed):
    """This rank's part of the batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, x.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(net):
    net.routed = False
    for layer in (net.first, *net.experts, net.head):
        fully_shard(layer)
    return fully_shard(net)


def drop(how, net, opt):
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    if how == "model.zero_grad":
        net.zero_grad()
    elif how == "zero_":
        for grad in grads:
            grad.zero_()
    else:
        opt.zero_grad()


def dropped(kind, how, options):
    """Worst error to Algorithm 1 of steps with a pass before them that was dropped."""
    net = Net().double()
    single = copy.deepcopy(net)
    if kind == "fsdp":
        forward = shard(net)
    else:
        view = kind == "ddp, bucket views"
        forward = DistributedDataParallel(net, gradient_as_bucket_view=view)
    opt = FROG(forward, sample_size=EVERYTHING, **options)
    model, seen = Algorithm1(copy.deepcopy(single.first)), []
    worst = 0.0
    for step in range(3):
        if step != 1:
            (100 * forward(batch(10 + step)[1])).backward()
            drop(how, net, opt)
        everything, mine = batch(step)
        forward(mine).backward()
        # The mean over ranks, as DistributedDataParallel makes of a sum.
        handle = single.first.register_forward_hook(
            lambda m, args, y: (
                seen.append(args[0].detach()),
                y.register_hook(seen.append),
                None,
            )[-1]
        )
        single.zero_grad()
        (single(everything) / dist.get_world_size()).backward()
        handle.remove()
        model.step(*seen, single.first.weight.grad, single.first.bias.grad)
        seen.clear()
        opt.step()
        net.zero_grad()
        with torch.no_grad():
            for p, q in zip(net.parameters(), single.parameters(), strict=True):
                q.copy_(whole(p.detach()))
        found = whole(net.first.weight.detach())
        worst = max(worst, oracles.relative_error(found, model.weight))
    same = True if kind == "fsdp" else bits(net.parameters())
    return worst, same


def accumulated(kind):
    """Worst difference between three passes and one over all of their batches."""
    net = Net().double()
    twin = copy.deepcopy(net)
    if kind.startswith("fsdp"):
        forward = shard(net)
        twin_forward = shard(twin)
    else:
        forward, twin_forward = map(DistributedDataParallel, (net, twin))
    opt = FROG(forward, sample_size=EVERYTHING)
    other = FROG(twin_forward, sample_size=EVERYTHING)
    for step in range(2):
        parts = [batch(10 * step + micro)[1] for micro in range(3)]
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            quiet = contextlib.nullcontext()
            if kind == "ddp, no_sync" and not last:
                quiet = forward.no_sync()
            if kind == "fsdp, no sync":
                forward.set_requires_gradient_sync(last)
            with quiet:
                forward(part).backward()
        twin_forward(torch.cat(parts)).backward()
        for optimizer in (opt, other):
            optimizer.step()
            optimizer.zero_grad()
    return max(
        oracles.relative_error(whole(p.detach()), oracles.as_numpy(whole(q.detach())))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True)
    )


class Functional(nn.Module):
    """Uses a weight without its module, unless a rank calls it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x, call):
        x = torch.tanh(self.first(x))
        w, b = self.second.weight, self.second.bias
        x = self.second(x) if call else torch.nn.functional.linear(x, w, b)
        return self.head(torch.tanh(x)).square().sum()


def let_go_and_taken_back(calls):
    """Who updates the second layer after each step, and whether all ranks are equal.

    Args:
        calls: for each step, the ranks that call it.
    """
    net = Functional().double()
    forward = DistributedDataParallel(net)
    opt = FROG(forward, sample_size=EVERYTHING)
    by, warned = [], 0
    for step, ranks in enumerate(calls):
        opt.zero_grad()
        forward(batch(step)[1], dist.get_rank() in ranks).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        warned += len(caught)
        table = opt.describe(file=io.StringIO())
        by.append({r.name: r.updated_by for r in table}["module.second.weight"])
    return by, warned, bits(net.parameters())


def experts(routes):
    """Who updates the experts at the end; `routes` names each step's, by rank."""
    net = Net().double()
    forward = DistributedDataParallel(net)
    opt = FROG(forward, sample_size=EVERYTHING)
    for step, chosen in enumerate(routes):
        opt.zero_grad()
        forward(batch(step)[1], chosen[dist.get_rank() % 2]).backward()
        opt.step()
    frog = opt.describe(file=io.StringIO()).updated_by("frog")
    return frog, bits(net.parameters())


def refused_load():
    net = Net().double()
    forward = DistributedDataParallel(net)
    opt = FROG(forward, sample_size=EVERYTHING)
    forward(batch(0)[1]).backward()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    before = str(opt.describe(file=io.StringIO()))
    error = error_of(opt.load_state_dict, saved)
    after = str(opt.describe(file=io.StringIO()))
    opt.zero_grad()
    forward(batch(1)[1]).backward()
    opt.step()
    return error, before == after, bits(net.parameters())
