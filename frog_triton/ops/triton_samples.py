"""Samples as the kernels address them, explicit or implicit.

They may be a matrix, or whole images of a one- or two-dimensional convolution, whose
patches the kernels read where the activations lie. A kernel for the hardware's own
im2col copies would be one more way to describe them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..autotune import config
from ..kernels.common import PARTS
from ..kernels.largest import _largest_kernel
from .interpreter import interpreted
from .launch import launch
from .precision import tf32_convolutions
from .tables import Tables
from .triton_common import DTYPES, PRECISION
from .types import SampleMap

# Names of the arguments that say where activations lie, and how the window moves.
_PLACE = (
    *("HEIGHT", "WIDTH", "OUT_HEIGHT", "OUT_WIDTH"),
    *("stride_xn", "stride_xc", "stride_xh", "stride_xw"),
)
_WINDOW = (
    *("KERNEL_W", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W"),
    *("DILATION_H", "DILATION_W", "POINTWISE"),
)


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


def largest_of(xs: Sequence[SampleMap]) -> list[Tensor]:
    """What kernels find the scale of each layer's samples from; see `with_largest`.

    Samples that have not been prepared count as near one.
    """
    largest = [x.largest for x in xs if x.largest is not None]
    if len(largest) == len(xs):
        return largest
    return near_one(xs[0].x, len(xs), xs[0].groups)


def near_one(like: Tensor, layers: int, groups: int) -> list[Tensor]:
    """The same for samples that need no scale."""
    return [like.new_ones(groups, PARTS.value, dtype=torch.float32)] * layers


def with_largest(xs: Sequence[SampleMap]) -> list[SampleMap]:
    """The same samples, with the largest entries of parts of each group; one launch."""
    x, samples = xs[0], [m.x for m in xs]
    if len({t.stride() for t in samples}) > 1:
        samples = [t.contiguous() for t in samples]
    first = samples[0]
    layers, groups, parts = len(xs), x.groups, int(PARTS.value)
    channels, entries = first.shape[1] // groups, first.numel() // groups
    sizes = [first.shape[0], channels, *first.shape[2:]]
    order = sorted(range(len(sizes)), key=first.stride)
    filler = 4 - len(sizes)
    strides = [first.stride(i) for i in order] + [0] * filler
    ordered = [sizes[i] for i in order] + [1] * filler
    # In one piece, whatever the order of its dimensions?
    steps = accumulate([1, *ordered], mul)
    dense = groups == 1 and all(
        size == 1 or stride == step
        for size, stride, step in zip(ordered, strides, steps, strict=False)
    )
    chosen = config.LargestConfig()
    tables = Tables([samples])
    largest = first.new_empty(layers, groups, parts, dtype=torch.float32)
    programs = max(1, min(parts, -(-entries // chosen.BLOCK)))
    launch(
        _largest_kernel,
        (programs, layers * groups),
        chosen,
        x_table_ptr=tables[0],
        largest_ptr=largest,
        ENTRIES=entries,
        part_length=16 * -(-entries // (16 * programs)),  # whole vectors of any type
        GROUPS=groups,
        SIZE_0=ordered[0],
        SIZE_1=ordered[1],
        SIZE_2=ordered[2],
        stride_0=strides[0],
        stride_1=strides[1],
        stride_2=strides[2],
        stride_3=strides[3],
        stride_group=channels * first.stride(1),
        ALIGN=tables.align,
        X_DTYPE=DTYPES[first.dtype],
        DENSE=dense,
        HAS_BIAS=x.bias,
    )
    return [m.with_largest(parts) for m, parts in zip(xs, largest, strict=True)]


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
