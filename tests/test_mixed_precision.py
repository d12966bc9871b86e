"""autocast, 16-bit models, loss scales and gradient clipping."""

import copy

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn

from frog_triton import FROG


class Net(nn.Module):
    """A convolution, two Linear layers and a norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 4 * 4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(torch.tanh(self.fc(x.flatten(1))))


def batch(seed, size=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def state_of(net, opt):
    """Everything that a step may change, copied."""
    tensors = dict(net.named_parameters())
    for name, param in net.named_parameters():
        tensors |= {(name, key): value for key, value in opt.state[param].items()}
    tensors |= {("anomalies", name): n for name, n in opt._anomalies.counts.items()}
    return {name: t.detach().clone() for name, t in tensors.items()}


def assert_same(before, after):
    """A first step makes state, of zeros if it is skipped."""
    assert before.keys() <= after.keys()
    for name, tensor in after.items():
        assert torch.equal(before.get(name, torch.zeros_like(tensor)), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling", ["examples", "positions"])
@pytest.mark.parametrize("options", [{}, PAPER])
def test_autocast_is_algorithm_1_on_what_the_layers_saw(options, dtype, sampling):
    net = Net()
    options = options | {"sampling": sampling}
    opt = FROG(net, sample_size=1000, **options)
    layers = {name: net.get_submodule(name) for name in ("conv", "fc")}
    models = {name: Algorithm1(m, **options) for name, m in layers.items()}
    seen = {}

    def watch(name):
        def hook(module, args, output):
            seen[name] = [args[0].detach(), None]
            assert output.dtype == dtype
            output.register_hook(lambda g: seen[name].__setitem__(1, g))

        return hook

    for name in models:
        getattr(net, name).register_forward_hook(watch(name))
    worst = 0.0
    for step in range(4):
        x, y = batch(step)
        opt.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        for name, model in models.items():
            layer = getattr(net, name)
            bias = None if layer.bias is None else layer.bias.grad
            model.step(*seen[name], layer.weight.grad, bias)
        opt.step()
        for name, model in models.items():
            error = oracles.relative_error(getattr(net, name).weight, model.weight)
            worst = max(worst, error)
    assert worst < 1e-5  # measured 2e-6
    assert opt.state[net.fc.weight]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("options", [{}, PAPER])
def test_a_bfloat16_model_keeps_its_momentum_in_float32(options):
    net = Net().bfloat16()
    opt = FROG(net, sample_size=1000, **options)
    seen = {}
    net.fc.register_forward_hook(
        lambda module, args, output: (
            seen.__setitem__("x", args[0].detach()),
            output.register_hook(lambda g: seen.__setitem__("y", g)),
        )[0]
    )
    model = Algorithm1(net.fc, **options)
    for step in range(3):
        x, y = batch(step)
        opt.zero_grad()
        F.cross_entropy(net(x.bfloat16()).float(), y).backward()
        model.weight = oracles.as_numpy(net.fc.weight)
        model.bias = oracles.as_numpy(net.fc.bias)
        model.step(seen["x"], seen["y"], net.fc.weight.grad, net.fc.bias.grad)
        opt.step()
        # One rounding of the weights to 8 bits, 2e-3; measured 1.6e-3.
        assert oracles.relative_error(net.fc.weight, model.weight) < 3e-3
    buffer = opt.state[net.fc.weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert oracles.relative_error(buffer, model.m) < 1e-6  # measured 6e-8
    assert net.fc.weight.dtype == torch.bfloat16


def train(scaler, clip, **options):
    """Train, with or without a scaler; the scale changes from step to step."""
    torch.manual_seed(0)
    net = Net().double()
    # Examples: with PAPER, three positions alone would leave rounding over tau.
    options |= {"sampling": "examples", "sample_size": 3}
    opt = FROG(net, **options)
    for step in range(4):
        x, y = batch(step)
        opt.zero_grad()
        loss = F.cross_entropy(net(x.double()), y)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(opt)
            clip(net.parameters())
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
    return net


CLIPS = {
    "none": None,
    "norm": lambda params: nn.utils.clip_grad_norm_(params, 0.05),
    "value": lambda params: nn.utils.clip_grad_value_(params, 0.01),
}


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("options", [{}, PAPER])
def test_a_loss_scale_leaves_no_trace(options, clip, capturable, fallback):
    options = options | {"capturable": capturable, "fallback": fallback}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scaled = train(scaler, CLIPS[clip], **options)
    assert scaler.get_scale() == 2.0**12
    plain = train(None, CLIPS[clip], **options)
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        # Powers of two are exact but for the norm's and the scaler's own rounding:
        # measured 1.4e-7 of the largest entry.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_with_found_inf_changes_nothing(
    capturable, clipped, fallback, orthogonalize
):
    net = Net()
    options = {
        "capturable": capturable,
        "fallback": fallback,
        "orthogonalize": orthogonalize,
    }
    opt = FROG(net, sample_size=3, **options)
    twin = copy.deepcopy(net)
    twin_opt = FROG(twin, sample_size=3, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        x, y = batch(step)
        overflows = step in (0, 3)
        for model, optimizer in ((net, opt), (twin, twin_opt)):
            if model is twin and overflows:
                # Batch statistics advance in a skipped step, too.
                with torch.no_grad():
                    model(x)
                continue
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if overflows:
                net.norm.weight.grad[1] = float("inf")
                net.fc.weight.grad[2, 3] = float("nan")
                before = state_of(net, opt)
            if clipped:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            scaler.step(optimizer)
            if overflows:
                assert_same(before, state_of(net, opt))
        scaler.update(4.0)  # the same scale for both
    assert_same(state_of(net, opt), state_of(twin, twin_opt))
    assert not opt.anomalies()


def test_gradients_are_whole_again_after_a_skipped_step():
    net = Net()
    opt = FROG(net, capturable=True)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    net.fc.weight.grad[2, 3] = float("nan")
    grads = [p.grad.clone() for p in net.parameters()]
    opt.grad_scale, opt.found_inf = None, torch.ones(())
    opt.step()
    for p, grad in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)


def test_the_scaler_hands_its_tensors_over_only_where_nothing_may_wait():
    assert FROG(Net(), capturable=True)._step_supports_amp_scaling
    assert not FROG(Net())._step_supports_amp_scaling
