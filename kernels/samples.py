"""Entries of X, explicit or implicit: patches are read where the activations lie.

A column ``d`` of X is ``tap * CHANNELS + channel``, so that the columns of one tap are
neighbours, as channels_last activations are. Parameters keep torch's order, channel
first; `native_column` says where. A matrix is the case of one tap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import SampleMap, Window
from .largest import largest_of
from .layouts import entries


class Place(NamedTuple):
    """Where activations lie: sizes of images and of outputs, strides in entries.

    A matrix is one position an example.
    """

    HEIGHT: int
    WIDTH: int
    OUT_HEIGHT: int
    OUT_WIDTH: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int


class Stencil(NamedTuple):
    """How a window moves over an image; a constant of the kernels that read by it.

    Attributes:
        TAPS: of the window.
        CHANNELS: of a group; one for all matrices, which so share compiled kernels.
        KERNEL_W: taps in a row of the window.
        STRIDE_H: from one output to the next; likewise the others.
        UPSAMPLE_H: from one input to the next, with zeros between them.
        POINTWISE: whether sample n is simply row n.
    """

    TAPS: int = 1
    CHANNELS: int = 1
    KERNEL_W: int = 1
    STRIDE_H: int = 1
    STRIDE_W: int = 1
    PAD_H: int = 0
    PAD_W: int = 0
    DILATION_H: int = 1
    DILATION_W: int = 1
    UPSAMPLE_H: int = 1
    UPSAMPLE_W: int = 1
    POINTWISE: bool = False


@triton.jit
def native_column(d, STENCIL: tl.constexpr):
    """Where torch keeps the weight of column d."""
    column = d
    if STENCIL.TAPS > 1:
        column = (d % STENCIL.CHANNELS) * STENCIL.TAPS + d // STENCIL.CHANNELS
    return column


@triton.jit
def native_entries(rows, d, D, place, TAPS: tl.constexpr, STENCIL: tl.constexpr):
    """Where the entries of parameters lie that belong to columns d; see `entries`."""
    if TAPS > 1 and STENCIL.TAPS > 1:  # as many: both are the window's
        channel, tap = d % STENCIL.CHANNELS, d // STENCIL.CHANNELS
        at = rows * place.stride_r
        at += channel.to(tl.int64) * place.stride_c + tap.to(tl.int64) * place.stride_t
    else:
        at = entries(rows, native_column(d, STENCIL), D, place, TAPS)
    return at


@triton.jit
def load_window(x_ptr, n, channel, tap, mask, place, STENCIL: tl.constexpr):
    """Entries at positions n; what padding adds, or stands between inputs, is zero.

    The arguments n, channel and tap broadcast against each other.
    """
    if STENCIL.POINTWISE:
        at = n.to(tl.int64) * place.stride_n + channel * place.stride_c
    else:
        out_w = n % place.OUT_WIDTH
        out_h = (n // place.OUT_WIDTH) % place.OUT_HEIGHT
        example = n // (place.OUT_WIDTH * place.OUT_HEIGHT)
        tap_h, tap_w = tap // STENCIL.KERNEL_W, tap % STENCIL.KERNEL_W
        h = out_h * STENCIL.STRIDE_H - STENCIL.PAD_H + tap_h * STENCIL.DILATION_H
        w = out_w * STENCIL.STRIDE_W - STENCIL.PAD_W + tap_w * STENCIL.DILATION_W
        # Only whole quotients stay, so it is the same however division rounds.
        if STENCIL.UPSAMPLE_H > 1:
            whole = h % STENCIL.UPSAMPLE_H == 0
            h = tl.where(whole, h // STENCIL.UPSAMPLE_H, -1)
        if STENCIL.UPSAMPLE_W > 1:
            whole = w % STENCIL.UPSAMPLE_W == 0
            w = tl.where(whole, w // STENCIL.UPSAMPLE_W, -1)
        mask = mask & (h >= 0) & (h < place.HEIGHT) & (w >= 0) & (w < place.WIDTH)
        at = example.to(tl.int64) * place.stride_n + channel * place.stride_c
        at += h * place.stride_h + w * place.stride_w
    return tl.load(x_ptr + at, mask=mask, other=0.0)


@triton.jit
def load_columns(
    x_ptr,
    n,
    start,
    end_n,
    D,
    place,
    STENCIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns from `start` on, of samples n: a tile of X, its columns tap by tap.

    Where tiles fill the channels of a tap there is but one tap to a tile, and where
    it looks is found once a sample.
    """
    d = start + tl.arange(0, BLOCK_D)
    mask = (n < end_n)[:, None]
    if STENCIL.POINTWISE:
        mask = mask & (d < D)[None, :]
        x = load_window(x_ptr, n[:, None], d[None, :], 0, mask, place, STENCIL)
    elif STENCIL.CHANNELS % BLOCK_D == 0:
        channel, tap = d % STENCIL.CHANNELS, start // STENCIL.CHANNELS
        x = load_window(x_ptr, n[:, None], channel[None, :], tap, mask, place, STENCIL)
    else:
        channel, tap = d % STENCIL.CHANNELS, d // STENCIL.CHANNELS
        mask = mask & (d < D)[None, :]
        x = load_window(
            x_ptr, n[:, None], channel[None, :], tap[None, :], mask, place, STENCIL
        )
    return x


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
        place: where the activations lie.
        stencil: how a window moves over them.
    """

    map: SampleMap
    tensors: list[Tensor]
    largest: list[Tensor]
    depthwise: int
    n: int
    rows: int
    place: Place
    stencil: Stencil

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
        return 0 if self.depthwise else self.map.dim // self.stencil.TAPS

    @property
    def kind(self) -> str:
        """How samples are addressed, in a word."""
        if self.depthwise:
            return "depthwise"
        return "matrix" if self.stencil.POINTWISE else "window"

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
    depthwise = 0
    if spec is None:
        place = Place(1, 1, 1, 1, first.stride(0), first.stride(1), 0, 0)
        stencil = Stencil(POINTWISE=True)
    else:
        place, stencil = windowed(first, spec, x.output_shape, x.dim)
        if stencil.CHANNELS == 1 and x.groups > 1:
            depthwise = rows // x.groups
    return Samples(x, tensors, largest_of(xs), depthwise, n, rows, place, stencil)


def windowed(
    x: Tensor, window: Window, output_shape: Sequence[int], dim: int
) -> tuple[Place, Stencil]:
    """A window over signals or images.

    Args:
        x: ``(examples, channels, *spatial)``.
        window: with zeros as padding.
        output_shape: sizes of its output.
        dim: weights in a row.
    """
    spatial = (_two(x.shape[2:], 1), _two(output_shape, 1))
    strides = (x.stride(0), x.stride(1), *_two(x.stride()[2:], 0))
    kernel_h, kernel_w = _two(window.kernel, 1)
    taps = kernel_h * kernel_w
    stencil = Stencil(
        taps,
        dim // taps,
        kernel_w,
        *_two(window.stride, 1),
        *_two(window.pads, 0),
        *_two(window.dilation, 1),
        *_two(window.upsample, 1),
    )
    return Place(*spatial[0], *spatial[1], *strides), stencil


def _two(values: Sequence[int], filler: int) -> tuple[int, int]:
    """One or two numbers as two: a signal is an image of height one."""
    first, second = (*(filler,) * (2 - len(values)), *values)
    return int(first), int(second)
