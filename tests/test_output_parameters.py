"""Bare parameters before output layers, and losses with derivatives of the model."""

import copy
import warnings

import pytest
import torch
from algorithm1 import Algorithm1
from attention_net import EVERYTHING, by, reason_of
from seeking_nets import Bare, D, bare_steps, batch, saved
from torch import nn

import frog_triton
from frog_triton import FROG
from frog_triton.unhooked import PATIENCE


@pytest.mark.filterwarnings("ignore:FROG preconditions")
def test_a_bare_parameter_is_promoted_at_its_first_samples_and_let_go_without():
    net = Bare()
    opt = FROG(net, sample_size=EVERYTHING)
    bare = {"w", "v"}
    assert bare <= {*by(opt)}
    bare_steps(net, opt, [False] * 2)
    assert bare <= {*by(opt)} and "frog_triton.linear" in reason_of(opt, "w")
    bare_steps(net, opt, [True], 2)
    assert "w" in by(opt, "frog") and "v" in by(opt)
    layer, samples = nn.Linear(D, D, bias=False).double(), []
    layer.weight.data.copy_(net.w.data)
    model = Algorithm1(layer)
    model.m = opt.state[net.w]["momentum_buffer"].numpy().copy()
    original = frog_triton.linear

    def linear(x, weight):
        y = original(x, weight)
        samples.append(x.detach())
        y.register_hook(samples.append)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frog_triton, "linear", linear)
        opt.zero_grad()
        net(batch(3), True).square().mean().backward()
    model.step(*samples, net.w.grad)
    opt.step()
    # Measured 1e-15.
    expected = torch.from_numpy(model.weight)
    torch.testing.assert_close(net.w, expected, rtol=1e-11, atol=1e-12)
    bare_steps(net, opt, [False] * (PATIENCE - 1), 4)
    assert "w" in by(opt, "frog")
    with pytest.warns(UserWarning, match="^w: its weight is used without.*adamw"):
        bare_steps(net, opt, [False], 4 + PATIENCE)
    assert bare <= {*by(opt)}
    bare_steps(net, opt, [True], 5 + PATIENCE)
    assert "w" in by(opt, "frog")


@pytest.mark.filterwarnings("ignore:FROG preconditions")
def test_a_bare_parameter_that_never_appears_costs_a_hook():
    net = Bare()
    twin = copy.deepcopy(net)
    opt = FROG(net)
    adamw = torch.optim.AdamW([twin.v], 3e-3)
    assert len(net.v._backward_hooks) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            opt.zero_grad()
            net(batch(step), True).square().mean().backward()
            twin.v.grad = net.v.grad.clone()
            assert opt.capture.calls("w") and not opt.capture.calls("v")
            opt.step()
            adamw.step()
            torch.testing.assert_close(net.v, twin.v, rtol=1e-13, atol=1e-14)
    assert opt.state[net.v].keys() == adamw.state[twin.v].keys()
    opt.close()
    assert not net.v._backward_hooks and not net.w._backward_hooks


@pytest.mark.parametrize("cut", range(1, 9))
def test_bare_parameters_resume_with_the_same_bits(cut):
    calls = [False, True, True, False, False, False, False, True, True]

    def run(cut):
        net = Bare()
        opt = FROG(net, sample_size=3)
        bare_steps(net, opt, calls[:cut])
        if cut:
            weights, state = saved(net, opt)
            net = Bare()
            opt = FROG(net, sample_size=3)
            net.load_state_dict(weights)
            opt.load_state_dict(state)
        bare_steps(net, opt, calls[cut:], cut)
        return [*net.parameters()], by(opt, "frog")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (whole, frog), (weights, theirs) = run(0), run(cut)
    assert theirs == frog and "w" in frog
    assert all(map(torch.equal, weights, whole))


def penalty(critic, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("act", [nn.LeakyReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("dropped", ["before all", "after the penalty"])
def test_losses_with_derivatives_of_the_model(act, dropped):
    """A critic under a gradient penalty: the way back from slopes skips the last."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        *(nn.Linear(4, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 1))
    )
    opt = FROG(critic)
    for _ in range(2):
        if dropped == "before all":
            opt.zero_grad()
        slopes = penalty(critic, torch.randn(6, 4))
        if dropped == "after the penalty":
            opt.zero_grad()
        (critic(torch.randn(6, 4)).mean() + 10 * slopes).backward()
        opt.step()
    served = opt.describe().updated_by("frog")
    assert served == ["0.weight", "0.bias", "2.weight", "2.bias"]
