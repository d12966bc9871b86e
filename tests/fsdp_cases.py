"""What the ranks of `rank_pool` run for the tests of sharded training."""

from __future__ import annotations

import copy
import itertools

import oracles
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from rank_cases import Net, batch, error_of, mine, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from frog_triton import FROG


def shard(net, replicas=1, **options):
    """`fully_shard` each layer and the whole, on a mesh of replicas x shards."""
    size = dist.get_world_size()
    if replicas == 1:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    else:
        names = ("replicate", "shard")
        shape = (replicas, size // replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in [*net.layers().values(), net.head]:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def against_one_process(replicas, options, steps=3):
    """Worst relative difference to one process and to Algorithm 1; largest message."""
    net = Net().double()
    single = copy.deepcopy(net)
    shard(net, replicas)
    opt = FROG(net, sample_size=10_000, **options)
    alone = FROG(single, sample_size=10_000, process_group=False, **options)
    own = ("formulation", "sampling", "fallback")
    hyper = {key: value for key, value in options.items() if key not in own}
    models = {name: Algorithm1(m, **hyper) for name, m in single.layers().items()}
    seen = {}

    def hook(name):
        def forward_hook(module, args, output):
            output.register_hook(
                lambda grad: seen.__setitem__(name, (args[0].detach(), grad.clone()))
            )

        return forward_hook

    for name, layer in single.layers().items():
        layer.register_forward_hook(hook(name))
    worst = model = 0.0
    for step in range(steps):
        x, y = batch(step)
        for o, m, b in ((opt, net, (mine(x), mine(y))), (alone, single, (x, y))):
            o.zero_grad()
            F.cross_entropy(m(b[0]), b[1]).backward()
        for name, layer in single.layers().items():
            bias = None if layer.bias is None else layer.bias.grad
            models[name].step(*seen[name], layer.weight.grad, bias)
        opt.step()
        alone.step()
        for (name, p), q in zip(
            net.named_parameters(), single.parameters(), strict=True
        ):
            exact = oracles.as_numpy(q)
            worst = max(worst, oracles.relative_error(whole(p), exact))
            exact = oracles.as_numpy(alone.state[q].get("momentum_buffer", q))
            found = whole(opt.state[p].get("momentum_buffer", p))
            worst = max(worst, oracles.relative_error(found, exact))
            layer, _, kind = name.partition(".")
            if layer in models:
                exact = getattr(models[layer], kind)
                model = max(model, oracles.relative_error(whole(p), exact))
    states = [s for s in opt.state.values() if "momentum_buffer" in s]
    sharded = all(
        s["momentum_buffer"].to_local().shape == p.to_local().shape
        for p, s in opt.state.items()
        if "momentum_buffer" in s
    )
    return worst, model, sharded and len(states) > 0


def collectives_of_a_step(replicas):
    """Collectives of a step by name, DTensor's included, and `describe`'s table."""
    net = shard(Net(), replicas)
    opt = FROG(net, sample_size=4, **PAPER)
    train(net, opt, range(1), dtype=torch.float32)
    x, y = batch(1, dtype=torch.float32)
    opt.zero_grad()
    F.cross_entropy(net(mine(x)), mine(y)).backward()
    with CommDebugMode() as communication:
        opt.step()
    counts = {str(op): n for op, n in communication.get_comm_counts().items()}
    return counts, str(opt.describe())


def sharded_dtypes(policy):
    """Mixed precision by fully_shard's policy, and models in 16 bits."""
    net = Net()
    if policy:
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        shard(net, mp_policy=half)
        dtype = torch.float32
    else:
        net = shard(net.bfloat16())
        dtype = torch.bfloat16
    opt = FROG(net, sample_size=8)
    train(net, opt, range(3), dtype=dtype)
    buffer = opt.state[net.fc.weight]["momentum_buffer"]
    finite = all(bool(torch.isfinite(whole(p)).all()) for p in net.parameters())
    return finite, buffer.dtype == torch.float32, opt.anomalies()


def other_placements():
    """Errors at construction, by case."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    errors = {}

    def linear_columns(parameter):
        return Shard(1) if parameter.ndim == 2 else Shard(0)

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(net, mesh=mesh, shard_placement_fn=linear_columns)
    errors["columns"] = error_of(FROG, net)
    excluded = FROG(net, exclude="0.weight")
    errors["excluded"] = [g["updated_by"] for g in excluded.param_groups]
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(net[0], mesh=mesh)
    errors["plain"] = error_of(FROG, net)
    net = shard(Net())
    errors["group"] = error_of(FROG, net, process_group=dist.group.WORLD)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(net, mesh=mesh, ignored_params={net[0].bias})
    errors["bias"] = error_of(FROG, net)
    return errors


def anomalies():
    net = shard(Net().double())
    opt = FROG(net, sample_size=100)
    x, y = batch(0)
    F.cross_entropy(net(mine(x)), mine(y)).backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        opt.capture.calls("fc")[0].y[0, 1] = float("nan")
    opt.step()
    finite = all(bool(torch.isfinite(whole(p)).all()) for p in net.parameters())
    samples = opt.anomalies().get("fc", {}).get("nonfinite_samples", 0)
    opt.zero_grad()
    F.cross_entropy(net(mine(x)), mine(y)).backward()
    if dist.get_rank() == 0:  # who holds row 0 of conv2
        net.conv2.weight.grad.to_local()[0] = float("inf")
    held = [*net.parameters(), *(t for s in opt.state.values() for t in s.values())]
    before = [local(t.detach()).clone() for t in held]
    opt.step()
    unchanged = all(map(torch.equal, before, map(local, held)))
    return finite, samples, unchanged, opt.anomalies()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fallback_on_shards(fallback):
    """A model whose fallback is sharded, too, beside torch's own in one process."""
    net = Net().double()
    single = copy.deepcopy(net)
    shard(net)
    options = {"fallback": fallback, "weight_decay": 0.1, "exclude": ("conv*",)}
    opt = FROG(net, **options)
    alone = FROG(single, process_group=False, **options)
    worst = 0.0
    for step in range(3):
        x, y = batch(step)
        for o, m, b in ((opt, net, (mine(x), mine(y))), (alone, single, (x, y))):
            o.zero_grad()
            F.cross_entropy(m(b[0]), b[1]).backward()
            o.step()
        for name in ("conv1", "conv2", "conv3"):
            p = whole(net.get_submodule(name).weight)
            q = single.get_submodule(name).weight
            worst = max(worst, oracles.relative_error(p, oracles.as_numpy(q)))
    return worst


KINDS = {
    "ddp": lambda net: DistributedDataParallel(net),
    "fsdp": shard,
    "hsdp": lambda net: shard(net, dist.get_world_size() // 2),
}


def checkpoint(kind, fallback, samples, folder, save):
    """Two steps and a checkpoint, or a resume; then two more steps.

    Returns:
        The momentum after loading (or when saved), and the weights at the end, whole.
    """
    torch.manual_seed(1 if save else 2)
    net = Net().double()
    model = KINDS[kind](net)
    opt = FROG(model, sample_size=samples, fallback=fallback, cg_iters=2)
    if save:
        train(model, opt, range(2))
    model_state = get_model_state_dict(model)
    state = get_optimizer_state_dict(model, opt)
    stored = {"model": model_state, "optimizer": state}
    if save:
        dcp.save(stored, checkpoint_id=folder)
    else:
        dcp.load(stored, checkpoint_id=folder)
        set_model_state_dict(model, stored["model"])
        set_optimizer_state_dict(model, opt, stored["optimizer"])
    params = dict(net.named_parameters())
    names = [n for n, p in params.items() if "momentum_buffer" in opt.state[p]]
    momenta = {
        name: whole(opt.state[params[name]]["momentum_buffer"]).clone()
        for name in names
    }
    steps = {
        name: float(opt.state[p]["step"])
        for name, p in params.items()
        if "step" in opt.state[p]
    }
    loaded = {name: whole(p.detach()).clone() for name, p in params.items()}
    train(model, opt, range(2, 4))
    weights = {name: whole(p.detach()).clone() for name, p in params.items()}
    return momenta, steps, loaded, weights


def plain_resume(folder, save):
    """`torch.save` of each rank's own state_dict, on the same number of ranks."""
    path = f"{folder}/rank{dist.get_rank()}.pt"
    net = shard(Net().double())
    opt = FROG(net, sample_size=8)
    if save:
        train(net, opt, range(2))
        torch.save([net.state_dict(), opt.state_dict()], path)
    else:
        model_state, state = torch.load(path, weights_only=False)
        net.load_state_dict(model_state)
        opt.load_state_dict(state)
    train(net, opt, range(2, 4))
    return {name: whole(p.detach()).clone() for name, p in net.named_parameters()}


def same(first, second):
    keys = itertools.chain(first, second)
    return all(torch.equal(first[key], second[key]) for key in keys)
