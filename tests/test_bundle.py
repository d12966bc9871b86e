"""Layers of all sizes share the launches of a kernel, and their bits do not tell."""

from functools import partial

import pytest
import torch
from tape import Tape
from torch import nn

from frog_triton import FROG, cost, optimizer
from frog_triton.benchmarks.shapes import resnet50
from frog_triton.kernels.bundle import Bundle
from frog_triton.kernels.launch import recording
from frog_triton.kernels.queue import side_by_side
from frog_triton.layers.conv import ConvSpec
from frog_triton.ops import triton_ops
from frog_triton.solve.launches import Bucket, LayerShape, trial_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16
PLAIN = {"orthogonalize": False, "nesterov": False}


def conv(rows, channels, size, groups=1, bias=True):
    spec = ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), groups)
    dim, image = 9 * channels // groups, (channels, size, size)
    return LayerShape("", rows, dim, 2 * size * size, groups, bias, image, spec)


CASES = {
    "matrices": [LayerShape("", r, d, 16) for r, d in ((48, 32), (16, 64), (80, 96))],
    "no bias": [
        LayerShape("", r, d, 32, bias=False) for r, d in ((48, 32), (16, 96), (32, 64))
    ],
    # Strides that 16 divides and others, one row, and one weight in a row.
    "ragged": [
        LayerShape("", r, d, 16) for r, d in ((33, 17), (1, 31), (5, 1), (16, 9))
    ],
    "samples": [LayerShape("", 32, 32, n) for n in (8, 16, 24, 150)],
    "groups": [LayerShape("", r, 24, 16, groups=g) for r, g in ((48, 2), (96, 6))],
    "images": [conv(16, 16, 4), conv(32, 16, 6), conv(8, 16, 5, bias=False)],
    "depthwise": [conv(16, 16, 4, 16), conv(32, 32, 5, 32)],
}


def make(seed):
    generator = torch.Generator().manual_seed(seed)

    def tensor(size, dtype):
        if not dtype.is_floating_point:
            return torch.zeros(size, dtype=dtype, device=DEVICE)
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    return tensor


def trials(shapes, formulation, dtypes=(F32,) * 3):
    return [
        trial_step(Bucket(s, 1 + i % 2, 2, i > 0, dtypes), formulation, make(i))
        for i, s in enumerate(shapes)
    ]


def results(found):
    parts = [part for t in found for rows in t.params for part in rows]
    parts += [part for t in found for rows in t.batch.ms for part in rows]
    return [p for p in parts if p is not None] + [c for t in found for c in t.counts]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("formulation", ["gram", "primal"])
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_launches_of_their_own(case, formulation):
    shapes = CASES[case]
    alone, together = (trials(shapes, formulation) for _ in range(2))
    with recording() as apart:
        for each in alone:
            each.step(triton_ops)
    with recording() as shared:
        side_by_side([partial(each.step, triton_ops) for each in together])
    assert same(results(alone), results(together))
    assert sorted(a.name for a in shared.parts) == sorted(a.name for a in apart)
    assert len(shared) < len(apart)


@pytest.mark.parametrize("formulation", ["gram", "primal"])
def test_samples_parameters_and_momentum_of_16_bits(formulation):
    dtypes = (BF16, BF16, BF16)
    alone, together = (trials(CASES["matrices"], formulation, dtypes) for _ in range(2))
    for each in alone:
        each.step(triton_ops)
    side_by_side([partial(each.step, triton_ops) for each in together])
    assert same(results(alone), results(together))


def names(made):
    return [
        (a.name.removeprefix("_").removesuffix("_kernel"), len(a.parts)) for a in made
    ]


def test_each_kernel_is_launched_once():
    found = trials(CASES["matrices"], "gram")
    with recording(run=False) as made:
        side_by_side([partial(each.step, triton_ops) for each in found])
    assert names(made) == [
        ("largest", 3),
        ("gram", 3),
        ("gram_terms", 3),
        ("momentum_project", 1),  # without Nesterov's momentum, as `trials` has it
        ("momentum_project", 2),
        ("gram_cg", 3),
        ("update", 3),
    ]


def test_all_layers_share_launches():
    """ResNet-50 at the default sample size: 53 convolutions."""
    counted = cost(resnet50(256), sample_dtype=BF16, **PLAIN)
    alone = sum({line.layer: line.launches for line in counted.layers}.values())
    assert alone == 164
    kernels = {n: c for n, c in counted.launched.items() if n.endswith("_kernel")}
    # In Gram space one launch of each kernel, two of momentum and projection.
    gram = ("gram", "gram_terms", "gram_cg", "update")
    assert all(kernels[f"_{name}_kernel"] == 1 for name in gram)
    # On the rows two of each: those of 147 weights are read in another way.
    assert kernels["_primal_direction_kernel"] == 2 * 4
    assert kernels["_primal_forward_kernel"] == 2 * 4
    assert kernels["_primal_adjoint_kernel"] == 2 * 3
    assert counted.launches == 38 + sum(counted.beside.values())


class Net(nn.Module):
    """Layers of eight geometries, two of which go to the fallback."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1, groups=2),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 32, 1, bias=False),
        )
        self.inner = nn.Linear(32 * 4, 48)
        self.out = nn.Linear(48, 10)

    def forward(self, x):
        return self.out(self.inner(self.convs(x).flatten(1)).tanh())


@pytest.mark.parametrize("orthogonalize", [True, False])
@pytest.mark.parametrize("options", [{}, {"sampling": "examples", "sample_size": 4}])
def test_an_optimizer_steps_to_the_same_bits(monkeypatch, orthogonalize, options):
    def train():
        torch.manual_seed(0)
        net = Net().to(DEVICE)
        how = {"sample_size": 24, "orthogonalize": orthogonalize, **options}
        opt = FROG(net, backend="triton", **how)
        count = 0
        for _ in range(3):
            opt.zero_grad()
            with recording() as made:
                net(torch.randn(8, 3, 6, 6).to(DEVICE)).square().sum().backward()
                before = len(made)
                opt.step()
            count = len(made) - before
        return [p.detach().clone() for p in net.parameters()], count

    shared, fewer = train()
    monkeypatch.setattr(
        triton_ops, "side_by_side", lambda jobs: [job() for job in jobs]
    )
    alone, count = train()
    assert same(shared, alone)
    assert fewer < count


def test_strides_that_16_divides_do_not_lose_it():
    """Else one odd layer would slow the loads of all others down."""
    shapes = [LayerShape("", 32, d, 16, bias=False) for d in (32, 64, 33, 35)]
    found = trials(shapes, "gram")
    with recording(run=False) as made:
        side_by_side([partial(each.step, triton_ops) for each in found])
    for a in made:
        if a.name == "_update_kernel":
            assert len({part.args["D"] % 16 == 0 for part in a.parts}) == 1


def test_long_programs_come_first():
    shapes = [LayerShape("", 32, d, 16, bias=False) for d in (32, 96, 64)]
    found = trials(shapes, "gram")
    with recording(run=False) as made:
        side_by_side([partial(each.step, triton_ops) for each in found])
    (gram,) = (a for a in made if a.name == "_gram_kernel")
    assert [part.args["D"] for part in gram.parts] == [96, 64, 32]


def test_a_launch_that_fills_a_gpu_goes_alone_where_company_costs_registers():
    """Not as many small ones, though they are more programs together."""
    for rows_, parts in ((4096, 1), (512, 3)):  # programs of 32 rows by 64 samples
        shapes = [LayerShape("", rows_ + 32 * i, 64, 512) for i in range(3)]
        jobs = [partial(s.step, triton_ops) for s in meta_trials(shapes)]
        with recording(run=False) as made:
            side_by_side(jobs)
        forward = [a for a in made if a.name == "_primal_forward_kernel"]
        assert {len(a.parts) for a in forward} == {parts}


def meta_trials(shapes):
    """Steps on the rows, of tensors without memory."""

    def empty(size, dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    return [trial_step(Bucket(shape), "primal", empty) for shape in shapes]


def specialized(value):
    """As far as Triton makes another kernel for it."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return tuple(map(specialized, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, value < 2**31
    return str(getattr(value, "value", value))


def variant(made):
    """What is compiled for a launch."""
    whole = isinstance(made, Bundle)
    args = made.bound if whole else made.args
    known = {k: specialized(v) for k, v in args.items() if k != "COUNT"}
    return made.name, whole, tuple(known.items())


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_a_recording_compiles_nothing(monkeypatch, orthogonalize):
    """All its kernels have been launched before: none can be loaded meanwhile."""
    monkeypatch.setattr(optimizer, "may_read", lambda *_: False)
    monkeypatch.setattr(triton_ops, "on_host", lambda _: False)
    net = Net().to(DEVICE)
    options = {"sample_size": 24, "orthogonalize": orthogonalize}
    opt = FROG(net, backend="triton", exclude_output_layer=False, **options)
    if DEVICE == "cpu":
        opt._routines.graphs = lambda device: Tape
    met, new = set(), []
    for _ in range(3):
        opt.zero_grad()
        net(torch.randn(8, 3, 6, 6).to(DEVICE)).square().sum().backward()
        with recording() as made:
            opt.step()
        found = set(map(variant, made))
        new.append(len(found - met))
        met |= found
    assert "played from a recording" in opt._routines.summary()
    assert new[0] and not new[-1]
