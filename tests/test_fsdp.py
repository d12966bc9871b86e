"""fully_shard on two and four gloo ranks: rows stay where they lie."""

import fsdp_cases as cases
import oracles
import pytest
from cases import PAPER

MESHES = [(2, 1), (4, 1), (4, 2), (2, 2)]  # ranks, replicas
PLAIN = PAPER | {"damping": 1e-2, "cg_iters": 2}


@pytest.mark.parametrize(("size", "replicas"), MESHES)
@pytest.mark.parametrize(
    "options",
    [
        {"cg_iters": 2},
        PLAIN | {"formulation": "primal", "nesterov": True, "momentum": 0.8},
        PLAIN | {"fallback": "adamw"},
        PLAIN | {"orthogonalize": True, "nesterov": True},
    ],
)
def test_shards_step_as_one_process(pools, size, replicas, options):
    for worst, model, sharded in pools[size].run(
        cases.against_one_process, replicas, options
    ):
        assert sharded
        assert worst < 1e-12  # measured 4.4e-14
        assert model < 1e-12  # measured 5.4e-14


@pytest.mark.parametrize(("size", "replicas"), MESHES[:3])
def test_no_weight_moves(pools, size, replicas):
    for counts, table in pools[size].run(cases.collectives_of_a_step, replicas):
        shared = 1 if replicas > 1 else 0
        assert counts == {"c10d.allgather_": 1 + shared, "c10d.alltoall_base_": 1}
        if not shared:
            assert "and 0 B of rows (0)" in table


@pytest.mark.parametrize("policy", [True, False])
def test_bfloat16(pools, policy):
    for finite, wide, anomalies in pools[2].run(cases.sharded_dtypes, policy):
        assert finite and wide and not anomalies


def test_other_placements_are_errors_at_construction(pools):
    for errors in pools[2].run(cases.other_placements):
        assert "0.weight has placements (Shard(dim=1),)" in errors["columns"]
        assert "exclude=['0.weight']" in errors["columns"]
        assert "1.weight is a plain tensor, but 0.weight is" in errors["plain"]
        assert errors["excluded"] == ["frog", "adamw"]
        assert "fully_shard on the whole model" in errors["plain"]
        assert "leave it out" in errors["group"]
        assert "0.bias is a plain tensor" in errors["bias"]


def test_values_that_are_not_finite(pools):
    results = pools[4].run(cases.anomalies)
    saw = []
    for finite, _, unchanged, anomalies in results:
        assert finite and unchanged
        assert anomalies["model"] == {"skipped_steps": 1}  # on every rank
        saw.append("conv2.weight" in anomalies)
    assert saw == [True, False, False, False]
    assert sum(samples for _, samples, *_ in results) == 1


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_fallback_steps_on_shards(pools, fallback):
    for worst in pools[4].run(cases.fallback_on_shards, fallback):
        assert worst < 1e-12  # measured 2.2e-14


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, "fsdp"), (2, "fsdp")),
        ((2, "fsdp"), (4, "fsdp")),
        ((4, "fsdp"), (2, "fsdp")),
        ((4, "hsdp"), (2, "ddp")),
        ((2, "ddp"), (4, "hsdp")),
        ((4, "ddp"), (2, "ddp")),
    ],
)
def test_distributed_checkpoint(pools, tmp_path, saved, loaded, fallback):
    (size, kind), (other_size, other_kind) = saved, loaded
    folder = str(tmp_path / "checkpoint")
    # Other ranks draw other samples: only if all are kept do both end alike.
    samples = 8 if saved == loaded else 10_000
    args = (fallback, samples, folder)
    kept = pools[size].run(cases.checkpoint, kind, *args, True)
    read = pools[other_size].run(cases.checkpoint, other_kind, *args, False)
    expected_momenta, expected_steps, expected_weights, expected = kept[0]
    for momenta, steps, weights, trained in read:
        assert cases.same(weights, expected_weights)
        assert cases.same(momenta, expected_momenta)
        assert steps == expected_steps and set(steps.values()) == {2.0}
        if saved == loaded:
            assert cases.same(trained, expected)
        for name, weight in trained.items():
            error = oracles.relative_error(weight, oracles.as_numpy(expected[name]))
            assert error < 1e-12  # measured 1.2e-14


def test_state_dict_of_a_rank_resumes_bit_for_bit(pools, tmp_path):
    whole = pools[2].run(cases.plain_resume, str(tmp_path), True)[0]
    for resumed in pools[2].run(cases.plain_resume, str(tmp_path), False):
        assert cases.same(resumed, whole)
