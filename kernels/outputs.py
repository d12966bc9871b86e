"""Output gradients Y as kernels address them."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import settle
from .launchers import DTYPES


class OutputPlace(NamedTuple):
    """Where Y ``(n, R, P)`` lies: positions of an example, strides in entries."""

    P: int
    stride_n: int
    stride_r: int
    stride_p: int

    @classmethod
    def of(cls, y: Tensor) -> "OutputPlace":
        """The place of ``(n, R, P)``."""
        return cls(y.shape[2], *y.stride())


def output_gradients(y: Tensor) -> Tensor:
    """Y in a dtype that kernels read."""
    if y.dtype in DTYPES:
        return y
    settle()
    return y.float()


@triton.jit
def load_outputs(y_ptr, n, rows, mask, place):
    """``Y[n, rows]`` in float32; n counts the positions of all examples.

    Offsets are integers as wide as n and rows.
    """
    at = (n // place.P * place.stride_n + n % place.P * place.stride_p)[:, None]
    at += rows[None, :] * place.stride_r
    return tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
