"""Recurrent layers with a forward, or with weights, of their own: never wrong."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from attention_net import by, reason_of
from inside_nets import (
    HIDDEN,
    D,
    Net,
    backward,
    batch,
    first_of,
    frog,
    normed_hidden,
    sampled,
)
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm


class InputDropped(nn.LSTM):
    """Works on its input, and returns less."""

    def forward(self, x):
        return super().forward(F.dropout(x))[0]


class NormedGates(nn.GRU):
    """Other gates, by the same parameters."""

    def forward(self, x):
        h, out = x.new_zeros(x.shape[0], HIDDEN), []
        for step in x.unbind(1):
            gates = F.linear(step, self.weight_ih_l0, self.bias_ih_l0)
            gates = gates + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            z, _, n = F.layer_norm(gates, gates.shape[-1:]).chunk(3, -1)
            h = torch.lerp(h, n.tanh(), z.sigmoid())
            out.append(h)
        return torch.stack(out, 1)


class OwnCell(nn.LSTMCell):
    """Without a memory."""

    def forward(self, x):
        gates = F.linear(x, self.weight_ih, self.bias_ih)
        i, _, g, o = (gates + self.bias_hh).chunk(4, -1)
        return (o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()) + self.weight_hh.sum()


class OwnBase(nn.RNNCellBase):
    """A cell of the user's own, of torch's base class."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=True, num_chunks=1)

    def forward(self, x):
        return F.linear(x, self.weight_ih, self.bias_ih + self.bias_hh).sin()


@pytest.mark.filterwarnings("ignore:FROG preconditions")
@pytest.mark.parametrize("kind", [InputDropped, NormedGates, OwnCell, OwnBase])
def test_recurrent_layers_with_a_forward_of_their_own(kind):
    layer = issubclass(kind, nn.RNNBase)
    inner = kind(D, HIDDEN, **({"batch_first": True} if layer else {}))
    net = Net(inner, size=HIDDEN)
    opt, x = frog(net), batch(2, 5, D) if layer else batch(6, D)
    assert by(opt) == [f"inner.{name}" for name, _ in inner.named_parameters()]
    if kind is not OwnBase:  # which is none of a known kind
        why = f"{kind.__name__} has a forward of its own"
        assert {reason_of(opt, name) for name in by(opt)} == {why}
    before = [p.detach().clone() for p in net.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(net, opt, x)
            assert sampled(opt) == {"first", "last"}
            opt.step()
    pairs = zip(before, net.parameters(), strict=True)
    assert not any(torch.equal(a, p) for a, p in pairs if p.grad is not None)


def pruned():
    inner = nn.LSTM(D, HIDDEN, batch_first=True).double()
    prune.l1_unstructured(inner, "weight_ih_l0", 0.3)
    return inner


RECURRENT = {
    "plain": (lambda: nn.LSTM(D, HIDDEN, batch_first=True), {"ih", "hh"}),
    "weight norm": (normed_hidden(parametrizations.weight_norm), {"ih", "hh"}),
    "weight norm by a hook": (normed_hidden(weight_norm), {"ih", "hh"}),
    "pruned": (pruned, {"hh"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_whose_weights_are_computed(name):
    build, expected = RECURRENT[name]
    net, x = Net(build(), first_of, size=HIDDEN), batch(2, 5, D)
    opt = frog(net)
    for _ in range(3):
        backward(net, opt, x)
        assert sampled(opt) == {"first", "last"} | {
            f"inner.weight_{kind}_l0" for kind in expected
        }
        opt.step()
