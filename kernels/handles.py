"""Launches that are bound once and made again with other tensors.

Triton finds out at each launch, from all arguments, which compiled kernel serves them:
tens of microseconds of the host's time. What does not change here is kept, and so can
never be stale; what does is looked at anew: a compiled kernel is taken again only for
tensors of the same dtype and device whose addresses are as divisible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from triton import knobs

from .interpreter import interpreted
from .launch import Launch, is_recording, launch

if TYPE_CHECKING:
    from .config import Config
    from .kernel import Kernel

ALIGNMENT = 15
"""Bits of an address that Triton asks for zeros, to make another kernel if they are."""


class Handle:
    """One launch of a kernel, whose grid and sizes stay.

    Recordings see it as any other, and so do hooks that Triton's launches have.

    Args:
        kernel: what is launched.
        grid: programs along each axis.
        fixed: arguments that stay, by name: numbers and constants.
        config: block sizes, warps and stages.
        changing: names of all other arguments, in the order of calls: tensors, and
            integers that the kernel annotates as ``tl.int64`` and does not specialize
            on.

    Raises:
        ValueError: an argument is missing, or a tensor is to stay; at the first call,
            the kernel specializes on a number that changes.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        fixed: Mapping[str, Any],
        config: Config,
        changing: Sequence[str],
    ) -> None:
        self._kernel, self._config = kernel, config
        self._grid, self._fixed = grid, dict(fixed)
        self._changing = tuple(changing)
        self._three = (*grid, 1, 1)[:3]
        self._compiled: dict[tuple[Any, ...], Any] = {}
        fn = kernel.fn
        self._usual = interpreted()  # as launches without a handle are made
        if self._usual:
            return
        known = {**self._fixed, **config.options()}
        missing = {*fn.arg_names} - {*known, *changing}
        if missing:
            names = " and ".join(sorted(missing))
            raise ValueError(f"{kernel.name} is bound without {names}")
        for name, value in self._fixed.items():
            if isinstance(value, Tensor):
                raise ValueError(f"{name} is a tensor, which a handle must not keep")
        self._args = [known.get(name) for name in fn.arg_names]
        self._slots = [fn.arg_names.index(name) for name in changing]

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        config: Config,
        changing: Sequence[str],
        problems: int = 1,
        **args: Any,
    ) -> Self:
        """The same, with the grid that the kernel makes of its arguments.

        Args:
            kernel: what is launched, once.
            config: of this kernel.
            changing: names of arguments that each call gives.
            problems: layers times groups.
            args: all others, but those that `parts` adds.
        """
        (made,) = kernel.launches(config, problems, args)
        return cls(made.kernel, made.grid, made.args, config, changing)

    def __call__(self, *values: Tensor | int) -> None:
        """Launch, with what changes."""
        if self._usual or is_recording() or self._is_watched():
            launch(self._made(values))
            return
        args = self._args.copy()
        kind: list[Any] = []
        device = -1
        for slot, value in zip(self._slots, values, strict=True):
            if isinstance(value, int):
                args[slot] = value
                continue
            address, device = value.data_ptr(), value.get_device()
            args[slot] = address
            kind += (value.dtype, device, address & ALIGNMENT == 0)
        compiled = self._compiled.get(tuple(kind))
        if compiled is None:
            self._compiled[tuple(kind)] = self._first(values)
        elif torch._C._cuda_getDevice() == device:
            self._run(compiled, device, args)
        else:  # Triton launches on the current device
            with torch.cuda.device(device):
                self._run(compiled, device, args)

    def _run(self, compiled: Any, device: int, args: list[Any]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        kernel = compiled.function, compiled.packed_metadata
        compiled.run(*self._three, stream, *kernel, None, None, None, *args)

    def _made(self, values: Sequence[Tensor | int]) -> Launch:
        args = {**self._fixed, **dict(zip(self._changing, values, strict=True))}
        return Launch(self._kernel, self._grid, args, self._config)

    def _first(self, values: Sequence[Tensor | int]) -> Any:
        """Launch as usual; returns what Triton has compiled for it."""
        params = {param.name: param for param in self._kernel.fn.params}
        for name, value in zip(self._changing, values, strict=True):
            param = params[name]
            plain = param.do_not_specialize and param.annotation_type == "i64"
            if isinstance(value, int) and not plain:
                raise ValueError(
                    f"{self._kernel.name} makes another kernel for another {name}: "
                    "annotate it as tl.int64, and name it in do_not_specialize"
                )
        return self._made(values).run()

    def _is_watched(self) -> bool:
        """Whether hooks of Triton's want to know of launches."""
        runtime = knobs.runtime
        return bool(
            getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
            or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
            or self._kernel.fn.pre_run_hooks
        )
