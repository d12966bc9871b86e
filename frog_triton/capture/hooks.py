"""The forward hook that samples a layer's calls, and what calls it leaves alone.

It comes first of a module's hooks, so what it sees is what the layer made. It stays out
of whatever is no ordinary call: transforms of `torch.func`, tracing and scripting,
fake tensors. It never travels: a copied or pickled module has none.
"""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.plan import Layer, Use
from . import traced
from .taps import Tap, no_ordinary_call, takes_gradient, unlike_a_matrix

if TYPE_CHECKING:
    from .capture import SampleCapture

REPLACED = "its forward, or its class, was replaced"
NOT_FIRST = "another hook came first and may have changed its output"
REPLICA = (
    "nn.DataParallel calls copies of it, which FROG cannot follow: use "
    "torch.nn.parallel.DistributedDataParallel"
)


class ForwardHook(Tap):
    """Samples the calls of a module whose output is the product."""

    def __init__(self, capture: SampleCapture, layer: Layer, use: Use) -> None:
        super().__init__(capture, layer, use)
        self._kind = type(use.module)
        self._patched = "forward" in vars(use.module)

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
        capture = self.capture
        if capture is None:
            return None
        if module is not self.module:
            if getattr(module, "_is_replica", False) and torch.is_grad_enabled():
                capture.missed_replica(self.name)
            return None
        if not takes_gradient(output) or not self.applies(module):
            return None
        if no_ordinary_call():
            return None
        x = self.adapter.input(module, args, kwargs)
        reason = self.refuse() or unlike_a_matrix(x, output)
        if reason:
            capture.missed(self.name, reason)
            return None
        if self._to_prove and not self._proves(capture, module, x, output):
            return None
        capture.called.add(self.name)
        reason = self.reason(module, output)
        if reason:
            capture.missed(self.name, reason)
        else:
            self.take(capture, module, x, output)
        return None

    def _proves(
        self, capture: SampleCapture, module: nn.Module, x: Any, output: Tensor
    ) -> bool:
        if self.reason(module, output):
            return True  # said below
        return self.prove(capture, module, x, output)

    def refuse(self) -> str:
        """See `traced.Receiver`."""
        module = self.module
        if module is None:
            return ""
        patched = "forward" in module.__dict__
        if type(module) is not self._kind or patched is not self._patched:
            return REPLACED
        return self.refuted if _first(module) else NOT_FIRST

    def _trace(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if torch.compiler.is_exporting() or not takes_gradient(output):
            return None
        if not self.applies(module):
            return None
        return self.trace(module, self.adapter.input(module, args, kwargs), output)


# -- on the module, and on no copy of it -----------------------------------------------


class Installed:
    """A hook on a module.

    Args:
        hook: called as a forward hook with keywords.
        module: that it is on.
        name: after ``frog_triton_``; torch.jit.script wants one for each hook.
    """

    def __init__(
        self, hook: Callable[..., Any], module: nn.Module, name: str = "sampling"
    ) -> None:
        self.hook = hook
        self._on, self._in_graph = True, False
        self._number = traced.register_hook(self)
        copyreg.dispatch_table.setdefault(type(module), _reduce_without_hooks)
        self._handle = module.register_forward_hook(
            _as_function(self._call, name), prepend=True, with_kwargs=True
        )

    def _call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        on = traced.note(self._number) if compiling else self._on
        return self.hook(module, args, kwargs, output) if on else None

    def noted(self) -> bool:
        """A graph is made with the hook; returns whether it is to do anything there."""
        self._in_graph = True
        return self._on

    def remove(self) -> bool:
        """Take the hook off, or only still it if a graph was made with it.

        torch.compile makes graphs anew where hooks have come or gone.

        Returns:
            Whether it is off.
        """
        self._on = False
        if isinstance(self.hook, Tap):
            self.hook.off = True
        if not self._in_graph:
            self._handle.remove()
        return not self._in_graph

    def remove_for_good(self) -> None:
        """Take the hook off, graph or not."""
        self._on = False
        self._handle.remove()


def surround(
    before: Callable[..., None], after: Callable[..., None], module: nn.Module
) -> list[RemovableHandle]:
    """Hooks around a module's forward; the second runs even where that raises."""
    copyreg.dispatch_table.setdefault(type(module), _reduce_without_hooks)

    def frog_triton_before(module: nn.Module, args: Any) -> None:
        before(module, args)

    frog_triton_before.__wrapped__ = _scripted_before  # type: ignore[attr-defined]
    return [
        module.register_forward_pre_hook(frog_triton_before),
        module.register_forward_hook(
            _as_function(after, "watching"),
            prepend=True,
            with_kwargs=True,
            always_call=True,
        ),
    ]


def _as_function(hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A hook that torch.jit.script can compile, to nothing.

    Quantization moves hooks to other modules, and forgets that they take keywords.
    """

    def frog_triton_sampling(module: nn.Module, args: Any, *rest: Any) -> Any:
        kwargs = rest[0] if len(rest) > 1 else {}
        return hook(module, args, kwargs, rest[-1])

    # torch.jit.script wants each hook of a module to have a name of its own.
    frog_triton_sampling.__name__ = f"frog_triton_{name}"
    frog_triton_sampling.__wrapped__ = _scripted  # type: ignore[attr-defined]
    return frog_triton_sampling


def _scripted(self: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output


def _scripted_before(self: Any, inputs: tuple[Tensor]) -> None:
    return None


def is_ours(hook: Callable[..., Any]) -> bool:
    """Whether a hook is FROG's own."""
    return getattr(hook, "__wrapped__", None) in (_scripted, _scripted_before)


def _first(module: nn.Module) -> bool:
    """Whether no hook but FROG's own came first; of its own none does from now on."""
    for hook in torch.nn.modules.module._global_forward_hooks.values():
        # Torch's own, such as those of its FLOP counter, only look.
        if not getattr(hook, "__module__", "").startswith("torch."):
            return False
    hooks = module._forward_hooks
    if is_ours(next(iter(hooks.values()))):
        return True
    for key in [key for key, hook in hooks.items() if is_ours(hook)]:
        hooks.move_to_end(key, last=False)  # type: ignore[attr-defined]
    return False


def _reduce_without_hooks(module: nn.Module) -> Any:
    """How modules of a hooked type are copied and pickled: without FROG's hooks."""
    reduced: Any = module.__reduce_ex__(2)
    if isinstance(reduced, str) or not isinstance(reduced[2], dict):
        return reduced
    state = dict(reduced[2])
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        ours = [key for key, hook in state.get(hooks, {}).items() if is_ours(hook)]
        for name in (hooks, f"{hooks}_with_kwargs", f"{hooks}_always_called"):
            if ours and name in state:
                kept = ((k, v) for k, v in state[name].items() if k not in ours)
                state[name] = OrderedDict(kept)
    return (*reduced[:2], state, *reduced[3:])
