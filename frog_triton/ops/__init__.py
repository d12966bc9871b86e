"""Backends: modules with the same functions of the same signatures."""

from __future__ import annotations

from types import ModuleType

import torch

from . import torch_ops

__all__ = ["BACKENDS", "resolve"]

BACKENDS = ("auto", "torch", "triton")


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module that serves tensors of this device and dtype.

    Args:
        backend: one of `BACKENDS`.
        device: of the tensors.
        dtype: of the parameters or the momentum.

    Raises:
        ValueError: the Triton backend cannot serve such tensors.
    """
    if backend == "triton":
        if dtype == torch.float64:
            raise ValueError(
                "the Triton backend computes in float32 and does not take a float64 "
                "model; use backend='torch', or model.float()"
            )
        raise ValueError("this version has no Triton kernels yet; use backend='torch'")
    return torch_ops
