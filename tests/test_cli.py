"""Every word of the command line on a machine without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frog_triton import cli, cost
from frog_triton.autotune.cache import Cache, Machine
from frog_triton.benchmarks import pictures
from frog_triton.cli import doctor, layer_lines, models, output
from frog_triton.kernels.gram import GramConfig
from frog_triton.kernels.table import Table

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2)), (
        torch.zeros(2, 3, 8, 8)
    )

def bare():
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))

def norm():
    return nn.BatchNorm2d(3)

def wrong():
    return 3

def broken():
    raise RuntimeError("no such data")
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(FACTORY)
    return str(path)


def run(capsys, *words):
    """Exit code, standard output and standard error."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_help_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(name in out for name in cli.COMMANDS)
    assert "Exit codes: 0 done" in out
    for words in ([], ["dance"], ["cache"], ["describe"], ["bench"]):
        assert run(capsys, *words)[0] == 2


@pytest.mark.parametrize(
    "words", [["autotune"], ["describe"], ["cache"], ["doctor"], ["bench"]]
)
def test_help_of_each_command_has_examples(capsys, words):
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0 and f"frog-triton {words[0]}" in out


def test_python_m_and_version():
    command = [sys.executable, "-m", "frog_triton", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == cli.__version__


@pytest.mark.parametrize("name", models.BUILT_IN)
def test_describe_built_in_models(capsys, tmp_path, name):
    out_file = tmp_path / "out.json"
    code, out, _ = run(capsys, "describe", name, "--json", out_file)
    content = json.loads(out_file.read_text())
    counts = {"resnet18": 20, "resnet50": 53, "gpt2-small": 48}
    assert code == 0 and len(content["layers"]) == counts[name]
    assert f"total: {content['launches']} launches" in out
    assert "output layer" in out and "nothing was timed" in out
    assert out.startswith(f"{name}: {content['coverage']['text']}\n")
    assert (
        len(content["fallback"]) + content["coverage"]["tensors"]
        == (content["coverage"]["all_tensors"])
    )


def test_describe_groups_what_is_left_and_ends_with_totals(capsys, tmp_path):
    out_file = tmp_path / "out.json"
    code, out, _ = run(capsys, "describe", "resnet18", "--json", out_file)
    rows = [line.strip("│ ").split() for line in out.splitlines() if "│" in line]
    # Norms of 64 channels (5), 128, 256 and 512 (5 each), a weight and a bias each.
    norms = 2 * 5 * (64 + 128 + 256 + 512)
    kernels = 9 * (3 * 64 + 4 * 64 * 64)  # the stem and the first stage
    for wide in (128, 256, 512):
        # Two blocks of two; the first of them halves the map, with a shortcut.
        kernels += 9 * (wide // 2 + 3 * wide) * wide + wide // 2 * wide
    head = 512 * 10 + 10
    assert code == 0 and sum(f"{norms:,}" in row for row in rows) == 1
    found = [[cell for cell in row if cell != "│"] for row in rows[-3:]]
    assert found == [
        ["total", "20", f"{kernels:,}", "frog", "99.9%"],
        ["total", "42", f"{norms + head:,}", "adamw", "0.1%"],
        ["total", "62", f"{kernels + norms + head:,}"],
    ]
    content = json.loads(out_file.read_text())["coverage"]
    assert content["parameters"] == kernels and not content["low"]


def test_describe_groups_alike_layers_or_shows_each(capsys, tmp_path):
    json_, png = tmp_path / "out.json", tmp_path / "out.png"
    command = ("describe", "gpt2-small", "--json", json_)
    code, out, _ = run(capsys, *command, "--plot", png)
    content = json.loads(json_.read_text())
    grouped = layer_rows(out)
    assert code == 0 and png.read_bytes().startswith(b"\x89PNG")
    sizes = {
        "blocks.*.qkv": (2304, 768),
        "blocks.*.attention_out": (768, 768),
        "blocks.*.expand": (3072, 768),
        "blocks.*.mlp_out": (768, 3072),
    }
    for name, (rows, dim) in sizes.items():
        elements = f"{12 * rows * (dim + 1):,}"  # with biases
        expected = ["12", str(rows), str(dim), "128", "gram", elements]
        assert grouped[name][:6] == expected
    assert len(grouped) == len(sizes) + 1
    code, out, _ = run(capsys, *command, "--full")
    each = layer_rows(out)
    assert code == 0 and content == json.loads(json_.read_text())
    assert len(each) == 48 + 1 and each["blocks.7.qkv"][0] == "1"
    for norm in ("norm1", "norm2"):
        assert f"blocks.11.{norm}.weight" in out
    for rows in (grouped, each):
        *_, elements, _, megabytes, floor = rows["total of the layers"]
        assert elements == f"{content['coverage']['parameters']:,}"
        layers = content["layers"]
        assert megabytes == f"{sum(a['bytes'] for a in layers) / 1e6:.2f}"
        assert floor == f"{sum(a['floor_us'] for a in layers):.1f}"


def layer_rows(out):
    """Cells of the first table, by name."""
    text = out.partition("Left to the fallback")[0]
    lines = [line for line in text.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {name: [cell for cell in cells if cell] for name, *cells in rows}


def test_layers_of_other_sizes_are_not_alike(capsys):
    rows = layer_rows(run(capsys, "describe", "resnet18")[1])
    assert rows["5.shortcut.0"][:4] == ["1", "128", "64", "128"]
    assert rows["total of the layers"][0] == "20"


def test_a_picture_of_many_layers_puts_the_cheapest_together(capsys):
    loaded = models.load("resnet50")
    counted = cost(loaded.model, loaded.inputs)
    lines = layer_lines.layer_lines(counted)
    few = layer_lines.largest(lines, 5)
    assert len(few) == 5 and few[-1].label == f"{len(few[-1].layers)} other layers"
    assert few[0].label == "3 x *.body.3  512x4608"
    for what in ("parameters", "operations", "bytes", "floor_us"):
        kept = sum(getattr(line, what) for line in few)
        assert kept == pytest.approx(sum(getattr(line, what) for line in lines))
    assert layer_lines.largest(lines, 50) == lines


def test_describe_says_why_nothing_is_preconditioned(capsys, factory, tmp_path):
    out_file = tmp_path / "out.json"
    code, out, _ = run(capsys, "describe", f"{factory}:norm", "--json", out_file)
    content = json.loads(out_file.read_text())
    assert code == 0 and "FROG preconditions none of 2 tensors" in out
    assert "no adapter for BatchNorm2d" in out and "launches" not in out
    assert content["layers"] == [] and len(content["fallback"]) == 2
    assert content["coverage"]["low"] and content["coverage"]["share"] == 0


def test_describe_a_model_of_ones_own(capsys, factory):
    command = ("describe", f"{factory}:build", "--sample-size", 2)
    code, out, _ = run(capsys, *command, "--sampling", "examples")
    assert code == 0 and "no adapter" not in out and "gram" not in out
    code, out, _ = run(
        capsys, "describe", f"{factory}:bare", "--sample-size", 8, "--gpu", "a100"
    )
    assert code == 0 and "gram" in out and "a100" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["describe", "resnet19"], 2, "there are resnet18, resnet50, gpt2-small"),
        (["describe", "nothing.py:build"], 2, "is not a file"),
        (["describe", "FILE:nothing"], 2, "has no function called 'nothing'"),
        (["describe", "FILE:wrong"], 2, "returned int"),
        (["describe", "FILE:broken"], 1, "no such data"),
        (["describe", "FILE:bare", "--sampling", "examples"], 2, "pass inputs="),
        (["describe", "resnet18", "--gpu", "voodoo"], 2, "invalid choice: 'voodoo'"),
        (["autotune", "resnet18", "--gpu", "h100"], 2, "--gpu goes with --dry-run"),
        (["cache", "path", "file.json"], 2, "takes no file"),
        (["cache", "clear", "--json", "file.json"], 2, "--json goes with cache show"),
        (["cache", "export"], 2, "needs a file"),
    ],
)
def test_wrong_arguments_are_answered(capsys, factory, words, code, message):
    words = [word.replace("FILE", factory) for word in words]
    found, _, err = run(capsys, *words)
    assert found == code and message in err


@no_gpu
def test_autotune_without_a_gpu_says_what_would_work(capsys):
    code, _, err = run(capsys, "autotune", "resnet18")
    assert code == 3 and "--dry-run --gpu NAME" in err


@no_gpu
@pytest.mark.parametrize("gpu", ["a100", "rtx4090", "b200"])
def test_a_dry_run_compiles_for_a_gpu_that_is_not_here(capsys, factory, tmp_path, gpu):
    out_file = tmp_path / "out.json"
    words = ("autotune", f"{factory}:bare", "--dry-run", "--gpu", gpu, "--top", 1)
    words = (*words, "--sample-size", 16, "--json", out_file)
    code, out, _ = run(capsys, *words)
    content = json.loads(out_file.read_text())
    assert code == 0 and "Nothing was timed" in out and "pruned:" in out
    for key in content["keys"]:
        assert key["pruned"].get("invalid", 0) + key["pruned"]["predicted slower"] > 0
        for candidate in key["candidates"]:
            assert candidate["resources"]["registers"] > 0
            assert candidate["median_us"] is None and candidate["predicted_us"] > 0


def test_a_dry_run_out_of_budget_compiles_nothing(capsys, factory, tmp_path):
    out_file = tmp_path / "out.json"
    words = ("autotune", f"{factory}:build", "--dry-run", "--gpu", "h200")
    words = (*words, "--budget", 1e-9, "--top", 1, "--json", out_file)
    code, out, _ = run(capsys, *words)
    assert code == 0 and "were not compiled for lack of time (--budget 1e-09)" in out
    keys = json.loads(out_file.read_text())["keys"]
    assert keys and all(key["candidates"] for key in keys)
    assert all(c["resources"] is None for key in keys for c in key["candidates"])


MACHINE = Machine("NVIDIA Test 1", 90, "3.7.1")


def test_cache(capsys, tmp_path):
    folder = ("--cache-dir", tmp_path / "tables")
    assert run(capsys, "cache", "path", *folder)[1].strip() == str(folder[1])
    assert "no table" in run(capsys, "cache", "show", *folder)[1]
    assert "nothing to delete" in run(capsys, "cache", "clear", *folder)[1]
    out = tmp_path / "mine.json"
    code, _, err = run(capsys, "cache", "export", out, *folder)
    assert code == 1 and "holds: none" in err
    table = Table({"gram n64": GramConfig()}, {"layer n64": "gram"})
    Cache(folder[1]).store(MACHINE, table)
    shown = tmp_path / "shown.json"
    code, printed, _ = run(capsys, "cache", "show", *folder, "--json", shown)
    assert code == 0 and "gram n64" in printed and "BLOCK_N=64" in printed
    content = json.loads(shown.read_text())
    assert content == {
        "folder": str(folder[1]),
        "tables": [
            {
                "file": MACHINE.file_name,
                "configs": {"gram n64": GramConfig().values()},
                "formulations": {"layer n64": "gram"},
            }
        ],
    }
    assert run(capsys, "cache", "export", out, *folder)[0] == 0
    assert json.loads(out.read_text())["gpu"] == MACHINE.gpu
    (folder[1] / "broken.json").write_text("{")
    code, printed, _ = run(capsys, "cache", "show", *folder, "--json", shown)
    assert code == 1 and "broken.json: cannot be used" in printed
    assert "error" in json.loads(shown.read_text())["tables"][0]
    assert run(capsys, "cache", "export", out, *folder)[0] == 1
    code, printed, _ = run(capsys, "cache", "clear", *folder)
    assert code == 0 and printed.count("deleted") == 2


def test_doctor(capsys, tmp_path):
    out_file = tmp_path / "doctor.json"
    code, out, _ = run(capsys, "doctor", "--json", out_file)
    content = json.loads(out_file.read_text())
    versions = {p["package"]: p["version"] for p in content["packages"]}
    assert code == 0 and versions["torch"] == torch.__version__
    expected = "triton_ops" if torch.cuda.is_available() else "torch_ops"
    assert content["facts"]["backend"] == expected and expected in out


def test_doctor_names_the_extra_of_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for extra in ("demo", "peers"):
        assert f"pip install 'frog-triton[{extra}]'" in out


def test_text_is_no_markup(capsys):
    """What stands in brackets, or between colons, is printed as it is."""
    text = "layers[0] 'frog-triton[demo]' [red]x[/] [/] :smile:"
    output.print_table(f"title {text}", (f"column {text} ",), [(f"cell {text}",)])
    output.console().print(f"line {text}")
    printed = capsys.readouterr().out
    for kind in ("title", "column", "cell", "line"):
        assert f"{kind} {text}" in printed


def test_consoles_are_made_in_one_place():
    """Elsewhere text would be taken for markup again."""
    root = Path(cli.__file__).parents[1]
    folders = (root, Path(pictures.__file__).parent)
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    made = {path.name for path in paths if " Console(" in path.read_text()}
    assert made == {"output.py"}


@no_gpu
@pytest.mark.parametrize("bench", ["kernels", "step"])
def test_bench_without_a_gpu_counts_and_draws(capsys, tmp_path, bench):
    json_, png = tmp_path / "out.json", tmp_path / "out.png"
    model = {"kernels": "resnet18", "step": "gpt2-small"}[bench]
    code, out, _ = run(
        capsys, "bench", bench, "--model", model, "--json", json_, "--plot", png
    )
    assert code == 0 and "no time measured" in out
    assert json.loads(json_.read_text())["results"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setattr(cli, "missing_packages", lambda modules: ["sklearn"])
    code, _, err = run(capsys, "demo")
    assert code == 2 and "pip install 'frog-triton[demo]'" in err
