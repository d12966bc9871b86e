"""Wrappers that leave no whole rows: an error that says what to do, nothing changed."""

import copy

import pytest
import torch
import wrapping_cases as cases
from torch import nn

from frog_triton import FROG


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))


def backward(model, seed=0):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def flat(params):
    """As ZeRO does it: one flat tensor in place of a group."""
    whole = torch.cat([p.detach().flatten() for p in params])
    whole.grad = torch.ones_like(whole)
    return [whole]


def master(params):
    """As engines for 16-bit models do it: copies in float32."""
    copies = [p.detach().float().clone() for p in params]
    for made in copies:
        made.grad = torch.ones_like(made)
    return copies


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("kind", [flat, master])
def test_tensors_of_others_in_the_groups(kind, stepped, half, in_place):
    model = net()
    opt = FROG(model)
    for seed in range(stepped):
        opt.zero_grad()
        backward(model, seed)
        opt.step()
    backward(model)
    before = copy.deepcopy([model.state_dict(), opt.state_dict()["state"]])
    group = opt.param_groups[half]
    if in_place:
        group["params"][:] = kind(group["params"])
    else:
        group["params"] = kind(group["params"])
    given = [p.clone() for p in group["params"]]
    message = rf"param_groups\[{half}\] holds a tensor of shape .* not given.*stage 0"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert all(map(torch.equal, given, group["params"]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])


def replace_one(model):
    model[0].weight = nn.Parameter(torch.ones(6, 4))


def replace_all(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("replace", [replace_one, replace_all])
def test_parameters_replaced_before_the_first_step(replace):
    model = net()
    opt = FROG(model)
    replace(model)
    backward(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight is another parameter than when"):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_parameters_replaced_later():
    """No parameter that FROG knows has a gradient then: a step would do nothing."""
    model = net()
    opt = FROG(model)
    backward(model)
    opt.step()
    opt.zero_grad()
    opt.step()  # as with any optimizer, nothing to do
    replace_all(model)
    backward(model)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(assign=True\)"):
        opt.step()


def test_a_layer_taken_out_before_the_first_step_is_not_missed():
    model = net()
    opt = FROG(model)
    del model[1:3]
    backward(model)
    opt.step()


def test_a_partitioned_model():
    """What ZeRO-3 makes of parameters; the real one is in `test_deepspeed`."""
    model = net()
    for p in model.parameters():
        p.ds_id, p.ds_shape, p.data = 0, p.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"0\.weight is partitioned by .* ZeRO-3"):
        FROG(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_fsdp_with_flat_parameters(pools):
    for errors in pools[2].run(cases.flattened):
        for kind in ("flat", "views", "inner"):
            assert "wrapped in FullyShardedDataParallel" in errors[kind]
            assert "torch.distributed.fsdp.fully_shard" in errors[kind]
        assert "takes the model itself" in errors["ZeroRedundancyOptimizer"]


def test_fully_shard_after_frog(pools):
    for error in pools[2].run(cases.sharded_afterwards):
        assert "first.weight is another parameter" in error
        assert "build FROG after" in error and "fully_shard" in error


def test_tensor_parallel_layers(pools):
    named = "exclude=['blocks.*.up.weight', 'blocks.*.up.bias'"
    for errors in pools[2].run(cases.parallelisms):
        for kind in ("columns and rows", "sequence"):
            assert "blocks.0.up.weight is placed as (Shard(dim=0),)" in errors[kind]
            assert named in errors[kind]
        assert "blocks.0.down.weight is placed as (Shard(dim=1),)" in errors["rows"]
        assert "first.weight is placed as (Shard(dim=0),)" in errors["columns"]
        assert "(Replicate(),)" in errors["replicated by hand"]
        for error in errors.values():
            assert "as tensor parallelism does it" in error
            assert "Shard by fully_shard in place of parallelize_module or" in error


def test_tensor_parallel_layers_that_are_sharded_as_well(pools):
    for error in pools[2].run(cases.with_fully_shard):
        assert "blocks.0.up.weight is placed as" in error
        assert "as tensor parallelism does it" in error


def test_tensor_parallel_layers_that_are_excluded(pools):
    """The fallback steps on their shards, and the layers between are preconditioned."""
    for split, whole, served in pools[2].run(cases.excluded):
        assert served == ["first.weight", "first.bias", "second.weight", "second.bias"]
        for name, weight in whole.items():
            error = (split[name] - weight).abs().max()
            assert error < 1e-13  # measured 5.3e-16


def test_stages_of_a_pipeline(pools):
    for error, weights, expected in pools[2].run(cases.pipeline):
        assert "differ in layers" in error
        assert "give each stage of a pipeline a process_group of its own" in error
        for weight, other in zip(weights, expected, strict=True):
            assert (weight - other).abs().max() < 1e-13  # measured 1.5e-15
