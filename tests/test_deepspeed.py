"""DeepSpeed's engine with FROG on two ranks; skipped where it is not installed.

On a CPU it needs a C++ compiler, and DS_ACCELERATOR=cpu in the environment.
"""

import pytest

pytest.importorskip("deepspeed")

import deepspeed_cases as cases
import oracles


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stage_0_steps_as_one_process(pools, accumulate):
    for weights, expected in pools[2].run(cases.without_zero, accumulate):
        for name, weight in expected.items():
            error = oracles.relative_error(weights[name], oracles.as_numpy(weight))
            assert error < 1e-3  # in float32; measured 5.3e-5


def test_stage_0_with_autocast(pools):
    config = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    for error, same in pools[2].run(cases.error_with, config):
        assert error is None and not same


@pytest.mark.parametrize(
    ("stage", "half"), [(0, True), *((s, half) for s in (1, 2, 3) for half in (0, 1))]
)
def test_other_stages_are_errors(pools, stage, half):
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bool(half)}}
    for error, same in pools[2].run(cases.error_with, config):
        assert "that FROG was not given" in error and "stage 0" in error
        assert same


def test_a_model_of_stage_3(pools):
    config = {"zero_optimization": {"stage": 3}}
    for error, _ in pools[2].run(cases.error_with, config, True):
        assert "first.weight is partitioned by DeepSpeed's ZeRO-3" in error
