"""Samples of several steps that are solved together, against Algorithm 1 in float64."""

import copy
from collections import deque

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from kinds import Model, _grad
from kinds_attention import ATTENTION
from kinds_calls import CALLS, LR
from kinds_inside import EXPERTS, RECURRENT
from kinds_run import Run, backward
from recorded import Pair
from test_capturable import NoWaiting
from test_state import Net, assert_same, batch, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton import FROG, distributed
from frog_triton.distributed import division
from frog_triton.linalg import products
from frog_triton.ops import orthogonal, torch_ops
from frog_triton.recent import forget, join
from frog_triton.solve import together
from frog_triton.state import RECENT_KEYS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {**CALLS, **ATTENTION, **EXPERTS, **RECURRENT}
STEPS = 3


class Remembering(Model):
    """Algorithm 1 on the samples of the last `STEPS` steps of every weight."""

    def __init__(self, kind, **options):
        super().__init__(kind, **options)
        self.last = {name: deque(maxlen=STEPS) for name in kind.matrices}

    def step(self, *batches, sampled=True):
        record = self.record(*batches)
        for name, of_steps in self.last.items():
            groups = [g for n, g in self.algorithms if n == name]
            made = {g: record.rows(name, g) for g in groups if record.made[name, g]}
            pairs = {g: [oracles.as_numpy(t) for t in made[g]] for g in made}
            # Groups that meet fewer tokens than others are filled up with zeros.
            count = max((len(y) for _, y in pairs.values()), default=1)
            rows = sum(len(self.algorithms[name, g].weight) for g in groups)
            squares = sum(np.square(y).sum() for _, y in pairs.values())
            size = np.sqrt(squares / (count * rows)) or 1.0
            kept = pairs if sampled else {}
            of_steps.append({g: (x, y / size) for g, (x, y) in kept.items()})
        for name, group, grad, grad_bias in self._matrices(_grad):
            known = [s[group] for s in self.last[name] if group in s]
            if (name, group) not in self.algorithms or not record.made[name, group]:
                continue
            x, y = (
                torch.tensor(np.concatenate(part)) for part in zip(*known, strict=True)
            )
            if self.frozen:
                x, grad, grad_bias = x.new_ones(len(x), 1), grad_bias[:, None], None
            grads = [None if g is None else torch.tensor(g) for g in (grad, grad_bias)]
            self.algorithms[name, group].step(x, y, *grads)
        self._write()


def run_of(kind, *where, frozen=False, **options):
    run = Run(kind, *where, frozen=frozen, sample_steps=STEPS, **options)
    plain = options.get("orthogonalize", True)
    run.model = Remembering(kind, frozen=frozen, lr=LR, orthogonalize=plain)
    return run


@pytest.mark.parametrize("formulation", ["primal", "gram"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer(name, formulation):
    if any(its in name for its in ("transformers", "mixtral", "gpt-oss")):
        pytest.importorskip("transformers")
    kind = KINDS[name]
    orthogonalize = formulation == "primal"
    run = run_of(kind, formulation=formulation, orthogonalize=orthogonalize)
    for seed in range(5):
        run.step(kind.batch(seed))
        assert run.error() < 1e-10  # measured: 3e-13


@pytest.mark.parametrize("name", ["own-kind", "transposed-2d-groups", "self"])
def test_steps_of_kernels(name):
    options = {"backend": "triton", "orthogonalize": False}
    run = run_of(KINDS[name], torch.float32, DEVICE, **options)
    for seed in range(4):
        run.step(KINDS[name].batch(seed))
    assert run.error() < 1e-4  # measured: 4e-6 in the interpreter


@pytest.mark.parametrize("name", ["own-kind", "transposed-2d-groups", "self"])
def test_a_bias_alone_is_trained(name):
    run = run_of(KINDS[name], frozen=True)
    for seed in range(5):
        run.step(KINDS[name].batch(seed))
        assert run.error() < 1e-10  # measured: 2e-15


def test_passes_that_add_up_and_batches_of_other_sizes():
    kind = KINDS["own-kind"]
    run = run_of(kind)
    few = tuple(x[:2] for x in kind.batch(9))
    for batches in ([few], [kind.batch(1), kind.batch(2)], [few], [kind.batch(3)]):
        run.step(*batches)
        assert run.error() < 1e-10  # measured: 2e-15


def test_a_step_without_samples_is_solved_with_those_before():
    kind = KINDS["own-kind"]
    run = run_of(kind)
    run.step(kind.batch(0))
    run.opt.zero_grad()
    backward(kind, run.net, kind.batch(1))
    run.opt.drop_samples()
    with pytest.warns(UserWarning, match="that of the steps before"):
        run.opt.step()
    run.model.step(kind.batch(1), sampled=False)
    assert run.error() < 1e-10  # measured: 3e-15
    for seed in range(2, 5):
        run.step(kind.batch(seed))
        assert run.error() < 1e-10  # measured: 3e-15


def small(seed, factor=1.0, **options):
    """A net after six steps on losses times a factor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(DEVICE)
    opt = FROG(net, sample_steps=2, sample_size=8, fallback_lr=0.0, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        x = torch.randn(8, 5, generator=generator).to(DEVICE)
        opt.zero_grad()
        (factor * net(x).square().mean()).backward()
        opt.step()
    return net, opt


def test_one_number_times_all_losses_changes_nothing():
    one, other = (small(0, factor)[0][0].weight for factor in (1.0, 2.0**-90))
    assert torch.equal(one, other)


class Counting(TorchDispatchMode):
    """Counts operations that make or change memory."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        plain = func._schema.name == "aten::promote_types"
        self.made += not (func.is_view or plain)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("samples", "operations"), [(8, 17), (6, 21)])
def test_operations_beside_the_solve(samples, operations):
    """Filled up with zeros, a step takes four more; no operation depends on T."""
    own = {"step": torch.zeros(())}
    join(own, "layer", 4, (torch.randn(8, 5), torch.randn(8, 6)))
    new = torch.randn(samples, 5), torch.randn(samples, 6)
    with Counting() as counting:
        join(own, "layer", 4, new)
    assert counting.made == operations


def test_a_loss_that_shrinks_leaves_steps_their_weight():
    """A step whose gradients are half as large has the same part in the Fisher."""
    x = torch.randn(8, 5)
    own = {"step": torch.zeros(())}
    for i in range(2):
        y = torch.ones(8, 3) / 2**i
        xs, ys = join(own, "layer", 2, (x, y))
        own["step"] += 1
    assert torch.equal(ys, torch.ones(16, 3)) and torch.equal(xs, torch.cat([x, x]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_count_as_zero(bad):
    x, y = torch.ones(4, 2), torch.ones(4, 3)
    x[0, 1] = y[1, 2] = bad
    xs, ys = join({"step": torch.zeros(())}, "layer", 2, (x, y))
    assert xs[0].tolist() == [1, 0] and torch.isfinite(xs).all()
    assert ys[1, 2] == 0 and torch.isfinite(ys).all()
    assert ys.square().sum() == pytest.approx(y.numel())


# -- steps that are recorded, or captured ----------------------------------------------


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """Nothing looks at numbers: what is recorded depends on none."""
    for module in (orthogonal, together, torch_ops):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_recorded_steps_of_kernels():
    pair = Pair(sample_steps=3)
    pair.step(6)
    assert pair.plays == 3, pair.opts[0]._routines.refused
    pair.step(3, size=4)
    pair.step(3, micro_batches=2)
    pair.each(lambda net, opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())))
    pair.step(4)
    assert pair.plays == 7


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_recorded_biases_of_kernels():
    pair = Pair(sample_steps=3)

    def freeze(net, opt):
        net.down.weight.requires_grad_(False)

    pair.each(freeze)
    pair.step(6)
    before = pair.plays

    def renew(net, opt):  # elsewhere, so that an old address would be read
        for own in opt.state.values():
            own |= {key: own[key].clone() for key in RECENT_KEYS if key in own}

    pair.each(renew)
    pair.step(4)
    assert pair.plays > before > 0, pair.opts[0]._routines.refused


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_skipped_step_leaves_no_trace():
    """Its samples go where those of the next step will go."""
    pair = Pair(sample_steps=3)
    pair.step(5)
    net, opt = pair.nets[0], pair.opts[0]
    opt.zero_grad()
    given = torch.ones(6, 2, 4, 4) * torch.arange(6.0).view(6, 1, 1, 1)
    x, y = given.to(DEVICE), (torch.arange(6) % 3).to(DEVICE)
    F.cross_entropy(net(x.flip(0)), y).backward()
    net.up.weight.grad[0, 0] = float("nan")
    stats = copy.deepcopy(net.norm.state_dict())
    opt.step()
    assert opt.anomalies()["model"] == {"skipped_steps": 1}
    net.norm.load_state_dict(stats)
    for _ in range(3):
        for net, opt in zip(pair.nets, pair.opts, strict=True):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
        for a, b in zip(*(net.parameters() for net in pair.nets), strict=True):
            assert torch.equal(a, b)


def test_capturable_waits_for_nothing_and_changes_nothing(monkeypatch):
    for module in (orthogonal, together, torch_ops, products):
        monkeypatch.setattr(module, "on_host", lambda tensor: False, raising=False)
    net, opt = small(1, capturable=True)
    other, _ = small(1)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    net(torch.randn(8, 5, device=DEVICE)).square().mean().backward()
    with NoWaiting():
        opt.step()


# -- state -----------------------------------------------------------------------------


def make(**options):
    torch.manual_seed(0)
    net = Net()
    opt = FROG(net, sample_size=4, lr=0.05, **options)
    return net, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)


def load(into, source):
    for one, other in zip(into, source, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(capturable):
    whole = make(sample_steps=3, capturable=capturable)
    train(*whole, range(4))
    resumed = make(sample_steps=3, capturable=capturable)
    load(resumed, whole)
    for run in (whole, resumed):
        train(*run, range(4, 9))
    assert_same(whole, resumed)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_steps_begins_anew(before, after):
    first, second = make(sample_steps=before), make(sample_steps=after)
    train(*first, range(4))
    load(second, first)
    train(*second, range(4, 6))
    own = second[1].state[second[0].fc.weight]
    if after == 1:
        assert not own.keys() & set(RECENT_KEYS)
    else:
        assert own["recent_x"].shape == (3, 4, 64)
        assert own["recent_x"].flatten(1).any(1).tolist() == [False, True, True]


def test_another_type_begins_anew():
    net, opt, schedule = make(sample_steps=2)
    train(net, opt, schedule, range(3))
    net.to(torch.bfloat16)
    train(net, opt, schedule, range(3, 5))
    assert opt.state[net.fc.weight]["recent_x"].dtype == torch.bfloat16


def test_a_layer_that_is_let_go_leaves_its_samples():
    net, opt, schedule = make(sample_steps=2)
    train(net, opt, schedule, range(2))
    for seed in range(2, 6):
        x, y = batch(seed)
        opt.zero_grad()
        x = F.relu(net.norm(net.conv(x))).flatten(1)
        out = net.head(torch.tanh(x @ net.fc.weight.T + net.fc.bias))
        F.cross_entropy(out, y).backward()
        opt.step()
    assert not opt.state[net.fc.weight].keys() & set(RECENT_KEYS)
    assert opt.state[net.conv.weight].keys() >= set(RECENT_KEYS)


def test_samples_count_as_memory():
    net, opt = small(0)
    own = opt.state[net[0].weight]
    rings = [own[key] for key in RECENT_KEYS]
    assert [tuple(ring.shape) for ring in rings] == [(2, 8, 5), (2, 8, 6)]
    held = opt.memory_usage()["state"]
    forget(own)
    assert opt.memory_usage()["state"] == held - sum(ring.nbytes for ring in rings)


def test_through_torch_distributed_checkpoint():
    from torch.distributed.checkpoint import state_dict

    whole, resumed = make(sample_steps=3), make(sample_steps=3)
    train(*whole, range(4))
    saved = state_dict.get_state_dict(*whole[:2])
    state_dict.set_state_dict(
        *resumed[:2], model_state_dict=saved[0], optim_state_dict=saved[1]
    )
    resumed[2].load_state_dict(whole[2].state_dict())
    for run in (whole, resumed):
        train(*run, range(4, 7))
    assert_same(whole, resumed)


# -- what is refused -------------------------------------------------------------------


def test_whole_examples_are_refused():
    with pytest.raises(ValueError, match="sample_steps=2 joins positions"):
        FROG(Net(), sample_steps=2, sampling="examples")


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "_is_initialized", lambda: True)
    monkeypatch.setattr(division, "find_division", lambda *_: object())
    monkeypatch.setattr(division, "check_placements", lambda *_: None)
    with pytest.raises(ValueError, match=r"sample_steps=2 goes with one rank only"):
        FROG(Net(), sample_steps=2)


@pytest.mark.parametrize("value", [0, 1.5, True, "all"])
def test_what_is_no_number_of_steps_is_refused(value):
    with pytest.raises(ValueError, match="sample_steps must be a positive integer"):
        FROG(Net(), sample_steps=value)
