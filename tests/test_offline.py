"""What the default configurations compile to, for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from frog_triton.autotune.offline import SHARED_LIMITS

ROOT = Path(__file__).parents[1]
OLDEST_TRITON = ROOT / ".venv" / "triton-3.6"


def compiled(*arguments, path=None):
    """Resource usage, from a process whose kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-m", "frog_triton.benchmarks.compile_defaults", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT.parent,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(results):
    assert results
    for r in results:
        what = f"{r['kernel']} on sm_{r['capability']}, {r['samples']} {r['dtype']}"
        assert r["spilled"] == 0, what
        assert r["shared"] <= SHARED_LIMITS[r["capability"]], what
        assert r["tensor_core"] > 0 or not r["multiplies"], what
        # Warp-group instructions take 64 rows at a time.
        tiles = r["config"].get("BLOCK_N", 0) >= 64 or r["kernel"] == "_update_kernel"
        if r["capability"] == 90 and r["multiplies"] and tiles:
            assert r["wgmma"] > 0, what


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gram_kernels(dtype):
    check(compiled("--samples", "16", "64", "128", "256", "--dtype", dtype))


def test_convolution_kernels():
    shapes = ("conv", "stem", "grouped-conv", "depthwise", "pointwise")
    check(compiled("--samples", "16", "--formulation", "primal", "--shape", *shapes))


def test_ragged_and_grouped_layers():
    arguments = ("--samples", "32", "--formulation", "gram", "primal")
    arguments += ("--shape", "ragged", "grouped", "--dtype", "float16")
    check(compiled(*arguments, "--capability", "90"))


def test_primal_kernels():
    check(compiled("--samples", "64", "4096", "--formulation", "primal"))


def test_oldest_triton():
    if not OLDEST_TRITON.is_dir():
        pytest.skip("make test installs Triton 3.6 beside the pinned one for this")
    arguments = ("--samples", "64", "--formulation", "gram", "primal")
    results = compiled(*arguments, "--dtype", "bfloat16", path=OLDEST_TRITON)
    assert {r["triton"] for r in results} == {"3.6.0"}
    check(results)
