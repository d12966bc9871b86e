"""What steps show of output layers, and who updates which layer from then on."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from attention_net import reason_of
from seeking_nets import (
    Bare,
    D,
    Net,
    bare_steps,
    batch,
    chain,
    head_first,
    heads_of,
    outputs,
    saved,
    sought,
    taking_turns,
    train,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton import FROG
from frog_triton.unhooked import PATIENCE

# -- what steps show -------------------------------------------------------------------


def thawed(*names):
    """Frozen in the first two steps."""

    def before(net, opt, step):
        for name in names:
            getattr(net, name).requires_grad_(step >= 2)

    return before


def exits(net, x, step):
    """One block and its exit more in each step."""
    total = 0
    for block, way_out in [("a", "x"), ("b", "y"), ("c", "z")][: step + 1]:
        x = getattr(net, block)(x).tanh()
        total = total + getattr(net, way_out)(x)
    return total


def checkpointed(use_reentrant):
    def forward(net, x, step):
        x = x.clone().requires_grad_()
        x = checkpoint(
            lambda x: net.b(net.a(x).tanh()).tanh(), x, use_reentrant=use_reentrant
        )
        return net.z(x)

    return forward


def saliency(net, opt, step):
    """Somebody's look at a hidden layer, whose gradients are dropped."""
    if step == 0:
        net.a(batch(7)).sum().backward()


def penalty(net, x, step):
    """A loss of a derivative, beside the usual one."""
    x = x.clone().requires_grad_()
    y = chain("a b z")(net, x, step)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.cat([y, grad])


def autoencoder(net, x, step):
    mean, spread = net.mean(h := net.a(x).tanh()), net.spread(h)
    made = net.z(net.b(mean + spread.exp() * x).tanh())
    return torch.cat([made, mean])


def pretrained(net, x, step):
    """On a loss of a hidden layer at first."""
    h = net.b(net.a(x).tanh())
    return h if step < 2 else net.z(h.tanh())


STEPS = {
    "head last": ("a b z", chain("a b z"), None, 1, "z"),
    "head first": ("z a b", chain("a b z"), None, 1, "z"),
    "two heads": (
        "y a z b",
        lambda n, x, s: n.y(h := n.b(n.a(x))) + n.z(h),
        None,
        1,
        "y z",
    ),
    "one head after the other": (
        "a y z",
        taking_turns("y", "y", "y", "z"),
        None,
        8,
        "y z",
    ),
    "the last head first": ("a y z", taking_turns("z", "z", "z", "y"), None, 8, "y z"),
    "actor and critic": ("a p v", taking_turns("p", "v"), None, 10, "p v"),
    "critic and actor": ("a p v", taking_turns("v", "p"), None, 10, "p v"),
    "heads first, in turns": ("p v a", taking_turns("v", "p"), None, 10, "p v"),
    "probe, then tuned": ("z a b", chain("a b z"), thawed("a", "b"), 5, "z"),
    "head last, probe, then tuned": ("a b z", chain("a b z"), thawed("a", "b"), 5, "z"),
    "head frozen at first": ("z a b", chain("a b z"), thawed("z"), 5, "z"),
    "head last, frozen at first": ("a b z", chain("a b z"), thawed("z"), 5, "z"),
    "early exits, grown": ("a b c x y z", exits, None, 5, "x y z"),
    "early exits first, grown": ("x y z a b c", exits, None, 5, "x y z"),
    "checkpoint": ("z a b", checkpointed(False), None, 2, "z"),
    "reentrant checkpoint": ("z a b", checkpointed(True), None, 2, "z"),
    "reentrant checkpoint, head last": ("a b z", checkpointed(True), None, 2, "z"),
    "saliency": ("z a b", chain("a b z"), saliency, 2, "z"),
    "gradient penalty": ("z a b", penalty, None, 2, "z"),
    "variational": ("z a mean spread b", autoencoder, None, 2, "z"),
    "one layer": ("a", chain("a"), None, 2, ""),
    "not in the loss": (
        "z a b",
        lambda n, x, s: (n.z(h := n.a(x)), n.b(h))[1],
        None,
        2,
        "b",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_show_the_output_layers(name):
    names, forward, before, count, expected = STEPS[name]
    net = Net(names, forward)
    opt = FROG(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, opt, count, before=before)
    assert outputs(opt) == set(expected.split())
    assert sought(net) == []


def test_a_first_step_that_is_skipped_shows_nothing():
    net = head_first()
    opt = FROG(net)
    before = [p.detach().clone() for p in net.parameters()]
    train(net, opt, 2, factor=math.nan)
    assert outputs(opt) == {"b"} and all(map(torch.equal, before, net.parameters()))
    assert reason_of(opt, "b.weight").endswith("its first step will show")
    train(net, opt, 1, start=2)
    assert outputs(opt) == {"z"} and opt.anomalies()["model"] == {"skipped_steps": 2}


@pytest.mark.parametrize("capturable", [False, True])
def test_first_steps_that_a_scaler_skips(capturable):
    net = head_first().float()
    opt = FROG(net, capturable=capturable)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    before = [p.detach().clone() for p in net.parameters()]
    for step in range(4):
        opt.zero_grad()
        scaler.scale(1e3 * net(batch(step).float()).square().mean()).backward()
        scaler.step(opt)
        scaler.update()
        moved = not all(map(torch.equal, before, net.parameters()))
        assert moved is (step > 0)
    assert outputs(opt) == {"z"}


@pytest.mark.parametrize("passes", [1, 3])
def test_closures(passes):
    net = head_first()
    opt = FROG(net)

    def closure():
        for step in range(passes):
            opt.zero_grad()
            loss = net(batch(step)).square().mean()
            loss.backward()
        return loss

    assert opt.step(closure).item() > 0
    assert outputs(opt) == {"z"}


# -- layers that are put in ------------------------------------------------------------


def another_head(net, opt):
    net.y = nn.Linear(D, D).double()
    opt.add_param_group({"params": net.y.parameters(), "lr": 1e-2})


def replaced_head(net, opt):
    net.z = nn.Linear(D, D).double()
    opt.add_param_group({"params": net.z.parameters()})


def replaced_hidden(net, opt):
    net.b = nn.Linear(D, D).double()
    opt.add_param_group({"params": net.b.parameters()})


def deeper(net, opt):
    net.b = nn.Sequential(net.b, nn.Tanh(), nn.Linear(D, D).double())
    opt.add_param_group({"params": net.b[2].parameters()})


ADDED = {
    "another head": (another_head, "y z"),
    "a head in another's place": (replaced_head, "z"),
    "a hidden layer in another's place": (replaced_hidden, "z"),
    "a hidden layer after another": (deeper, "z"),
}


@pytest.mark.parametrize("names", ["z a b", "a b z"])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("name", ADDED)
def test_layers_that_are_put_in(name, after, names):
    add, expected = ADDED[name]
    net = Net(names, heads_of)
    opt = FROG(net)
    train(net, opt, after)
    add(net, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, opt, 3, start=after)
    here = {n for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    gone = {r.name.removesuffix(".weight") for r in opt.routes()} - here
    assert outputs(opt) - gone == set(expected.split())
    for which, param in net.named_parameters():  # by whom it really was updated
        frog = "momentum_buffer" in opt.state[param]
        assert frog is (which.rpartition(".")[0] not in expected.split())


@pytest.mark.filterwarnings("ignore:FROG preconditions")
@pytest.mark.parametrize("after", [0, 2])
def test_a_bare_parameter_in_anothers_place_waits_for_samples_of_its_own(after):
    net = Bare()
    opt = FROG(net)
    bare_steps(net, opt, [True] * after)
    net.w = nn.Parameter(torch.randn(D, D, dtype=torch.float64))
    opt.add_param_group({"params": [net.w]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare_steps(net, opt, [False] * (PATIENCE + 1), after)
        assert "exp_avg" in opt.state[net.w]
        bare_steps(net, opt, [True] * 2, after + PATIENCE + 1)
        assert "momentum_buffer" in opt.state[net.w]


# -- states ----------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["z a b", "a b z", "y z a b"])
@pytest.mark.parametrize("other", [0, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_states_of_any_time_into_optimizers_of_any_time(steps, other, names):
    """As without: each step is the same, bit for bit."""

    def made():
        net = Net(names, heads_of)
        return net, FROG(net, sample_size=3, lr=0.05)

    net, opt = made()
    train(net, opt, steps)
    weights, state = saved(net, opt)
    net2, opt2 = made()
    train(net2, opt2, other, start=20)
    net2.load_state_dict(weights)
    opt2.load_state_dict(state)
    for step in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(net, opt, 1, start=10 + step)
            train(net2, opt2, 1, start=10 + step)
        assert all(map(torch.equal, net.parameters(), net2.parameters()))
        assert outputs(opt) == outputs(opt2) == {*names.split()} - {"a", "b"}


def test_a_resumed_run_looks_no_more_at_what_is_decided():
    net = head_first()
    opt = FROG(net)
    train(net, opt, 1)
    weights, state = saved(net, opt)
    net = head_first()
    opt = FROG(net)
    net.load_state_dict(weights)
    opt.load_state_dict(state)
    train(net, opt, 1, start=1)
    assert sought(net) == []


def test_a_state_of_a_run_with_other_outputs():
    """Layers are sampled again that this optimizer took for outputs."""
    net, other = (Net("z a b", chain(names)) for names in ("z a b", "a b z"))
    opt, second = FROG(net, sample_size=3), FROG(other, sample_size=3)
    train(net, opt, 3)
    train(other, second, 3)
    assert (outputs(opt), outputs(second)) == ({"b"}, {"z"})
    other.run = net.run
    weights, state = saved(net, opt)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    for pair in ((net, opt), (other, second)):
        train(*pair, 3, start=3)
    assert outputs(second) == {"b"}
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_a_rate_finder_that_goes_back_to_the_start():
    net, twin = head_first(), head_first()
    opt, other = FROG(net), FROG(twin)
    weights, state = copy.deepcopy((net.state_dict(), opt.state_dict()))
    train(net, opt, 5, start=10)
    net.load_state_dict(weights)
    opt.load_state_dict(state)
    for pair in ((net, opt), (twin, other)):
        train(*pair, 3)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_a_state_from_before_anything_was_decided_by_steps():
    """It had the last layer with the fallback, whatever the layer was."""
    net = head_first()
    opt = FROG(net, output_layers="b")
    train(net, opt, 3)
    weights, state = copy.deepcopy((net.state_dict(), opt.state_dict()))
    del state["decided"]
    other = head_first()
    second = FROG(other)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    for pair in ((net, opt), (other, second)):
        train(*pair, 5, start=3)
    assert outputs(second) == {"b"}
    assert all(map(torch.equal, net.parameters(), other.parameters()))


# -- in graphs of torch.compile --------------------------------------------------------


@pytest.mark.parametrize("names", ["z a b", "a b z", "head a b"])
def test_no_graph_is_made_twice(names):
    torch.compiler.reset()
    head = "head" if "head" in names else "z"
    net = Net(names, chain(f"a b {head}"))
    opt = FROG(net)
    compiled = torch.compile(net, backend="aot_eager")
    for step in range(3):
        # Layers inside of a graph are not seen; the guess stays.
        again = torch._dynamo.config.patch(error_on_recompile=True)
        with again if step else nullcontext():
            opt.zero_grad()
            compiled(batch(step)).square().mean().backward()
            served = {
                r.name.split(".")[0] for r in opt.routes() if r.updated_by == "frog"
            }
            assert all(opt.capture.calls(name) for name in served)
            opt.step()
    assert outputs(opt) == {"head" if "head" in names else names[-1]}
    opt.close()
    for module in net.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
