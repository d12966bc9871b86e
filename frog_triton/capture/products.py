"""Sees products inside of a module's forward: of experts, and of other own weights.

While a watched module's forward runs in training, a mode of torch's function dispatch
looks at the functions it calls. In evaluation, and without gradients, nothing is
looked at, so fused paths stay what they are.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from ..model.plan import Layer, Use
from . import hooks
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
        return _Products(self, module, taps)

    def sees(self, mode: TorchFunctionMode) -> bool:
        """Whether a mode belongs to the call that runs.

        One whose call was interrupted from outside, as by the keyboard, is left over.
        """
        return bool(self._open) and self._open[-1] is mode

    def sweep(self) -> None:
        """Between steps no call runs: what is still open is left over."""
        left = [mode for mode in self._open if mode is not None]
        self._open.clear()
        if left:
            self.close()
            remove_modes(left)

    def _before(self, module: nn.Module, args: Any) -> None:
        mode = None
        if module.training and torch.is_grad_enabled() and self._is_ours(module):
            taps = {w: tap for w, tap in self.taps.items() if tap.applies(module)}
            if taps:
                mode = self.mode(module, taps)
        self._open.append(mode)
        if mode is not None:
            mode.__enter__()

    def close(self) -> None:
        """Forget what belongs to the call that has ended."""

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._open:
            return  # the hooks came between
        mode = self._open.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
            self.close()
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


def remove_modes(left: list[TorchFunctionMode]) -> None:
    """Take modes off torch's stack, from wherever they are."""
    stack = [_pop_mode() for _ in range(_len_torch_function_stack())]
    for mode in reversed(stack):
        if not any(mode is each for each in left):
            _push_mode(mode)


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
    def whole(self) -> bool:
        """Whether it holds the matrices of all groups, in their order."""
        return self.group is None and self.ids is None

    @property
    def inputs_first(self) -> bool:
        """Whether the matrix is ``(in, out)``."""
        second = self.tap.use.weight.axes.rows[-1] == self.tap.weight.ndim - 1
        return self.flipped is not second


class _Products(TorchFunctionMode):
    """Follows weights, and matrices taken of them, to the products they are used in.

    What it does not know it leaves alone, so that it never makes a forward fail.
    """

    def __init__(
        self, watch: ProductWatch, module: nn.Module, taps: dict[str, Tap]
    ) -> None:
        super().__init__()
        self._watch = watch
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
        if look is not None and self._watch.sees(self):
            what, names = look
            # As torch's own functions, these take arguments by place or by name.
            given = list(args[: len(names)])
            given += [kwargs[n] for n in names[len(given) :] if n in kwargs]
            if len(given) == len(names):
                what(self, output, *given)
        return output

    def find(self, tensor: Any) -> _Weight | None:
        """What a tensor is of a watched weight, if it is."""
        for known, weight in self._known:
            if known is tensor:
                return weight
        return None

    # -- what becomes of a weight

    def on_item(self, output: Any, weight: Any, index: Any) -> None:
        """``weight[e]``, or the matrices of many tokens' experts."""
        found = self.find(weight)
        if found is None or found.tap.weight.ndim != 3 or not found.whole:
            return
        taken = copy.copy(found)
        if isinstance(index, tuple) and index and all(map(_is_whole, index[1:])):
            index = index[0]
        if isinstance(index, Tensor) and index.dtype in _INTEGERS and index.ndim < 2:
            if index.ndim:
                taken.ids = index.clone()  # the forward may work on its own in place
            else:
                taken.group = int(index) % weight.shape[0]
        elif isinstance(index, int) and not isinstance(index, bool):
            taken.group = index % weight.shape[0]
        else:
            return
        self._known.append((output, taken))

    def on_select(self, output: Any, weight: Any, dim: Any, index: Any) -> None:
        """``weight.select(0, e)``."""
        if dim == 0:
            self.on_item(output, weight, index)

    def on_index_select(self, output: Any, weight: Any, dim: Any, index: Any) -> None:
        """``weight.index_select(0, ids)``."""
        if dim == 0 and index.ndim == 1:
            self.on_item(output, weight, index)

    def on_unbind(self, output: Any, weight: Any) -> None:
        """``for matrix in weight``."""
        if self.find(weight) is None or output[0].stride() != weight.stride()[1:]:
            return  # along another dimension
        for index, matrix in enumerate(output):
            self.on_item(matrix, weight, index)

    def on_swap(self, output: Any, weight: Any, first: Any, second: Any) -> None:
        """``weight.transpose(first, second)``."""
        if {first % weight.ndim, second % weight.ndim} == {
            weight.ndim - 1,
            weight.ndim - 2,
        }:
            self.on_turn(output, weight)

    def on_turn(self, output: Any, weight: Any) -> None:
        """``weight.mT``: the last two dimensions change places."""
        found = self.find(weight)
        if found is not None:
            turned = copy.copy(found)
            turned.flipped = not found.flipped
            self._known.append((output, turned))

    def on_reverse(self, output: Any, weight: Any) -> None:
        """``weight.T``: all dimensions change places."""
        if weight.ndim == 2:
            self.on_turn(output, weight)

    def on_cast(self, output: Any, weight: Any) -> None:
        """The same matrix in another dtype, or in another place."""
        found = self.find(weight)
        if found is not None and output.shape == weight.shape:
            self._known.append((output, found))

    # -- products

    def on_linear(self, output: Any, x: Any, weight: Any) -> None:
        """``F.linear``: the weight's matrix is ``(out, in)``."""
        found = self.find(weight)
        if found is not None and not found.inputs_first:
            self._product(found, x, output)

    def on_matmul(self, output: Any, x: Any, weight: Any) -> None:
        """``x @ w``: the weight's matrix is ``(in, out)``."""
        found = self.find(weight)
        if found is not None and found.inputs_first:
            self._product(found, x, output)
            return
        found = self.find(x)  # w x, of one column each
        if found is not None and found.ids is not None and not found.inputs_first:
            self._product(found, weight, output)

    def on_addmm(self, output: Any, bias: Any, x: Any, weight: Any) -> None:
        """``b + x @ w``."""
        self.on_matmul(output, x, weight)

    def on_grouped(self, output: Any, x: Any, weight: Any, offs: Any) -> None:
        """Tokens in the order of their experts, times ``(E, in, out)``."""
        found = self.find(weight)
        fits = found is not None and found.whole and found.inputs_first
        if found is not None and fits and x.ndim == 2 and isinstance(offs, Tensor):
            self._take(found.tap, x, output, offs)

    def _product(self, found: _Weight, x: Any, output: Any) -> None:
        tap = found.tap
        if found.ids is not None:
            self._tokens(found, found.ids, x, output)
        elif found.group is not None:
            tap = copy.copy(tap)
            tap.part = (found.group, found.group + 1)
            tap.see(self._module, x, output)
        elif tap.weight.ndim == 3:
            self._all(tap, x, output)
        else:
            tap.see(self._module, x, output)

    def _tokens(self, found: _Weight, ids: Tensor, x: Any, output: Any) -> None:
        """A product of each token with its own expert's matrix."""
        tap, geometry = found.tap, found.tap.geometry
        rows = geometry.rows // geometry.groups
        if (x.numel(), output.numel()) != (
            ids.numel() * geometry.dim,
            ids.numel() * rows,
        ):
            return  # several tokens for a matrix
        ids, order = (ids % geometry.groups).sort(stable=True)
        experts = torch.arange(geometry.groups, device=ids.device)
        ends = torch.searchsorted(ids, experts, right=True)
        self._take(tap, x.reshape(ids.numel(), -1), output, ends, order)

    def _all(self, tap: Tap, x: Any, output: Any) -> None:
        """A batched product: as many tokens for each expert."""
        groups = tap.geometry.groups
        if x.ndim == 3 and x.shape[0] == groups:
            each = x.shape[1]
            ends = torch.arange(1, groups + 1, device=x.device) * each
            self._take(tap, x.reshape(groups * each, -1), output, ends)

    def _take(
        self, tap: Tap, x: Tensor, output: Tensor, ends: Tensor, *order: Tensor
    ) -> None:
        capture = tap.capture
        if capture is not None and tap.may_sample(capture, self._module, x, output):
            tap.take_tokens(capture, self._module, x, output, ends, *order)


def _is_whole(index: Any) -> bool:
    """Whether an index takes all of a dimension."""
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))


_INTEGERS = (torch.int64, torch.int32)
_Look = tuple[Callable[..., None], tuple[str, ...]]
"""What to do, and names of the function's arguments that it wants."""

_MATRIX = ("input", "mat2")
_LOOKS: dict[Any, _Look] = {
    Tensor.__getitem__: (_Products.on_item, ("self", "index")),
    torch.select: (_Products.on_select, ("input", "dim", "index")),
    Tensor.select: (_Products.on_select, ("self", "dim", "index")),
    torch.index_select: (_Products.on_index_select, ("input", "dim", "index")),
    Tensor.index_select: (_Products.on_index_select, ("self", "dim", "index")),
    torch.unbind: (_Products.on_unbind, ("input",)),
    Tensor.unbind: (_Products.on_unbind, ("self",)),
    torch.transpose: (_Products.on_swap, ("input", "dim0", "dim1")),
    Tensor.transpose: (_Products.on_swap, ("self", "dim0", "dim1")),
    Tensor.mT.__get__: (_Products.on_turn, ("self",)),  # type: ignore[attr-defined]
    Tensor.T.__get__: (_Products.on_reverse, ("self",)),  # type: ignore[attr-defined]
    Tensor.t: (_Products.on_turn, ("self",)),
    torch.t: (_Products.on_turn, ("input",)),
    F.linear: (_Products.on_linear, ("input", "weight")),
    torch.matmul: (_Products.on_matmul, ("input", "other")),
    Tensor.matmul: (_Products.on_matmul, ("self", "other")),
    Tensor.__matmul__: (_Products.on_matmul, ("self", "other")),
    torch.mm: (_Products.on_matmul, _MATRIX),
    Tensor.mm: (_Products.on_matmul, ("self", "mat2")),
    torch.bmm: (_Products.on_matmul, _MATRIX),
    Tensor.bmm: (_Products.on_matmul, ("self", "mat2")),
    torch.addmm: (_Products.on_addmm, ("input", "mat1", "mat2")),
    torch.baddbmm: (_Products.on_addmm, ("input", "batch1", "batch2")),
    torch._grouped_mm: (_Products.on_grouped, (*_MATRIX, "offs")),
    "transformers.grouped_mm_fallback": (
        _Products.on_grouped,
        ("input", "weight", "offs"),
    ),
}
for _same in (
    *(Tensor.to, Tensor.type, Tensor.float, Tensor.bfloat16, Tensor.half),
    *(Tensor.contiguous, Tensor.clone),
):
    _LOOKS[_same] = (_Products.on_cast, ("self",))
if hasattr(F, "grouped_mm"):
    _LOOKS[F.grouped_mm] = (_Products.on_grouped, ("mat_a", "mat_b", "offs"))
