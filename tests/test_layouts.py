"""Parameters, gradients and momentum of any layout are used where they lie."""

import copy

import pytest
import torch
from cases import PAPER
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton import FROG
from frog_triton.kernels.launch import recording
from frog_triton.layers import adapter_for
from frog_triton.linalg.numbers import Numbers
from frog_triton.linalg.rows import Rows, rows_in_place
from frog_triton.ops import torch_ops, triton_ops
from frog_triton.solve import FORMULATIONS, Batch

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = (0.9, 0.3, 0.1, 0.2)  # momentum, damping, lr, weight decay
MODULES = {
    "conv": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "conv without bias": lambda: nn.Conv2d(5, 7, (2, 3), bias=False),
    "one tap": lambda: nn.Conv2d(5, 7, 1),
    "groups": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "signals": lambda: nn.Conv1d(5, 7, 3),
    "volumes": lambda: nn.Conv3d(3, 5, 2),
    "transposed": lambda: nn.ConvTranspose2d(5, 7, 3, stride=2),
}


def dense(t):
    return t.contiguous()


def channels_last(t):
    """Channels next to each other, for any number of axes."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def spread(t):
    """Every other entry of a tensor whose rows come second, as views may be."""
    wide = t.new_full((t.shape[1], t.shape[0], *t.shape[2:-1], 2 * t.shape[-1]), 7.0)
    view = wide.transpose(0, 1)[..., ::2]
    return view.copy_(t)


MIXED = (
    (channels_last, channels_last, dense),
    (spread, dense, channels_last),
    (dense, channels_last, spread),
)
FORMATS = (torch.contiguous_format, torch.channels_last)


def solved(ops, name, layouts, formulation, nesterov, dtype):
    """What two layers' weights, momenta and biases are after a step."""
    torch.manual_seed(0)
    module = MODULES[name]()
    adapter = adapter_for(module)
    axes = adapter.weights(module)[0].axes
    xs, ys, found = [], [], {"theta": [], "m": [], "g": []}
    for _ in range(2):
        x = torch.randn(3, module.in_channels, *(5, 4, 3)[: module.weight.ndim - 2])
        y = torch.randn_like(module(x))
        bias = module.bias is not None
        xs.append(adapter.linear_map(module, x.to(DEVICE, dtype), bias))
        ys.append(adapter.canonical(y.to(DEVICE, dtype)))
        for key, layout in zip(found, layouts, strict=True):
            weight = torch.randn_like(module.weight).to(DEVICE, dtype)
            b = torch.randn_like(module.bias).to(DEVICE, dtype) if bias else None
            found[key].append(Rows(axes.view(layout(weight)), b))
    before = [r.weight.data_ptr() for r in found["theta"] + found["m"]]
    numbers = Numbers(*NUMBERS)
    batch = Batch(
        *ops.prepare(xs, ys, dtype), found["m"], found["g"], numbers, nesterov
    )
    how = "gram" if formulation == "directions" else formulation
    solution = FORMULATIONS[how](ops, batch, 3)
    rows = found["theta"][0].weight.shape[0]
    counts = [torch.zeros(2, rows, dtype=torch.int32, device=DEVICE) for _ in xs]
    if formulation == "directions":
        done = (solution.status, solution.finite, counts, numbers)
        ops.direction_update_(found["theta"], solution.rows(), *done)
    else:
        solution.update_(found["theta"], counts)
    ended = found["theta"] + found["m"]
    assert before == [r.weight.data_ptr() for r in ended]
    return [t for r in ended for t in r if t is not None]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("formulation", ["gram", "primal", "directions"])
@pytest.mark.parametrize("name", MODULES)
def test_any_layout_is_the_same_step(name, formulation, nesterov):
    """The very bits of dense rows, and those are float64's but for rounding.

    In the interpreter, that is: compiled code may add a row up in another order where
    it lies otherwise (one rounding, measured for a transposed convolution's rows).
    """
    how = (formulation, nesterov)
    plain = solved(triton_ops, name, (dense,) * 3, *how, torch.float32)
    exact = solved(torch_ops, name, (dense,) * 3, *how, torch.float64)
    for ours, theirs in zip(plain, exact, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 1e-6  # measured: 8e-8
    for layouts in ((channels_last,) * 3, *MIXED):
        found = solved(triton_ops, name, layouts, *how, torch.float32)
        assert all(map(torch.equal, found, plain)), layouts
        wide = solved(torch_ops, name, layouts, *how, torch.float64)
        for ours, theirs in zip(wide, exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_rows_are_views_wherever_they_can_be():
    weight = torch.randn(4, 3, 2, 5)
    for layout in (channels_last, spread):
        rows = rows_in_place(layout(weight))
        assert torch.equal(rows.flatten(1), weight.flatten(1))
    view = channels_last(weight)
    assert rows_in_place(view).shape == (4, 3, 10)
    assert rows_in_place(view).data_ptr() == view.data_ptr()
    assert rows_in_place(weight).shape == (4, 30)
    one = channels_last(torch.randn(4, 3, 1, 1))
    assert rows_in_place(one).stride() == (3, 1)
    turned = weight.transpose(2, 3)  # taps at unequal distances
    assert torch.equal(rows_in_place(turned), turned.flatten(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.body(torch.tanh(self.stem(x))))
        x = self.up(torch.tanh(self.point(torch.tanh(self.depthwise(x)))))
        return self.head(torch.tanh(x).mean((2, 3)))


def built(memory_format=torch.channels_last, **options):
    torch.manual_seed(0)
    net = Net().to(DEVICE).to(memory_format=memory_format)
    options = {"backend": "triton"} | options | {"damping": 0.3, "sample_size": 4}
    return net, FROG(net, **options)


def backward(net, opt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    opt.zero_grad()
    net(
        torch.randn(6, 3, 6, 6, generator=generator).to(DEVICE)
    ).square().sum().backward()


class Copying(TorchDispatchMode):
    """Notes what copies tensors of some sizes."""

    NAMES = ("copy_", "clone", "_to_copy", "contiguous", "cat", "_foreach_copy_")

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [out, *(out if isinstance(out, (list, tuple)) else ())]
        sizes = [t.numel() for t in tensors if isinstance(t, torch.Tensor)]
        if name in self.NAMES and self.sizes.intersection(sizes):
            self.found.append((name, sizes))
        return out


@pytest.mark.parametrize("sampling", ["examples", "positions"])
@pytest.mark.parametrize("formulation", ["gram", "primal"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_copies_no_parameter(nesterov, formulation, sampling):
    how = {"nesterov": nesterov, "formulation": formulation, "sampling": sampling}
    net, opt = built(**(PAPER | how))
    backward(net, opt)
    opt.step()
    convolutions = [m for m in net.modules() if hasattr(m, "kernel_size")]
    assert not net.stem.weight.is_contiguous()
    for module in convolutions[:-1]:  # a transposed one keeps its momentum's rows dense
        buffer = opt.state[module.weight]["momentum_buffer"]
        assert buffer.stride() == module.weight.stride()
    backward(net, opt, seed=1)
    sizes = {module.weight.numel() for module in convolutions}
    with recording(run=False), Copying(sizes) as mode:
        opt.step()
    assert mode.found == []


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("options", [{}, PAPER])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_momentum_of_another_layout_is_taken_up(memory_format, options, backend):
    """A state of a dense model goes into a channels_last one, and the other way."""
    net, opt = built(memory_format, backend=backend, **options)
    backward(net, opt)
    opt.step()
    (other,) = (f for f in FORMATS if f != memory_format)
    state = copy.deepcopy(opt.state_dict())
    for values in state["state"].values():
        for key, value in values.items():
            if value.ndim == 4:
                values[key] = value.contiguous(memory_format=other)
    twin, twin_opt = built(memory_format, backend=backend, **options)
    twin.load_state_dict(net.state_dict())
    twin_opt.load_state_dict(state)
    for seed in (1, 2):
        for model, optimizer in ((net, opt), (twin, twin_opt)):
            backward(model, optimizer, seed)
            optimizer.step()
    loaded = twin_opt.state[twin.stem.weight]["momentum_buffer"]
    assert loaded.stride() != opt.state[net.stem.weight]["momentum_buffer"].stride()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        if backend == "triton":
            assert torch.equal(p, q)
        # Measured: torch's sums in another order, 1e-6 after two steps.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
