"""Entries of parameter groups: checked before anything moves, each group's own."""

import copy
import io
import math

import pytest
import torch
from attention_net import (
    EVERYTHING,
    Attention,
    attention,
    batch,
    by,
    steps,
)
from cases import PAPER
from torch import nn

from frog_triton import FROG

ENTRIES = [
    ("damping", -1.0),
    ("damping", 0.0),
    ("damping", math.nan),
    ("damping", "auto"),
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", torch.tensor([1e-3, 1e-3])),
    ("lr", torch.tensor(math.nan)),
    ("lr", None),
    ("momentum", math.nan),
    ("momentum", -0.1),
    ("momentum", 1.0),
    ("momentum", 1.5),
    ("momentum", torch.tensor(1.5)),
    ("nesterov", "no"),
    ("orthogonalize", 1),
    ("capturable", None),
    ("weight_decay", math.nan),
    ("weight_decay", -1.0),
    ("weight_decay", math.inf),
    ("weight_decay", True),
    ("cg_iters", 0),
    ("cg_iters", 2.5),
    ("cg_iters", True),
    ("betas", (0.9, 1.0)),
    ("betas", 0.9),
    ("eps", math.nan),
    ("eps", -1e-8),
    ("eps", math.inf),
    ("updated_by", "adagrad"),
]


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize(("name", "value"), ENTRIES)
def test_an_entry_set_between_steps_is_checked_before_anything_moves(
    name, value, group
):
    if group == 0 and name in ("betas", "eps"):
        pytest.skip("not an entry of this group")
    net, opt = attention()
    steps(net, opt, [True])
    opt.zero_grad()
    net(batch(1), True).square().sum().backward()
    good, opt.param_groups[group][name] = opt.param_groups[group][name], value
    before = [p.detach().clone() for p in net.parameters()]
    held = [v.clone() for s in opt.state.values() for v in s.values()]
    with pytest.raises(ValueError, match=rf"param_groups\[{group}\]: {name} must"):
        opt.step()
    assert all(map(torch.equal, before, net.parameters()))
    now = [v for s in opt.state.values() for v in s.values()]
    assert all(map(torch.equal, held, now))
    # Mended, it goes on: the samples are still there.
    opt.param_groups[group][name] = good
    opt.step()
    twin, second = attention()
    steps(twin, second, [True] * 2)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


REQUIRED = ["lr", "momentum", "weight_decay", "damping", "cg_iters"]
FLAGS = ["nesterov", "orthogonalize", "capturable"]


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("name", [*REQUIRED, *FLAGS])
def test_an_entry_that_was_taken_out_is_asked_for_before_anything_moves(name, group):
    net, opt = attention()
    net(batch(1), True).square().sum().backward()
    good = opt.param_groups[group].pop(name)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=rf"param_groups\[{group}\]: {name} is miss"):
        opt.step()
    assert all(map(torch.equal, before, net.parameters())) and not opt.state
    opt.param_groups[group][name] = good
    opt.step()


RATES = {
    "no dimension": lambda: torch.tensor(0.01, dtype=torch.float64),
    "one dimension": lambda: torch.tensor([0.01], dtype=torch.float64),
    "three dimensions": lambda: torch.full((1, 1, 1), 0.01, dtype=torch.float64),
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("when", ["construction", "between steps", "in a group"])
@pytest.mark.parametrize("options", [{}, {"fallback": "sgd"}, {"capturable": True}])
def test_a_learning_rate_in_a_tensor_is_the_number_in_it(rate, when, options):
    def run(lr):
        torch.manual_seed(0)
        net = Attention().double()
        if when == "construction":
            opt = FROG(net, lr=lr, **options)
        elif when == "in a group":
            params = [
                {"params": net.a.parameters(), "lr": lr},
                {"params": [*net.b.parameters(), *net.out.parameters()]},
            ]
            opt = FROG(net, params=params, **options)
        else:
            opt = FROG(net, **options)
            for group in opt.param_groups:
                group["lr"] = lr
        steps(net, opt, [True] * 2)
        return list(net.parameters())

    for p, q in zip(run(RATES[rate]()), run(0.01), strict=True):
        # Measured 2e-10 (a fallback's rate in float32), else 1e-17.
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("through", ["construction", "a saved state", "added group"])
def test_each_group_has_a_schedule_of_its_own(fallback, through):
    """LambdaLR writes into tensors, so groups that shared one would share it all."""
    torch.manual_seed(0)
    net = Attention().double()
    rate = torch.tensor(0.01)
    first = {"params": [*net.a.parameters(), *net.out.parameters()]}
    params = [first, {"params": list(net.b.parameters()), "lr": rate}]
    if through == "added group":
        opt = FROG(net, lr=rate, fallback=fallback, params=params[:1])
        opt.add_param_group(params[1])
    else:
        opt = FROG(net, lr=rate, fallback=fallback, params=params)
    if through == "a saved state":
        saved = opt.state_dict()
        for group in saved["param_groups"]:
            group["lr"] = rate
        opt.load_state_dict(copy.deepcopy(saved))
    steps(net, opt, [True])
    begin = [float(group["lr"]) for group in opt.param_groups]
    factors = (0.5, 1.0, 0.25, 0.125)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, [lambda t, f=f: f**t for f in factors]
    )
    for step in range(3):
        steps(net, opt, [True], step + 1)
        schedule.step()
    rates = [float(group["lr"]) for group in opt.param_groups]
    assert rates == pytest.approx(
        [b * f**3 for b, f in zip(begin, factors, strict=True)], rel=1e-6
    )


def test_the_users_own_tensor_still_sets_the_rate():
    rate = torch.tensor(0.01)
    _, opt = attention(lr=rate)
    rate.fill_(0.5)
    assert opt.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("unordered", [set, frozenset])
@pytest.mark.parametrize("where", ["params", "group", "add_param_group"])
def test_params_without_an_order_are_refused(where, unordered):
    net = Attention()
    some = unordered(net.parameters())
    with pytest.raises(TypeError, match=r"list|order"):
        if where == "params":
            FROG(net, params=some)
        elif where == "group":
            FROG(net, params=[{"params": some}])
        else:
            opt = FROG(net, params=list(net.a.parameters()))
            opt.add_param_group({"params": unordered(net.b.parameters())})
    if where != "add_param_group":
        assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("options", [{}, PAPER])
def test_a_bias_alone_costs_the_state_of_a_bias(options):
    """As when biases are all that is trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    opt = FROG(net, sample_size=EVERYTHING, **options)
    for layer in (net[0], net[2]):
        layer.weight.requires_grad_(False)
    net(batch(0)).square().sum().backward()
    opt.step()
    held = opt.state[net[0].weight]
    assert set(held) == {"step"} and held["step"] == 1
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(net)
    second = FROG(twin, sample_size=EVERYTHING, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert by(second, "frog") == ["0.weight", "0.bias"]
    for model, optimizer in ((net, opt), (twin, second)):
        optimizer.zero_grad()
        model(batch(1)).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
