"""Gradients dropped, layers let go and refused loads on several ranks."""

import fate_cases as cases
import pytest


@pytest.fixture
def two(pools):
    return pools[2]


@pytest.mark.parametrize("kind", ["ddp", "ddp, bucket views", "fsdp"])
@pytest.mark.parametrize("how", ["model.zero_grad", "zero_", "opt.zero_grad"])
def test_a_dropped_gradient_takes_its_samples_along(two, kind, how):
    for worst, same in two.run(cases.dropped, kind, how, {}):
        assert same
        assert worst < 1e-12  # measured 2.8e-16


@pytest.mark.parametrize("kind", ["ddp", "ddp, no_sync", "fsdp", "fsdp, no sync"])
def test_accumulated_passes_are_all_kept(two, kind):
    for worst in two.run(cases.accumulated, kind):
        assert worst < 1e-11  # measured 5.1e-16


def test_ranks_let_go_and_take_back_together(two):
    never, one, both = (), (1,), (0, 1)
    calls = [never, never, one, never, never, never, never, one, never, both]
    expected = ["frog"] * 5 + ["adamw"] * 2 + ["frog"] * 3
    for by, warned, same in two.run(cases.let_go_and_taken_back, calls):
        assert by == expected and warned == 1 and same


def test_an_expert_of_one_rank_or_of_none(two):
    routes = [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0), (0, 0), (0, 0), (1, 0)]
    for frog, same in two.run(cases.experts, routes):
        assert "module.experts.1.weight" in frog and same


def test_a_refused_load_changes_nothing_on_any_rank(two):
    for error, unchanged, same in two.run(cases.refused_load):
        assert "saved momentum_buffer has (2, 2)" in error and unchanged and same
