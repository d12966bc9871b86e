"""Time spent in the two halves of a step, without waiting for the device in between."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import torch


class Clock(ABC):
    """Takes marks: before a step, and after each backward pass and each optimizer."""

    def __init__(self) -> None:
        self._marks: list[Any] = []
        self._steps: list[list[Any]] = []
        self._spans: list[tuple[float, float]] = []

    @abstractmethod
    def seconds(self) -> float:
        """Of training, from no certain start."""

    @abstractmethod
    def _now(self) -> Any:
        """A point in time, perhaps one that the device has yet to reach."""

    @abstractmethod
    def _milliseconds(self, start: Any, end: Any) -> float:
        """Between two points that have passed."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """Most memory allocated since the clock was made."""

    def mark(self) -> None:
        """Take a mark."""
        self._marks.append(self._now())

    def end_step(self) -> None:
        """The marks since the last call are those of one step."""
        self._steps.append(self._marks)
        self._marks = []

    def wait(self) -> None:
        """Wait until the device is done."""
        for marks in self._steps:
            spans = [self._milliseconds(a, b) for a, b in pairwise(marks)]
            self._spans.append((sum(spans[::2]), sum(spans[1::2])))
        self._steps.clear()

    def medians(self) -> tuple[float, float]:
        """Forward with backward pass, and optimizer: median milliseconds a step."""
        first, second = zip(*self._spans, strict=True)
        return statistics.median(first), statistics.median(second)


class _CPUClock(Clock):
    """With one thread, the processor's time: other programs do not show in it."""

    def __init__(self) -> None:
        super().__init__()
        alone = torch.get_num_threads() == 1
        self._timer = time.process_time if alone else time.perf_counter

    def seconds(self) -> float:
        return self._timer()

    def _now(self) -> float:
        return self._timer()

    def _milliseconds(self, start: float, end: float) -> float:
        return 1000 * (end - start)

    def peak_bytes(self) -> int | None:
        return None  # the process's peak would include the runs before


class _CUDAClock(Clock):
    def __init__(self) -> None:
        super().__init__()
        torch.cuda.reset_peak_memory_stats()

    def seconds(self) -> float:
        return time.perf_counter()

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        torch.cuda.synchronize()
        super().wait()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated()


def clock(device: torch.device) -> Clock:
    """The clock for a device."""
    return _CUDAClock() if device.type == "cuda" else _CPUClock()
