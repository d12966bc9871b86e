"""Backends: modules with the same functions of the same signatures."""

from __future__ import annotations

import importlib
import importlib.util
from typing import cast

import torch

from . import torch_ops
from .backend import Backend

__all__ = ["BACKENDS", "Backend", "resolve"]

BACKENDS = ("auto", "torch", "triton")


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend module that serves tensors of this device and dtype.

    Args:
        backend: one of `BACKENDS`; ``"auto"`` is Triton for CUDA tensors other than
            float64, where Triton is installed, and torch for all others.
        device: of the tensors.
        dtype: of the parameters or the momentum.

    Raises:
        ValueError: the Triton backend cannot serve such tensors.
    """
    available = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        serves = available and device.type == "cuda" and dtype != torch.float64
        backend = "triton" if serves else "torch"
    if backend == "torch":
        return torch_ops
    if dtype == torch.float64:
        raise ValueError(
            "the Triton backend computes in float32 and does not take a float64 model; "
            "use backend='torch', or model.float()"
        )
    if not available:
        raise ValueError("backend='triton' needs triton: pip install triton")
    interpreter = importlib.import_module("..kernels.interpreter", __name__)
    # Tensors without memory launch nothing, and may be counted with.
    if device.type not in ("cuda", "meta") and not interpreter.interpreted():
        raise ValueError(
            f"the Triton backend takes CUDA tensors, got {device.type}; use "
            "backend='torch', or set TRITON_INTERPRET=1 before Python starts to run "
            "the kernels on the CPU, slowly"
        )
    return cast(Backend, importlib.import_module(".triton_ops", __name__))
