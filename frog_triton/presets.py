"""Settings of FROG that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SAMPLINGS: Mapping[str, int] = MappingProxyType({"examples": 32, "positions": 128})
"""Ways to sample, each with its default size."""

PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "orthogonalize": False,
        "nesterov": False,
        "damping": 1e-4,
        "weight_decay": 1e-5,
        "fallback": "sgd",
        "sampling": "examples",
    }
)
"""The method as it was published: ``FROG(model, lr=0.06, **PAPER)``.

Rows step along their own direction, 32 whole examples are sampled, all else goes to SGD
at the same rate. It wants a rate found by trial, and a net with norm layers: without
them a row may move ``lr / sqrt(damping) = 100 lr`` where the samples say nothing, and
ordinary nets do not survive that (``frog-triton bench stability``).
"""
