"""Bad input raises before anything is changed, and names the remedy."""

import copy

import pytest
import torch
from torch import nn

from frog_triton import FROG


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"momentum": -0.1}, r"momentum must be one number in \[0, 1\), got -0.1"),
        ({"momentum": 1.5}, r"momentum must be one number in \[0, 1\), got 1.5"),
        ({"momentum": 1}, r"momentum must be one number in \[0, 1\), got 1"),
        ({"momentum": torch.tensor(1.0)}, "momentum must be one number in"),
        ({"momentum": (0.9, 0.99)}, "momentum must be one number in"),
        ({"momentum": float("inf")}, "momentum must be one number in"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"damping": float("nan")}, "damping must be positive"),
        ({"damping": float("inf")}, "damping must be positive and finite"),
        ({"damping": "auto"}, "damping must be positive and finite, got 'auto'"),
        ({"damping": torch.ones(2)}, "damping must be positive"),
        ({"lr": torch.ones(2)}, "lr must be one number"),
        ({"lr": None}, "lr must be one number"),
        ({"lr": float("inf")}, "lr must not be negative or infinite"),
        ({"fallback_lr": -1.0}, "fallback_lr: lr must not be negative"),
        ({"fallback_lr": float("nan")}, "fallback_lr: lr must not be negative"),
        ({"fallback_lr": torch.ones(2)}, "fallback_lr: lr must be one number"),
        ({"lr": float("nan")}, "lr must not be negative or infinite, got nan"),
        ({"lr": True}, "lr must be one number, got True"),
        ({"lr": 1j}, "lr must be one number, got 1j"),
        ({"lr": torch.tensor(1j)}, "lr must be one number"),
        ({"lr": torch.tensor(True)}, "lr must be one number"),
        ({"fallback_lr": float("inf")}, "fallback_lr: lr must not be negative"),
        ({"fallback_lr": "auto"}, "fallback_lr: lr must be one number, got 'auto'"),
        ({"momentum": float("nan")}, "momentum must be one number in"),
        ({"weight_decay": float("inf")}, "weight_decay must not be negative or inf"),
        ({"weight_decay": None}, "weight_decay must be one number, got None"),
        ({"weight_decay": float("nan")}, "weight_decay must not be negative"),
        ({"params": []}, "params is empty"),
        ({"cg_iters": 0}, "cg_iters must be a positive integer"),
        ({"cg_iters": True}, "cg_iters must be a positive integer, got True"),
        ({"cg_iters": 4.0}, "cg_iters must be a positive integer, got 4.0"),
        ({"sample_size": True}, "sample_size must be a positive integer, got True"),
        ({"sample_size": "all"}, "sample_size must be a positive integer, got 'all'"),
        ({"sample_size": 0}, "sample_size must be a positive integer"),
        ({"sample_size": 1.5}, "sample_size must be a positive integer"),
        ({"nesterov": "no"}, "nesterov must be True or False, got 'no'"),
        ({"orthogonalize": None}, "orthogonalize must be True or False, got None"),
        ({"capturable": 1}, "capturable must be True or False, got 1"),
        ({"exclude_output_layer": "2"}, "exclude_output_layer must be True or False"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"sampling": "rows"}, "sampling must be one of"),
        ({"fallback": "adam"}, "fallback must be one of"),
        ({"formulation": "dual"}, "formulation must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"params": [nn.Parameter(torch.zeros(7))]}, "shape .7,. in params"),
    ],
)
def test_options(options, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        FROG(model, **options)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("option", ["exclude", "output_layers"])
@pytest.mark.parametrize("value", [3, [3]])
def test_layers_that_are_named_by_nothing(option, value):
    model = net()
    with pytest.raises(TypeError, match=f"{option} takes names, patterns or .* got 3"):
        FROG(model, **{option: value})
    assert not any(m._forward_hooks for m in model.modules())


def test_group_options():
    model = net()
    with pytest.raises(ValueError, match="lr must not be negative"):
        FROG(model, params=[{"params": model.parameters(), "lr": -1}])
    with pytest.raises(ValueError, match="momentum must be one number in"):
        FROG(model, params=[{"params": model.parameters(), "momentum": 1.5}])
    with pytest.raises(ValueError, match=r"0\.weight appears in more than one group"):
        FROG(model, params=[{"params": list(model.parameters())}] * 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda net: ["x"], "FROG optimizes tensors, but params holds a str"),
        (lambda net: "x", "params must be a list of tensors"),
        (lambda net: net[0].weight, "params must be a list of tensors"),
        (lambda net: set(net.parameters()), "params must be a list of tensors"),
        (lambda net: [{"params": set(net.parameters())}], "the order of a set"),
        (lambda net: [{"lr": 0.1}], "must be a dict with params"),
        (lambda net: [{"params": net.parameters()}, net[0].weight], "must be a dict"),
        (lambda net: [("0.weight", None)], "but params holds a NoneType"),
    ],
)
def test_params_of_the_wrong_kind(params, message):
    """As torch's optimizers do it: a TypeError, and no hook is left on the model."""
    model = net()
    with pytest.raises(TypeError, match=message):
        FROG(model, params=params(model))
    assert not any(m._forward_hooks for m in model.modules())
    opt = FROG(model, params=[model[0].weight])
    with pytest.raises(TypeError, match="the order of a set"):
        opt.add_param_group({"params": {model[1].weight}})
    assert len(opt.param_groups) == 2


def test_some_names_are_missing():
    model = net()
    with pytest.raises(ValueError, match="some params of a group have names"):
        FROG(model, params=[("0.weight", model[0].weight), model[0].bias])


def test_group_options_of_the_fallback():
    model = net()
    for entry in ({"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"betas": 0.9}):
        with pytest.raises(ValueError, match="betas must be two numbers in"):
            FROG(model, params=[{"params": model.parameters(), **entry}])
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps must not be negative or infinite"):
            FROG(model, params=[{"params": model.parameters(), "eps": eps}])


def test_names_for_some_groups_only():
    model = net()
    opt = FROG(model, params=[("a", model[0].weight), ("b", model[0].bias)])
    with pytest.raises(ValueError, match="all have names or none"):
        opt.add_param_group({"params": model[1].parameters()})
    opt.add_param_group({"params": [("c", model[1].weight), ("d", model[1].bias)]})
    names = [name for group in opt.param_groups for name in group["param_names"]]
    assert sorted(names) == ["a", "b", "c", "d"]


def test_unknown_option_and_parameters_for_a_model():
    with pytest.raises(TypeError, match="unexpected keyword"):
        FROG(net(), dampening=0.1)
    with pytest.raises(TypeError, match=r"FROG\(model\)"):
        FROG(net().parameters())


def test_float64_with_the_triton_backend():
    with pytest.raises(ValueError, match=r"0: .*float64.*backend=.torch"):
        FROG(net().double(), backend="triton")


def test_step_before_any_backward():
    model = net()
    opt = FROG(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) first"):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model(torch.randn(3, 3)).sum().backward()
    opt.step()
    opt.zero_grad()
    opt.step()  # as with torch's optimizers, nothing to do


def test_sparse_gradients():
    embedding = nn.Embedding(5, 3, sparse=True)
    model = nn.Sequential(embedding, nn.Linear(3, 4), nn.Linear(4, 2))
    opt = FROG(model)
    model(torch.tensor([1, 2])).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight has a sparse.*sparse=False"):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run one"):
        FROG(model)
    model(torch.randn(2, 3))
    FROG(model)
