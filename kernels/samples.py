"""Entries of X, explicit or implicit: patches are read where the activations lie.

A column ``d`` of X is ``tap * CHANNELS + channel``, so that the columns of one tap are
neighbours, as channels_last activations are. Parameters keep torch's order, channel
first; `native_column` says where. A matrix is the case of one tap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.precision import tf32_convolutions
from ..linalg.rows import SampleMap
from .interpreter import interpreted
from .largest import largest_of
from .launchers import PRECISION

# Names of the arguments that say where activations lie, and how the window moves.
_PLACE = (
    *("HEIGHT", "WIDTH", "OUT_HEIGHT", "OUT_WIDTH"),
    *("stride_xn", "stride_xc", "stride_xh", "stride_xw"),
)
_WINDOW = (
    *("KERNEL_W", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W"),
    *("DILATION_H", "DILATION_W", "POINTWISE"),
)


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


@dataclass(frozen=True)
class Samples:
    """Samples of layers of one geometry, as the kernels address them.

    Attributes:
        map: of the first layer, for its sizes.
        tensors: activations of each layer, all of the same shape and strides.
        largest: what the scale of each layer's is found from, ``(groups, PARTS)``.
        depthwise: rows a channel where each row sees one channel of an image, else 0.
        n: positions, of all examples.
        rows: R.
        window: arguments that describe the window.
    """

    map: SampleMap
    tensors: list[Tensor]
    largest: list[Tensor]
    depthwise: int
    n: int
    rows: int
    window: dict[str, Any]

    @property
    def groups(self) -> int:
        """Problems a layer falls into: depthwise layers are one."""
        return 1 if self.depthwise else self.map.groups

    @property
    def problem_rows(self) -> int:
        """Rows of a problem."""
        return self.rows // self.groups

    @property
    def group_channels(self) -> int:
        """Channels (of a matrix: columns) of a group."""
        return 0 if self.depthwise else self.map.dim // int(self.window["TAPS"])

    @property
    def kind(self) -> str:
        """How samples are addressed, in a word."""
        if self.depthwise:
            return "depthwise"
        return "matrix" if self.window["POINTWISE"] else "window"

    @property
    def key(self) -> dict[str, int]:
        """Sizes that matter to speed, for `tuned`."""
        problems = len(self.tensors) * self.groups
        sizes = {"n": self.n, "r": self.problem_rows, "d": self.map.dim}
        return {**sizes, "p": problems}

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments that all kernels here take."""
        return {
            "N": self.n,
            "R": self.problem_rows,
            "D": self.map.dim,
            "GROUPS": self.groups,
        }

    @property
    def taps(self) -> dict[str, int]:
        """The column order."""
        return {key: self.window[key] for key in ("CHANNELS", "TAPS")}


def serves(x: SampleMap) -> bool:
    """Whether the kernels can read these samples in place."""
    return x.window is not None or x.x.ndim == 2


def matrix_view(x: SampleMap) -> Tensor | None:
    """The rows ``(N, groups * D)`` where the activations lie, if they lie so.

    They do in a matrix, and in channels_last images that a window of one tap visits
    one position at a time.
    """
    if x.x.ndim == 2:
        return x.x
    window = x.window
    if not x.pointwise or window is None or {*window.stride} != {1} or any(window.pads):
        return None
    rows = x.x.movedim(1, -1)
    return rows.view(-1, rows.shape[-1]) if rows.is_contiguous() else None


def samples(xs: Sequence[SampleMap], rows: int) -> Samples:
    """Describe the samples of layers of one geometry with `rows` rows."""
    x, n = xs[0], xs[0].samples * xs[0].positions
    tensors = [m.x for m in xs]
    if len({t.stride() for t in tensors}) > 1:
        tensors = [t.contiguous() for t in tensors]
    spec = x.window
    views = [matrix_view(m) for m in xs]
    if all(view is not None for view in views):
        tensors = [view for view in views if view is not None]
        if len({t.stride() for t in tensors}) > 1:
            tensors = [t.contiguous() for t in tensors]
        spec = None
    first = tensors[0]
    if spec is None:
        channels, taps, depthwise = x.dim, 1, 0
        place = (1, 1, 1, 1, *first.stride(), 0, 0)
        window = (1, 1, 1, 0, 0, 1, 1, True)
    else:
        height, width = _two(first.shape[2:], 1)
        kernel_h, kernel_w = _two(spec.kernel, 1)
        stride, pads = _two(spec.stride, 1), _two(spec.pads, 0)
        dilation = _two(spec.dilation, 1)
        out_height, out_width = _two(x.output_shape, 1)
        taps = kernel_h * kernel_w
        channels = x.dim // taps
        depthwise = rows // x.groups if channels == 1 and x.groups > 1 else 0
        strides = (first.stride(0), first.stride(1), *_two(first.stride()[2:], 0))
        place = (height, width, out_height, out_width, *strides)
        window = (kernel_w, *stride, *pads, *dilation, False)
    described = dict(zip(_PLACE, place, strict=True))
    described |= dict(zip(_WINDOW, window, strict=True))
    # One value for all matrices, so that they share a compiled kernel.
    described |= {"CHANNELS": 1 if spec is None else channels, "TAPS": taps}
    return Samples(x, tensors, largest_of(xs), depthwise, n, rows, described)


def _two(values: Sequence[int], filler: int) -> tuple[int, int]:
    """One or two numbers as two: a signal is an image of height one."""
    first, second = (*(filler,) * (2 - len(values)), *values)
    return int(first), int(second)


def product_precision(s: Samples) -> str:
    """How products of these samples are computed.

    A matrix: as float32. Images: bfloat16 as it is; float16, whose range is too small
    for the rows, and float32 in tf32; float32 to its full precision where torch's
    convolutions keep it (``torch.backends.cudnn.conv.fp32_precision``).
    """
    if s.map.window is None:
        return PRECISION
    dtype = s.tensors[0].dtype
    if dtype == torch.bfloat16:
        return "bf16_tf32" if interpreted() else "bf16"
    if dtype == torch.float32 and not tf32_convolutions():
        return PRECISION
    return "tf32"
