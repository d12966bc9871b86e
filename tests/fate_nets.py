"""A net under FROG beside Algorithm 1, and ways to drop a gradient."""

import copy

import oracles
import torch
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn

from frog_triton import FROG

EVERYTHING = 1000  # samples: all of a batch
PLAIN = PAPER | {"damping": 1e-2, "cg_iters": 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)))


class Watched:
    """A net under FROG, and Algorithm 1 for its two layers.

    Its input is noted by hooks on a twin that FROG knows nothing of.
    """

    def __init__(self, compiled=False, dtype=torch.float64, **options):
        torch.manual_seed(0)
        self.net = Net().to(dtype)
        self.seen = {}
        build = ("backend", "capturable", "formulation", "sampling", "fallback")
        how = {key: options.pop(key) for key in build if key in options}
        self.opt = FROG(self.net, sample_size=EVERYTHING, **how, **options)
        # The same net without hooks but these.
        self.twin = copy.deepcopy(self.net)
        self.layers = {"first": self.twin.first, "second": self.twin.second}
        self.models = {
            name: Algorithm1(copy.deepcopy(layer), **options)
            for name, layer in self.layers.items()
        }
        self.forward = self.net
        if compiled:
            self.forward = torch.compile(self.net, backend="aot_eager", fullgraph=True)

    def step(self, *xs):
        """A step of each; Algorithm 1 is given the samples of these batches alone."""
        self._expect(xs)
        self.opt.step()
        self.net.zero_grad()
        self.twin.load_state_dict(self.net.state_dict())

    def _expect(self, xs):
        seen = {name: [] for name in self.layers}
        handles = []
        for name, layer in self.layers.items():

            def hook(module, args, y, name=name):
                pair = [args[0].detach(), None]
                seen[name].append(pair)
                y.register_hook(lambda grad: pair.__setitem__(1, grad))

            handles.append(layer.register_forward_hook(hook))
        self.twin.zero_grad()
        for x in xs:
            loss(self.twin, x).backward()
        for handle in handles:
            handle.remove()
        for name, layer in self.layers.items():
            x, y = (torch.cat(part) for part in zip(*seen[name], strict=True))
            bias = None if layer.bias is None else layer.bias.grad
            self.models[name].step(x, y, layer.weight.grad, bias)

    def check(self, limit=1e-12):
        # Measured 1.2e-15 at most in float64, 1.7e-6 in float32.
        for name, model in self.models.items():
            weight = self.net.get_submodule(name).weight
            assert oracles.relative_error(weight, model.weight) < limit


def batch(seed, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype)


def loss(net, x):
    return net(x).square().sum()


class Wrapper(torch.optim.Optimizer):
    """As SAM and Lookahead are written: an optimizer around another."""

    def __init__(self, inner):
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})


def each(change):
    def drop(net, opt):
        for param in net.parameters():
            change(param)

    return drop


def foreach_zero(net, opt):
    torch._foreach_zero_([p.grad for p in net.parameters()])


DROPS = {
    "opt.zero_grad": lambda net, opt: opt.zero_grad(),
    "opt.zero_grad, zeros": lambda net, opt: opt.zero_grad(set_to_none=False),
    "model.zero_grad": lambda net, opt: net.zero_grad(),
    "model.zero_grad, zeros": lambda net, opt: net.zero_grad(set_to_none=False),
    "None": each(lambda p: setattr(p, "grad", None)),
    "zero_": each(lambda p: p.grad.zero_()),
    "data.zero_": each(lambda p: p.grad.data.zero_()),
    "detach_().zero_": each(lambda p: p.grad.detach_().zero_()),
    "mul_(0)": each(lambda p: p.grad.mul_(0)),
    "other zeros": each(lambda p: setattr(p, "grad", torch.zeros_like(p))),
    "foreach_zero": foreach_zero,
    "wrapper": lambda net, opt: Wrapper(opt).zero_grad(),
    "wrapper, zeros": lambda net, opt: Wrapper(opt).zero_grad(set_to_none=False),
}


def clip(net):
    nn.utils.clip_grad_norm_(net.parameters(), 1e9)


def replace(net):
    for param in net.parameters():
        param.grad = param.grad.clone()


CHANGES = {
    "nothing": lambda net: None,
    "clipped": clip,
    "scaled": each(lambda p: p.grad.mul_(1.0)),
    "by data": each(lambda p: p.grad.data.mul_(1.0)),
    "replaced": replace,
}
