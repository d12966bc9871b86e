"""What torch's operations on a GPU compute and move, counted as they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kernels.work import PRICES, Work

# A product in float32 keeps its precision unless the user says otherwise, so it runs
# on no tensor core: as dear as tf32x3 here.
_PRICES = {torch.bfloat16: PRICES["bf16"], torch.float16: PRICES["bf16"]}


_FREE = ("empty", "new_empty", "scalar_tensor")

FROM_HOST = "copy from the host"
"""The name of a copy that brings numbers of the host's to the device."""


class Launched(NamedTuple):
    """What a device has something to do for.

    Attributes:
        name: of a kernel, of torch's operation, or `FROM_HOST`.
        work: what there is to do.
    """

    name: str
    work: Work


class _Counter(TorchDispatchMode):
    def __init__(self, on: str | None) -> None:
        super().__init__()
        self.on = on
        self.found: list[Launched] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {k: v for k, v in (kwargs or {}).items() if k != "out"}
        read = [t for t in tree_leaves((args, given)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        held = {t.untyped_storage()._cdata for t in read}
        only_a_view = not func._schema.is_mutable and all(
            t.untyped_storage()._cdata in held for t in written
        )
        devices = {t.device.type for t in (*read, *written)}
        elsewhere = self.on is not None and self.on not in devices
        if not (only_a_view or elsewhere or func.__name__.startswith(_FREE)):
            work = _work(func, args, kwargs or {}, read, written, out)
            copies = func.__name__.startswith(("_to_copy", "copy_"))
            from_host = copies and len(devices) > 1 and "cpu" in devices
            name = FROM_HOST if from_host else func.__name__.partition(".")[0]
            self.found.append(Launched(name, work))
        return out


def _work(
    func: Any,
    args: Any,
    kwargs: Any,
    read: list[Tensor],
    written: list[Tensor],
    out: Any,
) -> Work:
    from torch.utils.flop_counter import flop_registry  # which imports Triton

    operations = 0
    if func.overloadpacket in flop_registry:
        operations = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    once = {t.untyped_storage()._cdata: t for t in read}.values()
    moved = sum(t.numel() * t.element_size() for t in (*once, *written))
    price = _PRICES.get(written[0].dtype, PRICES["tf32x3"]) if written else 0
    return Work(operations, price * operations, moved, 1)


def eager_operations(
    run: Callable[[], Any], on: torch.device | None = None
) -> list[Launched]:
    """The operations of a function; those on meta tensors take no time.

    Args:
        run: views and allocations in it are free, every other operation is a launch.
        on: what happens elsewhere alone is not counted; None counts all.
    """
    with _Counter(None if on is None else on.type) as counter:
        run()
    found: list[Launched] = counter.found
    return found


def eager_work(run: Callable[[], Any]) -> Work:
    """All of `eager_operations` together."""
    return sum((operation.work for operation in eager_operations(run)), Work())
