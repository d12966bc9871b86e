"""More layers and groups than one launch can hold."""

import copy

import pytest
import torch
from cases import PAPER
from torch import nn

from frog_triton import FROG, cost, step
from frog_triton.kernels.launch import recording
from frog_triton.solve import launches
from frog_triton.solve.launches import LayerShape, together

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Grouped(nn.Module):
    """Three layers of one geometry, four groups each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.Conv1d(8, 8, 1, groups=4) for _ in range(3)))
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.blocks(x).mean(2))


def stepped(net):
    opt = FROG(net, backend="triton", sample_size=5, **PAPER)
    x = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    net(x).square().sum().backward()
    with recording() as made:
        opt.step()
    return [p.detach().clone() for p in net.parameters()], made


def test_layers_of_one_geometry_are_split_where_a_launch_is_full(monkeypatch):
    net = Grouped().to(DEVICE)
    whole, together = stepped(copy.deepcopy(net))
    monkeypatch.setattr(launches, "MOST_PROBLEMS", 8)
    split, apart = stepped(net)
    looks = 2  # at the gradients of all
    assert len(apart.parts) - looks == 2 * (len(together.parts) - looks)
    assert max(a.grid[1] for a in together.parts if len(a.grid) > 1) == 12
    assert max(a.grid[1] for a in apart.parts if len(a.grid) > 1) == 8
    for ours, theirs in zip(split, whole, strict=True):
        assert torch.equal(ours, theirs)


def test_layers_of_one_geometry_share_launches_as_far_as_these_hold_them():
    def counts(layers, groups):
        return [len(p) for p in together(layers, lambda i: 0, lambda i: groups)]

    odd = together(range(5), lambda i: i % 2, lambda i: 1)
    assert odd == [[0, 2, 4], [1, 3]]
    assert counts(range(70_000), 1) == [65_535, 4_465]
    assert counts(range(3), 40_000) == [1, 1, 1]
    assert counts(range(2), 100_000) == [1, 1]


def test_costs_are_counted_where_a_launch_is_full():
    shapes = [LayerShape(str(i), 3072, 49, 32, groups=3072) for i in range(30)]
    one = cost(shapes[:1], formulation="gram", orthogonalize=False)
    many = cost(shapes, formulation="gram", orthogonalize=False)
    launches = [c.launches - sum(c.beside.values()) for c in (one, many)]
    assert launches[1] == launches[0]  # both halves share them
    assert {line.shared_by for line in many.layers} == {21, 9}
    bytes_ = [sum(line.bytes for line in c.layers) for c in (one, many)]
    assert bytes_[1] == 30 * bytes_[0]


def test_more_groups_than_a_launch_holds_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(step, "MOST_PROBLEMS", 3)
    net = Grouped().to(DEVICE)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"blocks\.0: 4 groups .* backend='torch'"):
        stepped(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
