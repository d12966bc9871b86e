"""Samples recurrent layers by running a few of their sequences again.

Their gates are computed in a fused kernel. What its outputs' gradients are is heard in
the backward pass; just before that pass writes the weights' gradients, the sampled
sequences are run once more, step by step, with the weights as they are then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import recurrent
from .calls import Call
from .pool import current_pass
from .products import ProductWatch
from .taps import Tap, is_ordinary, takes_gradient

if TYPE_CHECKING:
    from .capture import SampleCapture

COMPILED = "recurrent layers are not sampled inside of graphs of torch.compile"
SHARDED = "its weights are sharded while its backward pass runs"


class ReplayWatch(ProductWatch):
    """Watches a recurrent layer or cell."""

    def mode(self, module: nn.Module, taps: dict[str, Tap]) -> None:
        """Nothing is to be seen inside."""
        if torch.compiler.is_compiling():
            for tap in taps.values():
                tap.leave_out(COMPILED)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        super()._after(module, args, kwargs, output)
        capture = self._capture()
        if torch.compiler.is_compiling() or capture is None or output is None:
            return None
        if not (module.training and self._is_ours(module)):
            return None
        taps = [tap for tap in self.taps.values() if tap.applies(module)]
        outputs = recurrent.outputs_of(module, output)
        if not taps or not any(takes_gradient(tensor) for tensor in outputs):
            return None
        for tap in taps:
            capture.called.add(tap.name)
        total = recurrent.batch_size(module, args, kwargs)
        steps = recurrent.length(module, args, kwargs)
        if not total * steps:
            return None
        output = _apart(module, output)
        outputs = recurrent.outputs_of(module, output)
        size = max(1, taps[0].size // steps)
        index = capture.draw_sequences(taps[0], module, total, size)
        for tap in taps[1:]:
            capture.draw_sequences(tap, module, total, 0)
        sequences = recurrent.take_sequences(module, args, kwargs, index)
        replay = _Replay(capture, module, taps, sequences, len(outputs), total * steps)
        replay.listen(outputs)
        return output


class _Replay:
    """One call, from its forward to the gradients of its weights.

    Args:
        capture: takes the samples.
        module: that was called.
        taps: of its weights.
        sequences: to run again.
        outputs: how many there are.
        total: positions of the whole call.
    """

    def __init__(
        self,
        capture: SampleCapture,
        module: nn.Module,
        taps: Sequence[Tap],
        sequences: recurrent.Sequences,
        outputs: int,
        total: int,
    ) -> None:
        self._capture, self._module, self._taps = capture, module, taps
        self._sequences, self._count, self._total = sequences, outputs, total
        self._grads: dict[int | None, list[Tensor | None]] = {}

    def listen(self, outputs: Sequence[Tensor]) -> None:
        """Hear of the gradients of the call's outputs."""
        for i, tensor in enumerate(outputs):
            made = _written(tensor)
            if made.grad_fn is None:
                continue
            number = made.output_nr
            view = None if made is tensor else (tensor.shape, tensor.stride())

            def on_grads(
                grads: Sequence[Tensor | None],
                i: int = i,
                number: int = number,
                view: tuple[Any, ...] | None = view,
            ) -> None:
                grad = grads[number]
                if grad is None or not is_ordinary(grad):
                    return
                if view is not None:
                    grad = grad.contiguous().as_strided(*view)
                self._heard(i, grad)

            made.grad_fn.register_prehook(on_grads)

    def _heard(self, number: int, grad: Tensor) -> None:
        this = current_pass()
        if this not in self._grads:
            self._grads = {this: [None] * self._count}
        for tap in self._taps:
            self._capture.expect(tap.name, self._run)
        given: list[Tensor | None] = [None] * self._count
        given[number] = grad
        taken = recurrent.take_grads(self._module, self._sequences, given)
        self._grads[this][number] = taken[number]

    def _run(self) -> None:
        grads = self._grads.pop(current_pass(), None)
        if grads is None:
            return  # for another of the weights
        params = recurrent.params_of(self._module)
        if any(hasattr(param, "to_local") for param in params.values()):
            for tap in self._taps:
                self._capture.missed(tap.name, SHARDED)
            return
        found = recurrent.replay(self._module, self._sequences, grads, params)
        for tap in self._taps:
            x, y = found[tap.use.weight.label]  # the name may be of what is behind it
            self._capture.pool(tap.name, Call(self._module, x, y), self._total)


def _written(output: Tensor) -> Tensor:
    """The output, or what it is a view of, whose node stays where it is worked on."""
    base = output._base
    whole = base is not None and base.numel() == output.numel()
    return base if base is not None and whole and base.is_contiguous() else output


def _apart(module: nn.Module, output: Any) -> Any:
    """The output, such that no part of it is made of another.

    The h of an LSTM cell is made of its c, and a gradient that reaches c by h is none
    of what comes from outside.
    """
    if not isinstance(module, nn.LSTMCell):
        return output
    h, c = output
    return h, c.clone()
