"""Samples one weight's products: an input, an output, and the output's gradient.

A `Tap` is told of products by whoever sees them (`hooks` sees a module's own call,
`products` what happens inside of one). It copies a sample of the input and waits for
the output's gradient, in a graph of autograd or in one that torch.compile makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..guards import is_capturing
from ..layers import LayerAdapter
from ..layers.linear import LinearAdapter
from ..layers.recognize import recognize
from ..layers.rows import Seen, owner
from ..model.plan import Layer, Use
from . import traced
from .sampling import Drawn
from .taking import Taker

if TYPE_CHECKING:
    from .calls import Part
    from .capture import SampleCapture

IN_EVAL_MODE = (
    "samples are taken in training mode with gradients enabled: did its forward pass "
    "run in eval mode?"
)
NESTED = "it was called with nested tensors"
EMPTY = "its inputs were empty"
UNPROVEN = "its forward is its own, and no call has shown yet what it computes"

_PRODUCT = LinearAdapter()
"""Takes rows of a product inside of a module, whatever the module's own kind."""


class Tap:
    """Takes samples of one layer's products in one module.

    Holds weak references, so that neither module nor optimizer is kept alive.

    Args:
        capture: takes the samples.
        layer: whose samples they are.
        use: of its weight by the module.
        part: groups of rows that the products make, first and end; None for all.
    """

    def __init__(
        self, capture: SampleCapture, layer: Layer, use: Use, part: Part = None
    ) -> None:
        self._capture = weakref.ref(capture)
        self._module = weakref.ref(use.module)
        self.use = use
        self.name = layer.name
        self.part = part
        self.weight, self.geometry = layer.weight, layer.geometry
        self.inside = use.weight.seen is not Seen.CALL
        self.by_position = self.inside or capture.sampling == "positions"
        self.size = capture.size_inside if self.inside else capture.sample_size
        geometry = layer.geometry
        groups = 1 if self.inside else geometry.groups
        self._row = groups * geometry.dim if self.by_position else 0
        self.taker = Taker(self.size, self.by_position, capture.backend)
        self._on_device = capture.counts_on_device
        self._number = traced.register(self)
        self._anchor = traced.make_anchor()
        self._to_prove = not use.proven  # stays, so that a proof recompiles no graph
        self.refuted = ""
        self.off = False

    @property
    def capture(self) -> SampleCapture | None:
        """What takes the samples, if it still lives."""
        return self._capture()

    @property
    def module(self) -> nn.Module | None:
        """That uses the weight, if it still lives."""
        return self._module()

    @property
    def adapter(self) -> Any:
        """Knows the form of input and output."""
        return _PRODUCT if self.inside else self.use.adapter

    # -- what keeps a call from being sampled ------------------------------------------

    def applies(self, module: nn.Module) -> bool:
        """Whether the module now uses the layer's own weight, which takes a gradient.

        FSDP2 puts a gathered one in its place; `torch.func.functional_call` any other.
        """
        held, name = owner(module, self.use.weight.name)
        if held is None:
            return False
        weight = held._parameters.get(name)
        if weight is None:  # computed, as by pruning
            weight = held.__dict__.get(name)
            return weight is not None and weight.requires_grad
        another = weight is not self.weight and weight.is_leaf
        if another and not hasattr(self.weight, "to_local"):
            return False
        if weight.requires_grad:
            return True
        bias = self.use.weight.bias_of(module)
        return bias is not None and bias.requires_grad

    def gathered(self, module: nn.Module) -> list[Tensor | None]:
        """What now stands in the module for the weight and its bias."""
        return [self.use.weight.of(module), self.use.weight.bias_of(module)]

    def reason(self, module: nn.Module, output: Tensor) -> str:
        """Why a call that could be sampled is not, if it is not."""
        if not module.training:
            return IN_EVAL_MODE
        return EMPTY if not output.numel() else ""

    def see(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Sample a product inside of a module.

        Returns:
            The output to be used from now on.
        """
        if torch.compiler.is_compiling():
            tapped = self.trace(module, x, output)
            return output if tapped is None else tapped
        capture = self._capture()
        if capture is not None and self.may_sample(capture, module, x, output):
            self.take(capture, module, x, output)
        return output

    def may_sample(
        self, capture: SampleCapture, module: nn.Module, x: Tensor, output: Tensor
    ) -> bool:
        """Whether a product is to be sampled; if not, the reason is noted."""
        if not output.requires_grad:
            return False
        reason = unlike_a_matrix(x, output)
        if reason:
            capture.missed(self.name, reason)
            return False
        capture.called.add(self.name)
        reason = self.reason(module, output)
        if reason:
            capture.missed(self.name, reason)
        return not reason

    # -- in a graph of autograd --------------------------------------------------------

    def take(
        self, capture: SampleCapture, module: nn.Module, x: Tensor, output: Tensor
    ) -> None:
        """Copy a sample of a product's input, and wait for the output's gradient."""
        adapter = self.adapter
        if type(x) is not Tensor:
            x = x.detach().as_subclass(Tensor)
        x = adapter.batched(module, x)
        held = capture.draw(self, module, x, adapter.batched(module, output).shape)
        on_gradient(output, held, partial(capture.keep, self, module))

    def take_tokens(
        self,
        capture: SampleCapture,
        module: nn.Module,
        x: Tensor,
        output: Tensor,
        ends: Tensor,
        order: Tensor | None = None,
    ) -> None:
        """The same of a grouped product, in which each token has a group.

        Args:
            capture: takes the samples.
            module: that made the product.
            x: tokens ``(T, D)``.
            output: ``(T, R / groups)``.
            ends: where each group's tokens end, ``(groups,)``, on the device.
            order: of the tokens by their group; None where they lie so.
        """
        held = capture.draw_tokens(self, module, x.detach(), ends, order)
        on_gradient(output, held, partial(capture.keep_tokens, self, module))

    # -- in a graph that torch.compile makes -------------------------------------------

    def trace(self, module: nn.Module, x: Any, output: Tensor) -> Tensor | None:
        """The same by operators that torch.compile can put into its graphs.

        Returns:
            The output to be used from now on; None leaves it as it is.
        """
        reason = traced.refuse(self._number)
        if not reason and (x.is_nested or output.is_nested):
            reason = NESTED
        reason = reason or self.reason(module, output)
        if reason:
            self.leave_out(reason)
            return None
        y = self.adapter.batched(module, output)
        positions = self.adapter.positions(y) if self._row else 1
        count = torch.sym_min(self.size, y.shape[0] * positions)
        x = self.adapter.batched(module, x.detach())
        seen = output.detach() if self._to_prove else None
        return traced.tap(
            output,
            self._anchor,
            x,
            y.shape,
            count,
            self._row,
            self._number,
            self._on_device,
            seen,
        )

    def leave_out(self, reason: str) -> None:
        """Note, while a graph is made, that it takes no samples, and why."""
        traced.mark(self._number, reason)

    def refuse(self) -> str:
        """See `traced.Receiver`."""
        return self.refuted

    def mark(self, reason: str) -> None:
        """See `traced.Receiver`."""
        capture = self._capture()
        if capture is not None:
            capture.unsampled_graphs[self.name] = reason

    def sample(
        self, x: Tensor, y_shape: Sequence[int], output: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """See `traced.Receiver`."""
        capture, module = self._capture(), self._module()
        if capture is None or module is None or self.off:
            return None
        if not capture.watches(self.name):
            return None
        if output is not None and not self.prove(capture, module, x, output):
            return None
        capture.called.add(self.name)
        rows, drawn = capture.draw(self, module, x, torch.Size(y_shape))
        return rows, traced.carried(drawn.key, x.device if self._on_device else "cpu")

    def prove(
        self, capture: SampleCapture, module: nn.Module, x: Tensor, output: Tensor
    ) -> bool:
        """Whether the module's forward computes what its adapter says.

        Looked at in the first calls, until one tells, and again ever more rarely: what
        a layer computes may change in training.
        """
        use = self.use
        if self.refuted:
            capture.missed(self.name, self.refuted)
            return False
        use.calls += 1
        # Inputs of another size may show another padding.
        size = _size(module, x)
        another = use.proven and size not in use.sizes
        due = another or _is_due(use.calls, use.proven)
        if not due or is_capturing():
            found: LayerAdapter | str | None = None  # it would wait for the device
        else:
            y = self.adapter.batched(module, output.detach())
            given = self.adapter.batched(module, x.detach())
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                found = recognize(module, use.adapter, given, y)
        if isinstance(found, str):
            self.refuted, use.proven = found, False
            capture.missed(self.name, found)
        elif found is not None:
            use.adapter, use.proven = found, True
            use.sizes.add(size)
        elif not use.proven and use.trusted:
            return True
        elif not use.proven:
            capture.missed(self.name, UNPROVEN)
        return use.proven

    def keep(self, x: Tensor, key: Tensor, grad: Tensor) -> None:
        """See `traced.Receiver`."""
        capture, module = self._capture(), self._module()
        # Without one `sample` gave nothing: what comes back are the graph's zeros.
        known = not self.refuted and (self.use.proven or self.use.trusted)
        if capture is not None and module is not None and known:
            y = self.adapter.batched(module, grad)
            total = y.shape[0]
            total *= self.adapter.positions(y) if self.by_position else 1
            known_key = key if self._on_device else traced.number(key)
            drawn = Drawn(total, self.size, known_key)
            capture.keep(self, module, x, drawn, grad, grad.shape)


def takes_gradient(output: Any) -> bool:
    """Whether an output may get a gradient."""
    return (
        torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
    )


def _size(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Of a convolution's input, its spatial shape; of others none."""
    kernel = getattr(module, "kernel_size", None)
    return tuple(x.shape[-len(kernel) :]) if isinstance(kernel, tuple) else ()


def _is_due(calls: int, proven: bool) -> bool:
    """Whether to look at this call: the first few, then each twice as late as before.

    Once it is proven, a tenth as often.
    """
    if proven:
        return calls >= 10 and str(calls).strip("0") == "1"
    return calls <= 4 or calls & (calls - 1) == 0


def on_gradient(output: Tensor, held: Any, receive: Callable[..., None]) -> None:
    """Call ``receive(*held, grad, shape)`` when the output's gradient is there.

    The shape is the output's, whose leading dimensions the gradient may have as one.
    What is held lives as long as the graph does, or until the gradient has come.
    """
    made, shape = _written_tensor(output), output.shape
    number, kept = made.output_nr, [held]
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

    def on_grads(grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[number]
        if grad is None or not is_ordinary(grad):
            return
        for each in kept:
            receive(*each, grad, shape)
        if not keeps_graph():  # whoever keeps the loss keeps this hook
            kept.clear()

    # What the product's own backward gets: after all that is hooked on the tensor.
    assert made.grad_fn is not None
    made.grad_fn.register_prehook(on_grads)


def unlike_a_matrix(x: Any, output: Tensor) -> str:
    """Why a product of such tensors cannot be sampled, if it cannot."""
    for tensor in (x, output):
        if tensor.is_nested:
            return NESTED
        if tensor.layout != torch.strided:
            return "it was called with sparse tensors"
    if type(output) is not Tensor:
        return f"its output is a {type(output).__name__}"
    return ""


def no_ordinary_call() -> bool:
    """Whether torch transforms or records what runs instead of running it."""
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey
    modes = (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(key) is not None for key in modes)


def is_ordinary(grad: Tensor) -> bool:
    """Whether a backward pass runs, and for one gradient alone."""
    if torch.compiler.is_compiling() or no_ordinary_call():
        return False
    return not torch._C._functorch.is_legacy_batchedtensor(grad)


def _written_tensor(output: Tensor) -> Tensor:
    """The output, or the tensor that it is another shape of.

    A Linear layer's output for a sequence is a view. An in-place activation on it
    takes the view's old node out of the graph, and its hooks with that; those of the
    viewed tensor stay.
    """
    base = output._base
    if base is None or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base if base.numel() == output.numel() else output
