"""What routing finds out: layers, the uses of their weights, and who updates what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from ..layers import Geometry, LayerAdapter
from ..layers.rows import RowAxes, Weight

OUTPUT_LAYER = "output layer"
"""The reason of what goes to the fallback because the loss follows it."""


@dataclass
class Use:
    """One module's use of a weight.

    Attributes:
        module: that uses it.
        weight: which of the module's weights it is.
        adapter: of the module's kind.
        proven: whether the module's forward is known to be what the adapter says. One
            that is not torch's own is checked at calls.
        trusted: whether calls that prove nothing are sampled.
        calls: how many there were that could be checked.
        sizes: of inputs that it was proven with.
    """

    module: nn.Module
    weight: Weight
    adapter: LayerAdapter
    proven: bool = True
    trusted: bool = True
    calls: int = 0
    sizes: set[tuple[int, ...]] = field(default_factory=set)


@dataclass
class Layer:
    """A preconditioned weight, the modules that use it, and its bias if it has one.

    Attributes:
        name: of the (first) module, with the weight's label where a module has several;
            the weight's own name where the model is a layer.
        uses: by the modules that share the weight, usually one.
        geometry: of the rows.
        weight: the parameter.
        bias: the bias that belongs to the rows, or None.
    """

    name: str
    uses: tuple[Use, ...]
    geometry: Geometry
    weight: nn.Parameter
    bias: nn.Parameter | None

    def without_bias(self) -> Layer:
        """The same layer, its rows without the bias."""
        return replace(self, bias=None, geometry=replace(self.geometry, bias=False))

    @property
    def params(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def modules(self) -> list[nn.Module]:
        """That share the weight."""
        return [use.module for use in self.uses]

    @property
    def axes(self) -> RowAxes:
        """Where the weight has its rows."""
        return self.uses[0].weight.axes

    @property
    def unit(self) -> int:
        """Rows that a sharded weight never parts: those of one expert."""
        axes = self.axes
        units = axes.split if axes.split > 1 else self.weight.shape[axes.rows[0]]
        return self.geometry.rows // max(1, units)


@dataclass
class Plan:
    """The result of routing.

    Attributes:
        layers: what FROG preconditions, by name, in model order.
        names: every parameter's name, in model order.
        reasons: why a parameter goes where it goes.
        guess: the name of the layer that is taken for the output layer until the first
            step shows which is; None where the model or the user has told.
        pending: layers that the fallback updates until something shows that it should
            not, with the reason: the guess, and bare parameters.
        search: whether steps are to show which layers are outputs.
        named: output layers that the model's methods and names tell.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    names: dict[nn.Parameter, str] = field(default_factory=dict)
    reasons: dict[nn.Parameter, str] = field(default_factory=dict)
    guess: str | None = None
    pending: dict[str, str] = field(default_factory=dict)
    search: bool = False
    named: set[nn.Module] = field(default_factory=set)

    def keep_guess(self) -> None:
        """Leave the guessed output layer to the fallback for good."""
        if self.guess is not None:
            layer = self.layers.pop(self.guess)
            self.reasons |= dict.fromkeys(layer.params, OUTPUT_LAYER)
            del self.pending[self.guess]
        self.guess = None

    def preconditioned(self) -> set[nn.Parameter]:
        """Parameters that belong to a layer, but for those that are pending."""
        return {p for layer in self.served() for p in layer.params}

    @property
    def bare(self) -> set[str]:
        """Names of layers that are bare parameters, pending until they have samples."""
        return {name for name, why in self.pending.items() if why != OUTPUT_LAYER}

    def served(self) -> list[Layer]:
        """Layers that are preconditioned from the first step on."""
        return [x for name, x in self.layers.items() if name not in self.pending]
