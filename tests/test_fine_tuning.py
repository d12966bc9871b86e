"""Adapters on a frozen model, frozen k-bit layers, layers that thaw one by one."""

import copy

import pytest
import torch
from torch import nn

import frog_triton
from frog_triton import FROG

pytestmark = pytest.mark.filterwarnings("ignore:FROG preconditions")


def batch(seed=0, size=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def step(net, opt, seed):
    opt.zero_grad()
    net(batch(seed)).square().mean().backward()
    opt.step()


def with_state(opt, net):
    """Names of the parameters that the optimizer keeps state for."""
    return {name for name, p in net.named_parameters() if opt.state.get(p)}


def test_lora_has_samples_of_its_adapters_alone():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["first", "second"])
    net = peft.get_peft_model(Net(), config)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    opt = FROG(net)
    assert set(opt.describe().updated_by("frog")) >= trained
    frozen = {n: p.clone() for n, p in net.named_parameters() if n not in trained}
    before = {n: p.clone() for n, p in net.named_parameters() if n in trained}
    for seed in range(3):
        opt.zero_grad()
        net(batch(seed)).square().mean().backward()
        sampled = {name for name, _ in net.named_modules() if opt.capture.calls(name)}
        # B is zero at first, so nothing proves or needs proof: all are plain layers.
        assert {f"{name}.weight" for name in sampled} == trained
        opt.step()
    assert with_state(opt, net) == trained
    assert opt._assignment.unhooked.reasons.keys() <= {"base_model.model.head"}
    for name, p in net.named_parameters():
        if name in trained:
            assert not torch.equal(p, before[name])
        else:
            assert torch.equal(p, frozen[name])


def test_lora_beside_a_head_that_is_trained():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"])
    net = peft.get_peft_model(Net(), config)
    opt = FROG(net)
    for seed in range(2):
        step(net, opt, seed)
    routes = {r.name: r for r in opt.describe()}
    head = routes["base_model.model.head.modules_to_save.default.weight"]
    assert (head.updated_by, head.reason) == ("adamw", "output layer")
    lora = routes["base_model.model.first.lora_A.default.weight"]
    assert lora.updated_by == "frog"


class Linear4bit(nn.Linear):
    """As those of bitsandbytes: packed integers, and a forward that unpacks them."""

    def __init__(self, dim, rows):
        super().__init__(dim, rows)
        packed = torch.randint(0, 255, (rows * dim // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias.requires_grad_(False)

    def forward(self, x):
        halves = torch.cat([self.weight & 15, self.weight >> 4]).float()
        return x @ (halves.view(self.out_features, -1) - 7.5).T / 20 + self.bias


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = Linear4bit(6, 8)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + self.up(self.down(x))))


def test_a_frozen_k_bit_layer_is_left_untouched():
    net = Adapted()
    base = copy.deepcopy(net.base.state_dict())
    opt = FROG(net)
    for seed in range(3):
        step(net, opt, seed)
    assert with_state(opt, net) == {
        *("down.weight", "up.weight", "head.weight", "head.bias")
    }
    assert opt.describe().updated_by("frog") == ["down.weight", "up.weight"]
    for name, value in net.base.state_dict().items():
        assert torch.equal(value, base[name])
    assert not opt.capture.watches("base")


class Bare(nn.Module):
    """Matrices of its own: a position embedding, and a projection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.positions = nn.Parameter(torch.randn(12, 6))
        self.projection = nn.Parameter(torch.randn(8, 6) / 3)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = frog_triton.linear(x + self.positions, self.projection)
        return self.head(torch.tanh(self.second(torch.tanh(x))))


def test_bare_matrices_may_be_frozen_and_thaw():
    net = Bare()
    net.positions.requires_grad_(False)
    net.projection.requires_grad_(False)
    opt = FROG(net)
    assert not net.positions.requires_grad and not net.projection.requires_grad
    step(net, opt, 0)
    assert not opt.state.get(net.projection)
    net.projection.requires_grad_(True)
    step(net, opt, 1)
    assert "projection" in opt.describe().updated_by("frog")
    opt.close()
    assert not any(p._backward_hooks for p in net.parameters())
    copy.deepcopy(net)


@pytest.mark.parametrize("saved_between", [False, True])
def test_layers_thaw_one_by_one(saved_between):
    net = Net()
    for p in (*net.first.parameters(), *net.second.parameters()):
        p.requires_grad_(False)
    opt = FROG(net)
    for seed in range(2):
        step(net, opt, seed)
        assert with_state(opt, net) == {"head.weight", "head.bias"}
        assert opt.capture.watches("first") and opt.capture.watches("second")
        assert not [*opt.capture.tensors()]
    expected = {"head.weight", "head.bias"}
    for name in ("second", "first"):
        for p in getattr(net, name).parameters():
            p.requires_grad_(True)
        if saved_between:
            state = copy.deepcopy(opt.state_dict())
            opt.close()
            opt = FROG(net)
            opt.load_state_dict(state)
        before = getattr(net, name).weight.clone()
        opt.zero_grad()
        net(batch(7)).square().mean().backward()
        assert opt.capture.calls(name)
        opt.step()
        expected |= {f"{name}.weight", f"{name}.bias"}
        assert with_state(opt, net) == expected
        assert not torch.equal(getattr(net, name).weight, before)
        assert opt.describe().updated_by("frog") == [
            *("first.weight", "first.bias", "second.weight", "second.bias")
        ]
