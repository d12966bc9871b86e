"""Training steps of real models, and how long the host and the GPU take over them."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .. import FROG, ops, optimizer
from ..eager import eager_work
from ..kernels.bundle import Bundle
from ..kernels.launch import Launch, recording
from ..presets import SAMPLINGS
from .models import resnet
from .train.models import GPT

WARM_UP = 5
"""Rounds that do not count: kernels are compiled, outputs are found."""


@dataclass(frozen=True)
class Workload:
    """A model with a batch.

    Attributes:
        model: to be trained.
        inputs: of the batch.
        classes: of its targets.
        sample_size: N.
    """

    model: nn.Module
    inputs: Tensor
    classes: int
    sample_size: int

    def passes(self) -> None:
        """Forward and backward."""
        outputs = self.model(self.inputs).flatten(0, -2)
        targets = torch.arange(len(outputs), device=outputs.device) % self.classes
        cross_entropy(outputs, targets).backward()

    def twin(self) -> Workload:
        """The same with another model."""
        model = copy.deepcopy(self.model)
        return Workload(model, self.inputs, self.classes, self.sample_size)


def _gpt2_small(narrow: bool) -> tuple[nn.Module, Tensor, int]:
    width, context, symbols = (32, 16, 64) if narrow else (768, 256, 50257)
    model = GPT(symbols, context, depth=12, width=width, heads=width // 8)
    inputs = torch.arange(4 * context).view(4, context) % symbols
    return model, inputs, 768 // width


def _resnet(depth: int, narrow: bool) -> tuple[nn.Module, Tensor, int]:
    large = depth == 50
    width = 16 if narrow else 64
    pixels = {18: (8, 32), 50: (32, 224)}[depth][not narrow]
    model = resnet(depth, 1000 if large else 10, not large, width)
    return model, torch.randn(40, 3, pixels, pixels), 64 // width


MODELS: Mapping[str, Callable[[bool], tuple[nn.Module, Tensor, int]]] = {
    "gpt2-small": _gpt2_small,
    "resnet18": lambda narrow: _resnet(18, narrow),
    "resnet50": lambda narrow: _resnet(50, narrow),
}
"""Model, inputs, and by how much it is narrower; in full, or narrow and as deep."""


def workload(name: str, device: torch.device) -> Workload:
    """A model in full for a GPU; narrow for a CPU, so that the host's part shows.

    A narrow one has as many tensors, and a sample size that is smaller by as much as
    its layers are, so that they are solved in the same formulations.

    Args:
        name: one of `MODELS`.
        device: of everything.
    """
    torch.manual_seed(0)
    model, inputs, narrower = MODELS[name](device.type == "cpu")
    size = SAMPLINGS["positions"] // narrower
    classes = 10  # targets, which any of the models has
    return Workload(model.to(device), inputs.to(device), classes, size)


@contextmanager
def triton_anywhere(device: torch.device) -> Iterator[Callable[[], None]]:
    """The Triton backend: on a CPU kernels neither compile nor run.

    What they would write is undefined then, but for what the host looks at. The rest of
    a step goes as on a GPU, whose numbers the host does not read.

    Yields:
        Forgets the launches so far, and the tensors that they hold.
    """
    if device.type == "cuda":
        yield lambda: None
        return
    from ..ops import triton_ops

    taken = mock.patch.object(ops, "resolve", lambda *_: triton_ops)
    idle = mock.patch.object(Launch, "run", _pretend)
    bound = mock.patch.object(Bundle, "run", lambda bundle: bundle.bound)
    unread = mock.patch.object(optimizer, "may_read", lambda *_: False)
    unseen = mock.patch.object(triton_ops, "on_host", lambda _: False)
    with taken, idle, bound, unread, unseen, recording() as launches:

        def forget() -> None:
            launches.clear()
            launches.tensors.clear()

        yield forget


def _pretend(launch: Launch) -> None:
    """Leave all as it is; the largest gradients, on which a step depends, are 1."""
    if launch.name == "_largest_parts_kernel":
        with _disable_current_modes():
            launch.args["largest_ptr"].fill_(1.0)


class Silence:
    """In place of a CUDA graph on a CPU: what it plays takes the host no time."""

    held = 0

    def recording(self) -> AbstractContextManager[Any]:
        """See `frog_triton.routine.Graph`; what is recorded is done, too."""
        return nullcontext()

    def replay(self) -> None:
        """Do nothing."""


class Time(NamedTuple):
    """Microseconds of one run; a GPU's are 0 where there is none."""

    host: float
    device: float


def timed(run: Callable[[], Any], device: torch.device) -> Time:
    """Time a run; the host waits for the device before and after, not within.

    Without a device it is the thread's own time, to which others on the machine add
    little.
    """
    if device.type == "cpu":
        begun = time.thread_time()
        run()
        return Time(1e6 * (time.thread_time() - begun), 0.0)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    begun = time.perf_counter()
    run()
    host = time.perf_counter() - begun
    end.record()
    end.synchronize()
    return Time(1e6 * host, 1e3 * start.elapsed_time(end))


def interleaved(
    parts: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    after: Callable[[], None],
) -> dict[str, Time]:
    """Medians of parts that are run in turns.

    Args:
        parts: in their order.
        rounds: that count.
        device: that they run on.
        after: each round, and not timed.
    """
    found: dict[str, list[Time]] = {name: [] for name in parts}
    for _ in range(WARM_UP + rounds):
        for name, run in parts.items():
            found[name].append(timed(run, device))
        after()
    return {
        name: Time(*map(statistics.median, zip(*times[WARM_UP:], strict=True)))
        for name, times in found.items()
    }


@dataclass(frozen=True)
class Count:
    """What a run asks for.

    Attributes:
        kernels: launches of ours.
        launches: of torch's operations that launch a kernel on a GPU.
        operations: of torch's, views and allocations among them.
    """

    kernels: int
    launches: int
    operations: int

    def __sub__(self, other: Count) -> Count:
        mine, theirs = asdict(self), asdict(other)
        return Count(**{name: mine[name] - theirs[name] for name in mine})


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> Count:
    """Count what a run asks for; on a CPU inside of `triton_anywhere`."""
    with recording() as launches, _Operations() as seen:
        work = eager_work(run)
    return Count(len(launches), work.launches, seen.count)


def frog(work: Workload, **options: Any) -> FROG:
    """FROG with the Triton backend and, but for N, its defaults."""
    options = {"backend": "triton", "sample_size": work.sample_size, **options}
    made = FROG(work.model, **options)
    if not work.inputs.is_cuda:
        made._routines.graphs = lambda device: Silence
    return made


def hook_times(
    name: str, device: torch.device, rounds: int, **options: Any
) -> dict[str, dict[str, float]]:
    """Forward and backward of a model, without and with FROG's hooks.

    Args:
        name: one of `MODELS`.
        device: of everything.
        rounds: whose median is taken.
        options: of FROG.

    Returns:
        Host's and device's microseconds.
    """
    bare = workload(name, device)
    hooked = bare.twin()
    with triton_anywhere(device) as forget:
        ours = frog(hooked, **options)
        parts = {
            "drop the twin's gradients": bare.model.zero_grad,
            "without hooks": bare.passes,
            "drop gradients": ours.zero_grad,
            "with hooks": hooked.passes,
            "step": ours.step,
        }
        times = interleaved(parts, rounds, device, forget)
        ours.close()
    return {part: times[part]._asdict() for part in ("without hooks", "with hooks")}
