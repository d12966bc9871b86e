"""Products of samples on tensor cores, and how precisely they are computed.

Samples of 16 bits are exact as they are, so the other factor is what must not be
rounded. It is a sum of two terms of the samples' own format, and each term's product is
exact: of two bfloat16 terms 16 bits are left, which after a few iterations is as close
to float64 as float32 is.
"""

import torch
import triton
import triton.language as tl

from ..linalg.precision import tf32_convolutions
from ..linalg.rows import SampleMap
from .interpreter import interpreted

PRECISION = "tf32x3"
"""Of products with float32 operands: three tensor-core products, float32's accuracy."""


@triton.jit
def as_factor(x, scale, PRECISION: tl.constexpr):
    """Samples as `product` takes them: scaled, but bfloat16 as it lies.

    So copies of bfloat16 samples need not pass through registers; `outstanding` is
    what the product's other factor, or its result, is to be multiplied by then.
    """
    if PRECISION != "bf16" and PRECISION != "bf16_tf32":
        x = x.to(tl.float32) * scale
    return x


@triton.jit
def outstanding(scale, PRECISION: tl.constexpr):
    """What `as_factor` has left out of the scale."""
    left = scale
    if PRECISION != "bf16" and PRECISION != "bf16_tf32":
        left = 1.0
    return left


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` on tensor cores with float32 accumulation.

    PRECISION is ``"bf16"``: both rounded to bfloat16; ``"bf16_tf32"``: the same
    numbers through tf32, for the interpreter, which cannot multiply bfloat16; or one of
    `tl.dot`'s, on float32 operands.
    """
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc=acc)
    elif PRECISION == "bf16_tf32":
        a = a.to(tl.bfloat16).to(tl.float32)
        b = b.to(tl.bfloat16).to(tl.float32)
        acc = tl.dot(a, b, acc=acc, input_precision="tf32")
    else:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        acc = tl.dot(a, b, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def high_term(v, PRECISION: tl.constexpr):
    """The first of two terms whose sum is v: its leading bits.

    PRECISION is ``"bf16x2"`` or ``"bf16x2_tf32"``, the same for the interpreter, which
    cannot multiply bfloat16: 8 bits each; or ``"tf32x2"``: 11 bits each.
    """
    if PRECISION == "bf16x2":
        high = v.to(tl.bfloat16)
    elif PRECISION == "bf16x2_tf32":
        high = v.to(tl.bfloat16).to(tl.float32)
    else:
        high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high


@triton.jit
def low_term(v, high, PRECISION: tl.constexpr):
    """The second term, what the first has left."""
    return high_term(v - high.to(tl.float32), PRECISION)


@triton.jit
def sample_factor(x, PRECISION: tl.constexpr):
    """Samples as the products below take them."""
    if PRECISION != "bf16x2":
        x = x.to(tl.float32)
    return x


@triton.jit
def samples_times(x, v, acc, PRECISION: tl.constexpr):
    """``acc + x v``; x is exact in PRECISION, v float32."""
    if PRECISION == "tf32x3":
        acc = tl.dot(sample_factor(x, PRECISION), v, acc=acc, input_precision="tf32x3")
    else:
        x = sample_factor(x, PRECISION)
        high = high_term(v, PRECISION)
        low = low_term(v, high, PRECISION)
        acc = tl.dot(x, low, acc=acc, input_precision="tf32")
        acc = tl.dot(x, high, acc=acc, input_precision="tf32")
    return acc


@triton.jit
def terms_times_samples(u, high, low, x, acc, PRECISION: tl.constexpr):
    """``acc + u x``, likewise; high and low are the terms of u."""
    x = sample_factor(x, PRECISION)
    if PRECISION == "tf32x3":
        acc = tl.dot(u, x, acc=acc, input_precision="tf32x3")
    else:
        acc = tl.dot(low, x, acc=acc, input_precision="tf32")
        acc = tl.dot(high, x, acc=acc, input_precision="tf32")
    return acc


def sample_precision(dtype: torch.dtype) -> str:
    """How products of a matrix of samples with float32 numbers are computed."""
    if dtype == torch.bfloat16:
        return "bf16x2_tf32" if interpreted() else "bf16x2"
    return "tf32x2" if dtype == torch.float16 else PRECISION


def gram_precision(dtype: torch.dtype) -> str:
    """How products of samples with each other are; all of them exact but float32's."""
    if dtype == torch.bfloat16:
        return "bf16_tf32" if interpreted() else "bf16"
    return "tf32" if dtype == torch.float16 else PRECISION


def product_precision(x: SampleMap, dtype: torch.dtype) -> str:
    """How products of samples that may be images are computed on the rows.

    A matrix: as float32. Images: bfloat16 as it is; float16, whose range is too small
    for the rows, and float32 in tf32; float32 to its full precision where torch's
    convolutions keep it (``torch.backends.cudnn.conv.fp32_precision``).
    """
    if x.window is None:
        return PRECISION
    if dtype == torch.bfloat16:
        return "bf16_tf32" if interpreted() else "bf16"
    if dtype == torch.float32 and not tf32_convolutions():
        return PRECISION
    return "tf32"
