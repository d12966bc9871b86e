"""The forward hook that samples a layer's calls, and what calls it leaves alone.

It comes first of a module's hooks, so what it sees is what the layer made. It stays out
of whatever is no ordinary call: transforms of `torch.func`, tracing and scripting,
fake tensors. It never travels: a copied or pickled module has none.
"""

from __future__ import annotations

import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import traced
from .routing import Layer

if TYPE_CHECKING:
    from .capture import SampleCapture

IN_EVAL_MODE = (
    "samples are taken in training mode with gradients enabled: did its forward pass "
    "run in eval mode?"
)
NESTED = "it was called with nested tensors"
EMPTY = "its inputs were empty"
REPLACED = "its forward, or its class, was replaced"
NOT_FIRST = "another hook came first and may have changed its output"
REPLICA = (
    "nn.DataParallel calls copies of it, which FROG cannot follow: use "
    "torch.nn.parallel.DistributedDataParallel"
)


class ForwardHook:
    """Holds weak references, so that neither module nor optimizer is kept alive.

    Args:
        capture: takes the samples.
        layer: whose samples they are.
        module: that is hooked, one of the layer's.
    """

    def __init__(self, capture: SampleCapture, layer: Layer, module: nn.Module) -> None:
        self._capture = weakref.ref(capture)
        self._module = weakref.ref(module)
        self._kind = type(module)
        self._name = layer.name
        self._weight = layer.weight
        self._adapter = layer.adapter
        self._number = traced.enrol(self)
        self._anchor = traced.make_anchor()
        self._sample_size = capture.sample_size
        geometry = layer.adapter.geometry(module)
        by_position = capture.sampling == "positions"
        self._row = geometry.groups * geometry.dim if by_position else 0

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Sample the call if it can be; the output stays as it is, unless traced."""
        if torch.compiler.is_compiling():
            return self._trace(module, args, kwargs, output)
        capture = self._capture()
        if capture is None:
            return None
        if module is not self._module():
            if getattr(module, "_is_replica", False) and torch.is_grad_enabled():
                capture.missed_replica(self._name)
            return None
        if not _takes_gradient(module, output) or _no_ordinary_call():
            return None
        if self._calls_another(module):
            return None
        x = args[0] if args else kwargs.get("input")
        reason = self.refuse() or _unlike_a_matrix(x, output)
        if reason:
            capture.missed(self._name, reason)
            return None
        capture.called.add(self._name)
        if not module.training:
            capture.missed(self._name, IN_EVAL_MODE)
        elif not output.numel():
            capture.missed(self._name, EMPTY)
        else:
            self._sample(capture, module, x, output)
        return None

    def _sample(
        self, capture: SampleCapture, module: nn.Module, x: Any, output: Tensor
    ) -> None:
        adapter, name = self._adapter, self._name
        y = adapter.batched(module, output)
        x = x.detach()
        x = adapter.batched(module, x if type(x) is Tensor else x.as_subclass(Tensor))
        candidates = adapter.positions(y) if self._row else 1
        sample, index = capture.draw(name, module, adapter, x, y.shape, candidates)
        made, shape = _written_tensor(output), output.shape
        number, held = made.output_nr, [(sample, index)]
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

        def on_grads(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[number]
            if torch.compiler.is_compiling():  # by compiled autograd
                return
            if grad is None or _no_ordinary_call() or _is_batched(grad):
                return
            for x, index in held:
                capture.keep(name, module, adapter, x, index, grad.view(shape))
            if not keeps_graph():  # whoever keeps the loss keeps this hook
                held.clear()

        # What the layer's own backward gets: after all that is hooked on the tensor.
        assert made.grad_fn is not None
        made.grad_fn.register_prehook(on_grads)

    def _calls_another(self, module: nn.Module) -> bool:
        """Whether another weight is in the layer's place for this call.

        FSDP2 puts a gathered one there, and pruning computes one from the layer's.
        """
        weight = module._parameters.get("weight")
        if weight is None or weight is self._weight or not weight.is_leaf:
            return False
        return not hasattr(self._weight, "to_local")

    def refuse(self) -> str:
        """See `traced.Receiver`."""
        module = self._module()
        if module is None:
            return ""
        if type(module) is not self._kind or "forward" in module.__dict__:
            return REPLACED
        return "" if _first(module) else NOT_FIRST

    def _trace(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """The same by operators that torch.compile can put into its graphs."""
        if torch.compiler.is_exporting() or not _takes_gradient(module, output):
            return None
        if self._calls_another(module):
            return None
        reason = traced.refuse(self._number)
        if reason:
            traced.mark(self._number, reason)
            return None
        x = args[0] if args else kwargs["input"]
        if x.is_nested or output.is_nested:
            reason = NESTED
        elif not module.training:
            reason = IN_EVAL_MODE
        elif output.numel() == 0:
            reason = EMPTY
        if reason:
            traced.mark(self._number, reason)
            return None
        y = self._adapter.batched(module, output)
        positions = self._adapter.positions(y) if self._row else 1
        count = torch.sym_min(self._sample_size, y.shape[0] * positions)
        x = self._adapter.batched(module, x.detach())
        return traced.tap(
            output, self._anchor, x, y.shape, count, self._row, self._number
        )

    def mark(self, reason: str) -> None:
        """See `traced.Receiver`."""
        capture = self._capture()
        if capture is not None:
            capture.unsampled_graphs[self._name] = reason

    def sample(self, x: Tensor, y_shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """See `traced.Receiver`."""
        capture, module = self._capture(), self._module()
        if capture is None or module is None or not capture.watches(self._name):
            return None
        capture.called.add(self._name)
        adapter, candidates = self._adapter, 1
        if self._row:
            candidates = adapter.positions(x.new_empty(()).expand(tuple(y_shape)))
        shape = torch.Size(y_shape)
        return capture.draw(self._name, module, adapter, x, shape, candidates)

    def keep(self, x: Tensor, index: Tensor, grad: Tensor) -> None:
        """See `traced.Receiver`."""
        capture, module = self._capture(), self._module()
        if capture is not None and module is not None:
            capture.keep(self._name, module, self._adapter, x, index, grad)


def _takes_gradient(module: nn.Module, output: Any) -> bool:
    """Whether the call's weight or bias may get a gradient."""
    if not (torch.is_grad_enabled() and isinstance(output, Tensor)):
        return False
    if not output.requires_grad:
        return False
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None:  # computed, as by pruning
        weight = module.__dict__.get("weight")
    return (weight is not None and weight.requires_grad) or (
        bias is not None and bias.requires_grad
    )


def _unlike_a_matrix(x: Any, output: Tensor) -> str:
    """Why a call with such an input and output cannot be sampled, if it cannot."""
    for tensor in (x, output):
        if tensor.is_nested:
            return NESTED
        if tensor.layout != torch.strided:
            return "it was called with sparse tensors"
    if type(output) is not Tensor:
        return f"its output is a {type(output).__name__}"
    return ""


def _no_ordinary_call() -> bool:
    """Whether torch transforms or records what runs instead of running it."""
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey
    modes = (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(key) is not None for key in modes)


def _is_batched(grad: Tensor) -> bool:
    """Whether a backward pass runs for many gradients at once."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


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


# -- on the module, and on no copy of it -----------------------------------------------


def install(hook: ForwardHook, module: nn.Module) -> RemovableHandle:
    """Put a hook in front of a module's others, and out of what is copied of it."""
    function = _as_function(hook)
    copyreg.dispatch_table.setdefault(type(module), _reduce_without_hooks)
    return module.register_forward_hook(function, prepend=True, with_kwargs=True)


def _as_function(hook: ForwardHook) -> Callable[..., Any]:
    """A hook that torch.jit.script can compile, to nothing.

    Quantization moves hooks to other modules, and forgets that they take keywords.
    """

    def frog_triton_sampling(module: nn.Module, args: Any, *rest: Any) -> Any:
        kwargs = rest[0] if len(rest) > 1 else {}
        return hook(module, args, kwargs, rest[-1])

    frog_triton_sampling.__wrapped__ = _scripted  # type: ignore[attr-defined]
    return frog_triton_sampling


def _scripted(self: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    return None


def _is_ours(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__wrapped__", None) is _scripted


def _first(module: nn.Module) -> bool:
    """Whether no hook but FROG's own came first; of its own none does from now on."""
    for hook in torch.nn.modules.module._global_forward_hooks.values():
        # Torch's own, such as those of its FLOP counter, only look.
        if not getattr(hook, "__module__", "").startswith("torch."):
            return False
    hooks = module._forward_hooks
    if _is_ours(next(iter(hooks.values()))):
        return True
    for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
        hooks.move_to_end(key, last=False)  # type: ignore[attr-defined]
    return False


def _reduce_without_hooks(module: nn.Module) -> Any:
    """How modules of a hooked type are copied and pickled: without FROG's hooks."""
    reduced: Any = module.__reduce_ex__(2)
    if isinstance(reduced, str) or not isinstance(reduced[2], dict):
        return reduced
    state = dict(reduced[2])
    hooks = state.get("_forward_hooks", {})
    ours = [key for key, hook in hooks.items() if _is_ours(hook)]
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs") if ours else ():
        if name in state:
            kept = ((k, v) for k, v in state[name].items() if k not in ours)
            state[name] = OrderedDict(kept)
    return (*reduced[:2], state, *reduced[3:])
