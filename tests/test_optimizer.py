"""The optimizer end to end against Algorithm 1 in float64, and as torch knows it.

More than 400 lines: all that torch's own optimizers are asked, too.
"""

import contextlib
import copy
import gc
import pickle

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn

from frog_triton import FROG


class Net(nn.Module):
    """Two convolutions and two Linear layers; all samples of a batch are kept."""

    def __init__(self, inplace=True):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.fc = nn.Linear(6 * 2 * 2, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.act(self.norm(self.conv1(x)))
        x = self.conv2(x)
        x += 0.1
        x = self.act(x)
        return self.head(self.act(self.fc(x.flatten(1))))

    def layers(self):
        return {"conv1": self.conv1, "conv2": self.conv2, "fc": self.fc}


def batch(seed, size=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def record(layers):
    """Inputs and output gradients of each layer, by hooks of the test's own."""
    inputs, grads = {}, {}

    def hook(name):
        def forward_hook(module, args, output):
            inputs[name] = args[0].detach().clone()
            output.register_hook(lambda g: grads.__setitem__(name, g.clone()))

        return forward_hook

    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in layers.items()
    ]
    return inputs, grads, handles


@pytest.mark.parametrize("formulation", ["primal", "gram"])
@pytest.mark.parametrize("sampling", ["examples", "positions"])
@pytest.mark.parametrize(
    ("options", "limit"),
    # Measured: 2e-14 with the defaults; 7e-9 with PAPER, and 2e-10 with damping 1e-2.
    # Rows with two or three live samples are solved before k = 4; what is left of their
    # residual is rounding over tau.
    [
        ({}, 1e-12),
        (PAPER, 1e-7),
        (PAPER | {"nesterov": True, "momentum": 0.8}, 1e-7),
        (
            PAPER
            | {"momentum": 0.0, "weight_decay": 0.1, "damping": 1e-2, "cg_iters": 2},
            1e-7,
        ),
        ({"weight_decay": 0.1, "damping": 1e-2}, 1e-7),
    ],
)
def test_ten_steps_of_algorithm_1(options, limit, sampling, formulation):
    net = Net().double()
    options = options | {"sampling": sampling}
    opt = FROG(net, sample_size=10_000, formulation=formulation, **options)
    models = {name: Algorithm1(m, **options) for name, m in net.layers().items()}
    inputs, grads, _ = record(net.layers())
    worst = 0.0
    for step in range(10):
        x, y = batch(step)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for name, layer in net.layers().items():
            bias = None if layer.bias is None else layer.bias.grad
            models[name].step(inputs[name], grads[name], layer.weight.grad, bias)
        opt.step()
        for name, layer in net.layers().items():
            model = models[name]
            worst = max(worst, oracles.relative_error(layer.weight, model.weight))
            if layer.bias is not None:
                worst = max(worst, oracles.relative_error(layer.bias, model.bias))
    assert worst < limit


def test_learning_rate_schedulers_and_groups():
    net = Net().double()
    opt = FROG(net, weight_decay=0.1)
    assert [g["updated_by"] for g in opt.param_groups] == ["frog", "adamw"]
    opt.param_groups[1]["lr"] = 1e-3
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    x, y = batch(0)
    for _ in range(3):
        F.cross_entropy(net(x), y).backward()
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(2e-2 / 8)
    assert opt.param_groups[1]["lr"] == pytest.approx(1e-3 / 8)


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_schedulers_that_cycle_momentum(fallback):
    net = Net().double()
    opt = FROG(net, fallback=fallback)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    x, y = batch(0)
    for _ in range(5):
        F.cross_entropy(net(x), y).backward()
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["momentum"] != 0.9


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_fallback_is_torchs_optimizer_with_decay_on_matrices_only(fallback):
    net = Net().double()
    opt = FROG(
        net, fallback=fallback, fallback_lr=1e-2, weight_decay=0.1, nesterov=True
    )
    rest = [net.norm.weight, net.norm.bias, net.head.weight, net.head.bias]
    assert [id(p) for p in opt.param_groups[1]["params"]] == [id(p) for p in rest]
    twins = [p.detach().clone().requires_grad_() for p in rest]
    decayed, plain = [t for t in twins if t.ndim > 1], [t for t in twins if t.ndim < 2]
    if fallback == "sgd":
        torchs = torch.optim.SGD(twins, lr=1e-2, momentum=0.9, nesterov=True)
    else:
        torchs = torch.optim.AdamW(
            [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-2,
            weight_decay=0.1,
        )
    for step in range(4):
        x, y = batch(step)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for p, t in zip(rest, twins, strict=True):
            t.grad = p.grad.clone()
        if fallback == "sgd":  # torch's own decay is not decoupled
            with torch.no_grad():
                for t in decayed:
                    t.mul_(1 - 1e-2 * 0.1)
        torchs.step()
        opt.step()
        for p, t in zip(rest, twins, strict=True):
            torch.testing.assert_close(p, t, rtol=1e-12, atol=1e-14)


def test_fallback_lr_defaults():
    assert FROG(Net(), lr=0.3).param_groups[1]["lr"] == 3e-3
    assert FROG(Net(), lr=0.3, fallback="adamw").param_groups[1]["lr"] == 3e-3
    assert FROG(Net(), lr=0.3, fallback="sgd").param_groups[1]["lr"] == 0.3


@pytest.mark.parametrize(
    ("options", "group", "expected"),
    [
        ({}, {}, 3e-3),
        ({}, {"lr": 0.01}, 1.5e-3),  # half the default, so half the fallback's
        ({}, {"lr": 0.0}, 0.0),
        ({}, {"lr": 0.01, "fallback_lr": 0.1}, 0.1),
        ({"lr": 0.0}, {"lr": 0.01}, 3e-3),
        ({"fallback_lr": 1e-3}, {"lr": 0.04}, 2e-3),
        ({"fallback": "sgd"}, {"lr": 0.5}, 0.5),
        ({"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.2)}, 6e-3),
    ],
)
def test_a_group_scales_the_fallback_as_itself(options, group, expected):
    net = Net()
    rows, rest = FROG(
        net, params=[{"params": net.parameters(), **group}], **options
    ).param_groups
    assert float(rest["lr"]) == pytest.approx(expected, rel=1e-6)
    assert "fallback_lr" not in rows and "fallback_lr" not in rest


def test_params_override_options_group_by_group():
    net = Net()
    opt = FROG(
        net,
        params=[
            {"params": net.conv1.parameters(), "lr": 0.5, "damping": 1e-2},
            {"params": [*net.conv2.parameters(), *net.fc.parameters()]},
        ],
    )
    kinds = [(g["updated_by"], g["lr"], len(g["params"])) for g in opt.param_groups]
    assert kinds[:2] == [("frog", 0.5, 2), ("adamw", 3e-3 * 25, 0)]
    assert kinds[2:] == [("frog", 2e-2, 3), ("adamw", 3e-3, 0)]
    assert opt.param_groups[0]["damping"] == 1e-2
    table = {r.name: r for r in opt.describe()}
    assert table["head.weight"].updated_by == "-"
    assert table["head.weight"].reason == "not in params"
    before = net.head.weight.clone()
    net(batch(0)[0].float()).sum().backward()
    opt.step()
    assert torch.equal(before, net.head.weight)


def test_gradients_outputs_and_random_state_are_untouched():
    net, plain = Net().double(), Net().double()
    plain.load_state_dict(net.state_dict())
    opt = FROG(net, sample_size=3)
    x, y = batch(0)
    state = torch.get_rng_state()
    out = net(x)
    F.cross_entropy(out, y).backward()
    expected = plain(x)
    F.cross_entropy(expected, y).backward()
    assert torch.equal(out, expected)
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    for name, p in plain.named_parameters():
        assert torch.equal(p.grad, grads[name])
    opt.step()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, grads[name])
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_depends_on_the_seed_alone():
    def run(seed):
        torch.manual_seed(0)
        net = Net().double()
        opt = FROG(net, sample_size=3, seed=seed)
        for step in range(3):
            x, y = batch(step)
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            torch.rand(step + 1)  # somebody else draws
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_resume_is_bit_for_bit(fallback, tmp_path):
    def make():
        torch.manual_seed(0)
        net = Net()
        return net, FROG(net, sample_size=3, fallback=fallback)

    def train(net, opt, steps):
        for step in steps:
            x, y = batch(step)
            opt.zero_grad()
            F.cross_entropy(net(x.float()), y).backward()
            opt.step()

    net, opt = make()
    train(net, opt, range(6))
    first, first_opt = make()
    train(first, first_opt, range(3))
    torch.save([first.state_dict(), first_opt.state_dict()], tmp_path / "state")
    second, second_opt = make()
    saved = torch.load(tmp_path / "state", weights_only=True)
    second.load_state_dict(saved[0])
    second_opt.load_state_dict(saved[1])
    train(second, second_opt, range(3, 6))
    for name, value in net.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_momentum_of_16_bit_parameters_is_float32_and_stays_so():
    net = Net().bfloat16()
    opt = FROG(net)
    x, y = batch(0)
    F.cross_entropy(net(x.bfloat16()), y).backward()
    opt.step()
    buffer = opt.state[net.fc.weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    other = Net().bfloat16()
    second = FROG(other)
    second.load_state_dict(opt.state_dict())
    assert torch.equal(second.state[other.fc.weight]["momentum_buffer"], buffer)
    assert net.fc.weight.dtype == torch.bfloat16


def test_state_of_a_later_version_is_refused():
    opt = FROG(Net())
    with pytest.raises(ValueError, match="upgrade frog_triton"):
        opt.load_state_dict(opt.state_dict() | {"version": 99})


def test_samples_that_are_not_finite_are_counted():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = FROG(net, **PAPER)
    out = net[0](torch.randn(5, 3)) * 1
    out.register_hook(lambda g: torch.full_like(g, float("nan")))
    net[1](out).sum().backward()
    with torch.no_grad():
        net[0].weight.grad.fill_(1.0)
        net[0].bias.grad.fill_(1.0)
    before = net[0].weight.clone()
    opt.step()
    assert opt.anomalies() == {"0": {"nonfinite_samples": 4, "overflowing_momenta": 0}}
    # The identity Fisher: m / |m| with three weights and a bias of 1.
    decayed = before * (1 - 2e-2 * 1e-5)
    torch.testing.assert_close(net[0].weight, decayed - 2e-2 * 0.5)


def test_closure():
    net = Net().double()
    opt = FROG(net)
    x, y = batch(0)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    first = opt.step(closure)
    assert opt.step(closure) < first


def test_tensor_learning_rate():
    nets = [Net().double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    lrs = (0.05, torch.tensor(0.05, dtype=torch.float64))
    for net, lr in zip(nets, lrs, strict=True):
        opt = FROG(net, lr=lr)
        x, y = batch(0)
        F.cross_entropy(net(x), y).backward()
        opt.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_frozen_weight_with_a_trainable_bias():
    net = Net().double()
    opt = FROG(net, **PAPER)
    net.fc.weight.requires_grad_(False)
    x, y = batch(0)
    before = net.fc.weight.clone(), net.fc.bias.clone()
    F.cross_entropy(net(x), y).backward()
    grad = net.fc.bias.grad.clone()
    opt.step()
    assert torch.equal(before[0], net.fc.weight)
    # On the bias alone the normalized Fisher is 1, or the identity for a dead unit.
    decayed = before[1] * (1 - 2e-2 * 1e-5)
    expected = decayed - 2e-2 * grad.sign() / (1 + 1e-4) ** 0.5
    alive = grad != 0
    torch.testing.assert_close(net.fc.bias[alive], expected[alive])
    net.fc.weight.requires_grad_(True)
    F.cross_entropy(net(x), y).backward()
    opt.step()
    assert not torch.equal(before[0], net.fc.weight)


def test_layers_skipped_in_a_step_stay():
    net = Net().double()
    opt = FROG(net)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    opt.step()
    opt.zero_grad()
    before = net.fc.weight.clone()
    net.conv1(x).square().sum().backward()
    opt.step()
    assert torch.equal(before, net.fc.weight)
    assert opt.state[net.fc.weight]["step"] == 1
    assert opt.state[net.conv1.weight]["step"] == 2


def test_layers_added_later():
    net = Net().double()
    opt = FROG(net)
    net.extra = nn.Linear(5, 5).double()
    opt.add_param_group({"params": net.extra.parameters(), "lr": 0.1})
    assert [g["updated_by"] for g in opt.param_groups] == ["frog", "adamw"] * 2
    x, y = batch(0)
    h = net.act(net.norm(net.conv1(x)))
    h = net.act(net.fc(net.act(net.conv2(h)).flatten(1)))
    F.cross_entropy(net.head(net.extra(h)), y).backward()
    before = net.head.weight.clone()
    opt.step()
    routes = {r.name: r for r in opt.describe()}
    assert routes["head.weight"].reason == "output layer"
    assert not torch.equal(before, net.head.weight)
    with pytest.raises(ValueError, match="more than one group"):
        opt.add_param_group({"params": net.extra.parameters()})


def test_optimizer_can_be_neither_copied_nor_pickled():
    opt = FROG(Net())
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(opt)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(opt)


def test_hooks_go_with_the_optimizer():
    net = Net()

    def hooks():
        return sum(len(m._forward_hooks) for m in net.modules())

    opt = FROG(net)
    assert hooks() == 7  # three to sample, four to find the output layer
    opt.close()
    assert hooks() == 0
    with FROG(net):
        assert hooks() == 7
    assert hooks() == 0
    opt = FROG(net)
    del opt
    gc.collect()
    assert hooks() == 0


@pytest.mark.gpu
def test_moving_the_model_after_construction():
    net = Net()
    opt = FROG(net)
    net.to("cuda")
    x, y = batch(0)
    F.cross_entropy(net(x.float().cuda()), y.cuda()).backward()
    opt.step()
    assert opt.state[net.fc.weight]["momentum_buffer"].is_cuda


def test_a_step_inside_autocast_is_the_step_outside():
    def run(inside):
        torch.manual_seed(0)
        net = Net()
        opt = FROG(net)
        x, y = batch(0)
        F.cross_entropy(net(x.float()), y).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            opt.step()
        return [p.detach() for p in net.parameters()]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_a_closed_optimizer_takes_no_step():
    net = Net().double()
    opt = FROG(net)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    opt.close()
    with pytest.raises(RuntimeError, match="closed"):
        opt.step()


def test_an_empty_batch_says_nothing():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = FROG(net)
    before = net[0].weight.clone()
    net(torch.zeros(0, 3)).sum().backward()
    with pytest.warns(UserWarning, match="no samples"):
        opt.step()
    torch.testing.assert_close(net[0].weight, before * (1 - 2e-2 * 1e-2))


def test_frozen_weight_in_another_layout():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    net[0].to(memory_format=torch.channels_last)
    opt = FROG(net)
    net[0].weight.requires_grad_(False)
    before = net[0].bias.clone()
    net(torch.randn(4, 2, 4, 4)).square().sum().backward()
    opt.step()
    assert not torch.equal(before, net[0].bias)


def test_state_of_layers_that_were_let_go_at_different_steps():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("inner", "a", "b", "head"):
                setattr(self, name, nn.Linear(4, 4))

        def forward(self, x, both):
            x = F.linear(torch.tanh(self.inner(x)), self.b.weight, self.b.bias)
            if both:
                x = F.linear(torch.tanh(x), self.a.weight, self.a.bias)
            return self.head(torch.tanh(x))

    net = Model()
    opt = FROG(net)
    for both in (False, True):
        for _ in range(2):
            net(torch.randn(5, 4), both).square().sum().backward()
            opt.step()
        with pytest.warns(UserWarning, match="without calling the module"):
            opt.step()
    other = Model()
    second = FROG(other)
    second.load_state_dict(opt.state_dict())
    for name in ("a", "b"):
        ours, theirs = net.get_submodule(name), other.get_submodule(name)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            saved, loaded = opt.state[p], second.state[q]
            assert saved.keys() == loaded.keys() and "exp_avg" in saved
            assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_bfloat16_momentum_in_three_dimensions():
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 2))
    opt = FROG(net, momentum_dtype=torch.bfloat16, backend="auto")
    net(torch.randn(3, 1, 4, 4, 4)).square().sum().backward()
    opt.step()
    assert torch.isfinite(net[0].weight).all()


def test_tuning_is_asked_for_once_a_step(monkeypatch):
    """Whatever the number of groups: the table holds for all of them."""
    asked = []

    def tuned(tuning, layers, backend, world, gathered):
        asked.append([len(steps) for _, _, steps in gathered])
        return contextlib.nullcontext()

    monkeypatch.setattr("frog_triton.optimizer.tuned", tuned)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    groups = [{"params": layer.parameters()} for layer in net]
    opt = FROG(net, params=groups, exclude_output_layer=False)
    net(torch.ones(6, 3)).square().sum().backward()
    opt.step()
    assert asked == [[1, 0] * 3]
