"""Drawn rows, straight from where activations and output gradients lie.

Which positions are drawn is a pure function of a key, the one of
`frog_triton.capture.sampling`, and found where the rows are read: there is no index.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import Reading
from .config import Config, tile_side
from .handles import Handle
from .kernel import Args, Kernel, Parts, Values, blocks
from .launchers import DTYPES
from .samples import Place, Stencil, load_window, windowed
from .table import active
from .work import Sizes

GIVEN: tl.constexpr = tl.constexpr(0)
"""The key is a number of the host's."""

COUNTED: tl.constexpr = tl.constexpr(1)
"""It is hashed from a step counter on the device, and written down."""

WRITTEN: tl.constexpr = tl.constexpr(2)
"""It is read where it was written down."""

GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(z):
    """The end of splitmix64, of unsigned numbers."""
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


@triton.jit
def _hashed(key, counter):
    """How `counter_key` goes on from one counter to the next."""
    return _mix(key + GOLDEN + counter)


@triton.jit
def drawn(i, key, N, TOTAL):
    """The i-th of N positions below TOTAL: `frog_triton.capture.sampling.draw`."""
    position = i
    if N < TOTAL:
        start = i * TOTAL // N
        length = (i + 1) * TOTAL // N - start
        z = _mix(i.to(tl.uint64) * GOLDEN + key)
        within = ((z & 0xFFFFFFFF).to(tl.int64) * length) >> 32
        total = (i * 0 + TOTAL).to(tl.uint64)
        # A hash of the key as the first counter, and of 1 as the second.
        offset = _hashed(_mix(key + GOLDEN), 1) % total
        position = (start + within + offset.to(tl.int64)) % TOTAL
        position = tl.where(position < 0, position + TOTAL, position)
    return position


@triton.jit(do_not_specialize=["key", "forward", "N", "TOTAL"])
def _draw_kernel(
    x_ptr,
    out_ptr,
    step_ptr,
    key_ptr,
    key: tl.int64,
    forward: tl.int64,
    N,
    TOTAL,
    ROW,
    place,
    STENCIL: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One piece of one row: channel, then kernel row, then kernel column."""
    i = tl.program_id(0).to(tl.int64)
    bits = key.to(tl.int64).to(tl.uint64, bitcast=True)
    if KEY == COUNTED:
        step = tl.load(step_ptr).to(tl.int64).to(tl.uint64)
        bits = _hashed(_hashed(bits, step), forward.to(tl.int64).to(tl.uint64))
        first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
        tl.store(key_ptr, bits.to(tl.int64, bitcast=True), mask=first)
    elif KEY == WRITTEN:
        bits = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    position = drawn(i, bits, N, TOTAL)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    tap, channel = d % STENCIL.TAPS, d // STENCIL.TAPS
    x = load_window(x_ptr, position, channel, tap, d < ROW, place, STENCIL)
    tl.store(out_ptr + i * ROW + d, x, mask=d < ROW)


@dataclass(frozen=True)
class DrawConfig(Config):
    """`DRAW`."""

    BLOCK_D: int = 512


def draw_config(row: int) -> DrawConfig:
    """A row at a time, up to 1024 entries."""
    return DrawConfig(BLOCK_D=min(tile_side(row), 1024))


def _parts(args: Args, problems: int, values: Values) -> Parts:
    return [((args["N"], blocks(args["ROW"], values["BLOCK_D"])), {})]


def _count(s: Sizes) -> tuple[int, int]:
    return 0, 2 * s.n * s.args["ROW"] * s.args["out_ptr"].element_size()


DRAW = Kernel(
    fn=_draw_kernel,
    config=DrawConfig,
    parts=_parts,
    count=_count,
    values={"BLOCK_D": (128, 256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)},
    accumulator=("BLOCK_D",),
)

CHANGING = {
    GIVEN.value: ("x_ptr", "out_ptr", "key"),
    COUNTED.value: ("x_ptr", "out_ptr", "step_ptr", "key_ptr", "key", "forward"),
    WRITTEN.value: ("x_ptr", "out_ptr", "key_ptr"),
}
"""What differs from launch to launch, by where the key comes from."""

_ABSENT = {"step_ptr": None, "key_ptr": None, "key": 0, "forward": 0}


class Drawing:
    """Draws rows of tensors of one shape, a launch each.

    Args:
        like: such a tensor.
        place: where its rows lie.
        stencil: how they are read.
        total: how many there are.
        shape: of what is drawn, ``(N, row)`` or whole examples.
        strides: of that; those of a row are the tensor's own.
    """

    def __init__(
        self,
        like: Tensor,
        place: Place,
        stencil: Stencil,
        total: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        self._shape, self._strides = shape, strides
        n, row = shape[0], strides[0]
        self._key = {"n": n, "d": row}
        self._dtype, self._device = like.dtype, like.device
        self._args: dict[str, Any] = {
            "N": n,
            "TOTAL": total,
            "ROW": row,
            "place": place,
            "STENCIL": stencil._replace(CHANNELS=1),  # the same kernel for any
        }
        self._handles: dict[Any, Handle] = {}

    def given(self, x: Tensor, key: int) -> Tensor:
        """Rows ``(N, D)`` of x, drawn by a key of the host's."""
        out = self._empty()
        self._launch(GIVEN.value)(x, out, _signed(key))
        return out

    def counted(
        self, x: Tensor, prefix: int, step: Tensor, forward: int
    ) -> tuple[Tensor, Tensor]:
        """The same by a key that is hashed on the device.

        Args:
            x: the tensor.
            prefix: hash of the counters before the step.
            step: the counter, of any dtype.
            forward: the counter after that.

        Returns:
            The rows, and the key for `written`.
        """
        out = self._empty()
        key = torch.empty((), dtype=torch.int64, device=self._device)
        self._launch(COUNTED.value)(x, out, step, key, _signed(prefix), forward)
        return out, key

    def written(self, x: Tensor, key: Tensor) -> Tensor:
        """The same by a key that lies on the device."""
        out = self._empty()
        self._launch(WRITTEN.value)(x, out, key)
        return out

    def _empty(self) -> Tensor:
        return torch.empty_strided(
            self._shape, self._strides, dtype=self._dtype, device=self._device
        )

    def _launch(self, source: int) -> Handle:
        known = source, active()
        found = self._handles.get(known)
        if found is None:
            default = draw_config(self._key["d"])
            config = DRAW.tuned(default, self._key, (self._dtype,))
            changing = CHANGING[source]
            absent = {k: v for k, v in _ABSENT.items() if k not in changing}
            fixed = {**self._args, **absent, "KEY": source}
            found = Handle.of(DRAW, config, changing, **fixed)
            self._handles[known] = found
        return found


def drawing(
    x: Tensor, reading: Reading | None, total: int, size: int
) -> Drawing | None:
    """What draws rows of tensors like x; None if the kernel cannot read them.

    Args:
        x: any tensor of that shape, strides, dtype and device.
        reading: how a row is read at a position; None for whole examples.
        total: positions, or examples.
        size: how many to draw.
    """
    n = min(size, total)
    if x.dtype not in DTYPES or not n or not x.numel():
        return None
    if reading is None:
        return _examples(x, n)
    window = reading.window
    if window is None:
        place, row = _place(x, reading.axis), x.shape[reading.axis]
        if place is None:
            return None
        stencil = Stencil(POINTWISE=place.OUT_HEIGHT * place.OUT_WIDTH == 1)
    else:
        if x.ndim > 4 or window.padding_mode != "zeros":
            return None
        row = x.shape[1] * math.prod(window.kernel)
        place, stencil = windowed(x, window, reading.output_shape, row)
    return Drawing(x, place, stencil, total, (n, row), (row, 1))


def _examples(x: Tensor, n: int) -> Drawing | None:
    """Draws whole examples, channels_last or contiguous, and leaves them so."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not (last or x.is_contiguous()):
        return None
    row = math.prod(x.shape[1:])
    place, stencil = Place(1, 1, 1, 1, row, 1, 0, 0), Stencil(POINTWISE=True)
    shape, strides = (n, *x.shape[1:]), (row, *x.stride()[1:])
    return Drawing(x, place, stencil, x.shape[0], shape, strides)


def _place(x: Tensor, axis: int) -> Place | None:
    """Where entries of positions lie, all axes but one; None if those are too many.

    Neighbouring axes count as one where their strides allow.
    """
    axis %= x.ndim
    sizes: list[int] = []
    strides: list[int] = []
    for other in range(x.ndim):
        size, stride = x.shape[other], x.stride(other)
        if other == axis or size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return None
    if len(sizes) < 2:
        (stride,) = strides or [0]
        return Place(1, 1, 1, 1, stride, x.stride(axis), 0, 0)
    example, *_ = strides
    height, width = _two(sizes[1:], 1)
    stride_h, stride_w = _two(strides[1:], 0)
    steps = (example, x.stride(axis), stride_h, stride_w)
    return Place(height, width, height, width, *steps)


def _two(values: Sequence[int], filler: int) -> tuple[int, int]:
    first, second = (*(filler,) * (2 - len(values)), *values)
    return first, second


def _signed(key: int) -> int:
    """The int64 of the same bits."""
    return key - (1 << 64) if key >> 63 else key
