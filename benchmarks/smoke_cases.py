"""Small inputs that launch every kernel, and what either backend makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import FROG, PAPER
from ..kernels.orthogonalize import orthogonalize
from ..linalg.rows import Rows
from ..ops import torch_ops

# Both backends see the same samples, so errors are those of the kernels. Measured in
# the interpreter: 4e-7 in float32, 1e-3 where images in bfloat16 round p and T, 2e-2
# where Newton-Schulz iterations are computed in bfloat16.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

# Two iterations and a large damping, so that rounding is not amplified.
_WELL_POSED = {"sampling": "positions", "damping": 1e-2, "cg_iters": 2}


class Case(Protocol):
    """Something to compute with either backend."""

    @property
    def limit(self) -> float:
        """Of the error, relative."""

    def result(self, backend: str) -> Tensor:
        """As one vector in float64; of the same numbers each time."""


@dataclass(frozen=True)
class Step:
    """What a step of a small model changes.

    Attributes:
        network: builds the model; every layer is preconditioned.
        inputs: shape of the batch.
        options: of FROG.
        dtype: of the samples.
    """

    network: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def limit(self) -> float:
        """See `Case`; directions are orthogonalized in bfloat16 on a GPU."""
        rounded = bool(self.options.get("orthogonalize"))
        return LIMITS[torch.bfloat16 if rounded else self.dtype]

    def result(self, backend: str) -> Tensor:
        """See `Case`."""
        device = _device()
        torch.manual_seed(0)
        network = self.network().to(device)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.inputs, generator=generator).to(device)
        before = [p.detach().clone() for p in network.parameters()]
        optimizer = FROG(
            network,
            lr=1.0,
            exclude_output_layer=False,
            backend=backend,
            autotune="off",
            **{**PAPER, **_WELL_POSED, **self.options},
        )
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            output = network(x)
        slope = torch.randn(output.shape, generator=generator).to(output)
        output.backward(slope)
        optimizer.step()
        pairs = zip(network.parameters(), before, strict=True)
        return torch.cat([(p.detach() - b).flatten() for p, b in pairs]).double().cpu()


@dataclass(frozen=True)
class Orthogonalized:
    """Directions orthogonalized by kernels on any device; a step takes torch on a CPU.

    Attributes:
        shape: of the directions, ``(L, R, D)``.
    """

    shape: tuple[int, ...]
    limit: float = LIMITS[torch.bfloat16]

    def result(self, backend: str) -> Tensor:
        """See `Case`."""
        generator = torch.Generator().manual_seed(0)
        rows = Rows(torch.randn(self.shape, generator=generator).to(_device()), None)
        finite = torch.ones_like(rows.weight[..., 0], dtype=torch.bool)
        how = orthogonalize if backend == "triton" else torch_ops.orthogonalize
        return how(rows, finite, 1).weight.flatten().double().cpu()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _linear(dim: int = 40, rows: int = 40) -> nn.Module:
    if dim != rows:
        return nn.Linear(dim, rows)
    return nn.Sequential(nn.Linear(dim, rows), nn.Tanh(), nn.Linear(rows, dim))


def _conv(groups: int = 1) -> nn.Module:
    layers = [nn.Conv2d(8, 8, 3, padding=1, groups=groups) for _ in range(2)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def _sizes() -> nn.Module:
    """Layers of four sizes, which share launches."""
    sizes = (40, 24, 64, 33, 48)
    layers = [(nn.Linear(dim, rows), nn.Tanh()) for dim, rows in pairwise(sizes)]
    return nn.Sequential(*(part for pair in layers for part in pair))


_GRAM, _PRIMAL = {"formulation": "gram"}, {"formulation": "primal"}
_WHOLE = {"sampling": "examples", "sample_size": 2}
_BF16 = torch.bfloat16

CASES: dict[str, Case] = {
    "gram": Step(_linear, (24, 40), _GRAM),
    "gram-bfloat16": Step(_linear, (24, 40), _GRAM, _BF16),
    "gram-more-samples": Step(_linear, (140, 40), _GRAM | {"sample_size": 140}),
    "gram-many-samples": Step(_linear, (270, 40), _GRAM | {"sample_size": 270}),
    "gram-long-rows": Step(lambda: _linear(1100, 5), (9, 1100), _GRAM),
    "gram-images": Step(lambda: nn.Conv2d(8, 8, 3), (2, 8, 5, 5), _GRAM | _WHOLE),
    "gram-nesterov": Step(_linear, (24, 40), _GRAM | {"nesterov": True}),
    "primal": Step(_linear, (70, 40), _PRIMAL),
    "primal-bfloat16": Step(_linear, (70, 40), _PRIMAL, _BF16),
    "primal-images": Step(_conv, (3, 8, 7, 6), _PRIMAL | _WHOLE),
    "primal-images-bfloat16": Step(_conv, (3, 8, 7, 6), _PRIMAL | _WHOLE, _BF16),
    "depthwise": Step(lambda: _conv(8), (3, 8, 7, 6), _PRIMAL | _WHOLE),
    "gram-sizes": Step(_sizes, (20, 40), _GRAM),
    "primal-sizes": Step(_sizes, (70, 40), _PRIMAL),
    "positions": Step(_conv, (3, 8, 7, 6), {"sample_size": 20}),
    "capturable": Step(_linear, (24, 40), {"capturable": True}),
    "orthogonal": Step(_linear, (24, 40), {"orthogonalize": True}),
    "orthogonal-wide": Orthogonalized((2, 20, 40)),
    "orthogonal-tall": Orthogonalized((2, 40, 20)),
}
