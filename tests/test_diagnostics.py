"""Diagnostics against dense float64 systems."""

import numpy as np
import oracles
import pytest
import torch
from cases import PAPER
from torch import nn

from frog_triton import FROG


def make(**options):
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)
    ).double()
    return net, FROG(net, sample_size=100, cg_iters=2, **options)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_values_are_those_of_the_dense_systems(formulation, nesterov):
    options = PAPER | {"nesterov": nesterov, "damping": 1e-2, "weight_decay": 0.0}
    net, opt = make(formulation=formulation, **options)
    conv, seen = net[0], {}

    def watch(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda g: seen.__setitem__("y", g))

    conv.register_forward_hook(watch)
    net(torch.randn(6, 2, 5).double()).square().sum().backward()
    before = np.c_[oracles.as_numpy(conv.weight).reshape(4, -1), conv.bias.tolist()]
    with opt.diagnose() as diagnostics:
        opt.step()
    after = np.c_[oracles.as_numpy(conv.weight).reshape(4, -1), conv.bias.tolist()]
    moved = np.linalg.norm(after - before, axis=1)
    (found,) = diagnostics.read().values()
    # Measured 5e-15.
    assert found["update_norm_mean"] == pytest.approx(moved.mean(), rel=1e-12)
    assert found["update_norm_std"] == pytest.approx(moved.std(), rel=1e-12)
    assert found["identity_rows"] == found["skipped_rows"] == 0

    scale = 1.9 if nesterov else 1.0  # the first step: M is G, so G + 0.9 M
    g = np.c_[oracles.as_numpy(conv.weight.grad).reshape(4, -1), conv.bias.grad]
    x = oracles.patches(conv, oracles.as_numpy(seen["x"]))[:, 0]
    x = np.c_[x, np.ones(len(x))]
    y = oracles.as_numpy(seen["y"]).transpose(0, 2, 1).reshape(-1, 4)
    residuals, dampings = [], []
    for row in range(4):
        m = scale * g[row]
        trace = (y[:, row] ** 2 * (x**2).sum(1)).sum()
        weights = y[:, row] ** 2 / (trace / x.shape[1])
        fisher = x.T @ (weights[:, None] * x) + 1e-2 * np.eye(x.shape[1])
        direction = (before - after)[row] / 2e-2
        z = direction * (direction @ m)
        residuals.append(np.linalg.norm(m - fisher @ z) / np.linalg.norm(m))
        dampings.append(1e-2 * trace / x.shape[1])
    # Measured 3e-15.
    assert found["cg_residual"] == pytest.approx(np.mean(residuals), rel=1e-10)
    assert found["effective_damping"] == pytest.approx(np.mean(dampings), rel=1e-12)


def test_rows_that_are_not_solved_are_counted():
    net, opt = make()
    opt.param_groups[0]["lr"] = 0.0  # a step that makes the state
    net(torch.randn(6, 2, 5).double()).square().sum().backward()
    opt.step()
    net(torch.randn(6, 2, 5).double()).square().sum().backward()
    (call,) = opt.capture.calls("0")
    call.y[:, 1] = 0
    largest = torch.finfo(torch.float64).max  # too much for the momentum
    opt.state[net[0].weight]["momentum_buffer"][2] = 0.9 * largest
    net[0].weight.grad[2] = 0.9 * largest
    with opt.diagnose() as diagnostics:
        opt.step()
    found = diagnostics.read()["0"]
    assert found["identity_rows"] == 1 and found["skipped_rows"] == 1
    assert all(np.isfinite(value) for value in found.values())


def test_a_step_that_is_looked_at_is_the_step_that_is_not():
    weights = []
    for look in (False, True):
        torch.manual_seed(0)
        net, opt = make()
        net(torch.randn(6, 2, 5).double()).square().sum().backward()
        if look:
            with opt.diagnose():
                opt.step()
        else:
            opt.step()
        weights.append(net[0].weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("sampling", "kept"),
    # Activations and output gradients; patches of three pixels of two channels.
    [("examples", 6 * 2 * 5 + 6 * 4 * 5), ("positions", 30 * 6 + 30 * 4)],
)
def test_bytes(sampling, kept, fallback):
    net, opt = make(sampling=sampling, fallback=fallback)
    count = sum(p.numel() for p in net.parameters())
    for param in net.parameters():
        param.requires_grad_(False)
    net(torch.randn(6, 2, 5).double())
    assert opt.memory_usage()["state"] == opt.memory_usage()["samples"] == 0
    net.requires_grad_(True)
    net(torch.randn(6, 2, 5).double()).sum().backward()
    opt.step()
    usage = opt.memory_usage()
    # One step counter; AdamW has a second average and a counter of its own.
    rest = [p.numel() for p in net[3].parameters()] if fallback == "adamw" else []
    assert usage["state"] == 8 * count + 4 + sum(8 * n + 4 for n in rest)
    # Two for each row; for each parameter; for skipped steps.
    assert usage["counters"] == 4 * (2 * 4 + len(list(net.parameters())) + 1)
    assert usage["samples"] == 0
    net(torch.randn(6, 2, 5).double()).sum().backward()
    assert opt.memory_usage()["samples"] == 8 * kept
    opt.step()
    assert opt.memory_usage() == usage
