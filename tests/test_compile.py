"""Models under torch.compile: whole graphs, and the samples of an uncompiled run."""

import contextlib
import copy
import gc
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton import FROG


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


class Net(nn.Module):
    """In-place activations, a module used twice, a sequence, groups, a padding mode."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.conv1 = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def features(self, x):
        x = F.relu(self.conv1(x), inplace=True).unflatten(2, (4, 4))
        x = self.conv2(x)
        x += 0.1
        return F.relu(self.norm(x), inplace=True)

    def tail(self, x):
        x = self.twice(torch.tanh(self.twice(x)))
        x = F.relu(self.fc(input=x), inplace=True)
        return self.head(x).mean(1)

    def forward(self, x):
        x = self.features(x).flatten(2).mT
        if self.checkpointed:
            return checkpoint(self.tail, x, use_reentrant=False)
        return self.tail(x)


def batch(seed, size=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 16, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def train(net, opt, forward, sizes=(7, 7, 7), micro_batches=1):
    for step, size in enumerate(sizes):
        opt.zero_grad()
        for micro in range(micro_batches):
            x, y = batch(10 * step + micro, size)
            F.cross_entropy(forward(x.to(net.fc.weight.dtype)), y).backward()
        opt.step()


def pair(checkpointed=False, dtype=torch.float64, **options):
    net = Net(checkpointed).to(dtype)
    twin = copy.deepcopy(net)
    return net, FROG(net, **options), twin, FROG(twin, **options)


def assert_close(net, twin, rtol=1e-9, atol=1e-11):
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        # Measured: 2e-15 of the largest entry with Inductor, 2e-12 with PAPER; the same
        # bits without.
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("backend", "sampling", "capturable"),
    [
        ("eager", "examples", False),
        ("aot_eager", "examples", False),
        ("aot_eager", "positions", False),
        ("aot_eager", "positions", True),
    ],
)
def test_a_compiled_run_is_the_uncompiled_run(backend, sampling, capturable):
    options = {"sampling": sampling, "sample_size": 5, "capturable": capturable}
    net, opt, twin, twin_opt = pair(**options)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    train(net, opt, compiled)
    train(twin, twin_opt, twin)
    # Float64: a small damping amplifies what a graph rounds in another order.
    assert_close(net, twin)
    assert opt.describe().updated_by("frog") == twin_opt.describe().updated_by("frog")


def test_no_graph_break():
    net, _, _, _ = pair()
    explained = torch._dynamo.explain(net)(batch(0)[0].double())
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


@pytest.mark.skipif(shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_inductor():
    net, opt, twin, twin_opt = pair(sample_size=5, sampling="examples")
    train(net, opt, torch.compile(net, fullgraph=True), sizes=(7, 7))
    train(twin, twin_opt, twin, sizes=(7, 7))
    assert_close(net, twin)


def test_batches_of_changing_size():
    net, opt, twin, twin_opt = pair(sample_size=5, sampling="positions")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    train(net, opt, compiled, sizes=(7, 3, 4, 9))
    train(twin, twin_opt, twin, sizes=(7, 3, 4, 9))
    assert_close(net, twin)


def test_accumulation_pools_as_it_does_uncompiled():
    net, opt, twin, twin_opt = pair(sample_size=5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    train(net, opt, compiled, micro_batches=3)
    train(twin, twin_opt, twin, micro_batches=3)
    assert_close(net, twin)


def test_activation_checkpointing_inside_a_graph():
    net, opt, twin, twin_opt = pair(checkpointed=True, sample_size=1000)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    train(net, opt, compiled)
    train(twin, twin_opt, twin)
    assert_close(net, twin)


def test_autocast_inside_a_graph():
    net, opt, _, _ = pair(dtype=torch.float32, sample_size=5)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    x, y = batch(0)
    F.cross_entropy(forward(x), y).backward()
    (call,) = opt.capture.calls("fc")
    assert call.y.dtype == torch.bfloat16
    opt.step()
    assert not opt.anomalies()


def test_samples_die_with_the_graph_when_no_backward_comes():
    net, opt, _, _ = pair(sample_size=5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(batch(0)[0].double())
    gc.collect()
    assert opt.capture.watches("fc") and not opt.capture.calls("fc")


def test_eval_mode_keeps_nothing_and_training_goes_on():
    net, opt, _, _ = pair(sample_size=5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    net.eval()
    x, y = batch(0)
    F.cross_entropy(compiled(x.double()), y).backward()
    assert opt.capture.watches("fc") and not opt.capture.calls("fc")
    with pytest.warns(UserWarning, match="eval mode"):
        opt.step()
    net.train()
    train(net, opt, compiled)
    assert "fc.weight" in opt.describe().updated_by("frog")


def test_a_graph_outlives_its_optimizer():
    net, opt, _, _ = pair(sample_size=5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    train(net, opt, compiled)
    plain = copy.deepcopy(net)
    opt.close()
    x, y = batch(0)
    for _ in range(2):
        for model in (net, plain):
            model.zero_grad()
        F.cross_entropy(compiled(x.double()), y).backward()
        F.cross_entropy(plain(x.double()), y).backward()
        torch.testing.assert_close(net.fc.weight.grad, plain.fc.weight.grad)
        opt = None
        gc.collect()


def test_hooks_put_on_after_the_first_compiled_call_are_missed_with_a_hint():
    net = Net()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x, y = batch(0)
    F.cross_entropy(compiled(x), y).backward()
    opt = FROG(net)
    net.zero_grad()
    for _ in range(2):
        F.cross_entropy(compiled(x), y).backward()
        opt.step()
    assert "fc.weight" in opt.describe().updated_by("frog")
    with pytest.warns(UserWarning, match=r"compiled.*torch\.compiler\.reset"):
        opt.step()
    assert opt.describe().updated_by("frog") == []


def test_compiled_autograd():
    """A pass is not told from the next there: all that no gradient was dropped of."""

    def train_one(enabled):
        torch.compiler.reset()
        torch.manual_seed(0)
        net = Net().double()
        opt = FROG(net, sample_size=1000)
        compiled = torch.compile(net, backend="aot_eager")
        for step in range(2):
            for micro in range(2):
                x, y = batch(10 * step + micro)
                loss = F.cross_entropy(compiled(x.double()), y)
                with enabled():
                    loss.backward()
            opt.step()
            opt.zero_grad()
        return net

    backward = torch.compile(backend="aot_eager")
    on = partial(torch._dynamo.compiled_autograd._enable, backward)
    assert_close(train_one(on), train_one(contextlib.nullcontext))


def test_compiled_autograd_of_a_model_that_is_not_compiled():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    opt = FROG(net)
    loss = net(torch.randn(4, 6)).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    with pytest.warns(UserWarning, match="no samples"):
        opt.step()


def test_another_default_device_at_construction():
    """What the graph and its backward exchange stays on the CPU."""
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.device("meta"):
        opt = FROG(net, sample_size=3)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(torch.randn(4, 6)).square().sum().backward()
    opt.step()
    assert opt.anomalies() == {} and "N = 3" in opt.describe()[0].reason
