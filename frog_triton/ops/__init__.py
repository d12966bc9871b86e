"""Backends: modules with the same functions of the same signatures."""

from __future__ import annotations

from types import ModuleType

import torch

from . import torch_ops

__all__ = ["BACKENDS", "resolve"]

BACKENDS = ("auto", "torch", "triton")


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module that serves tensors of this device and dtype."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "triton":
        raise NotImplementedError
    return torch_ops
