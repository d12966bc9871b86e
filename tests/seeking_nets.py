"""Nets whose output layers steps show."""

import io

import torch
import torch.nn.functional as F
from torch import nn

import frog_triton
from frog_triton.model.plan import OUTPUT_LAYER

D = 4


class Net(nn.Module):
    """Linear layers by name, in the order given, and a forward function."""

    def __init__(self, names, forward):
        super().__init__()
        torch.manual_seed(1)
        for name in names.split():
            setattr(self, name, nn.Linear(D, D))
        self.run = forward
        self.double()

    def forward(self, x, step=0):
        return self.run(self, x, step)


def chain(names):
    """A forward function: one layer after another."""

    def forward(net, x, step):
        *body, head = names.split()
        for name in body:
            x = getattr(net, name)(x).tanh()
        return getattr(net, head)(x)

    return forward


def head_first():
    """The guess is wrong: b is declared last."""
    return Net("z a b", chain("a b z"))


def batch(step, size=6):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, D, generator=generator, dtype=torch.float64)


def train(net, opt, count, start=0, before=None, factor=1.0):
    for step in range(start, start + count):
        if before is not None:
            before(net, opt, step)
        opt.zero_grad()
        (factor * net(batch(step), step).square().mean()).backward()
        opt.step()


def outputs(opt):
    """Names of layers that go to the fallback as outputs; all others are FROG's."""
    found = {
        r.name.removesuffix(".weight"): r
        for r in opt.routes()
        if r.name.endswith("weight")
    }
    gone = {name for name, r in found.items() if r.updated_by == "adamw"}
    assert all(found[name].reason.startswith(OUTPUT_LAYER) for name in gone)
    return gone


def sought(net):
    """Names of modules that are watched to find output layers."""
    return [
        name
        for name, module in net.named_modules()
        if any("seeking" in hook.__name__ for hook in module._forward_hooks.values())
    ]


def taking_turns(*heads):
    def forward(net, x, step):
        return getattr(net, heads[step % len(heads)])(net.a(x).tanh())

    return forward


def heads_of(net, x, step):
    """By all heads that there are."""
    h = net.b(net.a(x).tanh()).tanh()
    return sum(getattr(net, name)(h) for name in "yz" if hasattr(net, name))


def saved(net, opt):
    file = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Bare(nn.Module):
    """Uses a parameter by FROG's linear, if it is told to, and another by torch's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.z = nn.Linear(D, D), nn.Linear(D, 3)
        self.w = nn.Parameter(torch.randn(D, D) / 2)
        self.v = nn.Parameter(torch.randn(D, D) / 2)
        self.double()

    def forward(self, x, told):
        linear = frog_triton.linear if told else F.linear
        x = linear(self.a(x).tanh(), self.w)
        return self.z(F.linear(x.tanh(), self.v))


def bare_steps(net, opt, calls, start=0):
    for step, told in enumerate(calls, start):
        opt.zero_grad()
        net(batch(step), told).square().mean().backward()
        opt.step()
