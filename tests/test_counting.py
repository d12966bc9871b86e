"""What `cost` counts is what a real step launches, launch for launch."""

from collections import Counter

import pytest
import torch
from torch import nn

import frog_triton
from frog_triton import optimizer
from frog_triton.eager import FROM_HOST, eager_operations
from frog_triton.kernels import tables
from frog_triton.kernels.launch import recording


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 24),
        nn.Linear(24, 24),
        nn.Linear(24, 24, bias=False),
        nn.Linear(24, 24, bias=False),
    )


def a_step(model, monkeypatch, **options):
    """Launches of the second step, by name; kernels do not run."""
    opt = frog_triton.FROG(
        model, backend="triton", exclude_output_layer=False, **options
    )
    uploads = []
    copied = tables._copied

    def copy(words, device):
        uploads.append(len(words))
        return copied(words, device)

    monkeypatch.setattr(tables, "_copied", copy)
    # As on a GPU, where the host does not know whether a step is skipped.
    monkeypatch.setattr(optimizer, "may_read", lambda *_: False)
    for _ in range(2):
        uploads.clear()
        opt.zero_grad()
        with recording(run=False):
            model(torch.randn(48, 3, 6, 6)).square().sum().backward()
        with recording(run=False) as kernels:
            operations = eager_operations(opt.step)
    found = Counter(kernel.name for kernel in kernels)
    found.update(operation.name for operation in operations)
    found[FROM_HOST] += len(uploads)
    # Of state, which lies on the host.
    found["add_"] -= sum("step" in state for state in opt.state.values())
    return +found


@pytest.mark.parametrize("orthogonalize", [True, False])
@pytest.mark.parametrize("samples", [8, 40])  # below and above most rows' length
@pytest.mark.parametrize("formulation", ["auto", "gram", "primal"])
def test_a_step_launches_what_is_counted(
    monkeypatch, orthogonalize, samples, formulation
):
    options = {
        "orthogonalize": orthogonalize,
        "sample_size": samples,
        "formulation": formulation,
    }
    model = net()
    counted = frog_triton.cost(model, exclude_output_layer=False, **options)
    expected = Counter(counted.launched)
    expected["_draw_kernel"] -= counted.beside["samples"]  # in forward and backward
    found = a_step(model, monkeypatch, **options)
    assert found == +expected
    assert counted.launches == found.total() + counted.beside["samples"]
    assert sum(counted.beside.values()) + sum(
        line.launches / line.shared_by for line in counted.layers
    ) == pytest.approx(counted.launches)
