from __future__ import annotations

import functools
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

# Kernels run in Triton's interpreter where there is no GPU; it must be chosen before
# they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tensors here are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

# What is installed is tested, here and in processes that tests start. The working
# directory may hold another frog_triton: the sources, without kernels and benchmarks.
ROOT = Path(__file__).parents[1]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
os.environ["PYTHONSAFEPATH"] = "1"

# `oracles` and `cases` are plain modules beside the tests.
sys.path.append(str(Path(__file__).parent))

if not torch.cuda.is_available():
    from interpreter import hasten

    hasten()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Convolutions and recurrent layers in float32, here and in kernels on images.

    By default cuDNN rounds them to tf32, where no oracle in float64 follows; products
    of float32 samples then are tf32x3. A test of that switch sets it itself.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def pools():
    """Gloo ranks by their number; each pool starts when it is first used."""
    from rank_pool import RankPool

    pools = {size: RankPool(size) for size in (2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def poisoned(monkeypatch):
    """Every `empty` is full of NaN, so that what a kernel leaves unwritten shows."""

    def poison(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return wrapper

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    """No operation of torch's touches what launches that wait read and write."""
    from watch import Watch

    from frog_triton.kernels import queue

    waiting = queue.deferring

    @contextmanager
    def watched(made):
        with waiting(made), nullcontext() if made is None else Watch():
            yield

    monkeypatch.setattr(queue, "deferring", watched)


KERNEL_TESTS = (
    "test_bundle",
    "test_kernels",
    "test_conv_kernels",
    "test_queue",
    "test_newton_schulz",
    "test_ranges",
    "test_routines",
)
"""Modules whose tests run on the GPU where there is one, so that `-m gpu` has them.

So do single tests whose name ends in ``_of_kernels``.
"""

FAST_TESTS = (
    "test_layers",
    "test_optimizer",
    "test_orthogonal",
    "test_package",
    "test_preconditioner",
    "test_recognize",
    "test_routing",
    "test_state",
)
"""Modules that `make test-fast` runs whole; of kernels it runs a case of each test."""


def fast(items):
    """The core that an edit is likely to break, in under a minute."""
    cases = {}
    for item in items:
        if item.path.stem in FAST_TESTS:
            yield item
        elif item.path.stem in KERNEL_TESTS:
            cases.setdefault((item.path, item.originalname), []).append(item)
    for alike in cases.values():
        yield alike[len(alike) // 2]  # sizes grow from degenerate to large


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in fast(items):
        item.add_marker("fast")
    if torch.cuda.is_available():
        for item in items:
            named = getattr(item, "originalname", "").endswith("_of_kernels")
            if named or item.path.stem in KERNEL_TESTS:
                item.add_marker("gpu")
    else:
        skip = pytest.mark.skip(reason="no NVIDIA GPU here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
