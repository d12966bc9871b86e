"""Sees the products of `torch.nn.MultiheadAttention`.

They happen inside of one function, which is run as it is, with the products that it
looks up by name replaced by ones that are seen.
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..model.plan import Layer, Use
from .products import ProductWatch
from .taps import Tap

if TYPE_CHECKING:
    from .capture import SampleCapture


class AttentionWatch(ProductWatch):
    """`torch.nn.MultiheadAttention`, whose products are those of one function."""

    def __init__(self, capture: SampleCapture, module: nn.Module) -> None:
        super().__init__(capture, module)
        self._parts: dict[tuple[int, int], Tap] = {}
        self._function = _Attention()

    def add(self, layer: Layer, use: Use) -> None:
        """See `ProductWatch.add`; pieces of ``in_proj`` have taps of their own."""
        super().add(layer, use)
        if use.weight.name == "in_proj_weight":
            capture = self._capture()
            assert capture is not None
            for part in ((0, 1), (1, 2), (2, 3), (1, 3)):
                self._parts[part] = Tap(capture, layer, use, part)
            self._parts[0, 3] = self.taps["in_proj_weight"]

    def mode(self, module: nn.Module, taps: dict[str, Tap]) -> TorchFunctionMode | None:
        """See `ProductWatch.mode`."""
        self._function.prepare(module, taps, self._parts)
        return _AttentionMode(self._function)

    def close(self) -> None:
        """See `ProductWatch.close`."""
        self._function.forget()


class _AttentionMode(TorchFunctionMode):
    """Runs the function that attention is with products that are seen."""

    def __init__(self, function: _Attention) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.multi_head_attention_forward and self._function.ready:
            return self._function(*args, **kwargs)
        return func(*args, **kwargs)


class _Attention:
    """`torch.nn.functional.multi_head_attention_forward` itself, with another `linear`.

    The same code, given names of its own to look up.
    """

    def __init__(self) -> None:
        self._names: dict[str, Any] = {}
        self._look_up()
        self._body = _with_names(F.multi_head_attention_forward, self._names)
        self._weights: list[tuple[Tensor | None, Tap]] = []
        self._packed: Tensor | None = None
        self._parts: dict[tuple[int, int], Tap] = {}
        self._module: nn.Module | None = None

    def _look_up(self) -> None:
        """All names as they are now, but for those that are replaced."""
        names = self._names
        names.update(vars(F))
        del names["__name__"]  # or torch.compile would look in F for the others
        names["linear"] = self._linear
        names["has_torch_function"] = _never
        for name in ("_in_projection_packed", "_in_projection"):
            names[name] = _with_names(getattr(F, name), names)

    @property
    def ready(self) -> bool:
        """Whether a module's forward is running."""
        return self._module is not None

    def prepare(
        self,
        module: nn.Module,
        taps: dict[str, Tap],
        parts: dict[tuple[int, int], Tap],
    ) -> None:
        """See the products of this module's next call."""
        self._weights = [(tap.use.weight.of(module), tap) for tap in taps.values()]
        packed = taps.get("in_proj_weight")
        self._packed = None if packed is None else packed.use.weight.of(module)
        self._parts = parts if packed is not None else {}
        self._module = module
        if not torch.compiler.is_compiling():
            self._look_up()

    def forget(self) -> None:
        """See nothing more, and hold no module."""
        self._weights, self._packed, self._parts = [], None, {}
        self._module = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._group = 0
        return self._body(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(x, weight, bias)
        module = self._module
        for known, tap in self._weights:
            if known is weight and module is not None:
                self._group += 3 * (known is self._packed)
                return tap.see(module, x, output)
        # Pieces of the packed weight come in the order of their rows.
        if self._packed is None or module is None or not self._is_piece(weight):
            return output
        first = self._group
        if not torch.compiler.is_compiling():
            offset = weight.storage_offset() - self._packed.storage_offset()
            first = offset // (weight.shape[1] * weight.stride(0))
        self._group = first + weight.shape[0] // weight.shape[1]
        piece = self._parts.get((first, self._group))
        return output if piece is None else piece.see(module, x, output)

    def _is_piece(self, weight: Tensor) -> bool:
        if torch.compiler.is_compiling():  # which does not tell what is whose view
            return weight.shape[0] % weight.shape[1] == 0
        return weight._base is self._packed


def _never(_: Any) -> bool:
    return False


def _with_names(function: Any, names: dict[str, Any]) -> Any:
    made = FunctionType(
        function.__code__,
        names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
