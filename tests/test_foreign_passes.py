"""Passes that write no gradient of a weight's make no samples of it.

As in `test_gradient_fate`, each situation ends in a step that Algorithm 1 takes, too.

More than 400 lines: a pass after the other of those that users make.
"""

import copy
import gc
import weakref

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from fate_nets import CHANGES, DROPS, EVERYTHING, Net, Watched, batch, loss
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton import FROG


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


def gradient_of_inputs(net, x):
    x = x.clone().requires_grad_()
    torch.autograd.grad(loss(net, 3 * x), x)


def penalty(net, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(net, 3 * x), x, create_graph=True)
    assert grad.requires_grad


def backward_into_inputs(net, x):
    x = x.clone().requires_grad_()
    loss(net, 3 * x).backward(inputs=[x])


def gradient_of_the_weights(net, x):
    torch.autograd.grad(loss(net, 3 * x), list(net.parameters()))


def frozen(net, x):
    """A GAN's discriminator in the generator's phase."""
    net.requires_grad_(False)
    loss(net, 3 * x.clone().requires_grad_()).backward()
    net.requires_grad_(True)


def without_gradients(net, x):
    with torch.no_grad():
        net(3 * x)


def no_backward(net, x):
    net(3 * x)


def many_at_once(net, x):
    x = x.clone().requires_grad_()
    y = net(3 * x)
    seeds = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    torch.autograd.grad(y, x, seeds, is_grads_batched=True)


def evaluation(net, x):
    net.eval()
    loss(net, 3 * x.clone().requires_grad_())
    net.train()


FOREIGN = [
    gradient_of_inputs,
    penalty,
    backward_into_inputs,
    gradient_of_the_weights,
    frozen,
    without_gradients,
    no_backward,
    many_at_once,
    evaluation,
]


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_only_passes_that_wrote_the_gradient_count(foreign, when, compiled):
    if compiled and foreign in (penalty, many_at_once):
        pytest.skip("torch.compile takes no derivative of a derivative, nor many")
    run = Watched(compiled)
    for step in range(2):
        x, z = batch(step), batch(20 + step)
        if when == "before":
            foreign(run.forward, z)
        loss(run.forward, x).backward()
        if when == "between":
            foreign(run.forward, z)
        loss(run.forward, 2 * x).backward()
        if when == "after":
            foreign(run.forward, z)
        run.step(x, 2 * x)
    run.check()


def test_the_derivative_inside_a_loss_is_not_the_losss():
    """A physics-informed net: the inner pass counts for nothing, the outer once."""
    run, seen = Watched(), []
    x = batch(0).requires_grad_()
    run.net.first.register_forward_hook(
        lambda m, a, y: (y.register_hook(seen.append), None)[1]
    )
    u = run.net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (du.square().sum() + u.square().sum()).backward()
    inner, outer = seen
    assert not torch.equal(inner, outer)
    (call,) = run.opt.capture.calls("first")
    assert torch.equal(call.x, x) and torch.equal(call.y, outer)


@pytest.mark.parametrize("sets", ["grad", "adds to grad"])
def test_a_gradient_set_by_hand_has_the_samples_of_its_pass(sets):
    """Gradients of tasks are computed apart, and put together by hand."""
    run = Watched()
    params = list(run.net.parameters())
    for step in range(2):
        x = batch(step)
        for param, grad in zip(
            params, torch.autograd.grad(loss(run.net, x), params), strict=True
        ):
            param.grad = grad if sets == "grad" else grad / 2 + grad / 2
        run.step(x)
    run.check()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("drop", ["model.zero_grad", "zero_"])
def test_a_layer_inside_and_outside_of_a_checkpoint(reentrant, drop):
    torch.manual_seed(0)
    net = Net().double()
    opt = FROG(net, sample_size=EVERYTHING)
    twin = copy.deepcopy(net)
    twin_opt = FROG(twin, sample_size=EVERYTHING)

    def forward(model, x, through):
        x = torch.tanh(model.first(x))
        x = torch.tanh(model.second(x))
        x = torch.tanh(through(model.second, x))
        return model.head(torch.tanh(model.second(x)))

    def checkpointed(module, x):
        return checkpoint(module, x, use_reentrant=reentrant)

    for step in range(2):
        forward(net, batch(10 + step), checkpointed).square().sum().backward()
        DROPS[drop](net, opt)
        forward(net, batch(step), checkpointed).square().sum().backward()
        plain = forward(twin, batch(step), lambda module, x: module(x))
        plain.square().sum().backward()
        for optimizer in (opt, twin_opt):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        # Measured 1e-15: the same samples in another order.
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_sharpness_aware_minimization():
    """Two passes a step; the gradient, and so the samples, are the second's."""
    run = Watched()
    params = list(run.net.parameters())
    for step in range(2):
        x = batch(step)
        loss(run.net, x).backward()
        with torch.no_grad():
            steps = [0.05 * p.grad / p.grad.norm() for p in params]
            torch._foreach_add_(params, steps)
        run.net.zero_grad()
        loss(run.net, x).backward()
        with torch.no_grad():
            torch._foreach_add_(list(run.twin.parameters()), steps)
            torch._foreach_sub_(params, steps)
        run.step(x)
    run.check()


@pytest.mark.parametrize("written", ["0 * sum", "penalty"])
def test_a_pass_without_calls_leaves_no_samples_of_a_dropped_one(written):
    run = Watched()
    loss(run.net, batch(0)).backward()
    run.net.zero_grad()
    total = sum(p.square().sum() for p in run.net.parameters())
    (0 * total if written == "0 * sum" else total).backward()
    assert run.opt.capture.calls("first") == run.opt.capture.calls("second") == []
    # Such a term beside a loss changes no sample.
    run.net.zero_grad()
    loss(run.net, batch(0)).backward()
    held = run.opt.capture.calls("first")
    sum(p.square().sum() for p in run.net.parameters()).backward()
    assert run.opt.capture.calls("first") == held != []


def test_a_scaler_skips_and_the_model_drops():
    """What Hugging Face's Trainer does after an overflow."""
    torch.manual_seed(0)
    nets = [Net(), None]
    nets[1] = copy.deepcopy(nets[0])
    opts = [FROG(net) for net in nets]
    for net, opt in zip(nets, opts, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            x = batch(step, dtype=torch.float32)
            if step == 1:
                x = x * float("inf")
            if step == 1 and net is nets[1]:
                continue
            scaler.scale(F.mse_loss(net(x), torch.ones(6, 2))).backward()
            scaler.step(opt)
            scaler.update(4.0)
            net.zero_grad()
        assert opt.anomalies() == {}
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("penalty", ["zero", "squares", "create_graph"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_pass_without_calls_after_a_change_keeps_the_samples(
    change, penalty, capturable
):
    """A weight penalty of its own backward pass, after clipping."""
    run = Watched(capturable=capturable)
    x = batch(0)
    loss(run.net, x).backward()
    act = CHANGES[change]
    act(run.net, None) if change in ("scaled", "by data") else act(run.net)
    total = sum(p.square().sum() for p in run.net.parameters())
    (0 * total if penalty == "zero" else 1e-30 * total).backward(
        create_graph=penalty == "create_graph"
    )
    run.step(x)
    run.check()


def test_zeros_after_inputs_of_zero():
    """Where the weight's gradient was zero anyway, the bias's tells."""
    run = Watched()
    loss(run.net, torch.zeros(6, 3).double()).backward()
    torch._foreach_zero_([p.grad for p in run.net.parameters()])
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


@pytest.mark.parametrize("inner", [1, 3, 8, 20])
def test_passes_inside_a_pass(inner):
    """An implicit layer solves for its gradient by passes inside the backward pass."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]).double()
    opt = FROG(net, sample_size=EVERYTHING)
    twin, seen = copy.deepcopy(net), []
    model = Algorithm1(copy.deepcopy(net[0]))

    def solved(layers, x, hook=None):
        handle = hook and layers[0].register_forward_hook(hook)
        y = 0.5 * torch.tanh(layers[0](x))
        if handle:
            handle.remove()
        z0 = x.clone().requires_grad_()
        f0 = 0.5 * torch.tanh(layers[0](z0))

        def backward(grad):
            total = grad
            for _ in range(inner):
                (step,) = torch.autograd.grad(f0, z0, total, retain_graph=True)
                total = grad + step
            return total

        y.register_hook(backward)
        return layers[1](y)

    x = batch(0)
    solved(net, x).square().sum().backward()

    def hook(module, args, y):
        seen.append(args[0])
        y.register_hook(seen.append)

    solved(twin, x, hook).square().sum().backward()
    model.step(*seen, net[0].weight.grad, net[0].bias.grad)
    opt.step()
    # Measured 4e-16.
    assert oracles.relative_error(net[0].weight, model.weight) < 1e-12


@pytest.mark.parametrize("depth", [2, 6])
def test_checkpoints_in_checkpoints(depth):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]).double()
    opt = FROG(net, sample_size=EVERYTHING)

    def nested(x, left):
        x = torch.tanh(net[0](x))
        if left:
            x = checkpoint(nested, x, left - 1, use_reentrant=True)
        return torch.tanh(net[0](x))

    x = batch(0).requires_grad_()
    net[1](nested(x, depth)).square().sum().backward()
    calls = opt.capture.calls("0")
    assert len(calls) == 2 * (depth + 1)
    total = sum(call.y.T @ call.x for call in calls)
    # Measured 1e-16.
    torch.testing.assert_close(total, net[0].weight.grad, rtol=1e-12, atol=1e-14)


def test_frozen_between_forward_and_backward():
    run = Watched()
    value = loss(run.net, 9 * batch(3))
    run.net.requires_grad_(False)
    value.backward()
    run.net.requires_grad_(True)
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


@pytest.mark.parametrize("drop", [d for d in DROPS if d != "data.zero_"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_penalty_of_its_own_pass_after_a_drop(drop, capturable):
    run = Watched(capturable=capturable)
    loss(run.net, 9 * batch(5)).backward()
    DROPS[drop](run.net, run.opt)
    (0 * sum(p.square().sum() for p in run.net.parameters())).backward()
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


def test_samples_do_not_live_as_long_as_the_loss():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = FROG(net, sample_size=4)
    losses = []
    for step in range(3):
        opt.zero_grad()
        losses.append(loss(net, batch(step, dtype=torch.float32)))
        losses[-1].backward()
        (call,) = opt.capture.calls("0")
        seen = weakref.ref(call.x)
        del call
        opt.step()
        gc.collect()
        assert seen() is None


def test_a_graph_that_is_retained_keeps_its_samples():
    run = Watched()
    value = loss(run.net, batch(0))
    value.backward(retain_graph=True)
    run.net.zero_grad()
    value.backward()
    run.step(batch(0))
    run.check()


def test_passes_that_raise_leave_little_behind():
    run = Watched()
    handle = run.net.first.weight.register_hook(lambda grad: 1 / 0)
    most = 0
    for step in range(40):
        run.net.zero_grad()
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            loss(run.net, batch(step)).backward()
        most = max(most, run.opt.memory_usage()["samples"])
    one = 8 * 6 * (3 + 5 + 5 + 5)  # bytes of both layers' samples of one pass
    assert most <= 19 * one
    handle.remove()
    run.net.zero_grad()
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


def test_gradients_of_inference_mode():
    run = Watched()
    loss(run.net, batch(0)).backward()
    with torch.inference_mode():
        grads = [p.grad * 1 for p in run.net.parameters()]
    for param, grad in zip(run.net.parameters(), grads, strict=True):
        param.grad = grad
    run.net(batch(1))
    run.step(batch(0))
    run.check()


def test_a_foreign_pass_and_a_penalty_make_no_samples():
    run = Watched()
    x = batch(0).requires_grad_()
    torch.autograd.grad(loss(run.net, x), x)
    sum(p.square().sum() for p in run.net.parameters()).backward()
    assert run.opt.capture.calls("first") == []


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_other_weights_in_a_functional_call(leaf, compiled):
    """Leaves of their own are not the layer's; what is computed from it may be."""
    run = Watched()
    params = dict(run.net.named_parameters())
    other = {k: 3 * p for k, p in params.items()}
    if leaf:
        other = {k: p.detach().requires_grad_() for k, p in other.items()}

    def both(x, z):
        y = torch.func.functional_call(run.net, other, z)
        return loss(run.net, x) + y.square().sum()

    if compiled:
        both = torch.compile(both, backend="aot_eager")
    both(batch(0), (10 * batch(5),)).backward()
    assert len(run.opt.capture.calls("first")) == (1 if leaf else 2)
    if leaf:
        run.step(batch(0))
        run.check()


def test_a_gradient_set_by_hand_after_others_were_dropped_is_said():
    """Tasks whose gradients are put together by hand, with a backward pass each."""
    run, merged = Watched(), []
    for task in range(2):
        loss(run.net, batch(task)).backward()
        merged.append([p.grad for p in run.net.parameters()])
        run.opt.zero_grad()
    for param, *grads in zip(run.net.parameters(), *merged, strict=True):
        param.grad = sum(grads)
    with pytest.warns(UserWarning, match=r"first, second: .* set by hand\?"):
        run.opt.step()
