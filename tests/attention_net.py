"""A net that uses a projection's weight without calling it, unless told to."""

import io

import torch
import torch.nn.functional as F
from torch import nn

from frog_triton import FROG

EVERYTHING = 1000


def batch(seed, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)


def by(opt, name="adamw"):
    return opt.describe(file=io.StringIO()).updated_by(name)


def reason_of(opt, name):
    (found,) = (r.reason for r in opt.describe(file=io.StringIO()) if r.name == name)
    return found


class Attention(nn.Module):
    """Uses the weight of a projection without calling it, unless told to."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(5, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x, call=False):
        x = torch.tanh(self.a(x))
        x = self.b(x) if call else F.linear(x, self.b.weight, self.b.bias)
        return self.out(torch.tanh(x))


def attention(**options):
    torch.manual_seed(0)
    net = Attention().double()
    return net, FROG(net, sample_size=EVERYTHING, **options)


def steps(net, opt, calls, start=0):
    for step, call in enumerate(calls, start):
        opt.zero_grad()
        net(batch(step), call).square().sum().backward()
        opt.step()


def snapshot(net, opt):
    groups = [
        {k: [id(p) for p in v] if k == "params" else v for k, v in group.items()}
        for group in opt.param_groups
    ]
    state = {
        (name, key): value.clone()
        for name, p in net.named_parameters()
        for key, value in opt.state.get(p, {}).items()
    }
    hooks = [len(m._forward_hooks) for m in net.modules()]
    return groups, state, hooks, str(opt.describe(file=io.StringIO()))


def assert_same(a, b):
    assert a[0] == b[0] and a[2:] == b[2:] and a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][key], b[1][key]) for key in a[1])
