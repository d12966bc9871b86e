"""Layers of every kind and option, with an input shape each."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import frog_triton


def without_tensors(launch):
    """Arguments of a launch's parts that are not tensors, nor rows of them."""

    def plain(value):
        parts = value if isinstance(value, tuple) else (value,)
        return not any(isinstance(part, torch.Tensor) for part in parts)

    return [
        {name: value for name, value in part.args.items() if plain(value)}
        for part in launch.parts
    ]


ROUNDING = 8 if torch.cuda.is_available() else 2
"""How often torch's own float32 error a kernel's may be. On a GPU its products are
tf32x3, whose rounding is four times float32's; in the interpreter they are float32."""

PAPER = {**frog_triton.PAPER, "sampling": "positions"}

# With the paper's damping, unless a test says otherwise: systems that are harder.
precondition = partial(frog_triton.precondition, damping=PAPER["damping"])
"""Algorithm 1 itself; tests that are about the sampling choose it."""

CASES = {
    "linear": (lambda: nn.Linear(7, 5), (6, 7)),
    "linear-nobias": (lambda: nn.Linear(7, 5, bias=False), (6, 7)),
    "linear-sequence": (lambda: nn.Linear(5, 3), (3, 4, 5)),
    "linear-deep": (lambda: nn.Linear(5, 3), (2, 2, 3, 5)),
    "linear-vector": (lambda: nn.Linear(5, 3), (5,)),
    "linear-one": (lambda: nn.Linear(1, 1), (3, 1)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 3, 9)),
    "conv1d-dilated": (lambda: nn.Conv1d(2, 3, 3, dilation=2, bias=False), (2, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
    "conv2d-unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 3, 1, bias=False), (3, 4, 3, 3)),
    "conv2d-1x1-stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 6)),
    "conv2d-1x1-padded": (lambda: nn.Conv2d(2, 3, 1, padding=1), (2, 2, 3, 4)),
    "conv2d-1x1-groups": (lambda: nn.Conv2d(4, 6, 1, groups=2), (3, 4, 3, 3)),
    "conv2d-stride-beyond-kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3), (3, 2, 8, 7)),
    "conv2d-oblong": (
        lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (2, 0), (1, 2)),
        (2, 2, 6, 7),
    ),
    "conv2d-same-even": (lambda: nn.Conv2d(2, 3, (4, 2), padding="same"), (2, 2, 5, 5)),
    "conv2d-same-dilated": (
        lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2),
        (2, 2, 5, 5),
    ),
    "conv2d-valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 2, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 4, 5)),
    "conv2d-depthwise": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        (2, 4, 5, 4),
    ),
    "conv2d-depthwise-multiplier": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3),
        (2, 3, 4, 4),
    ),
    "conv2d-kernel-beyond-map": (lambda: nn.Conv2d(2, 3, 5, padding=2), (2, 2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, stride=2), (2, 2, 3, 4, 3)),
    "conv3d-same": (
        lambda: nn.Conv3d(2, 2, (1, 2, 3), padding="same"),
        (1, 2, 3, 4, 3),
    ),
    **{
        f"conv2d-{mode}": (
            lambda mode=mode: nn.Conv2d(
                2, 3, 3, padding=(2, 1), stride=2, padding_mode=mode
            ),
            (2, 2, 5, 6),
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv1d-circular-same": (
        lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"),
        (2, 2, 7),
    ),
    "conv3d-replicate": (
        lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="replicate"),
        (1, 1, 3, 3, 4),
    ),
}


def problem(name: str, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A layer with random samples and momentum: module, x, y, m, m_bias."""
    generator = torch.Generator().manual_seed(seed)

    def randn(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    build, shape = CASES[name]
    module = build().double()
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(randn(param.shape))
    x = randn(shape)
    y = randn(module(x).shape) * 1e-3
    m = randn(module.weight.shape)
    m_bias = None if module.bias is None else randn(module.bias.shape)
    module, x, y, m = module.to(dtype), x.to(dtype), y.to(dtype), m.to(dtype)
    return module, x, y, m, None if m_bias is None else m_bias.to(dtype)
