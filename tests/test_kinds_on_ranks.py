"""Every layer kind on two and four gloo ranks, sharded and not.

What one process does with a kind is held against oracles elsewhere; here ranks with
parts of a batch do the same as one process that has all of it.
"""

import kinds_on_ranks as cases
import oracles
import pytest

CUT = {
    "conv1d": "dimension 0, which cuts its rows: shard it on 1 by fully_shard's",
    "transposed": "dimension 0, which cuts its rows: shard it on 1 by fully_shard's",
    "transposed, groups": "dimension 0, which cuts its groups",
    "bare": "see frog_triton.linear",  # which is given what the shards make
}
WHOLE = [kind for kind in cases.NETS if kind not in CUT]
PLAIN = {"orthogonalize": False, "sampling": "examples"}

# Measured: 5e-14 of most kinds, and 8e-13 of attention, where biases of keys have
# gradients of rounding alone.
TOLERANCE = 1e-11


def run(pool, kind, wrap, options=None, alone=None, empty=()):
    """The tables of all ranks, and samples of the first layer."""
    args = (kind, wrap, options, alone, empty)
    results = pool.run(cases.against_one_process, *args)
    for worst, equal, _, _, told in results:
        assert equal
        assert worst < TOLERANCE
        assert told == []
    return [result[2] for result in results], [r[3]["first"] for r in results]


def updated_by(table, start):
    return {by for name, (by, _) in table.items() if name.startswith(start)}


@pytest.mark.parametrize("kind", cases.NETS)
def test_ranks_step_as_one_process(pools, kind):
    tables, samples = run(pools[2], kind, "ddp")
    assert samples == [[16, 32]] * 2
    for table in tables:
        assert "frog" in updated_by(table, "layer.")


@pytest.mark.parametrize("kind", ["memory", "experts, inputs first", "transposed"])
def test_four_ranks_step_as_one_process(pools, kind):
    run(pools[4], kind, "ddp", PLAIN)


@pytest.mark.parametrize("kind", cases.NETS)
def test_a_rank_without_data(pools, kind):
    _, samples = run(pools[2], kind, "ddp", empty=(1,))
    assert samples == [[32, 32], [0, 32]]


@pytest.mark.parametrize("kind", WHOLE)
def test_shards_step_as_one_process(pools, kind):
    tables, _ = run(pools[2], kind, "fsdp")
    for table in tables:
        assert "frog" in updated_by(table, "layer.")


@pytest.mark.parametrize("kind", ["self", "experts", "experts, inputs first"])
def test_four_shards_of_rows_that_they_do_not_divide(pools, kind):
    """A rank holds a part of the rows that meet one input; another no expert."""
    run(pools[4], kind, "fsdp", PLAIN)


@pytest.mark.parametrize("kind", ["memory", "lstm", "own forward"])
def test_a_shard_without_data(pools, kind):
    run(pools[2], kind, "fsdp", empty=(0,))


@pytest.mark.parametrize("kind", ["memory", "experts, inputs first"])
def test_replicas_of_shards(pools, kind):
    run(pools[4], kind, "hsdp", PLAIN)


@pytest.mark.parametrize("kind", CUT)
def test_shards_that_cut_rows_are_left_to_the_fallback(pools, kind):
    tables, _ = run(pools[2], kind, "fsdp", alone={"exclude": "layer"})
    for table in tables:
        by, reason = table["layer.weight"]
        assert by == "adamw" and CUT[kind] in reason
        assert updated_by(table, "layer.") == {"adamw"}


@pytest.mark.parametrize("kind", ["conv1d", "transposed"])
@pytest.mark.parametrize("options", [{}, PLAIN])
def test_rows_on_the_second_dimension_may_be_sharded_there(pools, kind, options):
    tables, _ = run(pools[2], kind, "fsdp, second", options)
    for table in tables:
        assert updated_by(table, "layer.weight") == {"frog"}


def test_a_bare_matrix_need_not_be_on_the_mesh(pools):
    for table in pools[2].run(cases.beside_the_mesh):
        assert updated_by(table, "layer.") == {"adamw"}
        assert updated_by(table, "first.") == {"frog"}


# -- output layers ---------------------------------------------------------------------

WRONG = ["one", "two", "layer", "first"]
RIGHT = ["two", "first", "layer", "one"]
FOUND = "FROG: output layers, as a step shows: "


@pytest.mark.parametrize(
    ("wrap", "branches", "empty", "outputs"),
    [
        ("ddp", ["one"], (), {"one"}),
        ("fsdp", ["one"], (), {"one"}),
        ("ddp", ["one"], (1,), {"one"}),
        ("ddp", ["one", "two"], (), {"one", "two"}),
        ("ddp", ["one", None], (), {"one", "layer"}),  # the second leaves early
        ("ddp", [None, "two"], (1,), {"layer", "two"}),
    ],
)
def test_all_ranks_find_the_same_output_layers(pools, wrap, branches, empty, outputs):
    for rank, (first, last, equal, lines) in enumerate(
        pools[2].run(cases.search, wrap, WRONG, branches, empty)
    ):
        left = {name.partition(".")[0] for name, by in first.items() if by == "adamw"}
        assert left == outputs
        assert last == first and equal
        # What is told is told by one rank.
        assert len(lines) == (0 if rank else 2)
        if rank == 0:
            found = lines[1].partition(". FROG preconditions ")[0]
            found = found.removeprefix(FOUND).replace("module.", "")
            assert set(found.replace(".weight", "").split(", ")) == outputs


def test_a_right_guess_is_told_once(pools):
    results = pools[2].run(cases.search, "ddp", RIGHT, ["one"])
    assert [len(lines) for *_, lines in results] == [1, 0]
    assert "output layer 7.9% (module.one.weight" in results[0][-1][0]


def test_distributed_checkpoint_on_another_number_of_ranks(pools, tmp_path):
    folder = str(tmp_path / "checkpoint")
    expected_table, expected = pools[2].run(cases.checkpoint, folder, True)[0]
    assert updated_by(expected_table, "layer.") == {"frog"}
    for table, weights in pools[4].run(cases.checkpoint, folder, False):
        for name, (by, reason) in table.items():
            expected_by, expected_reason = expected_table[name]
            assert by == expected_by
            assert reason.split(";")[0] == expected_reason.split(";")[0]
        for name, weight in weights.items():
            error = oracles.relative_error(weight, oracles.as_numpy(expected[name]))
            assert error < 1e-12  # measured 1e-15
