"""Who updates each parameter from step to step: FROG, or the fallback."""

from __future__ import annotations

import weakref
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .capture.capture import SampleCapture
from .capture.sampling import Counter
from .capture.seeking import Outputs
from .fallback import FALLBACKS
from .model.coverage import Coverage, tell
from .model.plan import OUTPUT_LAYER, Layer, Plan
from .model.routing import Route, RoutingTable
from .partition import Partition
from .state import RECENT_KEYS, ROW_KEYS, STEP_KEYS
from .unhooked import REASON, Known, Unhooked
from .warning import warn

if TYPE_CHECKING:
    from .distributed import World

State = MutableMapping[Any, dict[str, Any]]
Due = Sequence[tuple[dict[str, Any], Sequence[nn.Parameter]]]
"""Groups, each with the parameters that it updates in a step."""


class Assignment:
    """Layers and who updates them, as far as steps have shown.

    Args:
        optimizer: whose state counts each layer's steps.
        partition: of its parameters.
        model: theirs.
        capture: of samples.
        fallback: the name of who updates what FROG does not.

    Attributes:
        unhooked: layers that the fallback updates for now.
        outputs: finds output layers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        partition: Partition,
        model: nn.Module,
        capture: SampleCapture,
        fallback: str,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._partition = partition
        self._capture = capture
        self._told_of: set[str] = set()  # bare parameters
        self.unhooked = Unhooked(fallback)
        self.unhooked.reasons |= self.plan.pending
        self.outputs = Outputs(model, capture.stilled)
        self.outputs.seek(self.plan)

    @property
    def plan(self) -> Plan:
        """The partition's."""
        return self._partition.plan

    @property
    def layer_of(self) -> Mapping[nn.Parameter, Layer]:
        """The layer of each parameter that belongs to one."""
        return self._partition.layer_of

    def watch(self, layers: Iterable[Layer]) -> None:
        """Start to capture samples."""
        for layer in layers:
            counter = partial(_steps, self._optimizer, self.unhooked, layer)
            self._capture.watch(layer, counter)

    def take_up(self, new: Mapping[str, Layer], known: Iterable[str]) -> None:
        """Begin with layers that have been added.

        Args:
            new: by name.
            known: names of layers that there were before; a module may have been put
                in another's place.
        """
        for name in new.keys() & set(known):
            if self._capture.watches(name):
                self._capture.unwatch(name)
            self.unhooked.forget(name)
        pending = self.plan.pending.items()
        self.unhooked.reasons |= {n: reason for n, reason in pending if n in new}
        self.watch(new.values())
        if new:
            self.outputs.decided -= new.keys()
            self.outputs.seek(self.plan)

    # -- a step ---------------------------------------------------------------------

    def look(self, may_wait: bool) -> Known:
        """What this rank knows before a step; see `Unhooked.look`."""
        layers = self.plan.layers.values()
        known = self.unhooked.look(layers, self._capture, may_wait)
        decided, outputs = self.outputs.look(known.sampled)
        return known._replace(decided=decided, outputs=outputs)

    def serves(self, param: nn.Parameter) -> bool:
        """Whether FROG updates a parameter, as far as is decided."""
        layer = self.layer_of.get(param)
        return layer is not None and not self.unhooked.holds(layer)

    def settled(self) -> Hashable | None:
        """Who updates what, where nothing suggests that a step might change that."""
        if self.unhooked.misses or self.outputs.seeking:
            return None
        return tuple(self.unhooked.reasons.items())

    def review(self, known: Known, state: State) -> Callable[[], None]:
        """Give layers without samples to the fallback, and take back who has some.

        Args:
            known: of all ranks.
            state: of the parameters; what another optimizer has made is dropped.

        Returns:
            What undoes it.
        """
        forget, layers = self.unhooked.remember(), self.plan.layers.values()
        with_grad = [x for x in layers if any(p.grad is not None for p in x.params)]
        decided = [x for x in layers if x.name in known.decided]
        changed = self.unhooked.decide(decided, known.outputs)
        changed += self.unhooked.review(with_grad, known, self._capture)
        params = [p for layer in changed for p in layer.params if p in state]
        before: dict[Any, Any] = {param: dict(state[param]) for param in params}
        for param in params:
            ours = ROW_KEYS.union(STEP_KEYS, RECENT_KEYS)
            for key in ours.union(*(f.keys for f in FALLBACKS.values())):
                state[param].pop(key, None)

        def undo() -> None:
            forget()
            state.update(before)

        return undo

    def due(self, groups: Iterable[dict[str, Any]]) -> Due:
        """Each group with the parameters that it updates now; see `Unhooked.due`."""
        return self.unhooked.due(groups, self.layer_of)

    def layers_due(self, due: Due) -> list[Layer]:
        """Layers among parameters that FROG updates."""
        layers = {
            self.layer_of[p].name: self.layer_of[p]
            for group, params in due
            if group["updated_by"] == "frog"
            for p in params
        }
        return list(layers.values())

    def learn(
        self, known: Known, leads: bool, routes: Callable[[], RoutingTable]
    ) -> None:
        """Keep what a step has shown of output layers; tell what was not expected.

        Args:
            known: of all ranks.
            leads: whether this rank speaks to the user.
            routes: gives what is preconditioned now.
        """
        text = self.outputs.learn(known.decided, known.outputs, known.sampled)
        bare = known.sampled & self.plan.bare - self._told_of
        self._told_of |= bare
        served = known.decided or bare  # is not what it was
        now = str(routes().coverage) if (text or bare) and served else ""
        if (text or now) and leads:
            tell(". ".join(filter(None, [text, now])))
        if known.decided:
            self._watch_what_is_served()

    def _watch_what_is_served(self) -> None:
        """Output layers that are known as such need no samples."""
        outputs = self.outputs.decided.intersection(self.unhooked.outputs)
        for layer in self.plan.layers.values():
            watched = self._capture.watches(layer.name)
            if layer.name in outputs and watched:
                self._capture.unwatch(layer.name)
            elif layer.name not in outputs and not watched:
                self.watch([layer])

    # -- saving and loading -----------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """What a saved state is to know."""
        return {
            "let_go": dict(self.unhooked.reasons),
            "misses": dict(self.unhooked.misses),
            "decided": sorted(self.outputs.decided),
        }

    def take_over(
        self, loaded: Mapping[str, Any], groups: Sequence[dict[str, Any]], state: State
    ) -> None:
        """Know again what was known when a state was saved.

        Args:
            loaded: what was saved.
            groups: the optimizer's.
            state: of the parameters, as it was loaded.
        """
        let_go = loaded.get("let_go")
        if let_go is None:  # not by `state_dict`, or by that of version 1
            let_go = dict.fromkeys(self._let_go_by_state(groups, state), REASON)
        self.unhooked.restart()
        decided = set(loaded.get("decided", self.plan.layers))
        self.outputs.decided = decided
        if "decided" not in loaded:  # by a version that had nothing pending
            self.unhooked.reasons |= self.plan.pending
        for name in self.plan.layers:
            if name in let_go:
                self.unhooked.reasons[name] = let_go[name]
            elif misses := loaded.get("misses", {}).get(name):
                self.unhooked.misses[name] = misses
        if not self._capture.closed:
            self._watch_what_is_served()
            if self.plan.layers.keys() - decided:
                self.outputs.seek(self.plan)
            else:
                self.outputs.close()

    def _let_go_by_state(
        self, groups: Sequence[dict[str, Any]], state: State
    ) -> Iterator[str]:
        """Names of layers that have the fallback's state."""
        for half, rest in zip(groups[::2], groups[1::2], strict=True):
            keys = FALLBACKS[rest["updated_by"]].keys
            for param in half["params"]:
                layer, held = self.layer_of[param], state.get(param, {}).keys()
                by_rows = held >= ROW_KEYS | STEP_KEYS
                if param is layer.weight and held >= keys and not by_rows:
                    yield layer.name

    # -- for the user's eyes ----------------------------------------------------------

    def routes(
        self,
        groups: Sequence[dict[str, Any]],
        solved: Mapping[str, str],
        world: World,
    ) -> RoutingTable:
        """Who updates each parameter, and why.

        Args:
            groups: the optimizer's.
            solved: how each layer was solved, in words.
            world: the ranks that train together.
        """
        updated_by: dict[nn.Parameter, str] = {}
        for rows, rest in zip(groups[::2], groups[1::2], strict=True):
            for p in (*rows["params"], *rest["params"]):
                layer = self.layer_of.get(p)
                gone = layer is None or self.unhooked.holds(layer)
                updated_by[p] = (rest if gone else rows)["updated_by"]
        table = RoutingTable(
            Route(
                name,
                tuple(p.shape),
                updated_by.get(p, "-"),
                "; ".join(filter(None, self._reasons(p, solved, world))),
            )
            for p, name in self.plan.names.items()
        )
        table.note = world.summary()
        return table

    def _reasons(
        self, param: nn.Parameter, solved: Mapping[str, str], world: World
    ) -> Iterator[str]:
        """Why a parameter is where it is, then notes."""
        layer, reason, notes = self.layer_of.get(param), self.plan.reasons[param], ""
        if layer is not None and layer.name in self.plan.bare:
            reason = "by frog_triton.linear"
        if layer is not None and self.plan.layers.get(layer.name) is layer:
            if layer.name in self.unhooked.reasons:
                reason = self.unhooked.reasons[layer.name]
                if reason == OUTPUT_LAYER and layer.name not in self.outputs.decided:
                    notes = "the last; its first step will show"
            else:
                notes = solved.get(layer.name, "")
        yield reason
        yield notes
        if layer is not None and not self.unhooked.holds(layer):
            yield world.describe(layer)
        if not param.requires_grad:
            yield "frozen"

    def tell_coverage(self, coverage: Coverage) -> None:
        """Say once how much is preconditioned; warn below half."""
        told = str(coverage)
        if self.plan.guess is not None:
            told += "; which is the output layer the first step will show"
        if not self.plan.layers:
            text = "FROG preconditions no parameter of this model"
            warn(f"{text}; describe() says why")
        elif coverage.low and not self.plan.bare:
            warn(f"{told}; describe() says why")
        else:
            tell(told)


def _steps(
    optimizer: weakref.ref[Optimizer], unhooked: Unhooked, layer: Layer
) -> Counter:
    """How many steps of a layer its samples are drawn for."""
    owner = optimizer()
    if owner is None:
        return 0
    counter = owner.state.get(layer.weight, {}).get("step")
    if counter is None or layer.name in unhooked.reasons:
        return 0
    if not owner.defaults["capturable"]:
        return int(counter)
    assert isinstance(counter, Tensor)
    return counter
