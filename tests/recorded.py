"""A net whose steps are recorded, beside its twin's, which are not."""

import copy

import torch
import torch.nn.functional as F
from tape import Tape
from torch import nn

from frog_triton import FROG
from frog_triton.routine import CudaGraph

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(x + self.down(torch.tanh(self.up(x))))


def batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 4, 4, generator=generator)
    y = torch.randint(0, 3, (size,), generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


class Counted:
    """A graph that counts how often it is played."""

    def __init__(self, graph):
        self._graph = graph
        self.plays = 0

    def __getattr__(self, name):
        return getattr(self._graph, name)

    def replay(self):
        self.plays += 1
        self._graph.replay()


class Pair:
    """A net whose steps are recorded, beside its twin's, which are not."""

    def __init__(self, kind=Net, **options):
        options = {"sample_size": 6, "backend": "triton", "lr": 1e-2} | options
        nets = [kind().to(DEVICE)]
        nets.append(copy.deepcopy(nets[0]))
        self.nets = nets
        self.opts = [FROG(net, **options) for net in nets]
        self.tapes = []
        self.opts[0]._routines.graphs = lambda device: self.tape
        self.opts[1]._routines.graphs = lambda device: None
        self.hold = []  # old gradients, so that new ones lie elsewhere
        self.steps = 0

    def tape(self):
        made = CudaGraph(DEVICE) if DEVICE.type == "cuda" else Tape()
        self.tapes.append(Counted(made))
        return self.tapes[-1]

    @property
    def plays(self):
        return sum(tape.plays for tape in self.tapes)

    def each(self, change):
        for net, opt in zip(self.nets, self.opts, strict=True):
            change(net, opt)

    def step(self, times=1, size=6, spoil=lambda net: None, micro_batches=1):
        """Step both; equal, bit for bit."""
        for _ in range(times):
            for net, opt in zip(self.nets, self.opts, strict=True):
                self.hold += [p.grad for p in net.parameters()]
                opt.zero_grad()
                for micro in range(micro_batches):
                    x, y = batch(10 * self.steps + micro, size)
                    x = x.to(next(net.parameters()).dtype)
                    F.cross_entropy(net(x).float(), y).backward()
                spoil(net)
                opt.step()
            self.steps += 1
            self.compare()

    def compare(self):
        for a, b in zip(*(net.parameters() for net in self.nets), strict=True):
            assert torch.equal(a, b)
        states = [opt.state_dict()["state"] for opt in self.opts]
        assert states[0].keys() == states[1].keys()
        for key, own in states[0].items():
            for name, value in own.items():
                assert torch.equal(value, states[1][key][name]), name
        assert self.opts[0].anomalies() == self.opts[1].anomalies()
