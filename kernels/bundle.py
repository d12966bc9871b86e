"""Launches of one kernel for layers of different sizes, made as one.

A launch serves layers of one geometry: a grid, and arguments. Where several launches of
a kernel have the same constants and do not depend on each other, one grid holds the
programs of all. What differs between them stands in a table on the device, in which
each program looks up whose it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .board import board_in_use, uploaded
from .launch import Launch

MOST: tl.constexpr = tl.constexpr(64)
"""Launches in a bundle at most."""

HEAD: tl.constexpr = tl.constexpr(3)
"""Words ahead of a launch's arguments: the first of its programs, then how many stand
on the first axis of its grid, and on the second."""

# How a program comes to an argument.
SHARED: tl.constexpr = tl.constexpr(0)
ADDRESS: tl.constexpr = tl.constexpr(1)
NUMBER: tl.constexpr = tl.constexpr(2)
SEVERAL: tl.constexpr = tl.constexpr(3)


@triton.jit
def _argument(own_ptr, shared, form):
    """An argument: ``(SHARED, i)``, or ``(ADDRESS or NUMBER, word, type, divisor)``."""
    if form[0] == SHARED:
        value = shared[form[1]]
        return value
    elif form[0] == ADDRESS:
        address = tl.load(own_ptr + form[1])
        pointer = address.to(tl.pointer_type(form[2]), bitcast=True)
        return tl.multiple_of(pointer, form[3])
    else:
        return tl.multiple_of(tl.load(own_ptr + form[1]).to(form[2]), form[3])


@triton.jit
def _several(own_ptr, shared, forms):
    """Arguments that are one tuple."""
    found = ()
    for i in tl.static_range(len(forms)):
        found += (_argument(own_ptr, shared, forms[i]),)  # type: ignore[assignment]
    return found


@triton.jit
def _arguments(own_ptr, shared, forms):
    """All arguments of a launch that are no constants."""
    found = ()
    for i in tl.static_range(len(forms)):
        if forms[i][0] == SEVERAL:
            found += (_several(own_ptr, shared, forms[i][1]),)  # type: ignore[assignment]
        else:
            found += (_argument(own_ptr, shared, forms[i]),)  # type: ignore[assignment]
    return found


def _named(proxy: Any) -> str:
    """The name of the compiled kernel, which profilers show."""
    kernel = proxy.constants.get("KERNEL")
    return f"{getattr(kernel, '__name__', 'kernel')}_bundle"


@triton.jit(repr=_named, do_not_specialize=["COUNT"])
def _bundle(
    words_ptr,
    shared,
    forms,
    constants,
    COUNT,
    WORDS: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """A program of one of COUNT launches, each with a row of WORDS in the table."""
    launches = tl.arange(0, MOST)
    firsts = tl.load(words_ptr + launches * WORDS, mask=launches < COUNT, other=2**31)
    program = tl.program_id(0)
    own_ptr = words_ptr + (tl.sum((firsts <= program).to(tl.int32), 0) - 1) * WORDS
    place = program - tl.load(own_ptr).to(tl.int32)
    first_axis = tl.load(own_ptr + 1).to(tl.int32)
    second_axis = tl.load(own_ptr + 2).to(tl.int32)
    rest = place // first_axis
    within = (place % first_axis, rest % second_axis, rest // second_axis)
    KERNEL(*_arguments(own_ptr, shared, forms), *constants, within)


POINTEES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.bool: tl.int1,
}


@dataclass(frozen=True)
class Signature:
    """What a Triton function takes.

    Attributes:
        arguments: names of what may differ from launch to launch.
        constants: names of what is compiled in.
        bundles: whether it can be told where in a grid a program stands.
    """

    arguments: tuple[str, ...]
    constants: tuple[str, ...]
    bundles: bool


@lru_cache(maxsize=256)
def signature(fn: Any) -> Signature:
    """Of a Triton function; one that bundles has ``within`` as its last argument."""
    known = fn.fn.__annotations__
    names = [name for name in fn.arg_names if name != "within"]
    marks = (tl.constexpr, "tl.constexpr")
    constants = tuple(name for name in names if known.get(name) in marks)
    arguments = tuple(name for name in names if name not in constants)
    in_order = (*arguments, *constants) == tuple(names)
    return Signature(arguments, constants, in_order and "within" in fn.arg_names)


STRIDES = frozenset({"N", "R", "D", "ROW"})
"""Sizes that are strides, too: whether 16 divides them decides how memory is read."""


def _class(name: str, value: Any) -> Any:
    """Arguments with equal classes can differ in a bundle, and lose no speed by it."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        names = getattr(value, "_fields", ("",) * len(value))
        return tuple(map(_class, names, value))
    if value is None:
        return None
    if name in STRIDES or name.startswith("stride_"):
        return value < 2**31, value % 16 == 0, value == 1
    return value < 2**31


def kind(launch: Launch) -> Any:
    """Launches of equal kinds can be one."""
    fn, args = launch.kernel.fn, launch.args
    takes = signature(fn)
    if not takes.bundles or math.prod(launch.grid) > launch.kernel.most_programs:
        return id(launch)
    options = launch.config.options()
    return (
        fn,
        device_of(launch),
        *(options[name] for name in ("num_warps", "num_stages")),
        *(options[n] if n in options else args[n] for n in takes.constants),
        *(_class(name, args[name]) for name in takes.arguments),
    )


def device_of(launch: Launch) -> torch.device:
    """Of the tensors."""
    return next(launch.tensors()).device


@dataclass(frozen=True, eq=False)
class Bundle:
    """Launches of one kind as one; see `Launch`.

    Attributes:
        parts: the launches, of one `kind`.
    """

    parts: tuple[Launch, ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.parts[0].name

    @property
    def kernel(self) -> Any:
        """What is launched."""
        return self.parts[0].kernel

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs of all parts, in a row."""
        return (sum(math.prod(part.grid) for part in self.parts),)

    def tensors(self) -> Iterator[Tensor]:
        """All that the parts are given."""
        for part in self.parts:
            yield from part.tensors()

    def compile(self) -> Any:
        """See `Launch.compile`."""
        return _bundle.warmup(grid=self.grid, **self.bound)

    def run(self) -> Any:
        """See `Launch.run`."""
        device = device_of(self.parts[0])
        on_device = torch.cuda.device(device) if device.type == "cuda" else None
        with on_device or nullcontext():
            return _bundle[self.grid](**self.bound)

    @cached_property
    def bound(self) -> dict[str, Any]:
        """Arguments of the kernel that stands for all parts; the table is made once."""
        first = self.parts[0]
        takes = signature(first.kernel.fn)
        options = first.config.options()
        table = _Table([math.prod(part.grid) for part in self.parts])
        grids = [(*part.grid, 1)[:2] for part in self.parts]
        table.number([grid[0] for grid in grids])
        table.number([grid[1] for grid in grids])
        forms = tuple(
            table.place([part.args[name] for part in self.parts])
            for name in takes.arguments
        )
        constants = (
            options[name] if name in options else first.args[name]
            for name in takes.constants
        )
        return {
            "words_ptr": table.on(device_of(first)),
            "shared": tuple(table.shared) or (0,),
            "forms": forms,
            "constants": tuple(map(_constant, constants)),
            "COUNT": len(self.parts),
            "WORDS": table.width,
            "KERNEL": first.kernel.fn,
            "num_warps": options["num_warps"],
            "num_stages": options["num_stages"],
        }


class _Table:
    """Words of each launch, and what all launches have in common.

    Args:
        programs: of each launch.

    Attributes:
        shared: arguments that are the same for all.
        width: words of a launch.
    """

    def __init__(self, programs: Sequence[int]) -> None:
        firsts = [sum(programs[:i]) for i in range(len(programs))]
        self.shared: list[Any] = []
        self.width = 0
        self._rows: list[list[int]] = [[] for _ in programs]
        self._tensors: list[list[Tensor | None]] = [[] for _ in programs]
        self.number(firsts)

    def number(self, values: Sequence[int]) -> int:
        """A word with a number; returns its place."""
        return self._add(values, [None] * len(values))

    def place(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """An argument, and how a program comes to it."""
        first = values[0]
        if isinstance(first, tuple):
            parts = tuple(self.place(each) for each in zip(*values, strict=True))
            return (SEVERAL, parts)
        tensors = isinstance(first, Tensor)
        numbers = [v.data_ptr() for v in values] if tensors else list(values)
        # Tensors without memory have no address to tell them by.
        same = all(value is first for value in values) or numbers[0] != 0
        if first is None or (same and all(n == numbers[0] for n in numbers)):
            # A tuple that a program puts together cannot have None in it.
            self.shared.append(0 if first is None else first)
            return (SHARED, tl.constexpr(len(self.shared) - 1))
        divisor = 16 if all(number % 16 == 0 for number in numbers) else 1
        if tensors:
            type_ = POINTEES[first.dtype]
            word = self._add(numbers, values)
            # An address that 16 does not divide is one of entries nevertheless.
            divisor = max(divisor, first.element_size())
        else:
            type_ = tl.int32 if all(n < 2**31 for n in numbers) else tl.int64
            word = self.number(numbers)
        how = ADDRESS if tensors else NUMBER
        return (how, *map(tl.constexpr, (word, type_, divisor)))

    def on(self, device: torch.device) -> Tensor:
        """The table on a device, as part of a board if there is one."""
        words = [word for row in self._rows for word in row]
        board = board_in_use()
        if board is None:
            return uploaded(words, device)
        return board.place(words, [t for row in self._tensors for t in row])

    def _add(self, numbers: Sequence[int], tensors: Sequence[Tensor | None]) -> int:
        for row, number in zip(self._rows, numbers, strict=True):
            row.append(number)
        for each, tensor in zip(self._tensors, tensors, strict=True):
            each.append(tensor)
        self.width += 1
        return self.width - 1


def _constant(value: Any) -> Any:
    """As a constant of the kernel, and a tuple of such."""
    if isinstance(value, tuple):
        parts = map(_constant, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return tl.constexpr(value)
