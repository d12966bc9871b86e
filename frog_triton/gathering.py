"""Brings together all that a step needs, before it changes anything."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anomalies import Anomalies
from .assignment import Assignment
from .capture.capture import SampleCapture
from .fallback import FALLBACKS
from .options import Options
from .recent import forget, samples_of
from .scaling import steps_taken
from .state import RECENT_KEYS, complete_rows, move_state
from .step import LayerStep, layer_step
from .unhooked import Known
from .update import Gathered

if TYPE_CHECKING:
    from .distributed import World

State = MutableMapping[Any, dict[str, Any]]


class Gathering:
    """Completes state, and finds each layer's rows and samples.

    Args:
        assignment: of layers to who updates them.
        world: the ranks that train together.
        capture: of this rank's samples.
        anomalies: counters, which are made with the state.
        options: of FROG.
    """

    def __init__(
        self,
        assignment: Assignment,
        world: World,
        capture: SampleCapture,
        anomalies: Anomalies,
        options: Options,
    ) -> None:
        self._assignment = assignment
        self._world = world
        self._capture = capture
        self._anomalies = anomalies
        self._options = options

    def gather(
        self, known: Known, groups: Iterable[dict[str, Any]], state: State
    ) -> list[Gathered]:
        """What each group brings to a step. Where this raises, nothing has changed.

        Args:
            known: of all ranks.
            groups: parameter groups.
            state: of the parameters, to be completed.
        """
        undo = self._assignment.review(known, state)
        try:
            due = self._assignment.due(groups)
            for group, params in due:
                self.complete_state(group, params, state)
            self._world.send_samples(self._assignment.layers_due(due))
            return [self.bring(group, params, state) for group, params in due]
        except BaseException:
            undo()
            raise

    def complete_state(
        self, group: dict[str, Any], params: Iterable[nn.Parameter], state: State
    ) -> None:
        """Make what is missing of a group's state, and bring it to its parameters."""
        names, dtype = self._assignment.plan.names, self._options.momentum_dtype
        for param in params:
            if group["updated_by"] == "frog":
                layer = self._assignment.layer_of[param]
                complete_rows(
                    state, param, layer, names, dtype, self._options.capturable
                )
            else:
                fallback = FALLBACKS[group["updated_by"]]
                fallback.complete(state[param], param, names[param])
            if self._options.sample_steps == 1:
                forget(state[param])  # of a state saved with more
            _check_shapes(names[param], param, state[param])
        move_state(state, group, params)

    def bring(
        self, group: dict[str, Any], params: Sequence[nn.Parameter], state: State
    ) -> Gathered:
        """What one group brings, with the samples that this rank has received."""
        layers = self._assignment.layers_due([(group, params)])
        for layer in layers:
            self._anomalies.expect(layer, self._world.rows_here(layer))
        options = self._options
        how = (state, self._world, self._capture, options.backend, options.sample_steps)
        return Gathered(group, params, [layer_step(layer, *how) for layer in layers])

    def join_samples(self, weights: Iterable[nn.Parameter], state: State) -> None:
        """Put samples where a recorded step finds them.

        Args:
            weights: of the layers that it solves.
            state: of the parameters.
        """
        for weight in weights:
            layer = self._assignment.layer_of[weight]
            how = (self._capture, self._options.sample_steps)
            samples_of(layer, state[weight], *how)

    def count_steps(
        self, steps: Iterable[LayerStep], state: State, found_inf: Tensor | None
    ) -> None:
        """Advance the counters of layers that were updated.

        Args:
            steps: theirs.
            state: of the parameters.
            found_inf: not 0 where the step was skipped. Counters on the host count
                calls: they do not wait to hear of it.
        """
        skipped = found_inf if self._options.capturable else None
        alike: dict[torch.device, list[Tensor]] = {}
        for step in steps:
            counter = state[step.layer.weight]["step"]
            alike.setdefault(counter.device, []).append(counter)
        for device, counters in alike.items():
            taken = steps_taken(skipped, device)
            if isinstance(taken, Tensor):
                torch._foreach_add_(counters, [taken] * len(counters))
            else:
                torch._foreach_add_(counters, taken)


def _check_shapes(name: str, param: nn.Parameter, own: dict[str, Any]) -> None:
    """Raise ValueError for state that a parameter has outgrown."""
    for key, value in own.items():
        if key in RECENT_KEYS:  # begin anew where they do not fit
            continue
        if isinstance(value, Tensor) and value.ndim and value.shape != param.shape:
            raise ValueError(
                f"{name} has shape {tuple(param.shape)}, but its {key} "
                f"{tuple(value.shape)}: was the parameter resized? Remove its entry "
                "from the optimizer's state to begin anew"
            )
