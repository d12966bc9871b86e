"""Samples share the fate of the gradient they belong to, whoever decides on it.

Each situation ends in one step that Algorithm 1 takes in float64 too, fed with the
inputs and output gradients of those passes alone whose gradient is in ``weight.grad``.
"""

import copy

import pytest
import torch
from fate_nets import CHANGES, DROPS, PLAIN, Net, Watched, batch, loss
from torch import nn

from frog_triton import FROG


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("options", [{}, PLAIN], ids=["default", "plain"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_dropped_gradient_takes_its_samples_along(drop, options, compiled):
    run = Watched(compiled, **options)
    for step in range(2):
        loss(run.forward, 50 * batch(10 + step)).backward()
        DROPS[drop](run.net, run.opt)
        loss(run.forward, batch(step)).backward()
        run.step(batch(step))
    run.check()


@pytest.mark.parametrize("drop", [d for d in DROPS if d != "data.zero_"])
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
def test_the_bits_do_not_tell_who_dropped_it(drop, when):
    """Nor do the draws, of samples that are few."""

    def train(drop):
        torch.manual_seed(0)
        net = Net()
        opt = FROG(net, sample_size=3)
        for step in range(3):
            loss(net, batch(10 + step, dtype=torch.float32)).backward()
            if when == "before the forward":
                DROPS[drop](net, opt)
            value = loss(net, batch(step, dtype=torch.float32))
            if when == "before the backward":
                DROPS[drop](net, opt)
            value.backward()
            opt.step()
            net.zero_grad()
        return [p.detach() for p in net.parameters()]

    zeros = "zero" in drop and drop not in ("opt.zero_grad", "model.zero_grad")
    reference = "opt.zero_grad, zeros" if zeros else "opt.zero_grad"
    assert all(map(torch.equal, train(drop), train(reference)))


@pytest.mark.parametrize("drop", [d for d in DROPS if d != "data.zero_"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_where_the_host_may_not_ask_whether_it_is_zero(drop, compiled):
    """On a GPU, and with capturable: samples of what was zeroed become zero."""
    run = Watched(compiled, capturable=True)
    x = batch(9)
    x[0] = float("inf")  # an overflow: what a GradScaler skips
    loss(run.forward, x).backward()
    DROPS[drop](run.net, run.opt)
    if run.net.first.weight.grad is not None:
        # mul_(0) leaves NaN, and then nothing was dropped.
        for param in run.net.parameters():
            param.grad.nan_to_num_(0.0, 0.0, 0.0)
    loss(run.forward, batch(0)).backward()
    run.step(batch(0))
    run.check()
    assert run.opt.anomalies() == {}


@pytest.mark.parametrize("drop", ["model.zero_grad", "zero_"])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_by_the_kernels(drop, formulation):
    run = Watched(dtype=torch.float32, backend="triton", formulation=formulation)
    for step in range(2):
        loss(run.net, batch(10 + step, dtype=torch.float32)).backward()
        DROPS[drop](run.net, run.opt)
        loss(run.net, batch(step, dtype=torch.float32)).backward()
        run.step(batch(step, dtype=torch.float32))
    run.check(2e-5)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gradient_that_is_changed_is_still_there(change, capturable, compiled):
    """Accumulation, with what trainers do to gradients between the passes."""
    run = Watched(compiled, capturable=capturable)
    for step in range(2):
        xs = [batch(10 * step + micro) for micro in range(3)]
        for x in xs:
            loss(run.forward, x).backward()
            act = CHANGES[change]
            act(run.net, None) if change in ("scaled", "by data") else act(run.net)
        run.step(*xs)
    run.check()


def test_a_gradient_that_accumulates_out_of_place():
    """As autograd does with create_graph."""
    run = Watched()
    xs = batch(0), batch(1)
    for x in xs:
        loss(run.net, x).backward(create_graph=True)
    run.step(*xs)
    run.check()


def test_gradients_can_be_saved_copied_and_cast(tmp_path):
    """They carry a mark, which is in nobody's way."""
    run = Watched()
    loss(run.net, batch(0)).backward()
    grads = [p.grad for p in run.net.parameters()]
    torch.save(grads, tmp_path / "grads")
    for other in (
        torch.load(tmp_path / "grads", weights_only=True),
        copy.deepcopy(grads),
    ):
        assert all(map(torch.equal, grads, other))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        run.net.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p.grad.dtype == torch.float32 for p in run.net.parameters())


def test_no_hook_is_left_on_a_parameter():
    run = Watched()
    loss(run.net, batch(0)).backward()
    run.opt.close()
    assert not any(p._post_accumulate_grad_hooks for p in run.net.parameters())
    run.net.requires_grad_(False)
    opt = FROG(run.net)
    run.net(batch(0))
    del opt
    assert not any(p._post_accumulate_grad_hooks for p in run.net.parameters())


# -- what it costs ---------------------------------------------------------------------


def test_a_frozen_backbone_costs_nothing():
    net = nn.Sequential(nn.Linear(3, 4), *[nn.Linear(4, 4) for _ in range(3)])
    net.append(nn.Linear(4, 2))
    opt = FROG(net, output_layers="4")
    net[:3].requires_grad_(False)  # as under adapters: gradients pass through
    loss(net, batch(0, dtype=torch.float32).requires_grad_()).backward()
    assert opt.memory_usage()["samples"] == 4 * 6 * (4 + 4)
    opt.step()
    assert opt.memory_usage()["state"] == 4 * (20 + 1) + 2 * 4 * (10 + 1)
    assert all(not opt.state.get(p) for p in net[:3].parameters())


def test_layers_without_a_gradient_have_no_state():
    net = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(11)])
    opt = FROG(net)
    net[:9].requires_grad_(False)
    assert opt.memory_usage()["state"] == 0
    loss(net, torch.randn(4, 32)).backward()
    opt.step()
    # A momentum and a counter; AdamW's averages of the output layer and a counter.
    assert opt.memory_usage()["state"] == 4 * (32 * 32 + 1) + 4 * (2 * 32 * 32 + 1)
    assert [r.reason for r in opt.describe()].count("Linear; frozen") == 9
