"""The largest magnitude of each of many tensors, in one pass over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import is_finite, layer_pointer
from .config import Config
from .kernel import Args, Kernel, Parts, Values
from .launchers import DTYPES
from .tables import Tables
from .work import ITEMSIZES, Sizes

CHUNK = 65536
"""Entries that a program reads: small enough that large tensors fill a GPU."""


@triton.jit
def _magnitudes_kernel(
    table_ptr,
    tensor_ptr,
    begin_ptr,
    entries_ptr,
    partial_ptr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest ``|x|`` of a chunk of a tensor; infinite if an entry is not finite."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_ptr + chunk)
    begin = tl.load(begin_ptr + chunk)
    end = tl.minimum(begin + CHUNK, tl.load(entries_ptr + tensor))
    x_ptr = layer_pointer(table_ptr, tensor, DTYPE, ALIGN)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        magnitude = tl.where(is_finite(x), tl.abs(x), float("inf"))
        largest = tl.maximum(largest, magnitude)
    tl.store(partial_ptr + chunk, tl.max(largest, axis=0))


@triton.jit
def _largest_parts_kernel(
    partial_ptr, first_ptr, order_ptr, largest_ptr, BLOCK: tl.constexpr
):
    """The largest of each tensor's chunks."""
    tensor = tl.program_id(0)
    begin, end = tl.load(first_ptr + tensor), tl.load(first_ptr + tensor + 1)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(partial_ptr + at, mask=at < end, other=0.0)
        largest = tl.maximum(largest, part)
    tl.store(largest_ptr + tl.load(order_ptr + tensor), tl.max(largest, axis=0))


@dataclass(frozen=True)
class MagnitudesConfig(Config):
    """`MAGNITUDES`."""

    num_warps: int = 8
    BLOCK: int = 4096


@dataclass(frozen=True)
class LargestPartsConfig(Config):
    """`LARGEST_PARTS`."""

    num_warps: int = 1
    BLOCK: int = 128


def _chunks(args: Args, problems: int, values: Values) -> Parts:
    return [((args["partial_ptr"].numel(),), {})]


def _tensors(args: Args, problems: int, values: Values) -> Parts:
    return [((args["largest_ptr"].numel(),), {})]


def _count(s: Sizes) -> tuple[int, int]:
    chunks: int = s.args["partial_ptr"].numel()
    # Chunks are whole but for the last of each tensor: what is counted is a bound.
    return 0, chunks * (CHUNK * ITEMSIZES[str(s.args["DTYPE"])] + 16)


def _count_parts(s: Sizes) -> tuple[int, int]:
    return 0, 4 * s.args["partial_ptr"].numel() + 12 * s.args["largest_ptr"].numel()


MAGNITUDES = Kernel(
    fn=_magnitudes_kernel, config=MagnitudesConfig, parts=_chunks, count=_count
)
LARGEST_PARTS = Kernel(
    fn=_largest_parts_kernel,
    config=LargestPartsConfig,
    parts=_tensors,
    count=_count_parts,
)


class Magnitudes:
    """Finds the largest magnitudes of tensors of given sizes, again and again.

    Args:
        tensors: that `serves` says yes to, of one device; those to come have as many
            entries each, of the same dtypes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        dtypes = list(DTYPES)
        self._order = sorted(
            range(len(tensors)), key=lambda i: dtypes.index(tensors[i].dtype)
        )
        owner: list[int] = []
        begin: list[int] = []
        first = [0]
        self._launches: list[tuple[torch.dtype, slice]] = []  # and their chunks
        for dtype, some in groupby(self._order, lambda i: tensors[i].dtype):
            chunks = len(owner)
            for i in some:
                starts = range(0, max(tensors[i].numel(), 1), CHUNK)
                owner += [len(first) - 1] * len(starts)
                begin += starts
                first.append(len(owner))
            self._launches.append((dtype, slice(chunks, len(owner))))
        entries = [tensors[i].numel() for i in self._order]
        numbers = (owner, begin, first, self._order, entries)
        listed = torch.tensor(list(chain(*numbers)), device="cpu")
        packed = listed.to(tensors[0].device)
        parts = packed.split([len(n) for n in numbers])
        self._owner: Tensor
        self._owner, self._begin, self._first, self._places, self._entries = parts

    def fixed(self) -> Tensor:
        """What is made once and read each time."""
        return self._owner

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest magnitude of each ``(count,)``; infinite where one is not finite.

        Two launches, one more for each further dtype.

        Args:
            tensors: with as many entries each as those at first.
        """
        tables = Tables([[tensors[i] for i in self._order]])
        like = tensors[0]
        partial = like.new_empty(len(self._owner), dtype=torch.float32)
        largest: Tensor = like.new_empty(len(tensors), dtype=torch.float32)
        for dtype, chunks in self._launches:
            MAGNITUDES.launch(
                MagnitudesConfig(),
                table_ptr=tables[0],
                tensor_ptr=self._owner[chunks],
                begin_ptr=self._begin[chunks],
                entries_ptr=self._entries,
                partial_ptr=partial[chunks],
                ALIGN=tables.align,
                DTYPE=DTYPES[dtype],
                CHUNK=CHUNK,
            )
        LARGEST_PARTS.launch(
            LargestPartsConfig(),
            partial_ptr=partial,
            first_ptr=self._first,
            order_ptr=self._places,
            largest_ptr=largest,
        )
        return largest


def serves(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these tensors: dense, of the dtypes they know."""
    return all(t.dtype in DTYPES and _dense(t) for t in tensors)


def _dense(tensor: Tensor) -> bool:
    """Whether the entries lie together, in whatever order, each by itself."""
    if tensor.is_contiguous():
        return True
    step = 1
    sides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in sides:
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True
