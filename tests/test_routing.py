"""Who updates what, and why."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from frog_triton import FROG


def routes(opt):
    return {r.name: (r.updated_by, r.reason) for r in opt.describe()}


def test_every_parameter_has_a_line_and_it_is_printed(capsys):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 4, 2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.Linear(8, 2),
    )
    table = FROG(net, fallback="adamw").describe()
    printed = capsys.readouterr().out
    assert printed.strip() == str(table)
    assert [r.name for r in table] == [n for n, _ in net.named_parameters()]
    guessed = "the last; its first step will show"
    expected = {
        "0.weight": ("frog", "Conv2d"),
        "0.bias": ("frog", "Conv2d"),
        "1.weight": ("adamw", "no adapter for BatchNorm2d"),
        "1.bias": ("adamw", "no adapter for BatchNorm2d"),
        "2.weight": ("frog", "ConvTranspose2d"),
        "2.bias": ("frog", "ConvTranspose2d"),
        "4.weight": ("frog", "Linear"),
        "4.bias": ("frog", "Linear"),
        "5.weight": ("adamw", f"output layer; {guessed}"),
        "5.bias": ("adamw", f"output layer; {guessed}"),
    }
    assert {r.name: (r.updated_by, r.reason) for r in table} == expected
    assert ["4.weight", "8x36"] in [line.split()[:2] for line in printed.splitlines()]


def body():
    return nn.ModuleDict(
        {
            "stem": nn.Linear(3, 3),
            "block1": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
            "block2": nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(3, 3)),
            "head": nn.Linear(3, 3),
        }
    )


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        ("stem", {"stem.weight", "stem.bias"}),
        (["block1"], {"block1.0.weight", "block1.0.bias"}),
        (["block?.0"], {f"block{i}.0.{p}" for i in (1, 2) for p in ("weight", "bias")}),
        ([nn.Conv1d], {"block2.0.weight", "block2.0.bias"}),
        (nn.Conv1d, {"block2.0.weight", "block2.0.bias"}),
        (["stem.bias"], {"stem.bias"}),
        (["stem.weight"], {"stem.weight", "stem.bias"}),
    ],
)
def test_exclude(exclude, gone):
    everything = set(FROG(body()).describe().updated_by("frog"))
    opt = FROG(body(), exclude=exclude)
    assert everything - set(opt.describe().updated_by("frog")) == gone
    for name in gone:
        assert routes(opt)[name][1].startswith("excluded by")


def test_exclude_that_matches_nothing():
    with pytest.raises(ValueError, match=r"exclude names 'sten'.*mean 'stem'"):
        FROG(body(), exclude=["sten"])
    with pytest.raises(ValueError, match="no module of that type"):
        FROG(body(), exclude=[nn.Conv3d])
    with pytest.raises(TypeError, match="names, patterns or module types"):
        FROG(body(), exclude=[3])


def test_output_layer_can_be_included():
    opt = FROG(body(), exclude_output_layer=False)
    assert "head.weight" in opt.describe().updated_by("frog")


def test_weights_shared_with_something_else():
    net = nn.ModuleDict(
        {"embed": nn.Embedding(5, 3), "proj": nn.Linear(3, 5), "last": nn.Linear(3, 3)}
    )
    net["proj"].weight = net["embed"].weight
    found = routes(FROG(net, exclude_output_layer=False))
    assert found["embed.weight"] == ("adamw", "weight shared with Embedding")
    assert found["proj.bias"] == ("adamw", "weight shared with Embedding")


def test_shared_weight_with_biases_of_their_own():
    net = nn.ModuleDict({n: nn.Linear(3, 3) for n in ("a", "b", "head")})
    net["b"].weight = net["a"].weight
    found = routes(FROG(net))
    assert found["a.weight"] == ("frog", "Linear, shared by 2")
    assert (
        found["a.bias"]
        == found["b.bias"]
        == (
            "adamw",
            "bias not shared like its weight",
        )
    )


def test_shared_weight_in_another_geometry():
    net = nn.ModuleDict(
        {
            "a": nn.Conv2d(4, 4, 1, bias=False),
            "b": nn.Conv2d(8, 4, 1, groups=2, bias=False),
            "head": nn.Linear(4, 4),
        }
    )
    net["b"].weight = net["a"].weight
    with pytest.warns(UserWarning, match="preconditions no parameter"):
        found = routes(FROG(net))
    reason = "weight shared by layers of different geometry"
    assert found["a.weight"] == ("adamw", reason)


def test_computed_weights_and_overridden_forwards():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict(
        {
            "a": parametrizations.weight_norm(nn.Linear(3, 3)),
            "b": parametrizations.orthogonal(nn.Linear(3, 3)),
            "c": Scaled(3, 3),
            "head": nn.Linear(3, 3),
        }
    )
    found = routes(FROG(net))
    scale = "a.parametrizations.weight.original0"
    assert {n for n, (by, _) in found.items() if by != "frog"} == {
        scale,
        "b.parametrizations.weight.original",
        "b.bias",
        "head.weight",
        "head.bias",
    }
    assert found[scale][1] == "the scale of a Linear's rows, weight_norm's g"
    assert found["b.bias"][1] == "Linear whose weight is computed by orthogonal"
    assert found["c.weight"][1] == "Scaled"  # until a call shows what it computes


def test_bias_in_another_group():
    net = body()
    weights = [p for n, p in net.named_parameters() if not n.endswith("bias")]
    biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
    opt = FROG(net, params=[{"params": weights}, {"params": biases, "weight_decay": 0}])
    found = routes(opt)
    assert found["stem.weight"] == ("frog", "Linear")
    assert found["stem.bias"] == ("adamw", "in another group than its weight")
    net["stem"](torch.randn(4, 3)).square().sum().backward()
    opt.step()


def test_bias_of_another_dtype():
    net = body()
    net["stem"].weight.data = net["stem"].weight.data.bfloat16()
    found = routes(FROG(net))
    assert found["stem.bias"] == ("adamw", "of another dtype than its weight")


def test_the_model_may_be_a_layer():
    layer = nn.Linear(3, 2)
    opt = FROG(layer)
    layer(torch.randn(4, 3)).square().sum().backward()
    opt.step()
    assert opt.describe().updated_by("frog") == ["weight", "bias"]
