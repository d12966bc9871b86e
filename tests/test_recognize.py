"""Layers with a forward of their own: which are served, by what, and which are not."""

import copy
import importlib
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from own_forwards import (
    C2,
    OWN,
    RIGHT,
    SAME,
    WRONG,
    conv,
    equalized,
    linear,
    make,
    padded,
    rectified,
    same,
    standard_same,
)
from torch import nn

from frog_triton.layers.base import MatrixMap
from frog_triton.layers.conv import ConvAdapter, SameConvAdapter
from frog_triton.layers.linear import LinearAdapter
from frog_triton.layers.recognize import recognize
from frog_triton.layers.rows import ROWS_SECOND, Weight
from frog_triton.linalg.rows import Rows
from frog_triton.ops import torch_ops

SEEDS = range(20)


# Headroom of the tolerances over these layers, measured: float64 and float32 60 times,
# bfloat16 3.5 times, autocast to bfloat16 4 times and to float16 4.8 times.
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
    "autocast-float16": (torch.float32, torch.float16),
}


def adapter_of(module):
    return LinearAdapter() if isinstance(module, nn.Linear) else ConvAdapter()


def answer(module, x, precision="float32"):
    """What `recognize` says of a call."""
    dtype, autocast = PRECISIONS[precision]
    module, x = module.to(dtype), x.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=bool(autocast)):
        return recognize(module, adapter_of(module), x, module(x))


def seeded(build, shape, seed):
    torch.manual_seed(seed)
    module = build()
    with torch.no_grad():
        # Rows of unlike sizes and means, as training makes them.
        scale = torch.rand(len(module.weight)).add(0.5)
        scale = scale.view(-1, *(1,) * (module.weight.ndim - 1))
        module.weight.mul_(scale).add_(0.1 * scale * module.weight.std())
    return module, torch.randn(shape) + 0.3 * torch.rand(shape)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RIGHT)
def test_layers_that_compute_a_linear_map_are_served(name, precision):
    build, shape, expected = RIGHT[name]
    for seed in SEEDS:
        assert type(answer(*seeded(build, shape, seed), precision)) is expected


def test_the_given_adapter_comes_back():
    module, adapter = make(nn.Linear, linear, 5, 3), LinearAdapter()
    x = torch.randn(6, 5)
    assert recognize(module, adapter, x, module(x).detach()) is adapter


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WRONG)
def test_layers_that_compute_something_else_are_refused(name, precision):
    build, shape = WRONG[name]
    for seed in SEEDS:
        reason = answer(*seeded(build, shape, seed), precision)
        form = "F.linear of" if len(shape) == 2 else "a convolution by"
        assert isinstance(reason, str)
        assert reason.startswith(f"its forward is not {form} its weight")
        assert "\n" not in reason


@pytest.mark.parametrize(
    ("forward", "kind", "shape"),
    [
        (lambda self, x: F.linear(x, self.weight).mean(-1), nn.Linear, (9, 3)),
        (lambda self, x: F.linear(x, self.weight)[:, :2], nn.Linear, (9, 3)),
        (lambda self, x: F.linear(x, self.weight).mT, nn.Linear, (2, 4, 3)),
        (lambda self, x: F.linear(x[..., :3], self.weight), nn.Linear, (9, 7)),
        (lambda self, x: F.linear(x, self.weight).repeat(2, 1), nn.Linear, (9, 3)),
        (lambda self, x: F.pad(conv(self, x), (1, 1)), C2, (2, 3, 5, 5)),
        (lambda self, x: conv(self, x).flatten(1), C2, (2, 3, 5, 5)),
        (lambda self, x: conv(self, x.flatten(2, 3)), C2, (2, 3, 5, 2, 5)),
    ],
)
def test_outputs_of_another_shape_are_refused(forward, kind, shape):
    module = make(kind, forward, 3, 5, *([3] if kind is C2 else []))
    assert answer(module, torch.randn(shape)).startswith("its output does not have the")


def test_other_types_are_refused():
    module = make(nn.Linear, lambda self, x: linear(self, x).int(), 3, 5)
    assert "torch.int32 out" in answer(module, torch.randn(9, 3))


def test_weights_that_multiply_from_the_right():
    class FromRight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 9))
            self.bias = nn.Parameter(torch.randn(9))

        def forward(self, x):
            return x @ self.weight + self.bias

    module, x = FromRight(), torch.randn(5, 8, 6)
    y, adapter = module(x).detach(), LinearAdapter(Weight(axes=ROWS_SECOND))
    assert recognize(module, adapter, x, y) is adapter
    assert recognize(module, adapter, x, y * 2 - module.bias.detach()) is adapter
    assert isinstance(recognize(module, adapter, x, y.abs()), str)


def test_a_patched_forward_is_checked_like_another():
    module, x = nn.Linear(6, 4), torch.randn(30, 6)
    own = module.forward
    module.forward = lambda x: own(x)
    assert type(answer(module, x)) is LinearAdapter
    module.forward = lambda x: own(x.sin())
    assert isinstance(answer(module, x), str)


def test_super_with_something_unused_is_served():
    class Compatible(nn.Linear):
        """As diffusers' layers that could take a LoRA, and have none."""

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.lora_layer = None

        def forward(self, hidden_states, scale=1.0):
            if self.lora_layer is None:
                return super().forward(hidden_states)
            return super().forward(hidden_states) + scale * self.lora_layer(
                hidden_states
            )

    module, x = Compatible(6, 4), torch.randn(30, 6)
    assert type(answer(module, x)) is LinearAdapter
    module.lora_layer = nn.Linear(6, 4)
    assert isinstance(answer(module, x), str)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("build", [linear, rectified])
def test_values_that_are_not_finite_prove_nothing(build, value):
    module, x = make(nn.Linear, build, 6, 4), torch.randn(30, 6)
    x[0, 2] = value
    y = module(x)
    assert answer(module, x) is None
    x[0, 2] = 0
    with torch.no_grad():
        module.weight[2, 1] = value
    assert recognize(module, LinearAdapter(), x, y.detach()) is None


def test_a_weight_of_zeros_proves_nothing_unless_outputs_contradict():
    module, x = make(nn.Linear, linear, 6, 4), torch.randn(30, 6)
    nn.init.zeros_(module.weight)
    assert answer(module, x) is None
    with torch.no_grad():
        module.bias.zero_()
    assert answer(module, x) is None
    module.forward = lambda x: linear(module, x) + x[:, :4].square()
    assert isinstance(answer(module, x), str)


def test_a_weight_that_rounding_hides_proves_nothing():
    module, x = make(nn.Linear, linear, 6, 4), torch.randn(30, 6)
    with torch.no_grad():
        module.weight.mul_(1e-3)
        module.bias.fill_(5)
    assert answer(module, x, "autocast") is None
    assert type(answer(module, x)) is LinearAdapter


def test_few_outputs_prove_nothing():
    single, few = make(nn.Linear, linear, 6, 1), make(nn.Linear, equalized, 6, 9)
    assert answer(single, torch.randn(4, 6)) is None
    assert type(answer(single, torch.randn(40, 6))) is LinearAdapter
    assert answer(few, torch.randn(2, 6)) is None
    assert answer(few, torch.randn(5, 6)) is None
    assert answer(few, torch.randn(0, 6)) is None
    assert type(answer(few, torch.randn(8, 6))) is LinearAdapter


def test_the_own_padding_is_kept_where_both_are_the_same():
    module = make(C2, conv, 3, 4, 3, padding=1)
    assert type(answer(module, torch.randn(2, 3, 7, 8))) is ConvAdapter


def test_no_random_number_is_drawn_and_nothing_is_written():
    module, x = make(C2, standard_same, 3, 4, 3, 2), torch.randn(2, 3, 7, 8)
    weight, image, state = module.weight.clone(), x.clone(), torch.get_rng_state()
    answer(module, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.weight, weight) and torch.equal(x, image)
    assert module.weight.grad is None


def test_wide_layers_are_looked_at_in_few_places(monkeypatch):
    module, x = make(nn.Linear, linear, 700, 900), torch.randn(8, 200, 700)
    y = module(x).detach()
    numbers = []
    double = torch.Tensor.double
    monkeypatch.setattr(
        torch.Tensor, "double", lambda t: numbers.append(t.numel()) or double(t)
    )
    assert type(recognize(module, LinearAdapter(), x, y)) is LinearAdapter
    assert max(numbers) <= 68 * 700


# What the "same" adapter makes of X, against windows of the padded input.
IMAGES = {name: case for name, case in RIGHT.items() if case[2] is SAME} | {
    "no-padding": (lambda: make(C2, same, 3, 4, 1, stride=3), (2, 3, 7, 8), SAME)
}


def windows(module, x):
    """Rows of X ``(n * P, groups * D)`` of the padded input, a window at a time."""
    unpadded = copy.deepcopy(module)
    unpadded.padding = (0,) * len(module.kernel_size)
    rows = oracles.patches(unpadded, oracles.as_numpy(padded(module, x)))
    return torch.from_numpy(rows).flatten(1)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("smaller", [0, 1, 2])
def test_rows_of_same_convolutions_are_windows_of_the_padded_input(name, smaller):
    build, shape, _ = IMAGES[name]
    module = build().double()
    x = torch.randn(*shape[:2], *(size - smaller for size in shape[2:])).double()
    adapter, expected = SameConvAdapter(), windows(module, x)
    map_ = adapter.linear_map(module, x, bias=False)
    y = same(module, x).detach()
    assert map_.output_shape == y.shape[2:]
    assert isinstance(map_.matrix(), MatrixMap)
    torch.testing.assert_close(map_.matrix().x, expected, rtol=0, atol=0)
    index = torch.randperm(len(expected))[:9]
    at = adapter.take_input_positions(module, x, y.shape, index, torch_ops)
    torch.testing.assert_close(at, expected[index], rtol=0, atol=0)
    bias = None if module.bias is None else module.bias.detach()
    outputs = map_.apply(Rows(module.weight.detach().flatten(1), bias))
    # Measured: 2e-15.
    torch.testing.assert_close(outputs, y.flatten(2), rtol=1e-13, atol=1e-13)


def imported(name):
    """A module of another package, or a skip where it, or what it needs, is broken."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


OTHERS = {
    "Linear": ("timm.layers", (24, 9), {}, (90, 24), LinearAdapter),
    "Conv2dSame": ("timm.layers", (4, 6, 3, 2), {}, (3, 4, 12, 9), SAME),
    "StdConv2d": ("timm.layers", (4, 6, 3), {"stride": 2}, (3, 4, 12, 9), OWN),
    "StdConv2dSame": ("timm.layers", (4, 6, 3), {"stride": 2}, (3, 4, 12, 9), SAME),
    "ScaledStdConv2d": ("timm.layers", (4, 6, 3), {}, (3, 4, 12, 9), OWN),
    "ScaledStdConv2dSame": (
        "timm.layers",
        (4, 6, 3),
        {"stride": 2},
        (3, 4, 12, 9),
        SAME,
    ),
    "WeightStandardizedConv2d": (
        "transformers.models.bit.modeling_bit",
        (4, 6, 3),
        {"stride": 2},
        (3, 4, 12, 9),
        SAME,
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_packages_are_served(name, precision):
    package, args, options, shape, expected = OTHERS[name]
    kind = getattr(imported(package), name)
    for seed in SEEDS:
        module, x = seeded(lambda: kind(*args, **options), shape, seed)
        assert type(answer(module, x, precision)) is expected
