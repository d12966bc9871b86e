"""What is sampled, when it is kept, and when it is dropped."""

import copy
import gc
import pickle
import weakref

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton import FROG


def held(opt, name):
    """Pooled inputs of a layer since the last step."""
    calls = opt.capture.calls(name)
    return torch.cat([c.x for c in calls]) if calls else None


def two_layers(**options):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    return net, FROG(net, **options)


def test_samples_are_pairs_of_the_same_examples():
    net, opt = two_layers(sample_size=4)
    x = torch.randn(10, 3).double()
    out = net[0](x)
    grads = []
    out.register_hook(grads.append)
    net[1](out).square().sum().backward()
    (call,) = opt.capture.calls("0")
    at = [(x == row).all(1).nonzero().item() for row in call.x]
    assert len(set(at)) == 4
    assert torch.equal(call.y, grads[0][at])


def test_nothing_of_batch_size_stays():
    net, opt = two_layers(sample_size=4)
    x = torch.randn(64, 3).double().requires_grad_()
    y = x * 2
    seen = weakref.ref(y)
    net(y).sum().backward()
    del y
    gc.collect()
    assert seen() is None
    assert held(opt, "0").untyped_storage().nbytes() == 4 * 3 * 8


@pytest.mark.parametrize("sampling", ["examples", "positions"])
def test_accumulated_passes_are_pooled(sampling):
    net, opt = two_layers(sample_size=8, sampling=sampling)
    for size in (4, 4):
        net(torch.randn(size, 3).double()).sum().backward()
    assert held(opt, "0").shape == (8, 3)
    for size in (8, 2, 30):
        net(torch.randn(size, 3).double()).sum().backward()
        assert held(opt, "0").shape == (8, 3)
    opt.step()
    assert held(opt, "0") is None


def test_pooling_keeps_every_candidate_with_equal_chance():
    net, opt = two_layers(sample_size=12)
    counts = torch.zeros(3)
    for seed in range(200):
        opt.capture.seed = seed
        opt.zero_grad()
        for value, size in enumerate((10, 20, 30)):
            net(torch.full((size, 3), float(value)).double()).sum().backward()
        counts += torch.bincount(held(opt, "0")[:, 0].long(), minlength=3)
    # 12 of 60: 2, 4 and 6 of the three passes.
    expected = torch.tensor([2.0, 4.0, 6.0])
    torch.testing.assert_close(counts / 200, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("sizes", "kept"), [((7, 5, 12), 5), ((30, 2, 2), 8), ((1,) * 12, 4)]
)
@pytest.mark.parametrize("passes", [True, False])
def test_calls_with_a_small_share_are_seen_as_often(sizes, kept, passes):
    """Of several passes, or of one pass."""
    layer = nn.Linear(1, 2).double()
    opt = FROG(layer, sample_size=kept, exclude_output_layer=False)
    counts, trials = torch.zeros(len(sizes)), 400
    for seed in range(trials):
        opt.capture.seed = seed
        opt.zero_grad()
        losses = [
            layer(torch.full((size, 1), float(value)).double()).sum()
            for value, size in enumerate(sizes)
        ]
        for loss in losses if passes else [sum(losses)]:
            loss.backward()
        counts += torch.bincount(held(opt, "weight")[:, 0].long(), minlength=len(sizes))
    expected = torch.tensor(sizes) * kept / sum(sizes)
    # Measured 0.19 of it at most, where it is a third of one sample (2.6 standard
    # deviations), and 0.05 elsewhere.
    torch.testing.assert_close(counts / trials, expected, rtol=0.25, atol=0)


@pytest.mark.parametrize("options", [{}, PAPER])
def test_algorithm_1_with_a_module_called_twice(options):
    layer, head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    net = nn.ModuleList([layer, head])
    opt = FROG(net, sample_size=1000, **options)
    model = Algorithm1(layer, **options)
    x = torch.randn(5, 3).double()
    seen = []

    def hook(module, args, output):
        pair = [args[0].detach(), None]
        seen.append(pair)
        output.register_hook(lambda grad: pair.__setitem__(1, grad))

    handle = layer.register_forward_hook(hook)
    head(layer(torch.tanh(layer(x)))).square().sum().backward()
    handle.remove()
    xs, ys = (torch.cat(part) for part in zip(*seen, strict=True))
    model.step(xs, ys, layer.weight.grad, layer.bias.grad)
    opt.step()
    assert oracles.relative_error(layer.weight, model.weight) < 1e-12


@pytest.mark.parametrize("options", [{}, PAPER])
def test_algorithm_1_with_a_shared_weight(options):
    a, b, head = (nn.Linear(3, 3).double() for _ in range(3))
    b.weight, b.bias = a.weight, a.bias
    net = nn.ModuleList([a, b, head])
    opt = FROG(net, sample_size=1000, **options)
    assert len(opt.describe()) == 4
    model = Algorithm1(a, **options)
    x = torch.randn(5, 3).double()
    first = a(x)
    second_in = torch.tanh(first)
    second = b(second_in)
    grads = {}
    first.register_hook(lambda g: grads.__setitem__(0, g))
    second.register_hook(lambda g: grads.__setitem__(1, g))
    head(second).square().sum().backward()
    model.step(
        torch.cat([x, second_in]),
        torch.cat([grads[0], grads[1]]),
        a.weight.grad,
        a.bias.grad,
    )
    opt.step()
    assert oracles.relative_error(a.weight, model.weight) < 1e-12


def test_a_convolution_fed_images_of_two_sizes():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    opt = FROG(net)
    for size in (5, 8):
        net(torch.randn(4, 2, size, size)).square().sum().backward()
    before = conv.weight.clone()
    opt.step()
    assert torch.isfinite(conv.weight).all() and not torch.equal(conv.weight, before)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
def test_nothing_is_kept_outside_training(mode):
    net, opt = two_layers()
    x = torch.randn(5, 3).double()
    if mode == "eval":
        net.eval()
        net(x).sum().backward()
        net.train()
    else:
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            net(x)
    assert held(opt, "0") is None
    net(x)  # a forward without backward leaves nothing either
    assert held(opt, "0") is None


def test_training_goes_on_in_eval_mode_with_the_identity():
    net, opt = two_layers(**PAPER)
    net.eval()
    net(torch.randn(5, 3).double()).square().sum().backward()
    grad = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
    expected = net[0].weight * (1 - 2e-7) - 2e-2 * (
        net[0].weight.grad / grad.norm(dim=1, keepdim=True)
    )
    with pytest.warns(UserWarning, match="eval mode"):
        opt.step()
    torch.testing.assert_close(net[0].weight, expected.detach())


def test_zero_grad_drops_the_samples():
    net, opt = two_layers()
    net(torch.randn(5, 3).double()).sum().backward()
    assert held(opt, "0") is not None
    opt.zero_grad()
    assert held(opt, "0") is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_samples_once(reentrant):
    net, opt = two_layers(sample_size=3)
    twin = copy.deepcopy(net)
    twin_opt = FROG(twin, sample_size=3)
    x = torch.randn(5, 3).double().requires_grad_()
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    twin(x).square().sum().backward()
    assert held(opt, "0").shape == held(twin_opt, "0").shape


def test_a_copied_model_is_inert():
    net, opt = two_layers()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(torch.randn(5, 3).double()).sum().backward()
        assert held(opt, "0") is None
        second = FROG(other)
        other(torch.randn(5, 3).double()).sum().backward()
        assert held(second, "0") is not None and held(opt, "0") is None


@pytest.mark.parametrize("shape", [(5, 3), (5, 6, 3), (2, 5, 6, 3), (3,)])
@pytest.mark.parametrize("bias", [False, True])
def test_an_inplace_activation_after_a_linear_layer(shape, bias):
    net = nn.Sequential(
        nn.Linear(3, 4, bias=bias), nn.ReLU(inplace=True), nn.Linear(4, 2)
    )
    twin = copy.deepcopy(net)
    twin[1] = nn.ReLU()
    x, samples = torch.randn(shape), []
    for model in (net, twin):
        opt = FROG(model)
        model(x).square().sum().backward()
        (call,) = opt.capture.calls("0")
        samples.append(call)
    assert torch.equal(samples[0].x, samples[1].x)
    assert torch.equal(samples[0].y, samples[1].y)


def test_input_by_keyword():
    net, opt = two_layers()
    net[1](net[0](input=torch.randn(5, 3).double())).sum().backward()
    assert held(opt, "0").shape == (5, 3)


def test_layer_used_without_its_module_falls_back_with_a_warning():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.used = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.inner(x)
            return self.head(F.linear(x, self.used.weight, self.used.bias))

    net = Model()
    opt = FROG(net)
    assert "used.weight" in opt.describe().updated_by("frog")
    x = torch.randn(3, 5, 4)
    net(x).square().sum().backward()
    for _ in range(2):
        opt.step()  # no proof yet
        assert "used.weight" in opt.describe().updated_by("frog")
    with pytest.warns(UserWarning, match=r"used: .*adamw updates it"):
        opt.step()
    table = opt.describe()
    assert table.updated_by("frog") == ["inner.weight", "inner.bias"]
    routes = {r.name: r.reason for r in table}
    reason = "its weight is used without calling the module"
    assert routes["used.bias"] == reason
    before = net.used.weight.clone()
    opt.zero_grad()
    net(x).square().sum().backward()
    opt.step()
    assert not torch.equal(before, net.used.weight)
    # A fresh optimizer loads the state, routes included.
    other = Model()
    second = FROG(other)
    second.load_state_dict(opt.state_dict())
    assert second.describe().updated_by("frog") == ["inner.weight", "inner.bias"]
    average = opt.state[net.used.weight]["exp_avg"]
    twin = second.state[other.used.weight]["exp_avg"]
    assert torch.equal(average, twin)
