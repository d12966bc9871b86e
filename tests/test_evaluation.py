"""Fused inference of torch's transformer layers is what it is without FROG."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton import FROG

FUSED = "_transformer_encoder_layer_fwd"


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def net():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))


def infer(model, x):
    model.eval()
    with torch.no_grad(), Names() as names:
        y = model(x)
    model.train()
    return y, FUSED in names.seen


def train(model, opt, x):
    opt.zero_grad()
    model(x).square().mean().backward()
    calls = {name: len(opt.capture.calls(name)) for name in opt._plan.layers}
    opt.step()
    return calls


def test_evaluation_is_fused_and_training_is_sampled():
    model, x = net(), torch.randn(4, 5, 8)
    plain, fused = infer(model, x)
    assert fused
    opt = FROG(model)
    y, fused = infer(model, x)
    assert fused and torch.equal(y, plain)
    for _ in range(2):
        calls = train(model, opt, x)
        inside = [n for n in calls if n.startswith("0.")]
        assert len(inside) == 8 and all(calls[n] == 1 for n in inside)
        assert infer(model, x)[1]
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )
    assert hooks > 0
    opt.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_users_hooks_stay_on_and_an_error_brings_ours_back():
    model, x, seen = net(), torch.randn(4, 5, 8), []
    layer = model[0].layers[0]
    layer.linear1.register_forward_hook(lambda *_: seen.append(1))
    opt = FROG(model)
    _, fused = infer(model, x)  # torch's rule: the layer with the user's is not fused
    assert seen and fused
    model.eval()
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 7))
    model.train()
    assert train(model, opt, x)["0.layers.1.linear2"] == 1
    first = next(iter(layer.linear1._forward_hooks.values()))
    assert first.__name__ == "frog_triton_sampling"


def test_evaluation_with_gradients_keeps_the_hooks():
    model, x = net().eval(), torch.randn(4, 5, 8)
    opt = FROG(model)
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match="did its forward pass run in eval mode"):
        opt.step()
