"""Nets with a layer of every kind, and what the ranks of `rank_pool` do with them."""

from __future__ import annotations

import contextlib
import io
import warnings
from functools import partial

import oracles
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from fsdp_cases import whole
from rank_cases import bits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, weight_norm

from frog_triton import FROG, linear
from frog_triton.layers import ROWS_SECOND, LinearAdapter, Weight, register

EVERYTHING = 10_000
WIDTH, TOKENS, EXPERTS = 8, 4, 3


class Conv1D(nn.Module):
    """As transformers': its weight is ``(in, out)``."""

    def __init__(self, out, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out) / 3)
        self.bias = nn.Parameter(torch.randn(out) / 3)

    def forward(self, x):
        return x @ self.weight + self.bias


register(f"{__name__}.Conv1D", LinearAdapter(Weight(axes=ROWS_SECOND)))


class Experts(nn.Module):
    """Stacked experts, gone through one by one; each token says whose it is."""

    def __init__(self, out, width, inputs_first, count=EXPERTS, every=False):
        super().__init__()
        self.num_experts, self.is_transposed = count, inputs_first
        shape = (count, width, out) if inputs_first else (count, out, width)
        self.weight = nn.Parameter(torch.randn(shape) / 3)
        self.bias = nn.Parameter(torch.randn(count, out) / 3)
        self.every = every

    def forward(self, x, expert):
        result = x.new_zeros(*x.shape[:-1], self.bias.shape[1])
        for e in range(self.num_experts):
            chosen = expert == e
            if self.every:  # so that the graph does not depend on the data
                result = result + chosen.unsqueeze(-1) * self.one(x, e)
            elif chosen.any():
                result[chosen] = self.one(x[chosen], e)
        return result

    def one(self, x, e):
        if self.is_transposed:
            return x @ self.weight[e] + self.bias[e]
        return F.linear(x, self.weight[e]) + self.bias[e]


class Halved(nn.Linear):
    """A Linear layer with a forward of its own."""

    def forward(self, input):
        return F.linear(input, self.weight * 0.5, self.bias)


class Bare(nn.Module):
    """A matrix of its own, of which FROG is told where it is used."""

    def __init__(self, out, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width) / 3)

    def forward(self, x):
        return linear(x, self.weight)


def plain(layer, x, _):
    return layer(x)


def attend(layer, x, _):
    return layer(x, x, x, need_weights=False)[0]


def attend_memory(layer, x, _):
    memory = 0.5 * x.flip(1)
    return layer(x, memory, memory)[0]


def attend_three(layer, x, _):
    return layer(x, x.flip(1), x.roll(1, 1))[0]


def attend_narrow(layer, x, _):
    return layer(x, x.flip(1)[..., :6], x[..., :5])[0]


def routed(layer, x, tokens):
    return layer(x, tokens[..., 0].long())


def images(layer, x, _):
    return layer(x.mT.unflatten(2, (2, 2))).flatten(2).mT


def pairs(layer, x, _):
    return layer(x, x.roll(1, 1))


def sequences(layer, x, _):
    return layer(x)[0]


class Net(nn.Module):
    """A Linear layer, a layer of some kind, and a head."""

    def __init__(self, build, call=plain, out=5):
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.layer = build()
        self.head = nn.Linear(out, 3)
        self.call = call

    def forward(self, x):
        x = self.call(self.layer, torch.tanh(self.first(x)), x)
        return self.head(torch.tanh(x))


def attention(**options):
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)


def normed(how):
    return lambda: how(nn.Linear(WIDTH, 5))


NETS = {
    "conv1d": partial(Net, lambda: Conv1D(6, WIDTH), out=6),
    "self": partial(Net, attention, attend, WIDTH),
    "memory": partial(Net, attention, attend_memory, WIDTH),
    "three": partial(Net, lambda: attention(bias=False), attend_three, WIDTH),
    "separate": partial(
        Net, lambda: attention(bias=False, kdim=6, vdim=5), attend_narrow, WIDTH
    ),
    "experts": partial(Net, lambda: Experts(5, WIDTH, False), routed),
    "experts, inputs first": partial(Net, lambda: Experts(5, WIDTH, True), routed),
    "transposed": partial(
        Net, lambda: nn.ConvTranspose2d(WIDTH, 6, 3, 2, 1), images, 6
    ),
    "transposed, groups": partial(
        Net, lambda: nn.ConvTranspose2d(WIDTH, 6, 3, 2, 1, groups=2), images, 6
    ),
    "bilinear": partial(Net, lambda: nn.Bilinear(WIDTH, WIDTH, 5), pairs),
    "lstm": partial(Net, lambda: nn.LSTM(WIDTH, 5, batch_first=True), sequences),
    "bare": partial(Net, lambda: Bare(5, WIDTH)),
    "own forward": partial(Net, lambda: Halved(WIDTH, 5)),
    "weight norm": partial(Net, normed(parametrizations.weight_norm)),
    "old weight norm": partial(Net, normed(weight_norm)),
}


def make(kind):
    return NETS[kind]().double()


def twins(kind):
    """Two nets with equal weights."""
    net, twin = make(kind), make(kind)
    twin.load_state_dict(net.state_dict())
    return net, twin


def batch(step, size=8):
    """Tokens, the first entry of each its expert: no half of a batch meets all."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, TOKENS, 6, generator=generator, dtype=torch.float64)
    first = torch.arange(size) * 2 // size + step % 2
    x[..., 0] = (first[:, None] + torch.arange(TOKENS) % 2) % EXPERTS
    return x, torch.randint(0, 3, (size,), generator=generator)


def parts(tensors, empty=()):
    """This rank's part of each tensor; ranks in `empty` have none."""
    ranks = [rank for rank in range(dist.get_world_size()) if rank not in empty]
    if dist.get_rank() in empty:
        return [tensor[:0] for tensor in tensors]
    here = ranks.index(dist.get_rank())
    return [tensor.chunk(len(ranks))[here] for tensor in tensors]


def loss_of(net, x, y, **kwargs):
    """A sum, so that it does not matter how much of a batch each rank has."""
    logits = net(x, **kwargs).mean(1)
    return F.cross_entropy(logits, y, reduction="sum")


def backward_on_ranks(model, step, empty=(), **kwargs):
    """A pass whose gradients, averaged over ranks, are those of the whole batch."""
    loss = loss_of(model, *parts(batch(step), empty), **kwargs)
    (loss * dist.get_world_size()).backward()


def train(net, opt, steps):
    for step in steps:
        opt.zero_grad()
        backward_on_ranks(net, step)
        opt.step()


def shard(net, replicas=1, **options):
    """`fully_shard` each child and the whole, on a mesh of replicas x shards."""
    size = dist.get_world_size()
    if replicas == 1:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    else:
        names, shape = ("replicate", "shard"), (replicas, size // replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for name, child in net.named_children():
        fully_shard(child, mesh=mesh, **(options if name == "layer" else {}))
    return fully_shard(net, mesh=mesh)


def second_dimension(param):
    """For `fully_shard`: matrices are sharded on the dimension of their rows."""
    return Shard(1) if param.ndim > 1 else None


WRAPS = {
    "ddp": lambda net: DistributedDataParallel(net, find_unused_parameters=True),
    "fsdp": shard,
    "fsdp, second": lambda net: shard(net, shard_placement_fn=second_dimension),
    "hsdp": lambda net: shard(net, dist.get_world_size() // 2),
}


def table_of(opt):
    """Who updates each parameter and why, by name in the model itself."""
    table = opt.describe(file=io.StringIO())
    return {r.name.removeprefix("module."): (r.updated_by, r.reason) for r in table}


def against_one_process(kind, wrap, options=None, alone_options=None, empty=()):
    """Three steps of ranks with parts of a batch, and of one process with all of it.

    Args:
        kind: of `NETS`.
        wrap: of `WRAPS`.
        options: of both optimizers.
        alone_options: of the one process's alone.
        empty: ranks without data.

    Returns:
        The worst relative difference of weights and momenta; whether ranks with copies
        of the weights have the same bits; `table_of` the ranks' optimizer; of each
        layer how many samples this rank and the one process had; and all warnings.
    """
    net, single = twins(kind)
    model = WRAPS[wrap](net)
    options = options or {}
    opt = FROG(model, sample_size=EVERYTHING, **options)
    options = options | (alone_options or {})
    alone = FROG(single, sample_size=EVERYTHING, process_group=False, **options)
    worst, equal, drawn, told = 0.0, True, {}, []
    for step in range(3):
        opt.zero_grad()
        alone.zero_grad()
        backward_on_ranks(model, step, empty)
        loss_of(single, *batch(step)).backward()
        for name in alone._plan.layers:
            held = f"module.{name}" if wrap == "ddp" else name
            both = opt.capture.calls(held), alone.capture.calls(name)
            drawn[name] = [sum(call.size for call in calls) for calls in both]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        told += [str(w.message) for w in caught]
        alone.step()
        equal &= wrap != "ddp" or bits(net.parameters())
        for p, q in zip(net.parameters(), single.parameters(), strict=True):
            worst = max(worst, oracles.relative_error(whole(p), oracles.as_numpy(q)))
            exact = oracles.as_numpy(alone.state[q].get("momentum_buffer", q))
            found = whole(opt.state[p].get("momentum_buffer", p))
            worst = max(worst, oracles.relative_error(found, exact))
    return worst, equal, table_of(opt), drawn, told


def beside_the_mesh():
    """Who updates what where a matrix of a module's own is left out of the sharding."""
    net = make("bare")
    fully_shard(net, ignored_params={net.layer.weight})
    return table_of(FROG(net))


# -- output layers ---------------------------------------------------------------------


class Branches(nn.Module):
    """Outputs whose names tell nothing.

    Args:
        names: of its parts, in order; FROG guesses that the last is the output.
    """

    def __init__(self, *names):
        super().__init__()
        made = {
            "one": nn.Linear(5, 3),
            "two": nn.Linear(5, 3),
            "first": nn.Linear(6, WIDTH),
            "layer": Experts(5, WIDTH, inputs_first=True),
        }
        for name in names:
            self.add_module(name, made[name])

    def forward(self, x, branch="one"):
        hidden = torch.tanh(self.layer(torch.tanh(self.first(x)), x[..., 0].long()))
        return getattr(self, branch)(hidden) if branch else hidden


def search(wrap, names, branches, empty=()):
    """Three steps; `branches` are those that the ranks take.

    Returns:
        Who updates what after the first step and after the last; whether ranks with
        copies have the same bits; and what this rank has printed.
    """
    net = Branches(*names).double()
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        model = WRAPS[wrap](net)
        opt = FROG(model, sample_size=EVERYTHING)
        tables = []
        for step in range(3):
            opt.zero_grad()
            branch = branches[dist.get_rank() % len(branches)]
            backward_on_ranks(model, step, empty, branch=branch)
            opt.step()
            tables.append({name: by for name, (by, _) in table_of(opt).items()})
    lines = [line for line in printed.getvalue().splitlines() if "FROG" in line]
    return tables[0], tables[-1], wrap != "ddp" or bits(net.parameters()), lines


def checkpoint(folder, save):
    """Two steps and a checkpoint, or a resume; then two more steps.

    Returns:
        Who updates what at the end, and why; and the weights, whole.
    """
    torch.manual_seed(1 if save else 2)
    net = shard(Branches("first", "layer", "one").double())
    opt = FROG(net, sample_size=EVERYTHING)
    if save:
        train(net, opt, range(2))
    stored = {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, opt),
    }
    if save:
        dcp.save(stored, checkpoint_id=folder)
    else:
        dcp.load(stored, checkpoint_id=folder)
        set_model_state_dict(net, stored["model"])
        set_optimizer_state_dict(net, opt, stored["optimizer"])
    train(net, opt, range(2, 4))
    weights = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
    return table_of(opt), weights
