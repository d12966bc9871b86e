"""What the ranks of `rank_pool` run for the tests."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import oracles
import torch
import torch.distributed as dist
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from frog_triton import FROG


class Net(nn.Module):
    """Convolutions with and without groups, and Linear layers of ragged sizes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 10, 3, stride=2, groups=2, bias=False)
        self.conv3 = nn.Conv2d(10, 10, 2, padding="same", groups=10)
        self.fc = nn.Linear(10 * 2 * 2, 5)
        self.tiny = nn.Linear(5, 1)
        self.head = nn.Linear(1, 3)

    def forward(self, x, skip=()):
        x = torch.tanh(self.conv1(x))
        x = torch.tanh(self.conv2(x))
        if "conv3" not in skip:
            x = torch.tanh(self.conv3(x))
        return self.head(self.tiny(torch.tanh(self.fc(x.flatten(1)))))

    def layers(self):
        names = ("conv1", "conv2", "conv3", "fc", "tiny")
        return {name: self.get_submodule(name) for name in names}


def batch(step, size=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (size,), generator=generator)


def mine(tensor):
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def bits(tensors):
    """Whether tensors are the same, bit for bit, on all ranks."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    everywhere = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, flat)
    return all(torch.equal(flat, other) for other in everywhere)


def pooled_calls(opt):
    """What all ranks captured: (name, module's place, x, y) of each call, by rank."""
    calls = []
    for name, layer in opt._plan.layers.items():
        for call in opt.capture.calls(name):
            calls.append((name, layer.modules.index(call.module), call.x, call.y))
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, calls)
    return [call for rank in everywhere for call in rank]


def ddp_against_one_process(options, steps=4):
    """Worst relative difference of the weights, and whether ranks have equal bits.

    All samples are kept, so one process sees the pooled batch. Algorithm 1 in float64
    is fed by hooks on that process's model.
    """
    net = Net().double()
    single, twin = copy.deepcopy(net), DistributedDataParallel(net)
    opt = FROG(twin, sample_size=10_000, **options)
    alone = FROG(single, sample_size=10_000, process_group=False, **options)
    own = ("formulation", "sampling")
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
    against_single = against_model = 0.0
    equal = True
    for step in range(steps):
        x, y = batch(step)
        for o, m, b in ((opt, twin, (mine(x), mine(y))), (alone, single, (x, y))):
            o.zero_grad()
            F.cross_entropy(m(b[0]), b[1]).backward()
        for name, layer in single.layers().items():
            bias = None if layer.bias is None else layer.bias.grad
            models[name].step(*seen[name], layer.weight.grad, bias)
        opt.step()
        alone.step()
        equal &= bits(net.parameters())
        equal &= bits(t for s in opt.state.values() for t in s.values())
        for p, q in zip(net.parameters(), single.parameters(), strict=True):
            error = oracles.relative_error(p, oracles.as_numpy(q))
            against_single = max(against_single, error)
        for name, layer in net.layers().items():
            error = oracles.relative_error(layer.weight, models[name].weight)
            against_model = max(against_model, error)
            if layer.bias is not None:
                error = oracles.relative_error(layer.bias, models[name].bias)
                against_model = max(against_model, error)
    return against_single, against_model, equal


def ddp_against_pooled_draws(options, steps=3):
    """As above with few samples: those that ranks drew are given to one process."""
    net = Net().double()
    single, twin = copy.deepcopy(net), DistributedDataParallel(net)
    opt = FROG(twin, **options)
    alone = FROG(single, **{**options, "sample_size": 10_000, "process_group": False})
    worst, drawn = 0.0, {}
    for step in range(steps):
        x, y = batch(step)
        opt.zero_grad()
        F.cross_entropy(twin(mine(x)), mine(y)).backward()
        drawn = {}
        for name, module, cx, cy in pooled_calls(opt):
            name = name.removeprefix("module.")
            layer = alone._plan.layers[name]
            alone.capture.add(name, layer.modules[module], cx, cy, len(cx))
            alone.capture.called.add(name)
            drawn[name] = drawn.get(name, 0) + len(cx)
        for p, q in zip(single.parameters(), net.parameters(), strict=True):
            p.grad = q.grad.clone()
        opt.step()
        alone.step()
        for p, q in zip(net.parameters(), single.parameters(), strict=True):
            worst = max(worst, oracles.relative_error(p, oracles.as_numpy(q)))
    return worst, drawn, bits(net.parameters())


def train(model, opt, steps, size=12, dtype=torch.float64, **kwargs):
    for step in steps:
        x, y = batch(step, size, dtype)
        opt.zero_grad()
        F.cross_entropy(model(mine(x), **kwargs), mine(y)).backward()
        opt.step()


def ddp_description():
    net = DistributedDataParallel(Net())
    opt = FROG(net, sample_size=5, **PAPER)
    before = str(opt.describe())
    train(net, opt, range(1), dtype=torch.float32)
    return before, str(opt.describe()), opt.capture.sample_size


def count_collectives(options):
    """Collectives of one step, by name, and what the optimizer says of them."""
    net = DistributedDataParallel(Net())
    opt = FROG(net, **options)
    train(net, opt, range(1), dtype=torch.float32)
    x, y = batch(1, dtype=torch.float32)
    opt.zero_grad()
    F.cross_entropy(net(mine(x)), mine(y)).backward()
    with CommDebugMode() as communication:
        opt.step()
    counts = {str(op): n for op, n in communication.get_comm_counts().items()}
    return counts, str(opt.describe())


def ddp_uneven(case):
    """Ranks with unlike data: weights stay equal, and all rows move."""
    net = Net().double()
    twin = DistributedDataParallel(net, find_unused_parameters=True)
    opt = FROG(twin, sample_size=8, sampling=case.get("sampling", "examples"))
    before = [p.detach().clone() for p in net.parameters()]
    rank = dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            size = case["sizes"][rank % 2]
            x, y = batch(10 * step + rank, size)
            skip = case.get("skip", ((), ()))[rank % 2]
            x = x[..., : case.get("width", (6, 6))[rank % 2]]
            if "width" in case:
                x = F.adaptive_avg_pool2d(x, 6) if case["width"][rank % 2] < 6 else x
            opt.zero_grad()
            F.cross_entropy(twin(x, skip), y, reduction="sum").backward()
            opt.step()
    moved = all(
        not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)
    )
    updated_by = [route.updated_by for route in opt.describe()]
    messages = sorted({str(w.message)[:60] for w in caught})
    return bits(net.parameters()), moved, updated_by, messages


class TwoSizes(nn.Module):
    """Rank 0 and the others feed the convolution images of different sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


def ddp_images_of_two_sizes():
    net = TwoSizes().double()
    single, twin = copy.deepcopy(net), DistributedDataParallel(net)
    opt = FROG(twin, sample_size=1000)
    alone = FROG(single, sample_size=1000, process_group=False)
    batches = []
    for rank in range(dist.get_world_size()):
        x, y = batch(rank, 3)
        batches.append((x if rank else x[..., :4], y))
    x, y = batches[dist.get_rank()]
    F.cross_entropy(twin(x), y).backward()
    loss = [F.cross_entropy(single(x), y) for x, y in batches]
    (sum(loss) / len(loss)).backward()
    opt.step()
    alone.step()
    error = oracles.relative_error(
        net.conv.weight, oracles.as_numpy(single.conv.weight)
    )
    return error, bits(net.parameters())


def ddp_resume(world, folder, save):
    """Two steps, and two more after a resume on `world` ranks; returns the weights."""
    path = f"{folder}/state.pt"
    net = Net().double()
    twin = DistributedDataParallel(net)
    opt = FROG(twin, sample_size=8)
    if save:
        train(twin, opt, range(2))
        if dist.get_rank() == 0:
            torch.save([net.state_dict(), opt.state_dict()], path)
        train(twin, opt, range(2, 4))
    else:
        weights, state = torch.load(path, weights_only=True)
        net.load_state_dict(weights)
        opt.load_state_dict(state)
        train(twin, opt, range(2, 4))
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def ddp_disagreements():
    rank = dist.get_rank()
    errors = {}
    net = DistributedDataParallel(Net().double())
    opt = FROG(net, sample_size=8 + rank)
    errors["sample_size"] = error_of(train, net, opt, range(1))
    opt = FROG(net, lr=0.1 if rank else 0.2)
    errors["lr"] = error_of(train, net, opt, range(1))
    opt.close()
    plain = Net().double()
    opt = FROG(plain)
    before = copy.deepcopy(plain.state_dict())
    errors["not averaged"] = error_of(train, plain, opt, range(1))
    after = plain.state_dict()
    errors["unchanged"] = all(torch.equal(after[n], before[n]) for n in before)
    opt.close()
    opt = FROG(plain, process_group=False)
    errors["alone"] = error_of(train, plain, opt, range(1))
    opt.close()
    net = DistributedDataParallel(Net().double())
    opt = FROG(net)
    train(net, opt, range(1))
    x, y = batch(1)
    F.cross_entropy(net(mine(x)), mine(y)).backward()
    if rank:
        net.module.fc.bias.grad = None
    errors["one gradient"] = error_of(opt.step)
    opt.close()
    opt = FROG(net)
    F.cross_entropy(net(mine(x)), mine(y)).backward()
    if rank:
        opt.zero_grad()
    errors["no gradient"] = error_of(opt.step)
    return errors


def ddp_anomalies(options):
    """NaN in the samples of one rank; then in the gradient of one."""
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    twin = DistributedDataParallel(net)
    opt = FROG(twin, **options)
    x = torch.randn(4, 3).double()
    twin(x).square().sum().backward()
    if dist.get_rank() == 1:
        (call,) = opt.capture.calls("module.0")
        call.y[0, 2] = float("nan")
    opt.step()
    finite = all(bool(torch.isfinite(p).all()) for p in net.parameters())
    samples = opt.anomalies().get("module.0", {}).get("nonfinite_samples", 0)
    before = copy.deepcopy((net.state_dict(), opt.state_dict()["state"]))
    opt.zero_grad()
    twin(x).square().sum().backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        net[0].weight.grad[5, 1] = float("inf")
    opt.step()
    after = (net.state_dict(), opt.state_dict()["state"])
    unchanged = same(before, after)
    skipped = opt.anomalies()["model"]
    return bits(net.parameters()), finite, samples, unchanged, skipped


def same(one, other):
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(one, dict):
        return all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def ddp_dtypes(backend, dtype, sampling, **options):
    """Bit equality with 16-bit or float32 samples."""
    net = Net().to(dtype)
    twin = DistributedDataParallel(net)
    opt = FROG(twin, sample_size=8, backend=backend, sampling=sampling, **options)
    train(twin, opt, range(2), size=8, dtype=dtype)
    finite = all(bool(torch.isfinite(p).all()) for p in net.parameters())
    return SimpleNamespace(equal=bits(net.parameters()), finite=finite)
