"""What an optimizer does about tuning: load a table, make one at once, or neither."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..kernels.table import Table, using
from ..warning import warn
from .share import broadcast
from .space import TOP

if TYPE_CHECKING:
    from ..solve.launches import Bucket
    from .cache import Machine
    from .tuner import Tuner

MODES = ("cached", "now", "off")
BUDGET_SECONDS = 240.0
"""For tuning at the first step; well below the time after which ranks that wait for
rank 0 give up."""


class Tuning:
    """The table that an optimizer's launches use.

    Args:
        mode: ``"cached"`` loads what `frog-triton autotune` has found, else what the
            package ships for the GPU, else keeps the defaults; ``"now"`` tunes what is
            missing at the first step; ``"off"`` keeps the defaults.
        folder: of the tables; None takes the user's cache folder.
        group: of ranks that take the table of the first; None where one trains alone.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        mode: str,
        folder: str | os.PathLike[str] | None = None,
        group: Any = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"autotune must be one of {MODES}, got {mode!r}")
        self.mode = mode
        self.folder = folder
        self.group = group
        self.table: Table | None = None

    @contextmanager
    def applied(
        self, device: torch.device, buckets: Callable[[], Sequence[Bucket]]
    ) -> Iterator[None]:
        """Launches in this context use the table; the first time, it is made.

        Args:
            device: of the parameters.
            buckets: gives the layers of this step; asked for only to tune.
        """
        if self.mode == "off":
            yield
            return
        if self.table is None:
            self.table = self._make(device, buckets)
        with using(self.table):
            yield

    def _make(
        self, device: torch.device, buckets: Callable[[], Sequence[Bucket]]
    ) -> Table:
        if device.type != "cuda":
            if self.mode == "now":
                warn(
                    f"autotune='now' times kernels on a GPU, and the model is on "
                    f"{device.type}: defaults are used"
                )
            return Table()
        from .cache import Cache, parse, render, shipped

        machine = machine_of(device)
        table = Table()
        if self.group is None or dist.get_rank(self.group) == 0:
            cache = Cache(self.folder)
            table = shipped(machine).merged(cache.load(machine))
            if self.mode == "now":
                try:
                    _, table = tune(device, buckets(), table, BUDGET_SECONDS)
                    cache.store(machine, table)
                except Exception as error:  # other ranks wait for what is known
                    warn(f"tuning failed, training goes on without: {error!r}")
        if self.group is None:
            return table
        return parse(broadcast(render(machine, table), device, self.group))


def machine_of(device: torch.device) -> Machine:
    """What a table for this device is called."""
    from .cache import Machine

    found = torch.cuda.get_device_properties(device)
    return Machine(found.name, 10 * found.major + found.minor)


def tune(
    device: torch.device,
    buckets: Sequence[Bucket],
    table: Table,
    budget: float,
    top: int = TOP,
    keep: Callable[[Table], object] = lambda table: None,
) -> tuple[Tuner, Table]:
    """Tune what a table lacks, with a progress bar.

    Args:
        device: the GPU.
        buckets: the layers.
        table: what is known.
        budget: seconds.
        top: candidates that are timed for each key.
        keep: called with the table as it grows.

    Returns:
        The tuner, for its reports, and the table.
    """
    from ..kernels.gpu import detect
    from .tuner import CudaTimer, Tuner

    gpu = detect(device)
    assert gpu is not None
    with progress_bar() as progress:
        timer = CudaTimer(device)
        tuner = Tuner(gpu, device, timer, table, top, budget, progress, keep=keep)
        return tuner, tuner.tune(buckets)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], object]]:
    """Gives what shows a task, in words, and the share that is done."""
    try:
        from rich.progress import Progress  # a step must not need it
    except ImportError:
        yield lambda what, share: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("tuning", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)
