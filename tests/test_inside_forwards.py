"""Layers with a forward of their own: looked at until a call decides."""

import pytest
import torch.nn.functional as F
from attention_net import by, reason_of
from inside_nets import Counted, D, Net, T, batch, frog, steps
from torch import nn

from frog_triton import FROG, layers
from frog_triton.capture import taps
from frog_triton.capture.taps import UNPROVEN
from frog_triton.model import routing as routes
from frog_triton.unhooked import PATIENCE


class Rectified(Counted):
    """From the third call on."""

    def change(self, x, y):
        return y.relu() if self.count > 2 else y


class DroppedAfter(Counted):
    """Ever more of its outputs."""

    def change(self, x, y):
        return F.dropout(y, min(0.5, 0.25 * (self.count - 1)))


class DroppedBefore(Counted):
    """Ever more of its inputs."""

    def change(self, x, y):
        x = F.dropout(x, min(0.5, 0.25 * (self.count - 1)))
        return F.linear(x, self.weight, self.bias)


@pytest.fixture
def looks(monkeypatch):
    """Answers of `recognize`, as they are given."""
    found, look = [], taps.recognize

    def recognize(*args):
        found.append(look(*args))
        return found[-1]

    monkeypatch.setattr(taps, "recognize", recognize)
    return found


@pytest.mark.parametrize("kind", [Rectified, DroppedAfter, DroppedBefore])
def test_layers_that_change_after_they_were_recognized(kind, looks):
    net, x = Net(kind(D, D)), batch(T, D)
    opt = frog(net)
    steps(net, opt, x, 9)
    assert [isinstance(answer, str) for answer in looks] == [False]
    with pytest.warns(UserWarning, match="inner: a gradient but no samples.*forward"):
        steps(net, opt, x, 1)  # the tenth call is looked at
    assert len(looks) == 2 and looks[1].startswith("its forward is not F.linear")
    assert "inner.weight" in by(opt, "frog")
    with pytest.warns(UserWarning, match=f"inner: {looks[1]}.*adamw updates it"):
        steps(net, opt, x, PATIENCE - 1)
    assert by(opt) == ["inner.weight", "inner.bias"]
    assert reason_of(opt, "inner.weight") == looks[1]
    steps(net, opt, x, 5)
    assert len(looks) == 2


def one_example(net):
    return batch(1, D)


def zeros(net):
    nn.init.zeros_(net.inner.weight)
    return batch(T, D)


@pytest.mark.parametrize("undecided", [one_example, zeros])
def test_layers_that_no_call_decides(undecided, looks):
    net = Net(Counted(D, 2), size=2)
    x = undecided(net)
    # A weight of zeros stays what it is.
    opt = frog(net, lr=1e-30, fallback_lr=1e-30, weight_decay=0.0)
    with pytest.warns(UserWarning, match=f"inner: .*{UNPROVEN}"):
        steps(net, opt, x, PATIENCE)
    assert by(opt) == ["inner.weight", "inner.bias"]
    assert reason_of(opt, "inner.weight") == UNPROVEN
    assert "no call has shown yet what it computes" in UNPROVEN
    steps(net, opt, x, 100 - PATIENCE)
    assert looks == [None] * 8  # calls 1, 2, 3, 4, 8, 16, 32, 64
    steps(net, opt, x, 27)
    assert len(looks) == 8
    # The 128th call shows it.
    nn.init.normal_(net.inner.weight)
    steps(net, opt, batch(T, D), 1)
    assert len(looks) == 9 and "inner.weight" in by(opt, "frog")


# -- construction ----------------------------------------------------------------------


def test_construction_asks_for_adapters_as_often_as_there_are_modules(monkeypatch):
    calls, find = [], routes.adapter_for

    def adapter_for(module):
        calls.append(module)
        return find(module)

    for module in (routes, layers):
        monkeypatch.setattr(module, "adapter_for", adapter_for)

    def asked(count):
        calls.clear()
        blocks = (Net(nn.LayerNorm(D), size=D) for _ in range(count // 2))
        net = nn.Sequential(*blocks)
        FROG(net).close()
        return len(calls)

    few, many = asked(60), asked(600)
    assert many < 11 * few and many < 10 * 600
