"""What torch has been told about the precision of float32 convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def tf32_convolutions() -> bool:
    """Whether float32 convolutions may round their operands to tf32.

    Asked of the operator itself: reading `torch.backends.cudnn.allow_tf32` raises as
    soon as precision was set by operator, or for all backends.
    """
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32")


@contextmanager
def exact_convolutions(x: Tensor) -> Iterator[None]:
    """Convolutions of CUDA tensors in full float32, and the same bits every time.

    Args:
        x: what is convolved; on other devices nothing is changed.
    """
    if not x.is_cuda:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    rounded, deterministic = tf32_convolutions(), cudnn.deterministic
    if rounded:
        cudnn.conv.fp32_precision = "ieee"
    cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.deterministic = deterministic
        if rounded:
            cudnn.conv.fp32_precision = "tf32"
