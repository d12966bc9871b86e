"""What `cost` counts is what a real step launches, launch for launch."""

import copy
from collections import Counter

import pytest
import torch
from tape import Tape
from torch import nn

import frog_triton
from frog_triton import optimizer
from frog_triton.eager import FROM_HOST, eager_operations
from frog_triton.kernels.launch import recording
from frog_triton.kernels.work import work
from frog_triton.ops import triton_ops


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


def steps(model, monkeypatch, **options):
    """Launches of the second step, by name, and how many kernels were recorded of the
    third; nothing of them runs."""
    opt = frog_triton.FROG(
        model, backend="triton", exclude_output_layer=False, **options
    )
    # As on a GPU, where the host does not know whether a step is skipped, directions
    # are in bfloat16, and steps are recorded.
    monkeypatch.setattr(optimizer, "may_read", lambda *_: False)
    monkeypatch.setattr(triton_ops, "on_host", lambda _: False)
    opt._routines.graphs = lambda device: Tape
    found = []
    for _ in range(3):
        opt.zero_grad()
        with recording(run=False):
            model(torch.randn(48, 3, 6, 6)).square().sum().backward()
        with recording(run=False) as kernels:
            operations = eager_operations(opt.step)
        found.append(Counter(made.name for made in (*kernels, *operations)))
    # Of state, which lies on the host.
    found[1]["_foreach_add_"] -= 1
    (recorded,) = opt._routines._kept.values()
    return +found[1], recorded.routine.launches


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
    assert expected.pop(FROM_HOST) == 1
    found, played = steps(model, monkeypatch, **options)
    assert found == +expected
    assert played == sum(n for name, n in found.items() if name.endswith("_kernel"))
    assert counted.launches == found.total() + counted.beside["samples"] + 1


@pytest.mark.parametrize("samples", [8, 40])
def test_hooks_launch_what_is_counted(samples):
    model = net()
    plain = copy.deepcopy(model)
    counted = frog_triton.cost(model, exclude_output_layer=False, sample_size=samples)
    opt = frog_triton.FROG(
        model, backend="triton", exclude_output_layer=False, sample_size=samples
    )
    x = torch.randn(48, 3, 6, 6)

    def passes(model):
        model.zero_grad()
        model(x).square().sum().backward()

    for _ in range(2):  # the first call checks what the layers compute
        with recording(run=False) as kernels:
            hooked = eager_operations(lambda: passes(model))
    assert len(list(opt.capture.tensors())) == counted.beside["samples"]
    assert {made.name for made in kernels} == {"_draw_kernel"}
    assert len(kernels) == counted.beside["samples"] == 2 * len(counted.layers)
    moved = sum(work(made).bytes for made in kernels)
    assert moved == 2 * sum(line.sample_bytes for line in counted.layers)
    bare = eager_operations(lambda: passes(plain))
    assert [made.name for made in hooked] == [made.name for made in bare]
