"""What the optimizer tells of itself when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from .anomalies import Anomalies
from .assignment import Assignment
from .capture.capture import SampleCapture
from .diagnostics import Diagnostics, memory_usage
from .gradients import GradientWatch
from .model.routing import RoutingTable
from .options import Options

if TYPE_CHECKING:
    from .distributed import World
    from .routines import Routines


class Inspection(Optimizer):
    """Those methods of `FROG` that change nothing."""

    capture: SampleCapture
    _assignment: Assignment
    _anomalies: Anomalies
    _gradients: GradientWatch
    _solved: dict[str, str]
    _world: World
    _routines: Routines
    _observe: Callable[..., None] | None
    _options: Options

    @property
    def formulation(self) -> str:
        """As given: ``"primal"``, ``"gram"`` or ``"auto"``."""
        return self._options.formulation

    @property
    def backend(self) -> str:
        """As given: ``"torch"``, ``"triton"`` or ``"auto"``."""
        return self._options.backend

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can capture steps."""
        return self._options.capturable

    def describe(self, file: Any = None) -> RoutingTable:
        """Print, and return, who updates each parameter and why.

        After a step, also the formulation that each layer was solved in, and on
        several ranks the bytes that this one sent.

        Args:
            file: where to print; standard output by default.
        """
        table = self.routes()
        print(table, file=file)
        return table

    def routes(self) -> RoutingTable:
        """What `describe` prints."""
        table = self._assignment.routes(self.param_groups, self._solved, self._world)
        table.note = "\n".join(filter(None, [table.note, self._routines.summary()]))
        return table

    def anomalies(self) -> dict[str, dict[str, int]]:
        """What was not finite so far; reading it waits for the device.

        A step in which any gradient is not finite changes nothing. On several ranks
        each counts what it holds, and all skip together.

        Returns:
            Only what there was: under ``"model"`` the ``skipped_steps``, without those
            that a GradScaler skips; under the name
            of a parameter, in how many steps its gradient held values that are not
            finite, ``nonfinite_gradients``; and under that of a layer
            ``nonfinite_samples``, rows that took the identity Fisher because of
            samples that were not finite (with `sample_steps` above 1 such entries count
            as zero, and nothing is counted), and ``overflowing_momenta``, rows left as
            they were because their momentum would not have been finite.
        """
        return self._anomalies.add_to(self._gradients.counts())

    @contextmanager
    def diagnose(self) -> Iterator[Diagnostics]:
        """Steps in this context are looked at; all others cost nothing more.

        Examples:
            >>> with opt.diagnose() as diagnostics:
            ...     opt.step()
            >>> diagnostics.read()["fc"]["cg_residual"]  # waits for the device
        """
        diagnostics = Diagnostics()
        self._observe = diagnostics.observe
        try:
            yield diagnostics
        finally:
            self._observe = None

    def memory_usage(self) -> dict[str, int]:
        """Bytes that this optimizer holds at this moment.

        Returns:
            ``state`` (of all parameters, the fallback's too), ``samples`` (between a
            backward pass and `step`), ``counters`` of anomalies, and ``total``.
        """
        held = (t for values in self.state.values() for t in values.values())
        state = (t for t in held if isinstance(t, Tensor))
        counters = [*self._anomalies.counts.values(), *self._gradients.counters()]
        return memory_usage(state, self.capture.tensors(), counters)
