"""Accumulation, checkpointing, sharing, freezing: against Algorithm 1 or a twin."""

import copy
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton import FROG

EVERYTHING = 1000  # samples: all of a batch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x, through=None):
        x = torch.tanh(self.first(x))
        x = self.second(x) if through is None else through(self.second, x)
        return self.head(torch.tanh(x))


def batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator, dtype=torch.float64)


def pair(**options):
    net = Net().double()
    twin = copy.deepcopy(net)
    return net, FROG(net, **options), twin, FROG(twin, **options)


def assert_close(net, twin):
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        # Measured 6e-12 of the largest entry with PAPER, 7e-14 with the defaults: the
        # same samples in another order.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@contextmanager
def counted(capture, candidates):
    """Adds up, of each layer, how many candidates its samples are drawn from."""
    pool = capture.pool

    def counting(name, call, total):
        candidates[name] += total
        pool(name, call, total)

    with mock.patch.object(capture, "pool", counting):
        yield


@pytest.mark.parametrize("options", [{}, PAPER])
def test_micro_batches_are_the_whole_batch(options):
    net, opt, twin, twin_opt = pair(sample_size=EVERYTHING, **options)
    for step in range(3):
        x = batch(step)
        for micro in x.split(2):
            net(micro).square().sum().backward()
        twin(x).square().sum().backward()
        for optimizer in (opt, twin_opt):
            optimizer.step()
            optimizer.zero_grad()
    assert_close(net, twin)


@pytest.mark.parametrize("sample_size", [4, EVERYTHING])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_checkpointing_is_the_run_without(reentrant, micro_batches, sample_size):
    if not reentrant and micro_batches > 1:
        sample_size = EVERYTHING  # a second forward counts, so others are drawn
    net, opt, twin, twin_opt = pair(sample_size=sample_size)

    def through(module, x):
        return checkpoint(module, x, use_reentrant=reentrant)

    for step in range(3):
        candidates = Counter()
        for micro in range(micro_batches):
            x = batch(10 * step + micro)
            with counted(opt.capture, candidates):
                net(x, through).square().sum().backward()
            twin(x).square().sum().backward()
        assert candidates["second"] == 6 * micro_batches
        for optimizer in (opt, twin_opt):
            optimizer.step()
            optimizer.zero_grad()
    assert_close(net, twin)


@pytest.mark.parametrize("options", [{}, PAPER])
def test_a_layer_skipped_in_some_steps_is_algorithm_1_in_the_others(options):
    net = Net().double()
    opt = FROG(net, sample_size=EVERYTHING, **options)
    model = Algorithm1(net.second, **options)
    seen = {}

    def watch(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda g: seen.__setitem__("y", g))

    net.second.register_forward_hook(watch)
    for step in range(6):
        opt.zero_grad()
        skip = step % 3 == 1
        through = (lambda module, x: x) if skip else None
        net(batch(step), through).square().sum().backward()
        if not skip:
            model.step(
                seen["x"], seen["y"], net.second.weight.grad, net.second.bias.grad
            )
        opt.step()
    assert opt.state[net.second.weight]["step"] == 4
    # Measured 8e-13 with PAPER, 3e-14 with the defaults.
    assert oracles.relative_error(net.second.weight, model.weight) < 1e-10


def test_a_frozen_layer_stays_and_moves_again_when_unfrozen():
    net = Net().double()
    net.second.requires_grad_(False)
    opt = FROG(net)
    assert "second.weight" in opt.describe().updated_by("frog")
    before = net.second.weight.clone()
    for step in range(4):
        if step == 2:
            assert torch.equal(net.second.weight, before)
            net.second.requires_grad_(True)
        opt.zero_grad()
        net(batch(step)).square().sum().backward()
        opt.step()
    assert opt.state[net.second.weight]["step"] == 2
    assert not torch.equal(net.second.weight, before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, PAPER])
def test_a_layer_put_in_the_place_of_another(options):
    net = Net().double()
    opt = FROG(net, sample_size=EVERYTHING, **options)
    net(batch(0)).square().sum().backward()
    opt.step()
    old, net.second = net.second, nn.Linear(5, 5).double()
    opt.add_param_group({"params": net.second.parameters()})
    assert not old._forward_hooks
    model, seen = Algorithm1(net.second, **options), {}

    def watch(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda g: seen.__setitem__("y", g))

    net.second.register_forward_hook(watch)
    opt.zero_grad()
    net(batch(1)).square().sum().backward()
    model.step(seen["x"], seen["y"], net.second.weight.grad, net.second.bias.grad)
    opt.step()
    # Measured 8e-13 with PAPER, 3e-14 with the defaults.
    assert oracles.relative_error(net.second.weight, model.weight) < 1e-10
    routes = [r.reason for r in opt.describe() if r.name == "second.weight"]
    assert sorted(routes) == ["Linear; gram, N = 6", "no longer in the model"]
    opt.load_state_dict(opt.state_dict())


def test_a_parameter_of_another_model_cannot_be_added():
    opt = FROG(Net())
    groups = len(opt.param_groups)
    with pytest.raises(ValueError, match=r"shape .4, 3. in params does not belong"):
        opt.add_param_group({"params": nn.Linear(3, 4).parameters()})
    assert len(opt.param_groups) == groups


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_a_clipped_gradient_is_what_the_momentum_sees(clip):
    net = Net().double()
    opt = FROG(net, sample_size=EVERYTHING)
    net(batch(0)).square().sum().backward()
    if clip == "norm":
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    else:
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
    opt.step()
    for layer in (net.first, net.second):
        buffer = opt.state[layer.weight]["momentum_buffer"]
        assert torch.equal(buffer, layer.weight.grad)


def test_loss_over_a_functional_call_of_the_model():
    net = Net().double()
    opt = FROG(net)
    params = dict(net.named_parameters())
    out = torch.func.functional_call(net, params, (batch(0),))
    F.mse_loss(out, torch.zeros_like(out)).backward()
    opt.step()
    assert opt.describe().updated_by("frog") == [
        f"{name}.{kind}" for name in ("first", "second") for kind in ("weight", "bias")
    ]
