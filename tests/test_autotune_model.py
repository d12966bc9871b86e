"""What may be tuned, and what the model says about it before anything runs."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from adding import SUM_SPLITS, SumConfig
from cases import without_tensors
from layer_shapes import BF16, CONV, DEPTHWISE, F32, LINEAR, MANY, RAGGED, geometry

from frog_triton.autotune import space
from frog_triton.autotune.jobs import (
    costliest,
)
from frog_triton.autotune.model import occupancy, predict
from frog_triton.autotune.offline import Resources
from frog_triton.autotune.shortlist import (
    keys,
    shortlist,
)
from frog_triton.autotune.space import invalid
from frog_triton.kernels.gpu import GPUS
from frog_triton.kernels.gram import GRAM, GRAM_TERMS, GramConfig
from frog_triton.kernels.launch import Launch, launch, recording
from frog_triton.kernels.momentum import MOMENTUM_PROJECT
from frog_triton.kernels.primal_forward import PRIMAL_FORWARD, ForwardConfig
from frog_triton.kernels.registry import KERNELS, kernel_of
from frog_triton.kernels.table import Table, kernel_key, using
from frog_triton.kernels.work import work
from frog_triton.solve.launches import Bucket, LayerShape, step_launches

H200 = GPUS["h200"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", [LINEAR, CONV, DEPTHWISE], ids=lambda s: s.name)
def test_pruning_never_drops_the_default(shape, gpu):
    found = keys([geometry(shape)])
    assert {kernel_of(asked.key) for asked in found} <= {
        kernel for kernel in KERNELS.values() if kernel.values
    }
    for asked in found:
        report = shortlist(asked, GPUS[gpu], top=1)
        assert asked.launch.config in [c.config for c in report.candidates]
        assert len(report.candidates) <= 2
        total = len(list(space.candidates(kernel_of(asked.key), asked.launch.config)))
        assert sum(report.pruned.values()) + len(report.candidates) == total


def test_every_default_is_valid():
    for shape in (LINEAR, CONV):
        for asked in keys([geometry(shape)]):
            launch = asked.launch
            args = launch.args
            sizes = {k.lower(): args[k] for k in "NRD" if k in args}
            kind = "alone" if args.get("PROJECT") is False else ""
            for gpu in GPUS.values():
                kernel = kernel_of(asked.key)
                assert (
                    invalid(kernel, launch.config, sizes, kind, gpu.capability) is None
                )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"BLOCK_N": 48}, "power of two"),
        ({"BLOCK_R": 128}, "far beyond"),
        ({"BLOCK_N": 256, "BLOCK_R": 64, "num_warps": 1}, "too many accumulators"),
        ({"BLOCK_N": 16, "BLOCK_R": 16, "num_warps": 16}, "fewer accumulators"),
        ({"BLOCK_D": 8}, "16 and more"),
        ({"BLOCK_N": 256, "BLOCK_D": 128, "num_stages": 4}, "shared memory"),
    ],
)
def test_what_cannot_serve_is_named(change, why):
    config = replace(ForwardConfig(num_warps=8), **change)
    sizes = {"n": 4096, "r": 32, "d": 768}
    found = invalid(PRIMAL_FORWARD, config, sizes, "", 80)
    assert found is not None and why in found


def test_keys_hold_for_batches_of_about_the_same_size():
    sizes = [kernel_key(GRAM.name, {"n": n}, (BF16,)) for n in (33, 48, 64)]
    assert set(sizes) == {"gram n64 bfloat16"}
    assert kernel_key(GRAM.name, {"n": 65}, (BF16,)) == "gram n128 bfloat16"
    assert kernel_key(GRAM.name, {"n": 64}, (F32,)) == "gram n64 float32"
    assert kernel_of("gram n64 bfloat16") is GRAM


def test_launches_take_their_configurations_from_the_table():
    default = {a.config.key: a.config for a in step_launches(geometry(LINEAR), "gram")}
    key = next(k for k in default if k.startswith("gram n64"))
    changed = GramConfig(BLOCK_N=32, BLOCK_D=64, programs=512)
    with using(Table({key: changed})):
        launches = {a.config.key: a for a in step_launches(geometry(LINEAR), "gram")}
    assert launches[key].config == changed != default[key]
    assert launches[key].grid[0] == 4  # tiles of 32 by 32
    others = [k for k in default if k != key]
    assert all(launches[k].config == default[k] for k in others if k)
    with using(Table({key: ForwardConfig()})):  # of another kernel: not taken
        launches = {a.config.key: a for a in step_launches(geometry(LINEAR), "gram")}
    assert launches[key].config == default[key]


def plain(launch):
    """A launch without its tensors."""
    return launch.name, launch.grid, without_tensors(launch), launch.config


def again(launch, config):
    """What its kernel makes of a launch's arguments with a configuration."""
    return launch.kernel.launches(config, launch.grid[1], launch.args)


@pytest.mark.parametrize(
    "shape", [LINEAR, CONV, DEPTHWISE, RAGGED, MANY], ids=lambda s: s.name
)
@pytest.mark.parametrize("nesterov", [False, True])
def test_launches_are_foretold_for_every_configuration(shape, nesterov):
    """The model's grids, splits and arguments are those of the launchers."""
    bucket = Bucket(shape, 2, 4, nesterov, (BF16, F32, BF16))
    checked = Counter()
    for asked in keys([bucket]):
        kernel = kernel_of(asked.key)
        found = list(space.candidates(kernel, asked.launch.config))
        for config in found[:: len(found) // 12 + 1]:
            with using(Table({asked.key: config})):
                made = step_launches(bucket, asked.formulation)
            ours = [a for a in made if a.config.key == asked.key]
            expected = [plain(a) for a in ours]
            for made in again(asked.launch, config):
                assert plain(made) in expected, (asked.key, config)
            checked[kernel] += 1
            as_it_is, *_ = again(asked.launch, asked.launch.config)
            assert plain(as_it_is) == plain(asked.launch)
    assert all(checked.values()) and len(checked) >= 4


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("grid", [(2**31,), (1, 65536), (1, 1, 65536)])
def test_grids_that_no_gpu_has_are_refused(grid, run):
    config = SumConfig()
    words = rf"_sum_splits_kernel.*{re.escape(str(grid))}.*65535.*layers.*groups"
    with (
        recording(run) as made,
        pytest.raises(ValueError, match=words + ".*backend='torch'"),
    ):
        launch(Launch(SUM_SPLITS, grid, {}, config))
    assert not made
    with pytest.raises(ValueError, match="CUDA has no grid"):
        Launch(SUM_SPLITS, grid, {}, config).run()
    largest = tuple(n - 1 if n > 1 else 1 for n in grid)
    with recording(run=False) as made:
        launch(Launch(SUM_SPLITS, largest, {}, config))
    assert [a.grid for a in made] == [largest]


@pytest.mark.parametrize("formulation", ["gram", "primal"])
@pytest.mark.parametrize("shape", [LINEAR, CONV, MANY], ids=lambda s: s.name)
def test_every_kernel_says_how_it_is_launched(shape, formulation):
    """Those that nobody tunes, too: none is taken for a single program."""
    for made in step_launches(geometry(shape), formulation):
        assert KERNELS[made.name] is made.kernel
        assert predict(made, H200).waves >= 1
        if made.leads:
            problems = made.grid[1] if len(made.grid) > 1 else 1
            first, *_ = made.kernel.launches(made.config, problems, made.args)
            assert plain(first) == plain(made)


def test_sums_of_splits_are_counted_with_all_their_programs():
    """As few as one program would leave all other processors idle."""
    made = step_launches(geometry(LayerShape("", 768, 3072, 512), 1), "gram")
    launch = next(a for a in made if a.kernel is GRAM_TERMS)
    found = predict(launch, H200)
    idle = H200.processors / launch.grid[0]
    assert 1 < idle < 3
    assert found.time_us == pytest.approx(H200.launch_us + idle * found.floor_us)


@pytest.mark.parametrize("n", [64, 100, 128, 200, 256, 1000])
def test_projections_share_their_samples(n):
    """Two launches move each sample, and each entry of C, once between them."""
    shape = LayerShape("", 96, 300, n, groups=2)
    made = step_launches(geometry(shape), "gram")
    launches = [a for a in made if a.kernel is MOMENTUM_PROJECT]
    assert len(launches) == (1 if n <= 256 else 2)
    rows, entries = 2 * 96, 2 * 96 * (300 + 1)
    samples = 2 * 2 * 300 * n
    products = sum(work(launch).operations for launch in launches)
    assert products == 2 * n * 300 * rows
    moved = 3 * 4 * entries + 5 * rows  # M in and out, G; |m|^2 and whether finite
    moved += 4 * entries * (len(launches) - 1)  # M again
    moved += 2 * samples + 4 * n * rows
    moved += 4 * rows * len(launches)  # scales of the rows
    assert sum(work(launch).bytes for launch in launches) == moved


def launch_of(shape, kernel, config=None, formulation="primal"):
    made = step_launches(geometry(shape), formulation)
    key = next(a.config.key for a in made if a.kernel is kernel)
    with using(Table({key: config} if config else {})):
        made = step_launches(geometry(shape), formulation)
    return costliest([a for a in made if a.config.key == key])


def test_predictions_rank_by_exact_counts():
    # 4096 positions by 128 rows by 1152 columns: what tiles read again, counted.
    x, p = 4096 * 1152 * 2, 128 * 1152
    kernel = PRIMAL_FORWARD
    predicted = {}
    for rows, samples in ((16, 64), (64, 64), (128, 128)):
        config = ForwardConfig(BLOCK_R=rows, BLOCK_N=samples, num_warps=8)
        launch = launch_of(CONV, kernel, config)
        found = predict(launch, H200)
        again = 2 * x * (128 // rows) + 2 * 2 * p * (4096 // samples - 1)
        image = 2 * 2 * 64 * 64 * 128
        assert found.cache_bytes == again - image + work(launch).bytes
        assert found.time_us > found.floor_us
        predicted[rows] = found.cache_bytes
    assert predicted[16] > predicted[64] > predicted[128]


def test_padding_costs_time():
    some = LayerShape("some", 130, 768, 4096)
    times = []
    for rows in (64, 128):
        config = ForwardConfig(BLOCK_R=rows, BLOCK_N=64, num_warps=8)
        launch = launch_of(some, PRIMAL_FORWARD, config)
        found = predict(launch, H200)
        exact = work(launch).tf32_operations
        assert found.operations == pytest.approx(exact * -(-130 // rows) * rows / 130)
        times.append(found.time_us)
    assert times[0] < times[1]


def test_occupancy_follows_the_scarcest_resource():
    assert occupancy(H200, 8) == 8  # 2048 threads
    assert occupancy(H200, 8, Resources(255, 0, 0, 0, 0)) == 1
    assert occupancy(H200, 4, Resources(64, 0, 100 * 1024, 0, 0)) == 2
    assert occupancy(GPUS["rtx4090"], 8) == 6  # 1536 threads
