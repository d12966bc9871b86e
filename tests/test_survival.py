"""What one does first with an optimizer: its defaults live through it.

Short forms of ``frog-triton bench stability``, which has the other optimizers, too.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frog_triton import FROG
from frog_triton.benchmarks.train.stability import OFFERED, Trial, survive
from frog_triton.benchmarks.train.survival_cases import CASES


@pytest.mark.parametrize(
    ("name", "steps", "rate", "spike"),
    # The largest loss after it was first low. Measured over four seeds, in this order:
    # 0.10, 0.10, 0.10, 0.12, 0.79, 0.17, 1.29, 0.53, 0.66, 6.2.
    [
        ("overfit-mlp", 100, 1.0, 0.3),
        ("overfit-cnn", 150, 1.0, 0.3),
        ("overfit-mlp", 100, 3.0, 0.3),
        ("overfit-cnn", 150, 3.0, 3.0),
        ("past-cnn", 600, 3.0, 3.0),
        ("past-norm", 120, 3.0, 3.0),
        ("mlm", 200, 3.0, 4.0),
        ("vit", 120, 3.0, 3.0),
        ("deep-mlp", 400, 1.0, 5.0),
        ("gan", 150, 3.0, 50.0),
    ],
)
def test_the_defaults_survive(name, steps, rate, spike):
    case = replace(CASES[name], steps=steps)
    trial = Trial(case, "constant", rate, OFFERED["FROG"], seed=0)
    found = survive(trial)
    assert found["survived"] and found["spike"] < spike


LAYERS = {
    "square": (lambda: nn.Linear(32, 32), (32,)),
    "wide": (lambda: nn.Linear(512, 64), (512,)),
    "tall": (lambda: nn.Linear(64, 512), (64,)),
    "convolution": (lambda: nn.Conv2d(8, 16, 3), (8, 6, 6)),
    "groups": (lambda: nn.Conv2d(16, 16, 3, groups=4), (16, 6, 6)),
}


@pytest.mark.parametrize("options", [{}, {"orthogonalize": False}])
@pytest.mark.parametrize("kind", LAYERS)
def test_lr_is_about_the_distance_that_a_row_moves(kind, options):
    """Whatever the layer, orthogonalized or not."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(4), nn.Linear(4, 3))
    x, y = torch.randn(32, *shape), torch.arange(32) % 3
    net(x)
    opt = FROG(net, lr=0.01, weight_decay=0.0, **options)
    before = layer.weight.detach().clone()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    moved = (layer.weight.detach() - before).flatten(1).norm(dim=1) / 0.01
    # Measured: medians of 0.28 to 0.96, at most 1.17.
    assert 0.2 < moved.median() <= moved.max() < 1.3
