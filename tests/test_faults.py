"""What goes wrong in a training loop names its cause and leaves nothing half-done."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frog_triton import FROG
from frog_triton.capture import capture, sampling


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 4 * 4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(F.relu(self.conv(x)).flatten(1))))


def batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def backward(net, seed=0):
    x, y = batch(seed)
    F.cross_entropy(net(x), y).backward()


def everything(net, opt):
    state = [opt.state[p] for p in net.parameters()]
    return [*net.parameters(), *(t for s in state for t in s.values())]


def copies(net, opt):
    return [t.detach().clone() for t in everything(net, opt)]


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["activations", "output gradients", "gradients"])
def test_numbers_that_are_not_finite_stay_where_they_are(
    where, bad, formulation, orthogonalize
):
    net = Net()
    opt = FROG(net, sample_size=6, formulation=formulation, orthogonalize=orthogonalize)
    before = copy.deepcopy(net)
    backward(net)
    (call,) = opt.capture.calls("fc")
    with torch.no_grad():
        if where == "activations":
            call.x[1, 3] = bad
        elif where == "output gradients":
            call.y[1, 2] = bad
        else:
            net.fc.weight.grad[2, 3] = bad
    held = copies(net, opt)
    opt.step()
    for p in everything(net, opt):
        assert torch.isfinite(p).all()
    if where == "gradients":
        assert_same(held, everything(net, opt))
        assert opt.anomalies() == {
            "model": {"skipped_steps": 1},
            "fc.weight": {"nonfinite_gradients": 1},
        }
    else:
        rows = 6 if where == "activations" else 1
        counted = {"nonfinite_samples": rows, "overflowing_momenta": 0}
        assert opt.anomalies() == {"fc": counted}
        assert (net.fc.weight != before.fc.weight).any(1).all()
    opt.zero_grad()
    backward(net, 1)
    opt.step()
    assert all(torch.isfinite(p).all() for p in everything(net, opt))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_no_memory_for_a_sample(when, monkeypatch):
    net, twin = Net(), None
    opt = FROG(net, sample_size=3)
    twin = copy.deepcopy(net)
    twin_opt = FROG(twin, sample_size=3)
    before = copies(net, opt)

    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with monkeypatch.context() as patch:
        if when == "forward":
            patch.setattr(sampling, "draw", no_memory)
        else:
            patch.setattr(capture.SampleCapture, "pool", no_memory)
        with pytest.raises(
            torch.OutOfMemoryError, match=r"(conv|fc): no memory.*smaller sample_size"
        ):
            backward(net)
    assert_same(before, everything(net, opt))
    for model, optimizer in ((net, opt), (twin, twin_opt)):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert_same(everything(net, opt), everything(twin, twin_opt))


def test_an_exception_between_backward_and_step():
    net = Net()
    opt = FROG(net, sample_size=3)
    twin = copy.deepcopy(net)
    twin_opt = FROG(twin, sample_size=3)
    with pytest.raises(KeyError):
        backward(net, 5)
        raise KeyError
    for model, optimizer in ((net, opt), (twin, twin_opt)):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert_same(everything(net, opt), everything(twin, twin_opt))


def test_an_exception_in_the_middle_of_a_backward():
    net = Net()
    opt = FROG(net, sample_size=3)
    twin = copy.deepcopy(net)
    twin_opt = FROG(twin, sample_size=3)

    def fail(grad):
        raise RuntimeError("a bug of the user's")

    x, y = batch(5)
    h = F.relu(net.conv(x)).flatten(1)
    h.register_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        F.cross_entropy(net.head(torch.tanh(net.fc(h))), y).backward()
    assert opt.capture.calls("fc")  # the later layers had theirs
    for model, optimizer in ((net, opt), (twin, twin_opt)):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert_same(everything(net, opt), everything(twin, twin_opt))


def test_a_closure_that_raises_changes_nothing():
    net = Net()
    opt = FROG(net)
    before = copies(net, opt)

    def closure():
        backward(net)
        raise RuntimeError("a bug of the user's")

    with pytest.raises(RuntimeError, match="a bug"):
        opt.step(closure)
    assert_same(before, everything(net, opt))


def test_a_sparse_gradient_is_refused_before_anything_changes():
    net = nn.ModuleDict(
        {"words": nn.Embedding(5, 3, sparse=True), "fc": nn.Linear(3, 4)}
    )
    net["head"] = nn.Linear(4, 2)
    opt = FROG(net)
    before = copies(net, opt)
    words = net["words"](torch.tensor([1, 2]))
    net["head"](net["fc"](words)).sum().backward()
    with pytest.raises(RuntimeError, match=r"words\.weight has a sparse gradient"):
        opt.step()
    assert_same(before, everything(net, opt))


def hooks(net):
    return sum(len(m._forward_hooks) for m in net.modules())


def test_hooks_are_removed_when_a_block_ends_with_an_exception():
    net = Net()
    with pytest.raises(KeyError), FROG(net):
        assert hooks(net) == 5  # three look for the output layer in the first step
        raise KeyError
    assert hooks(net) == 0


def test_hooks_are_removed_by_close_and_by_garbage_collection():
    net = Net()
    opt = FROG(net)
    opt.close()
    opt.close()
    assert hooks(net) == 0
    opt = FROG(net)
    backward(net)
    opt.step()
    del opt
    gc.collect()
    assert hooks(net) == 0
    backward(net)


def test_a_backward_after_close_keeps_nothing():
    net = Net()
    opt = FROG(net)
    x, y = batch(0)
    loss = F.cross_entropy(net(x), y)
    opt.close()
    loss.backward()
    assert not any(opt.capture.watches(name) for name, _ in net.named_modules())
    assert not [*opt.capture.tensors()]
