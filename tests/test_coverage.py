"""``bench coverage``: a net counted by hand, its rows, the command."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from frog_triton.benchmarks import coverage, zoo
from frog_triton.benchmarks.coverage import choose, examine, is_linear_map, row
from frog_triton.benchmarks.zoo import MODELS, Model
from frog_triton.benchmarks.zoo_torch import Trained
from frog_triton.cli import main
from frog_triton.cli.errors import CommandError


class Toy(nn.Module):
    """Of every sort of parameter one, each of a size of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)  # 20
        self.position_embed = nn.Parameter(torch.zeros(3, 4))  # 12
        self.frozen = nn.Linear(4, 4).requires_grad_(False)  # not counted
        self.hidden = nn.Linear(4, 6)  # 24 + 6, FROG's
        self.mix = nn.Parameter(torch.eye(6))  # 36, multiplied by, without a layer
        self.norm = nn.LayerNorm(6)  # 6 + 6
        self.head = nn.Linear(6, 3)  # 18 + 3, the output layer

    def forward(self, ids):
        x = self.frozen(self.embedding(ids) + self.position_embed)
        x = self.norm((self.hidden(x) @ self.mix).relu())
        return self.head(x.mean(1))


def _toy():
    model, ids, labels = Toy(), torch.randint(5, (8, 3)), torch.arange(8) % 3
    return Trained(model, lambda: F.cross_entropy(model(ids), labels))


def _broken():
    raise RuntimeError("no such | part\nat all")


ASIDE = Path(sys.prefix) / "vision"
"""Where `make test` puts timm and torchvision."""

TOY = Model("toy", "torch", _toy)


def test_toy_net_counted_by_hand():
    found = examine(TOY, 3)
    assert (found.parameters, found.tensors) == (20 + 12 + 30 + 36 + 12 + 21, 9)
    assert found.share == pytest.approx(30 / 131)
    assert found.tensor_share == pytest.approx(2 / 9)
    assert found.linear_share == pytest.approx(24 / (24 + 36))
    assert found.output_layers == ["head.weight"]
    assert found.largest is not None
    assert (found.largest["name"], found.largest["shape"]) == ("mix", (6, 6))
    assert sum(r["parameters"] for r in found.left_out.values()) == 131 - 30
    assert sum(r["tensors"] for r in found.left_out.values()) == 7
    output = next(r for why, r in found.left_out.items() if "output layer" in why)
    assert output == {"tensors": 2, "parameters": 21, "example": "head.weight"}


def test_loss_is_that_before_the_first_and_after_the_last_step():
    torch.manual_seed(0)
    before = _toy().loss().item()
    one, more = examine(TOY, 1), examine(TOY, 30)
    assert one.first == more.first == before
    assert more.last < one.last < before and more.fell


def test_loss_that_is_not_finite_did_not_fall():
    def build():
        trained = _toy()
        return Trained(trained.model, lambda: trained.loss() * float("nan"))

    found = examine(Model("nan", "torch", build), 2)
    assert not found.fell
    entry = {"model": "nan", "package": "torch", **vars(found)}
    assert row(entry)[8] == "nan to nan, did not fall"


@pytest.mark.parametrize(
    ("module", "name", "linear"),
    [
        (nn.Linear(3, 1), "weight", True),
        (nn.Linear(3, 2), "bias", False),
        (nn.Conv2d(4, 4, 3, groups=4), "weight", True),
        (nn.LSTM(3, 2), "weight_hh_l0", True),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", True),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", False),
        (nn.Embedding(3, 2), "weight", False),
        (nn.ParameterDict({"experts_bias": torch.ones(2, 3)}), "experts_bias", False),
        (nn.ParameterDict({"cls_token": torch.ones(1, 2, 3)}), "cls_token", False),
        (nn.ParameterDict({"experts": torch.ones(2, 3, 4)}), "experts", True),
        (nn.ParameterDict({"original0": torch.ones(5, 1)}), "original0", False),
    ],
)
def test_what_a_linear_map_is(module, name, linear):
    assert is_linear_map(module, name, getattr(module, name)) == linear


def _run(monkeypatch, tmp_path, *models):
    """The command on models of the test's own: exit code, entries, and the page."""
    monkeypatch.setattr(coverage, "MODELS", models)
    json_, page = tmp_path / "coverage.json", tmp_path / "coverage.md"
    words = ["--steps", "2", "--json", str(json_), "--write", str(page)]
    code = main(["bench", "coverage", *words])
    return code, json.loads(json_.read_text())["results"], page.read_text()


def test_a_model_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    broken, absent = Model("broken", "torch", _broken), Model("gone", "no_such_", _toy)
    code, entries, page = _run(monkeypatch, tmp_path, broken, absent, TOY)
    assert code == 1
    assert [e["model"] for e in entries] == ["broken", "toy"]
    assert entries[0]["error"]["type"] == "RuntimeError" and "share" in entries[1]
    lines = [line for line in page.splitlines() if line.startswith("| broken")]
    assert lines == [
        "| broken | torch | - | - | - | - | - | error: RuntimeError: no such \\| part "
        "| - | - |"
    ]
    assert "| toy | torch | 131 | 22.9% | 22.2% | 40.0% | head.weight | mix: " in page
    assert "Left out for want of no_such_: gone" in page
    assert "frog-triton bench coverage --steps 2\n" in page
    assert "RuntimeError: no such" in capsys.readouterr().out


def test_three_models_of_the_zoo(monkeypatch, tmp_path):
    names = ("BERT, classes", "actor and critic", "TransformerEncoder")
    chosen = [m for m in MODELS if m.name in names and m.installed]
    code, entries, page = _run(monkeypatch, tmp_path, *chosen)
    assert code == 0 and len(entries) == len(chosen) >= 2
    for entry in entries:
        assert 0 < entry["share"] <= 1 and entry["output_layers"]
        assert f"| {entry['model']} | {entry['package']} | " in page


@pytest.mark.skipif(
    not (ASIDE.exists() or find_spec("timm")), reason="needs timm, which make brings"
)
def test_a_model_of_timm_beside_any_torch(tmp_path):
    json_ = tmp_path / "coverage.json"
    words = ["--models", "mobilenetv3", "--steps", "2", "--json", str(json_)]
    paths = [str(ASIDE), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, "-m", "frog_triton", "bench", "coverage", *words],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
    )
    (entry,) = json.loads(json_.read_text())["results"]
    assert entry["package"] == "timm" and entry["share"] > 0.3 and entry["fell"]


def test_names_are_unlike_and_chosen_by_pattern():
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names)
    assert {m.package for m in choose(["TIMM"])} == {"timm"}
    assert [m.name for m in choose(["lstm", "g[r]u", "LSTM"])] == ["LSTM", "GRU"]
    assert choose(["*"]) == list(zoo.MODELS)
    with pytest.raises(CommandError, match="no model is called 'nothing'"):
        choose(["gru", "nothing"])
