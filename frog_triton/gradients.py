"""What a step's gradients tell before anything is changed.

One pass over all gradients finds the largest magnitude of each. A step in which any of
them is not finite is skipped whole; one that is a thousand times what it was a few
steps ago earns a warning. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .linalg.numbers import moved_to
from .linalg.rows import local
from .warning import warn

RECENT = 10
"""Steps that "a few steps ago" may mean."""

GROWTH = 1000.0
"""Growth of the largest gradient that a healthy training does not show."""


def local_grads(
    groups: Iterable[Mapping[str, Any]], names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """Gradients by parameter, those parts that lie on this rank.

    Args:
        groups: parameter groups.
        names: of the parameters.
    """
    return {
        names[p]: local(p.grad)
        for group in groups
        for p in group["params"]
        if p.grad is not None
    }


class GradientWatch:
    """Looks at the gradients of each step, and remembers what was wrong with them."""

    def __init__(self, backend: str = "auto") -> None:
        self._backend = backend
        self._skipped: dict[torch.device, Tensor] = {}
        self._nonfinite: dict[tuple[torch.device, str], Tensor] = {}
        self._together: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}
        self._kept: dict[Hashable, Any] = {}  # by the backend, for looks to come
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._peak = 0.0
        self._warned = False
        self._mail = _Mail()

    def expect(self, params: Mapping[str, Tensor]) -> None:
        """Make the counters of these parameters where they are missing.

        In time, nothing is made while a CUDA graph is captured.
        """
        by_device: dict[torch.device, list[str]] = {}
        for name, param in params.items():
            if (param.device, name) not in self._nonfinite:
                by_device.setdefault(param.device, []).append(name)
        for device, names in by_device.items():
            counts = torch.zeros(len(names), dtype=torch.int32, device=device)
            places = ((device, name) for name in names)
            self._nonfinite |= zip(places, counts.unbind(), strict=True)
            self._together[device, tuple(names)] = counts
            if device not in self._skipped:
                self._skipped[device] = torch.zeros_like(counts[0])

    def counters(self) -> Iterator[Tensor]:
        """All counters."""
        yield from self._skipped.values()
        yield from self._nonfinite.values()

    def found_inf(self, grads: Mapping[str, Tensor], may_wait: bool) -> Tensor | None:
        """Not 0 where a gradient is not finite, so that the step is to be skipped.

        Args:
            grads: as in `look`.
            may_wait: whether growth is looked at, too, with a warning.

        Returns:
            None without gradients.
        """
        largest = self.look(grads)
        if largest is None:
            return None
        if may_wait:
            self.warn_of_growth(largest)
        return (~torch.isfinite(largest)).float()

    def look(self, grads: Mapping[str, Tensor]) -> Tensor | None:
        """Find the largest magnitudes, and count what is not finite.

        Args:
            grads: dense gradients by parameter, of any devices and floating dtypes.

        Returns:
            The largest magnitude of all, on the first one's device: NaN or infinite if
            any gradient is. None without gradients.
        """
        self.expect(grads)
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, grad in grads.items():
            if grad.numel():
                by_device.setdefault(grad.device, {})[name] = grad
        found = []
        for device, there in by_device.items():
            sizes = self._magnitudes(list(there.values()))
            bad = (~torch.isfinite(sizes)).to(torch.int32)
            together = self._together.get((device, tuple(there)))
            if together is None:
                counts = [self._nonfinite[device, name] for name in there]
                torch._foreach_add_(counts, list(bad.unbind()))
            else:
                together += bad
            found.append(sizes.amax())
        if not found:
            return None
        moved = [moved_to(size, found[0].device) for size in found]
        return torch.stack(moved).amax() if len(moved) > 1 else moved[0]

    def _magnitudes(self, grads: Sequence[Tensor]) -> Tensor:
        """Largest magnitude of each, not finite if it holds one; all on one device."""
        try:
            backend = ops.resolve(self._backend, grads[0].device, torch.float32)
        except ValueError:  # Triton's is asked for, elsewhere than on a GPU
            backend = ops.resolve("torch", grads[0].device, torch.float32)
        return backend.magnitudes(grads, self._kept)

    def tensors(self) -> Iterator[Tensor]:
        """All that looks read and write beside gradients."""
        yield from self.counters()
        for kept in self._kept.values():
            yield kept.fixed()

    def count_skipped(self, skipped: Tensor | None) -> None:
        """Count a step.

        Args:
            skipped: 1 if it was skipped, else 0; on any device. None had no gradient.
        """
        if skipped is None:
            return
        device = skipped.device
        if device not in self._skipped:
            self._skipped[device] = torch.zeros_like(skipped, dtype=torch.int32)
        self._skipped[device] += skipped.to(torch.int32)

    def warn_of_growth(self, largest: Tensor) -> None:
        """Warn, once, if gradients have run away.

        A GPU's number is read when a later step finds that it has arrived.

        Args:
            largest: from `look`.
        """
        if self._warned:
            return
        for size in self._mail.exchange(largest):
            if not math.isfinite(size):
                continue
            before = max(self._recent, default=math.inf)
            if size > GROWTH * before > 0 and size > self._peak:
                self._warned = True
                warn(
                    f"the largest gradient is {size:.2g}, {size / before:.2g} times "
                    "what it was a few steps ago and the largest of this training: it "
                    "may be running away; lower lr or fallback_lr, or clip gradients "
                    "(torch.nn.utils.clip_grad_norm_)"
                )
            self._recent.append(size)
            self._peak = max(self._peak, size)

    def counts(self) -> dict[str, dict[str, int]]:
        """What was counted, as `FROG.anomalies` reports it; waits for the device."""
        found: dict[str, dict[str, int]] = {}
        skipped = sum(int(count) for count in self._skipped.values())
        if skipped:
            found["model"] = {"skipped_steps": skipped}
        key = "nonfinite_gradients"
        for (_, name), counter in self._nonfinite.items():
            if count := int(counter):
                entry = found.setdefault(name, {})
                entry[key] = entry.get(key, 0) + count
        return found


class _Mail:
    """Brings numbers from a GPU to the host without waiting, one at a time."""

    def __init__(self) -> None:
        self._sent: tuple[torch.cuda.Event, Tensor] | None = None

    def exchange(self, number: Tensor) -> list[float]:
        """Send a number, and take what has arrived: a CPU's at once."""
        if number.is_cpu:
            return [float(number)] if type(number) is Tensor else []  # none of a fake
        arrived: list[float] = []
        if not number.is_cuda:
            return arrived
        if self._sent is not None and self._sent[0].query():
            arrived.append(float(self._sent[1]))
            self._sent = None
        if self._sent is None:
            copy = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=True)
            copy.copy_(number, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(number.device))
            self._sent = event, copy
        return arrived
