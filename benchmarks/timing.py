"""How long functions take on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def milliseconds(
    run: Callable[[], Any], before: Callable[[], Any], repeats: int
) -> list[float]:
    """Time of each run between two events, after a few that do not count."""
    times = []
    for i in range(repeats + 5):
        before()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end))
    return times


def microseconds(run: Callable[[], Any]) -> float:
    """Median of a GPU function's time, the cache flushed before each run."""
    import triton

    return 1e3 * float(triton.testing.do_bench(run, return_mode="median"))


def matrix_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Operations per second of the vendor's matrix product in a dtype, measured."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / (1e-6 * microseconds(lambda: a @ b))
