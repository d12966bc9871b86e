"""Entries of X, explicit or implicit: patches are read where the activations lie.

A column ``d`` of X is ``tap * CHANNELS + channel``, so that the columns of one tap are
neighbours, as channels_last activations are. Parameters keep torch's order, channel
first; `native_column` says where. A matrix is the case of one tap.
"""

import triton
import triton.language as tl


@triton.jit
def native_column(d, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Where torch keeps the weight of column d."""
    column = d
    if TAPS > 1:
        column = (d % CHANNELS) * TAPS + d // CHANNELS
    return column


@triton.jit
def load_window(
    x_ptr,
    n,
    channel,
    tap,
    mask,
    HEIGHT,
    WIDTH,
    OUT_HEIGHT,
    OUT_WIDTH,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
):
    """Entries at positions n; what the padding adds is zero.

    The arguments n, channel and tap broadcast against each other.
    """
    if POINTWISE:
        at = n * stride_xn + channel * stride_xc
    else:
        out_w = n % OUT_WIDTH
        out_h = (n // OUT_WIDTH) % OUT_HEIGHT
        example = n // (OUT_WIDTH * OUT_HEIGHT)
        h = out_h * STRIDE_H - PAD_H + (tap // KERNEL_W) * DILATION_H
        w = out_w * STRIDE_W - PAD_W + (tap % KERNEL_W) * DILATION_W
        mask = mask & (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
        at = example * stride_xn + channel * stride_xc + h * stride_xh + w * stride_xw
    return tl.load(x_ptr + at, mask=mask, other=0.0)


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
