"""Sees products inside of a module's forward: attention, experts, bare weights.

While a watched module's forward runs in training, a mode of torch's function dispatch
looks at the functions it calls. In evaluation, and without gradients, nothing is
looked at, so fused paths stay what they are.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import hooks
from .layers.products import AttentionAdapter
from .routing import Layer, Use
from .taps import IN_EVAL_MODE, Tap, no_ordinary_call

if TYPE_CHECKING:
    from .capture import SampleCapture

UNSEEN = "its weight took part in no product that FROG knows"
COMPILED = "products of stacked experts are not seen in graphs of torch.compile"


class ProductWatch:
    """Watches one module for the layers whose weights it uses.

    Args:
        capture: takes the samples.
        module: that is watched.
    """

    def __init__(self, capture: SampleCapture, module: nn.Module) -> None:
        self._capture = weakref.ref(capture)
        self._module = weakref.ref(module)
        self.taps: dict[str, Tap] = {}  # by the name of the weight in the module
        self._open: list[TorchFunctionMode | None] = []
        self._handles = hooks.surround(self._before, self._after, module)

    def add(self, layer: Layer, use: Use) -> None:
        """Watch for products of one more layer."""
        capture = self._capture()
        assert capture is not None
        self.taps[use.weight.name] = Tap(capture, layer, use)

    def discard(self, name: str) -> bool:
        """Watch no more for a layer; returns whether nothing is left to watch for."""
        self.taps = {w: tap for w, tap in self.taps.items() if tap.name != name}
        if not self.taps:
            for handle in self._handles:
                handle.remove()
        return not self.taps

    def mode(self, module: nn.Module, taps: dict[str, Tap]) -> TorchFunctionMode | None:
        """What looks at the functions that the module calls; None for none."""
        if torch.compiler.is_compiling():
            for tap in taps.values():
                tap.leave_out(COMPILED)
            return None
        return _Products(module, taps)

    def _before(self, module: nn.Module, args: Any) -> None:
        mode = None
        if module.training and torch.is_grad_enabled() and self._is_ours(module):
            taps = {w: tap for w, tap in self.taps.items() if tap.applies(module)}
            if taps:
                mode = self.mode(module, taps)
        self._open.append(mode)
        if mode is not None:
            mode.__enter__()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._open:
            return  # the hooks came between
        mode = self._open.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        capture = self._capture()
        if capture is None or not self._is_ours(module):
            return
        if not any(t.requires_grad for t in tensors_in(output)):
            return
        for tap in self.taps.values():
            if not module.training and tap.applies(module):
                capture.called.add(tap.name)
                capture.missed(tap.name, IN_EVAL_MODE)
            elif mode is not None and tap.name not in capture.called:
                capture.unsampled.setdefault(tap.name, UNSEEN)

    def _is_ours(self, module: nn.Module) -> bool:
        if torch.compiler.is_compiling():
            return not torch.compiler.is_exporting()
        return module is self._module() and not no_ordinary_call()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)


# -- attention -------------------------------------------------------------------------


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


class _AttentionMode(TorchFunctionMode):
    """Runs the function that attention is with products that are seen."""

    def __init__(self, function: _Attention) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.multi_head_attention_forward:
            return self._function(*args, **kwargs)
        return func(*args, **kwargs)


class _Attention:
    """`torch.nn.functional.multi_head_attention_forward` itself, with another `linear`.

    The same code, given names of its own to look up.
    """

    def __init__(self) -> None:
        names = dict(vars(F))
        del names["__name__"]  # or torch.compile would look in F for the others
        names["linear"] = self._linear
        names["has_torch_function"] = _never
        for name in ("_in_projection_packed", "_in_projection"):
            names[name] = _with_names(getattr(F, name), names)
        self._body = _with_names(F.multi_head_attention_forward, names)

    def prepare(
        self,
        module: nn.Module,
        taps: dict[str, Tap],
        parts: dict[tuple[int, int], Tap],
    ) -> None:
        """See the products of this module's next call."""
        self._weights = [(tap.use.weight.of(module), tap) for tap in taps.values()]
        self._module, self._taps, self._parts = module, taps, parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._group = 0
        return self._body(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(x, weight, bias)
        tap = None
        for known, its in self._weights:
            if known is weight:
                tap = its
        if tap is None and "in_proj_weight" in self._taps:
            # Pieces of the packed weight come in the order of their rows.
            first = self._group
            self._group = first + weight.shape[0] // weight.shape[1]
            tap = self._parts.get((first, self._group))
        return output if tap is None else tap.see(self._module, x, output)


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


# -- experts, and weights that a module uses as they are -------------------------------


class _Weight:
    """What a tensor is of a watched weight.

    Args:
        tap: of the weight.
        flipped: whether the last two dimensions have changed places.
        group: of which it is the matrix; None for all of them.
        ids: groups of which it holds the matrices, one a token.
    """

    def __init__(
        self,
        tap: Tap,
        flipped: bool = False,
        group: int | None = None,
        ids: Tensor | None = None,
    ) -> None:
        self.tap, self.flipped, self.group, self.ids = tap, flipped, group, ids

    @property
    def inputs_first(self) -> bool:
        """Whether the matrix is ``(in, out)``."""
        second = self.tap.use.weight.axes.rows[-1] == self.tap.weight.ndim - 1
        return self.flipped is not second


class _Products(TorchFunctionMode):
    """Follows weights, and matrices taken of them, to the products they are used in."""

    def __init__(self, module: nn.Module, taps: dict[str, Tap]) -> None:
        super().__init__()
        self._module = module
        self._known: list[tuple[Tensor | None, _Weight]] = [
            (tap.use.weight.of(module), _Weight(tap)) for tap in taps.values()
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        output = func(*args, **kwargs)
        look = _LOOKS.get(func) or _LOOKS.get(str(func))
        if look is not None:
            look(self, output, *args, **kwargs)
        return output

    def find(self, tensor: Any) -> _Weight | None:
        """What a tensor is of a watched weight, if it is."""
        for known, weight in self._known:
            if known is tensor:
                return weight
        return None

    # -- what becomes of a weight

    def on_item(self, output: Tensor, weight: Any, index: Any) -> None:
        """``weight[e]``, or the matrices of many tokens' experts."""
        found = self.find(weight)
        if found is None or found.tap.weight.ndim != 3 or found.group is not None:
            return
        taken = copy.copy(found)
        if isinstance(index, Tensor) and index.ndim == 1:
            taken.ids = index
        elif isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            taken.group = int(index)
        else:
            return
        self._known.append((output, taken))

    def on_transpose(self, output: Tensor, weight: Any, *axes: Any, **_: Any) -> None:
        """The last two dimensions change places."""
        found = self.find(weight)
        last = {output.ndim - 1, output.ndim - 2}
        if found is None or (axes and {axis % output.ndim for axis in axes} != last):
            return
        turned = copy.copy(found)
        turned.flipped = not found.flipped
        self._known.append((output, turned))

    def on_cast(self, output: Tensor, weight: Any, *_: Any, **__: Any) -> None:
        """The same matrix in another dtype."""
        found = self.find(weight)
        if found is not None and output.shape == weight.shape:
            self._known.append((output, found))

    # -- products

    def on_linear(
        self, output: Tensor, input: Tensor, weight: Any, bias: Any = None
    ) -> None:
        """``F.linear``: the weight's matrix is ``(out, in)``."""
        found = self.find(weight)
        if found is not None and not found.inputs_first:
            self._product(found, input, output)

    def on_matmul(self, output: Tensor, input: Tensor, other: Any, **_: Any) -> None:
        """``x @ w``: the weight's matrix is ``(in, out)``."""
        found = self.find(other)
        if found is not None and found.inputs_first:
            self._product(found, input, output)
            return
        found = self.find(input)  # w x, of one column each
        if found is not None and found.ids is not None and not found.inputs_first:
            self._product(found, other, output)

    def on_addmm(
        self, output: Tensor, bias: Any, input: Tensor, weight: Any, **_: Any
    ) -> None:
        """``b + x @ w``."""
        self.on_matmul(output, input, weight)

    def on_grouped(
        self, output: Tensor, input: Tensor, weight: Any, offs: Any = None, **_: Any
    ) -> None:
        """Tokens in the order of their experts, times ``(E, in, out)``."""
        found = self.find(weight)
        if found is None or not found.inputs_first or offs is None:
            return
        capture, tap = found.tap.capture, found.tap
        if capture is not None and tap.may_sample(capture, self._module, input, output):
            tap.take_tokens(capture, self._module, input, output, offs)

    def _product(self, found: _Weight, x: Tensor, output: Tensor) -> None:
        tap, capture = found.tap, found.tap.capture
        if capture is None:
            return
        if found.ids is not None:
            self._tokens(found, x, output)
        elif found.group is not None:
            tap = copy.copy(tap)
            tap.part = (found.group, found.group + 1)
            tap.see(self._module, x, output)
        elif tap.weight.ndim == 3:
            self._all(found, x, output)
        else:
            tap.see(self._module, x, output)

    def _tokens(self, found: _Weight, x: Tensor, output: Tensor) -> None:
        """A product of each token with its own expert's matrix."""
        tap, capture, ids = found.tap, found.tap.capture, found.ids
        assert capture is not None and ids is not None
        if tap.may_sample(capture, self._module, x, output):
            groups = tap.weight.shape[0]
            ends = torch.bincount(ids, minlength=groups).cumsum(0)
            order = ids.argsort(stable=True)
            x = x.reshape(ids.numel(), -1)
            tap.take_tokens(capture, self._module, x, output, ends, order)

    def _all(self, found: _Weight, x: Tensor, output: Tensor) -> None:
        """A batched product: as many tokens for each expert."""
        tap, capture = found.tap, found.tap.capture
        assert capture is not None
        groups = tap.weight.shape[0]
        if x.ndim != 3 or x.shape[0] != groups:
            return
        if tap.may_sample(capture, self._module, x, output):
            each = x.shape[1]
            ends = torch.arange(1, groups + 1, device=x.device) * each
            x = x.reshape(groups * each, -1)
            tap.take_tokens(capture, self._module, x, output, ends)


_Look = Callable[..., None]
_LOOKS: dict[Any, _Look] = {
    Tensor.__getitem__: _Products.on_item,
    torch.select: lambda mode, out, w, dim, index: (
        mode.on_item(out, w, index) if dim == 0 else None
    ),
    torch.transpose: _Products.on_transpose,
    Tensor.transpose: _Products.on_transpose,
    Tensor.mT.__get__: _Products.on_transpose,  # type: ignore[attr-defined]
    Tensor.T.__get__: _Products.on_transpose,  # type: ignore[attr-defined]
    Tensor.t: _Products.on_transpose,
    torch.t: _Products.on_transpose,
    **dict.fromkeys(
        (Tensor.to, Tensor.type, Tensor.float, Tensor.bfloat16, Tensor.half),
        _Products.on_cast,
    ),
    F.linear: _Products.on_linear,
    torch.matmul: _Products.on_matmul,
    Tensor.matmul: _Products.on_matmul,
    Tensor.__matmul__: _Products.on_matmul,
    torch.mm: _Products.on_matmul,
    Tensor.mm: _Products.on_matmul,
    torch.bmm: _Products.on_matmul,
    Tensor.bmm: _Products.on_matmul,
    torch.addmm: _Products.on_addmm,
    torch._grouped_mm: _Products.on_grouped,
    "transformers.grouped_mm_fallback": _Products.on_grouped,
}
if hasattr(F, "grouped_mm"):
    _LOOKS[F.grouped_mm] = _Products.on_grouped

WATCHES: dict[type, type[ProductWatch]] = {AttentionAdapter: AttentionWatch}
"""By the type of a module's adapter, where it wants one of its own."""
