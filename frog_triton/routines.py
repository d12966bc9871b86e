"""Which steps are recorded, and when a recording may be played.

A step whose circumstances were met before is recorded, and played from then on; the
least change, and the step is taken launch by launch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .circumstances import NUMBERS, Circumstances, Look
from .fallback import FALLBACKS, Prepared
from .kernels.board import Board, Refused
from .routine import MOST_MEMORY, CudaGraph, Graph, Routine, record
from .state import RECENT_KEYS
from .step import LayerStep, is_mixture
from .update import Gathered, numbers_of, step_layers

if TYPE_CHECKING:
    from .anomalies import Anomalies
    from .capture.capture import SampleCapture
    from .distributed import World
    from .gradients import GradientWatch

KEPT = 2
"""Recordings that are kept: two sets of circumstances may take turns."""

IN_A_ROW = 5
"""Steps alike after which more than `KEPT` are recorded: where circumstances keep
changing, as lengths of sequences below the sample size do, none is."""

REMEMBERED = 16
"""Circumstances that are remembered without a recording."""

WORDS_A_LAYER = 1024
"""Of tables: some fifteen of a step, with eight rows each and what fills them up, and
the arguments of as many launches that are parts of a bundle, up to forty each."""


@dataclass(frozen=True)
class Beside:
    """What a group's step does beside the recorded launches.

    Attributes:
        counted: weights of layers whose steps are counted.
        params: that the fallback updates.
        needs: what their states must hold.
        prepared: does so, where it can.
    """

    counted: Sequence[nn.Parameter] = ()
    params: Sequence[nn.Parameter] = ()
    needs: frozenset[str] = frozenset()
    prepared: Prepared | None = None

    def fits(self, state: Mapping[Any, dict[str, Any]]) -> bool:
        """Whether all is there that `step` will read."""
        if not all("step" in state.get(w, ()) for w in self.counted):
            return False
        own = [state.get(p, {}) for p in self.params]
        if self.prepared is not None:
            return self.prepared.fits(own)
        return all(self.needs <= held.keys() for held in own)

    def step(
        self,
        group: dict[str, Any],
        state: Mapping[Any, dict[str, Any]],
        found_inf: Tensor | None,
    ) -> None:
        """Do it; see `Fallback.step`."""
        if self.counted:
            torch._foreach_add_([state[w]["step"] for w in self.counted], 1)
        if self.prepared is not None:
            self.prepared.step(group, found_inf)
        elif self.params:
            own = [state[p] for p in self.params]
            fallback = FALLBACKS[group["updated_by"]]
            fallback.step(self.params, own, group, found_inf)


@dataclass(frozen=True)
class KnownStep:
    """A step that can be played.

    Attributes:
        key: of its circumstances.
        routine: look at the gradients, solve, update; it finds whether the step was to
            be skipped, and the largest gradient.
        beside: of each group.
        held: what the routine reads and writes, and who else holds it may let go.
    """

    key: Hashable
    routine: Routine
    beside: Sequence[Beside]
    held: Sequence[Tensor]


def graphs(device: torch.device) -> Callable[[], Graph] | None:
    """What makes recordings of work on a device; None where nothing can."""
    return (lambda: CudaGraph(device)) if device.type == "cuda" else None


class Routines:
    """Recordings of an optimizer's steps.

    Args:
        capture: of samples.
        gradients: looks at them.
        anomalies: counters of the layers' rows.
        world: of one rank.
        formulation: of the solver.
        sample_steps: how many steps' samples are solved together.

    Attributes:
        graphs: see the function.
        refused: why the last step could not be recorded; empty if it could, or was.
    """

    def __init__(
        self,
        capture: SampleCapture,
        gradients: GradientWatch,
        anomalies: Anomalies,
        world: World,
        formulation: str,
        sample_steps: int = 1,
    ) -> None:
        self._look = Look(capture, anomalies, sample_steps)
        self._gradients = gradients
        self._anomalies = anomalies
        self._world = world
        self._formulation = formulation
        self._kept: OrderedDict[Hashable, KnownStep] = OrderedDict()
        self._met: OrderedDict[Hashable, str] = OrderedDict()  # why not recorded
        self._recorded = 0
        self._last: Hashable = None
        self._alike = 0  # steps in a row
        self.graphs = graphs
        self.refused = ""

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._kept.clear()
        self._met.clear()
        self._look.forget()

    def summary(self) -> str:
        """One line on how steps are taken, where there is something to say."""
        if self._kept:
            routine = next(reversed(self._kept.values())).routine
            return (
                f"steps are played from a recording: {routine.launches} kernels and "
                f"{routine.operations} operations of torch's at once; it holds "
                f"{routine.held / 2**20:.0f} MiB"
            )
        if self.refused:
            return f"steps are taken launch by launch: {self.refused}"
        return ""

    def look(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Any, dict[str, Any]],
        decided: Hashable | None,
        serves: Callable[[nn.Parameter], bool],
    ) -> Circumstances | None:
        """The circumstances of the step that is due; None if it cannot be recorded.

        Args:
            groups: parameter groups.
            state: of the parameters.
            decided: who updates what; None where a step must be thought through,
                whatever was before.
            serves: whether FROG updates a parameter, as far as is decided.
        """
        device = next((p.device for g in groups for p in g["params"]), None)
        if decided is None or device is None or self.graphs(device) is None:
            return None
        found = self._look.at(groups, state, decided, serves)
        self.refused = found if isinstance(found, str) else ""
        return None if isinstance(found, str) or found.device != device else found

    def find(
        self, now: Circumstances, state: Mapping[Any, dict[str, Any]]
    ) -> KnownStep | None:
        """What was recorded in such circumstances, if the fallback's state fits."""
        found = self._kept.get(now.key)
        if found is None or not all(beside.fits(state) for beside in found.beside):
            return None
        self._kept.move_to_end(found.key)
        return found

    def play(self, known: KnownStep, now: Circumstances) -> Tensor:
        """Do what was recorded.

        Returns:
            Not 0 where the step was skipped.
        """
        found_inf: Tensor
        found_inf, largest = known.routine.play(now.addresses, now.numbers)
        self._gradients.warn_of_growth(largest)
        return found_inf

    def meet(
        self,
        now: Circumstances,
        gathered: Sequence[Gathered],
        grads: Mapping[str, Tensor],
        state: Mapping[Any, dict[str, Any]],
        decided: Hashable | None,
    ) -> None:
        """A step was taken launch by launch: record it if such a one was met before.

        Args:
            now: its circumstances.
            gathered: what each group brought.
            grads: all gradients by parameter.
            state: of the parameters.
            decided: as for `look`, now that it was taken.
        """
        self._alike = self._alike + 1 if now.key == self._last else 1
        self._last, met = now.key, now.key in self._met
        self.refused = self._met[now.key] = self._met.pop(now.key, "")
        if len(self._met) > REMEMBERED:
            self._met.popitem(last=False)
        if not met or self.refused or decided != now.decided:
            return
        if self._recorded >= KEPT and self._alike < IN_A_ROW:
            self.refused = "circumstances keep changing"
            return
        make = self.graphs(now.device)
        assert make is not None
        steps = [step for some in gathered for step in some.steps]
        if any(is_mixture(step.layer) or step.homes for step in steps):
            self.refused = self._met[now.key] = "of experts, or rows that lie apart"
            return
        counters = [*self._anomalies.counts.values(), *self._gradients.tensors()]
        words = WORDS_A_LAYER * (8 + len(steps)) + 2 * len(grads)
        work = partial(self._work, gathered, grads)
        still = [*counters, *_own(steps), *_recent(steps, state)]
        how = (now.moving, still, words, len(now.numbers), now.device)
        try:
            routine = record(make(), work, *how)
            _check_memory(routine, now.device)
        except Refused as error:
            self.refused = self._met[now.key] = str(error)
            return
        except RuntimeError as error:  # torch's, of what no graph can hold
            self.refused = str(error) or type(error).__name__
            self.graphs = lambda device: None  # what it has left is not known
            return
        self._recorded += 1
        beside = [_beside(some, state) for some in gathered]
        self._kept[now.key] = KnownStep(now.key, routine, beside, counters)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _work(
        self,
        gathered: Sequence[Gathered],
        grads: Mapping[str, Tensor],
        board: Board,
    ) -> tuple[Tensor, Tensor]:
        """All that is recorded of a step."""
        largest = self._gradients.look(grads)
        if largest is None:
            raise Refused("no gradient has entries")
        found_inf = (~torch.isfinite(largest)).float()
        self._gradients.count_skipped(found_inf)
        ours = [some for some in gathered if some.group["updated_by"] == "frog"]
        for (group, _, steps), vector in zip(ours, board.numbers, strict=True):
            vector[len(NUMBERS)].copy_(found_inf)
            numbers = numbers_of(group, found_inf)
            numbers.vectors[vector.device] = vector
            how = (group, numbers, self._formulation, self._anomalies.counts)
            step_layers(self._world, steps, *how)
            for step in steps:
                step.write_back()
        return found_inf, largest


def _beside(some: Gathered, state: Mapping[Any, dict[str, Any]]) -> Beside:
    if some.group["updated_by"] == "frog":
        return Beside(counted=[step.layer.weight for step in some.steps])
    if not some.params:
        return Beside()
    fallback = FALLBACKS[some.group["updated_by"]]
    prepared = fallback.prepare(some.params, [state[p] for p in some.params])
    return Beside(params=some.params, needs=fallback.keys, prepared=prepared)


def _own(steps: Iterable[LayerStep]) -> Iterator[Tensor]:
    """Parameters and momentum of layers."""
    for step in steps:
        for rows in (step.params, step.momentum):
            yield from (t for t in rows if t is not None)
        yield from (home for home, _ in step.homes)


def _recent(
    steps: Iterable[LayerStep], state: Mapping[Any, dict[str, Any]]
) -> Iterator[Tensor]:
    """Samples that lie in the state."""
    for step in steps:
        own = state[step.layer.weight]
        yield from (own[key] for key in RECENT_KEYS if key in own)


def _check_memory(routine: Routine, device: torch.device) -> None:
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if routine.held > MOST_MEMORY * total:
        raise Refused(f"it would hold {routine.held / 2**20:.0f} MiB")
