"""Counts: exact launches, bytes beside AdamW's, and their agreement with real steps."""

import json

import oracles
import pytest
import torch
from cases import PAPER, problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import frog_triton
from frog_triton.benchmarks import bench_kernels, bench_step, reference
from frog_triton.benchmarks.eager import eager_solve
from frog_triton.benchmarks.models import resnet
from frog_triton.benchmarks.shapes import gpt2_small, resnet50
from frog_triton.eager import eager_work
from frog_triton.kernels.gpu import GPUS
from frog_triton.kernels.gram import GramConfig
from frog_triton.kernels.launch import recording
from frog_triton.kernels.momentum import MOMENTUM_PROJECT, ProjectConfig
from frog_triton.kernels.table import Table, active, using
from frog_triton.layers import adapter_for
from frog_triton.layers.conv import ConvSpec
from frog_triton.solve import FORMULATIONS, formulation
from frog_triton.solve.formulation import count_works, predict
from frog_triton.solve.launches import Bucket, LayerShape, step_launches

PLAIN = {"orthogonalize": False, "nesterov": False}


@pytest.mark.parametrize("blocks", [1, 12, 48])
@pytest.mark.parametrize(
    ("samples", "launches"), [(32, 6), (64, 6), (256, 6), (1024, 7)]
)
def test_gpt2_takes_as_many_launches_whatever_its_depth(blocks, samples, launches):
    shapes = gpt2_small(samples, blocks)
    counted = frog_triton.cost(shapes, formulation="gram", **PLAIN)
    # The largest samples, Gram and its terms, momentum and projection (twice beyond
    # 256), CG, update.
    beside = counted.beside
    # All four geometries share launches, if they are solved at once.
    portions = {1: 1, 12: 2, 48: 4}[blocks]
    assert counted.launches <= portions * launches + sum(beside.values())
    assert all(line.launches <= launches for line in counted.layers)
    assert all(line.shared_by == blocks for line in counted.layers)
    if blocks == 1:
        assert counted.launches == launches + sum(beside.values())
    # Forward and backward of each layer; two kernels and torch's few operations on what
    # they find; one copy from the host, and whether the step is skipped.
    assert beside["samples"] == 2 * len(counted.layers) and beside["numbers"] == 2
    assert 2 < beside["gradients"] < 20
    assert counted.launched["_magnitudes_kernel"] == 1
    assert counted.launched["copy from the host"] == 1


@pytest.mark.parametrize(("rows", "dim"), [(768, 768), (3072, 768), (768, 3072)])
def test_the_kernels_of_a_linear_step_move_less_than_adamw(rows, dim):
    n = 64
    counted = frog_triton.cost([LayerShape("", rows, dim, n, bias=False)], **PLAIN)
    (line,) = counted.layers
    elements = line.bytes / 4
    # X four times (its largest, Gram, projection, update); Y, Lambda, C and u in and
    # out.
    assert elements <= 6 * rows * dim + 8 * n * (dim + rows)
    assert elements < 7 * rows * dim  # fused AdamW: p, g, m, v in, p, m, v out
    assert counted.state_bytes == 4 * rows * dim
    assert counted.operations == sum(
        [4 * n * rows * dim, 2 * n * n * dim, 2 * 3 * n * n * rows]
    )


def test_the_kernels_of_whole_models_move_less_than_adamw():
    for shapes in (gpt2_small(64), resnet50(64)):
        counted = frog_triton.cost(shapes, sample_dtype=torch.bfloat16, **PLAIN)
        params = sum(s.rows * (s.dim + s.bias) for s in shapes)
        assert sum(line.bytes for line in counted.layers) < 7 * 4 * params
        look, drawn = 4 * params, 2 * sum(line.sample_bytes for line in counted.layers)
        beside = counted.bytes - sum(line.bytes for line in counted.layers)
        assert look + drawn < beside < 1.01 * (look + drawn)
        assert counted.state_bytes == 4 * params


def test_a_real_step_makes_the_launches_that_are_counted():
    net = nn.Sequential(
        nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 30), nn.Linear(30, 2)
    )
    options = {"sample_size": 9, "sampling": "positions"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = PAPER | options
    opt = frog_triton.FROG(net.to(device), backend="triton", **plain)
    net(torch.randn(16, 20, device=device)).square().sum().backward()
    with recording() as launches:
        opt.step()
    counted = frog_triton.cost(net, **options, **PLAIN)
    kernels = [n for name, n in counted.launched.items() if name.endswith("_kernel")]
    assert sum(kernels) - counted.beside["samples"] == len(launches)
    assert [line.shared_by for line in counted.layers] == [2, 2, 1]


def test_resnet18_takes_few_launches():
    """Whole examples, the paper's estimator, k = 4: 20 convolutions, 11 geometries."""
    counted = frog_triton.cost(
        resnet(18),
        torch.zeros(1, 3, 32, 32),
        sampling="examples",
        sample_size=64,
        sample_dtype=torch.bfloat16,
        formulation="primal",
        **PLAIN,
    )
    geometries = {(line.layer.rows, line.layer.dim) for line in counted.layers}
    assert len(counted.layers) == 20 and len(geometries) == 11
    # The largest samples, momentum, norms, scale (2), k directions, k forward, k - 1
    # adjoint (2 each where positions are split), update.
    assert sum({line.layer: line.launches for line in counted.layers}.values()) == 211
    # Windows are compiled in, so geometries share the launches that read none.
    assert counted.launches == 149 + sum(counted.beside.values())
    assert {line.formulation for line in counted.layers} == {"primal"}


def test_the_formulation_with_the_lower_time_is_chosen():
    image, spec = (512, 4, 4), ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), 1)
    deep = LayerShape("", 512, 4608, 4096, 1, False, image, spec)
    h200, k, rd, n = GPUS["h200"], 4, 512 * 4608, 4096

    def chosen(dtype):
        line = frog_triton.cost([deep], sample_dtype=dtype).layers[0]
        return line.formulation

    # Arithmetic alone, against C and X^T u in two terms, K, and K u in three products:
    primal = (4 * k - 2) * n * rd / h200.bf16
    gram = 2 * 4 * n * rd + 2 * n * n * 4608 + 3 * 2 * (k - 1) * n * n * 512
    gram /= h200.bf16
    assert primal < gram and chosen(torch.bfloat16) == "primal"
    # Where a step is all launches, the formulation with fewer is chosen.
    small = LayerShape("", 16, 40, 32)
    works = {f: count_works(Bucket(small), f) for f in ("gram", "primal")}
    assert len(works["gram"]) < len(works["primal"])
    assert frog_triton.cost([small]).layers[0].formulation == "gram"


def test_predictions_follow_the_table_in_force():
    """A table that splits a sum into more pieces costs launches and bytes."""
    shape = LayerShape("", 768, 768, 256)
    bucket, h200 = Bucket(shape), GPUS["h200"]
    key = next(
        a.config.key
        for a in step_launches(bucket, "gram")
        if a.kernel is MOMENTUM_PROJECT
    )

    def gram(table, allow_tf32=True):
        return predict(bucket, h200, table, allow_tf32)["gram"]

    def slices(block):
        return Table({key: ProjectConfig(BLOCK_N=block, num_warps=8)})

    plain, whole, halves = Table(), slices(256), slices(128)
    assert gram(plain) == gram(whole) < gram(halves)
    assert gram(plain) == gram(Table()) and hash(plain) == hash(Table())
    assert gram(slices(256)) == gram(whole) and hash(slices(256)) == hash(whole)
    # What was given may change later: the table does not.
    given = {key: ProjectConfig(BLOCK_N=256, num_warps=8)}
    table = Table(given)
    before = gram(table)
    given.clear()
    assert table == whole and gram(table) == before == gram(whole)
    assert hash(Table({}, {"layer": "gram"})) != hash(Table({}, {"layer": "primal"}))


def test_the_choice_follows_the_table_in_force(monkeypatch):
    seen = []
    honest = formulation.count_works

    def count(bucket, name):
        seen.append((name, active()))
        return honest(bucket, name)

    monkeypatch.setattr(formulation, "count_works", count)
    bucket = Bucket(LayerShape("", 96, 136, 24))
    first, second = (
        Table({"gram n1": GramConfig(programs=programs)}) for programs in (2, 4)
    )
    for table in (first, second, first):
        with using(table):
            formulation.choose(bucket, GPUS["h200"])
    expected = [(name, t) for t in (first, second) for name in FORMULATIONS]
    assert seen == expected  # the third is known


def test_the_price_of_images_follows_cudnn_allow_tf32(monkeypatch):
    image, spec = (512, 16, 16), ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), 1)
    bucket = Bucket(LayerShape("", 512, 4608, 4096, 1, False, image, spec))
    prices = []
    for allow in (True, False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allow)
        works = count_works(bucket, "primal")
        found = predict(bucket, GPUS["a100"], Table(), allow)["primal"]
        floor = sum(w.floor(GPUS["a100"]) for w in works)
        assert found == pytest.approx(floor + len(works) * GPUS["a100"].launch_us)
        prices.append(found)
    assert prices[0] == prices[2] < prices[1]


def test_the_eager_rival_solves_the_same_system():
    for name in ("conv2d", "conv2d-groups", "conv2d-oblong"):
        module, x, y, m, _ = problem(name)
        map_ = adapter_for(module).linear_map(module, x, False)
        z = eager_solve(x, y, m, map_.spec, 1e-2, 4)
        expected, _ = oracles.precondition(module, x, y, m, None, 1e-2, 4)
        assert oracles.relative_error(z, expected) < 1e-12  # measured 4e-15


def test_products_are_timed_from_the_middle_of_a_solve():
    image, spec = (4, 6, 6), ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), 1)
    shape = LayerShape("", 6, 36, 4 * 36, 1, False, image, spec)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, _ = bench_kernels.random_batch(shape, torch.float32, device)
    for launch in bench_kernels.products(batch).values():
        assert not launch.args.get("FIRST", False) and not launch.args.get("LAST")
        launch.run()


def test_the_reference_is_loaded_from_a_path(tmp_path):
    path = tmp_path / "frog.py"
    with pytest.raises(ValueError, match="is not a file"):
        reference.load(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no class Frog"):
        reference.load(path)
    path.write_text(
        "import torch\n"
        "class Frog(torch.optim.SGD):\n"
        "    def __init__(self, params, model, lr, momentum, **others):\n"
        "        super().__init__(params, lr, momentum)\n"
    )
    results = reference.compare(path, batch=2, size=8, repeats=1)
    assert list(results) == ["FROG, float32", "FROG, bfloat16", "reference, float32"]


def test_describe_tells_the_formulation():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 70, 3), nn.Flatten(), nn.Linear(280, 2)
    )
    opt = frog_triton.FROG(net, sampling="examples", sample_size=2)
    net(torch.randn(2, 3, 6, 6)).square().sum().backward()
    opt.step()
    reasons = {r.name: r.reason for r in opt.describe()}
    assert reasons["0.weight"] == "Conv2d; primal, N = 32"
    assert reasons["1.bias"] == "Conv2d; gram, N = 8"
    assert reasons["3.weight"] == "output layer"


def test_bench_kernels_without_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "kernels.json"
    bench_kernels.main(["--model", "resnet18", "--json", str(out)])
    assert "no time measured" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert len(content["results"]) == 11
    assert all("solve_us" not in r and r["floor_us"] > 0 for r in content["results"])


def test_positions_of_a_model_come_from_a_batch():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Flatten(), nn.Linear(8 * 9, 2))
    inputs = torch.randn(2, 3, 8, 8)
    counted = frog_triton.cost(net, inputs, sampling="examples", sample_size=4)
    assert [line.layer.samples for line in counted.layers] == [4 * 9]
    assert [line.layer.samples for line in frog_triton.cost(net).layers] == [128]
    with pytest.raises(ValueError, match="pass inputs="):
        frog_triton.cost(net, sampling="examples")
    with pytest.raises(ValueError, match="sampling must be one of"):
        frog_triton.cost(net, inputs, sampling="whole", sample_size=4)
    with pytest.raises(ValueError, match="gpu must be one of"):
        frog_triton.cost(net, inputs, gpu="voodoo")


def test_floor_is_the_larger_of_bytes_and_operations():
    shapes = [LayerShape("", 4096, 4096, 64)]
    counted = frog_triton.cost(shapes, gpu="h200")
    assert counted.floor_us >= 1e6 * counted.bytes / GPUS["h200"].bandwidth
    assert "nothing was timed" in str(counted)
    slower = frog_triton.cost(shapes, gpu="a100")
    assert slower.floor_us > counted.floor_us


def test_bfloat16_samples_and_momentum_cost_less():
    shapes = gpt2_small(64, 1)
    wide = frog_triton.cost(shapes)
    narrow = frog_triton.cost(
        shapes, sample_dtype=torch.bfloat16, momentum_dtype=torch.bfloat16
    )
    assert narrow.bytes < wide.bytes
    assert 2 * narrow.state_bytes == wide.state_bytes
    assert 2 * narrow.sample_bytes == wide.sample_bytes


def test_bench_step_without_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "step.json"
    bench_step.main(["--model", "gpt2-small", "--json", str(out)])
    printed = capsys.readouterr().out
    assert "no time measured" in printed and "AdamW (fused)" in printed
    content = json.loads(out.read_text())
    assert content["environment"]["gpu"] is None
    assert "median_us" not in content["results"][0]["FROG"]


def test_bench_step_checks_what_it_times():
    shapes = [LayerShape("a", 5, 7, 9), LayerShape("b", 5, 7, 9)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert bench_step.Step(shapes, torch.float32, device).check() < 1e-4


class Launching(TorchDispatchMode):
    """Collects torch's own operations that would launch something on a GPU."""

    FREE = (
        "empty",
        "new_empty",
        "view",
        "as_strided",
        "transpose",
        "permute",
        "select",
        "slice",
    )
    FREE += ("unsqueeze", "squeeze", "detach", "diagonal", "t.", "alias", "split")
    FREE += ("expand", "unbind", "_local_scalar", "lift_fresh", "unflatten")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in (*args, out) if isinstance(a, torch.Tensor)]
        on_device = any(t.device.type == "meta" for t in tensors)
        # Addresses and scalars come from the host in a copy, not in a kernel.
        from_host = name.startswith("_to_copy") and args[0].device.type == "cpu"
        if on_device and not from_host and not name.startswith(self.FREE):
            self.found.append(name)
        return out


@pytest.mark.parametrize("formulation", ["gram", "primal"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_launches_nothing_beside_the_kernels(formulation, nesterov):
    with Launching() as mode:
        shape = LayerShape("", 24, 40, 16)
        step_launches(Bucket(shape, 3, nesterov=nesterov), formulation)
    assert mode.found == []


@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (32, 64), (48, 48)])
def test_orthogonalization_is_counted(rows, dim):
    layers = [LayerShape(str(i), rows, dim, 16, bias=False) for i in range(3)]
    with_it = frog_triton.cost(layers)
    without = frog_triton.cost(layers, orthogonalize=False)
    n, m = min(rows, dim), max(rows, dim)
    more = with_it.operations - without.operations
    symmetric = n * (n + 1) * m + n * n * (n + 1)
    assert more == 3 * 5 * (symmetric + 2 * n * n * m)
    # Three kernels an iteration, and one that writes directions.
    assert with_it.launches - without.launches == 16
    # In bfloat16: directions written and read; in an iteration X three times, and G
    # and P twice each.
    x, g = 3 * n * m, 3 * n * n
    least = 2 * 2 * x + 5 * 2 * (3 * x + 4 * g)
    small = with_it.bytes - without.bytes - least
    assert 0 < small < 16 * 3 * rows  # numbers of a row


def test_torch_operations_are_counted_as_they_are_called():
    a = torch.empty(8, 4, device="meta")
    b = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")

    def run():
        view = a.T.unsqueeze(0)[0]  # free
        torch.empty_like(view)
        c = a @ a.T  # reads a once
        c.mul_(2.0)
        torch.mm(b.T, b)
        torch.mul(b, 2.0, out=torch.empty(4, 6, device="meta"))

    work = eager_work(run)
    assert work.launches == 4
    assert work.operations == 2 * 8 * 8 * 4 + 2 * 6 * 6 * 4
    assert work.tf32_operations == 3 * 2 * 8 * 8 * 4 + 0.5 * 2 * 6 * 6 * 4
    read = 4 * 32 + 4 * 64 + 2 * 24 + 2 * 24
    assert work.bytes == read + 4 * 64 + 4 * 64 + 2 * 36 + 4 * 24
