"""Parameter groups in two halves each: what is preconditioned, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import ops
from .distributed import check_parallelism, check_placements
from .fallback import FALLBACKS
from .groups import entries, fallback_lr, part_of
from .model.plan import Layer, Plan
from .model.routing import route
from .options import Options, check_group

Halves = tuple[dict[str, Any], dict[str, Any]]


class Partition:
    """Which parameters are rows of layers, and the groups that they are in.

    Args:
        model: whose parameters they are.
        options: of FROG.
        fallback_lr: of parameters that are not preconditioned, unless a group has one.

    Attributes:
        model: as above.
        plan: of all groups so far; replaced by another when groups are added.
        layer_of: the layer of each parameter that belongs to one.
    """

    def __init__(
        self, model: nn.Module, options: Options, fallback_lr: float | Tensor
    ) -> None:
        self.model = model
        self._options = options
        self._fallback_lr = fallback_lr
        self.plan = Plan()
        self.layer_of: dict[nn.Parameter, Layer] = {}

    def split(
        self, groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Check the user's groups, route their parameters and split each in two.

        Args:
            groups: in the form of `groups.user_group`.
            defaults: of group entries.

        Returns:
            Of each group the half that is preconditioned, then the rest.

        Raises:
            ValueError: an entry that no step can use, a parameter that is not the
                model's or in two groups, a layer that the backend cannot take, a
                sharding that leaves no rows whole, tensor parallelism.
        """
        names = {p: name for name, p in self.model.named_parameters()}
        group_of: dict[nn.Parameter, int] = {}
        halves: list[Halves] = []
        for i, group in enumerate(groups):
            halves.append(self._halves(group, defaults))
            self._check_params(group["params"], names, group_of)
            group_of |= dict.fromkeys(group["params"], i)
        options = self._options
        plan = route(
            self.model,
            group_of,
            options.exclude,
            options.exclude_output_layer,
            options.output_layers,
        )
        self._check_backend(plan)
        self._check_placements(plan, names)
        self._adopt(plan, group_of)
        served = plan.preconditioned()
        split = []
        for rows, rest in halves:
            split.append(part_of(rows, served))
            split.append(part_of(rest, set(rest["params"]) - served))
        return split

    def settings(self, groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """What ranks that train together must have alike, by name.

        Args:
            groups: all parameter groups.
        """
        layers = self.plan.layers.values()
        shapes = {layer.name: tuple(layer.weight.shape) for layer in layers}
        return {"layers": shapes, **self._options.settings, **entries(groups)}

    def _halves(self, given: dict[str, Any], defaults: Mapping[str, Any]) -> Halves:
        """Both halves' entries, with all parameters in each."""
        fallback = self._options.fallback
        group = {k: v for k, v in given.items() if k != "fallback_lr"}
        check_group({**defaults, **group})
        rest = {**FALLBACKS[fallback].defaults, **group}
        rest["lr"] = fallback_lr(given, defaults["lr"], self._fallback_lr)
        rest["updated_by"] = fallback
        try:
            check_group({**defaults, **rest})
        except ValueError as error:
            raise ValueError(f"fallback_lr: {error}") from None
        return group | {"updated_by": "frog"}, rest

    def _check_params(
        self,
        params: Iterable[nn.Parameter],
        names: Mapping[nn.Parameter, str],
        group_of: Mapping[nn.Parameter, int],
    ) -> None:
        """Raise ValueError for one that is not the model's, or in a group already."""
        here: set[nn.Parameter] = set()
        for param in params:
            if param not in names:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} in params does not "
                    "belong to the model that FROG was given"
                )
            optimized = self.plan.reasons.get(param, "not in params")
            taken = param in group_of or param in here
            if taken or optimized != "not in params":
                raise ValueError(f"{names[param]} appears in more than one group")
            here.add(param)

    def _check_backend(self, plan: Plan) -> None:
        """Raise ValueError for a layer that the backend cannot take."""
        for layer in plan.layers.values():
            try:
                dtype = self._options.momentum_dtype or layer.weight.dtype
                ops.resolve(self._options.backend, layer.weight.device, dtype)
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from None

    def _check_placements(self, plan: Plan, names: Mapping[nn.Parameter, str]) -> None:
        """Raise ValueError for a sharding that does not do, but for a guess."""

        def check() -> None:
            layers = [*self.plan.layers.values(), *plan.layers.values()]
            check_parallelism(self.model, layers, names)
            check_placements(layers, names, self._options.process_group)

        try:
            check()
        except ValueError:
            if plan.guess is None:
                raise
            plan.keep_guess()  # whatever the first step shows
            check()

    def _adopt(self, plan: Plan, group_of: Mapping[nn.Parameter, int]) -> None:
        """Take over a plan; parameters routed before keep their routes."""
        old = self.plan
        kept = {p: reason for p, reason in old.reasons.items() if p not in group_of}
        gone = [p for p in kept if p not in plan.names]
        reasons = plan.reasons | kept | dict.fromkeys(gone, "no longer in the model")
        names = {p: old.names[p] for p in gone} | plan.names
        layers = {**old.layers, **plan.layers}
        before = old if old.names else plan
        self.plan = Plan(layers, names, reasons, before.guess, search=before.search)
        self.plan.named = before.named
        self.plan.pending = {**old.pending, **plan.pending}
        self.layer_of |= {p: lay for lay in plan.layers.values() for p in lay.params}
