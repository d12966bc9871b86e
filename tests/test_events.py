"""Random nets and random events in a training loop, against Algorithm 1 in float64."""

import io

import oracles
import torch
from algorithm1 import Algorithm1
from cases import PAPER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from frog_triton import FROG

EVERYTHING = 10_000  # samples: all positions of all calls

LAYERS = {
    "linear": (lambda bias: nn.Linear(5, 4, bias=bias), (5,)),
    "sequence": (lambda bias: nn.Linear(3, 4, bias=bias), (2, 3)),
    "conv1d": (lambda bias: nn.Conv1d(2, 3, 3, padding=1, bias=bias), (2, 5)),
    "conv2d": (lambda bias: nn.Conv2d(2, 4, 2, stride=2, bias=bias), (2, 4, 4)),
    "groups": (lambda bias: nn.Conv2d(4, 4, 2, groups=2, bias=bias), (4, 3, 3)),
    "depthwise": (lambda bias: nn.Conv2d(3, 3, 2, groups=3, bias=bias), (3, 3, 3)),
    "reflect": (
        lambda bias: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect", bias=bias),
        (2, 5),
    ),
    "conv3d": (lambda bias: nn.Conv3d(1, 2, 2, bias=bias), (1, 3, 2, 2)),
}

EVENTS = ("step", "accumulate", "skip", "freeze", "unfreeze", "save and load", "drop")


class Net(nn.Module):
    """Layers side by side: each has an input, and a loss of its own."""

    def __init__(self, kinds, bias):
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(LAYERS[kind][0](bias) for kind in kinds)

    def loss(self, used, size, generator, dtype):
        total = torch.zeros((), dtype=dtype)
        for i in used:
            shape = (size, *LAYERS[self.kinds[i]][1])
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            y = self.layers[i](x)
            target = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            total = total + (torch.sin(y) - target.to(dtype)).square().sum()
        return total


class Watch:
    """Inputs and output gradients of one layer since the last step."""

    def __init__(self, layer):
        self.xs, self.ys = [], []
        layer.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        if output.requires_grad:
            self.xs.append(args[0].detach())
            output.register_hook(self.ys.append)

    def clear(self):
        self.xs.clear()
        self.ys.clear()


@settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_random_events_are_algorithm_1(data):
    choose = data.draw
    kinds = choose(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3))
    dtype = choose(st.sampled_from([torch.float64, torch.float32]))
    options = PAPER | {
        "momentum": choose(st.sampled_from([0.5, 0.9])),
        "nesterov": choose(st.booleans()),
        "weight_decay": choose(st.sampled_from([0.0, 0.1])),
        "damping": 0.1,
        "cg_iters": choose(st.integers(1, 3)),
    }
    build = {
        "sampling": choose(st.sampled_from(["examples", "positions"])),
        "formulation": choose(st.sampled_from(["primal", "gram"])),
        "capturable": choose(st.booleans()),
        "sample_size": EVERYTHING,
        "exclude_output_layer": False,
    }
    torch.manual_seed(0)
    net = Net(kinds, bias=choose(st.booleans())).to(dtype)
    generator = torch.Generator().manual_seed(choose(st.integers(0, 99)))
    opt = FROG(net, **(options | build))
    models = [Algorithm1(layer, **options) for layer in net.layers]
    watches = [Watch(layer) for layer in net.layers]

    def backward():
        trainable = [i for i, m in enumerate(net.layers) if m.weight.requires_grad]
        used = [i for i in trainable if choose(st.booleans())] or trainable[:1]
        if used:
            size = choose(st.integers(1, 4))
            net.loss(used, size, generator, dtype).backward()

    for event in choose(st.lists(st.sampled_from(EVENTS), min_size=3, max_size=10)):
        if event == "accumulate":
            backward()
        elif event == "skip":  # a forward that no backward follows
            net.loss([0], 2, generator, dtype)
            del watches[0].xs[len(watches[0].ys) :]
        elif event in ("freeze", "unfreeze"):
            # As in a loop: between a step and the next backward.
            opt.zero_grad()
            for watch in watches:
                watch.clear()
            layer = choose(st.sampled_from(list(net.layers)))
            layer.requires_grad_(event == "unfreeze")
        elif event == "save and load":
            file = io.BytesIO()
            torch.save([net.state_dict(), opt.state_dict()], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            net.load_state_dict(saved[0])
            opt.load_state_dict(saved[1])
        elif event == "drop":
            backward()
            opt.zero_grad()
            for watch in watches:
                watch.clear()
        else:
            backward()
            for layer, model, watch in zip(net.layers, models, watches, strict=True):
                if layer.weight.grad is not None:
                    bias = None if layer.bias is None else layer.bias.grad
                    x, y = torch.cat(watch.xs), torch.cat(watch.ys)
                    model.step(x, y, layer.weight.grad, bias)
                watch.clear()
            if any(p.grad is not None for p in net.parameters()):
                opt.step()
            opt.zero_grad()
    # Measured: 8e-16 and 6e-7.
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for layer, model in zip(net.layers, models, strict=True):
        error = oracles.relative_error(layer.weight, model.weight)
        assert error < limit
        if layer.bias is not None:
            assert oracles.relative_error(layer.bias, model.bias) < limit
