"""Layers whose weight has gradients, but no samples.

Attention that uses its projection's weight without calling the module, a layer fed
nested tensors: FROG sees no activations of theirs. One step without is no proof (a
mixture's expert may not be routed to, an early exit taken), so their rows take the
identity Fisher at first. After `PATIENCE` such steps in a row the fallback updates
them, until samples come (again).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .capture.capture import SampleCapture
from .linalg.rows import local
from .model.plan import OUTPUT_LAYER, Layer
from .warning import warn

REASON = "its weight is used without calling the module"

APART = (
    "none of its calls since the last step has a part in that gradient: were their own "
    "gradients or samples dropped, and this one set by hand?"
)

PATIENCE = 3
"""Steps with a gradient, and without a call, that prove a layer is used otherwise."""


class Known(NamedTuple):
    """What is to be known, of all ranks, before a step.

    Attributes:
        called: names of layers that were called since the last step.
        sampled: names of layers that have samples.
        used: names of layers whose gradient is not zero, where that is asked.
        decided: names of layers of which this step shows whether they are outputs.
        outputs: those that are.
        bad: whether a gradient is not finite.
    """

    called: set[str]
    sampled: set[str]
    used: set[str]
    decided: set[str]
    outputs: set[str]
    bad: bool


class Unhooked:
    """Which layers are let go of, and why.

    Args:
        fallback: the name of who updates them.

    Attributes:
        reasons: of those that are let go of, by name.
        misses: of the others, in how many steps in a row they had a gradient without a
            call; none where there was no such step.
    """

    def __init__(self, fallback: str) -> None:
        self._fallback = fallback
        self.restart()

    def restart(self) -> None:
        """Know nothing, as in the beginning."""
        self.reasons: dict[str, str] = {}
        self.misses: dict[str, int] = {}
        self._told: set[tuple[str, str]] = set()

    def holds(self, layer: Layer | None) -> bool:
        """Whether the fallback updates a layer."""
        return layer is not None and layer.name in self.reasons

    def remember(self) -> Callable[[], None]:
        """What brings the present reasons and misses back."""
        before = dict(self.reasons), dict(self.misses)

        def bring_back() -> None:
            self.reasons, self.misses = before

        return bring_back

    def forget(self, name: str) -> None:
        """Begin anew with a layer."""
        self.reasons.pop(name, None)
        self.misses.pop(name, None)

    def due(
        self,
        groups: Iterable[dict[str, Any]],
        layer_of: Mapping[nn.Parameter, Layer],
    ) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
        """Each group with the parameters that it updates now: those with a gradient.

        A layer that is let go of stays in its group, and is updated with the other half
        of it, which comes next; one that turns out to be no output layer the other way
        round.
        """
        found: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        pairs = list(groups)
        for rows, rest in zip(pairs[::2], pairs[1::2], strict=True):
            own, others = (
                [p for p in group["params"] if p.grad is not None]
                for group in (rows, rest)
            )
            stay = [p for p in own if not self.holds(layer_of.get(p))]
            gone = [p for p in own if self.holds(layer_of.get(p))]
            come = [p for p in others if p in layer_of and not self.holds(layer_of[p])]
            left = [p for p in others if p not in layer_of or self.holds(layer_of[p])]
            found += [(rows, stay + come), (rest, left + gone)]
        return found

    @property
    def outputs(self) -> list[str]:
        """Names of layers that are let go of as outputs."""
        return [name for name, reason in self.reasons.items() if reason == OUTPUT_LAYER]

    def decide(self, layers: Iterable[Layer], outputs: Collection[str]) -> list[Layer]:
        """Let go of output layers, and take back who is none.

        Args:
            layers: that are decided.
            outputs: names of those that are outputs.

        Returns:
            Those that another optimizer updates from this step on.
        """
        changed = []
        for layer in layers:
            name, reason = layer.name, self.reasons.get(layer.name)
            if name in outputs and reason != OUTPUT_LAYER:
                changed += [] if reason else [layer]
                self.reasons[name] = OUTPUT_LAYER
                self.misses.pop(name, None)
            elif name not in outputs and reason == OUTPUT_LAYER:
                changed.append(layer)
                del self.reasons[name]
        return changed

    def look(
        self, layers: Iterable[Layer], capture: SampleCapture, may_wait: bool
    ) -> Known:
        """What this rank knows, but whether gradients are finite.

        Args:
            layers: all that are preconditioned.
            capture: their samples.
            may_wait: for the device, to hear whether a gradient is zero. It is asked
                only where this step may prove a layer unhooked; who may not ask takes
                it for not zero.
        """
        called = capture.may_be_called()
        sampled, used = set(), set()
        for layer in layers:
            name = layer.name
            if capture.calls(name):
                sampled.add(name)
            elif self.misses.get(name) == PATIENCE - 1 and name not in called:
                grads = [local(p.grad) for p in layer.params if p.grad is not None]
                real = all(type(grad) is Tensor for grad in grads)  # not fake
                if not (may_wait and real) or any(bool(g.any()) for g in grads):
                    used.add(name)
        return Known(called, sampled, used, set(), set(), bad=False)

    def review(
        self, layers: Sequence[Layer], known: Known, capture: SampleCapture
    ) -> list[Layer]:
        """Let go of layers and take layers back, the same on all ranks; warn of it.

        Args:
            layers: that have a gradient.
            known: of all ranks.
            capture: knows why calls of a layer made no samples, if they made none.

        Returns:
            Those that another optimizer updates from this step on.
        """
        changed, gone, reasons = [], [], capture.unsampled_reasons()
        for layer in layers:
            name = layer.name
            if self.reasons.get(name) == OUTPUT_LAYER:
                continue
            if name in known.sampled:
                self.misses.pop(name, None)
                if self.reasons.pop(name, None) is not None:
                    changed.append(layer)
            elif name in known.called:
                self.misses.pop(name, None)
            elif name not in self.reasons:
                misses = self.misses.pop(name, 0) + 1
                if misses < PATIENCE:
                    self.misses[name] = misses
                elif name in known.used:
                    self.reasons[name] = reasons.get(name, REASON)
                    gone.append(layer)
        without = [x for x in layers if x.name not in known.sampled | {*self.reasons}]
        self._tell(_IDENTITY, without, self._apart(without, known) | reasons)
        self._tell(_GONE, gone, self.reasons)
        return changed + gone

    def _apart(self, layers: Iterable[Layer], known: Known) -> dict[str, str]:
        """Layers that were called, but not for the gradient that is there."""
        return {x.name: APART for x in layers if x.name in known.called}

    def _tell(
        self, message: str, layers: Iterable[Layer], reasons: Mapping[str, str]
    ) -> None:
        """Warn, of each layer once, at the line that called `step`."""
        names: dict[str, list[str]] = {}
        for layer in layers:
            key = message, layer.name
            if layer.name in reasons and key not in self._told:
                self._told.add(key)
                names.setdefault(reasons[layer.name], []).append(layer.name)
        for reason, named in names.items():
            text = message.format(
                layers=", ".join(named), reason=reason, fallback=self._fallback
            )
            warn(text)


_IDENTITY = (
    "{layers}: a gradient but no samples, so rows take the identity Fisher, or with "
    "sample_steps > 1 that of the steps before; {reason}"
)
_GONE = (
    "{layers}: {reason}, so FROG sees no activations; {fallback} updates it from now "
    "on, until there are some (if the model was compiled and called before FROG put "
    "its hooks on it: call torch.compiler.reset() after FROG(model))"
)
