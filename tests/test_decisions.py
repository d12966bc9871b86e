"""What an optimizer decides early, it can take back; state that was lost is made again.

Each situation against Algorithm 1 in float64, or beside torch's own optimizers in it.

More than 400 lines: situations told from beginning to end.
"""

import copy
import io
import warnings
from collections import defaultdict

import oracles
import pytest
import torch
from algorithm1 import Algorithm1
from attention_net import (
    EVERYTHING,
    assert_same,
    attention,
    batch,
    by,
    reason_of,
    snapshot,
    steps,
)
from torch import nn

from frog_triton import FROG


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


class Mixture(nn.Module):
    """One of two experts serves a batch."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.out = nn.Linear(5, 3)

    def forward(self, x, expert):
        return self.out(self.experts[expert](self.a(x)))


EXTRA = {
    "nothing": lambda net: 0,
    "0 * sum": lambda net: 0 * sum(p.sum() for p in net.parameters()),
    "L2": lambda net: 1e-2 * sum(p.square().sum() for p in net.parameters()),
}


def mixture(seed=0, **options):
    torch.manual_seed(seed)
    net = Mixture().double()
    return net, FROG(net, sample_size=EVERYTHING, **options)


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_expert_that_is_not_routed_to_in_a_step_or_two(extra, compiled):
    net, opt = mixture()
    forward = net
    if compiled:
        forward = torch.compile(net, backend="aot_eager", dynamic=False)
    frog = by(opt, "frog")
    assert "experts.1.weight" in frog
    for step, expert in enumerate((0, 0, 1, 0, 0, 1)):
        opt.zero_grad()
        (forward(batch(step), expert).square().sum() + EXTRA[extra](net)).backward()
        opt.step()
        assert by(opt, "frog") == frog


def test_a_step_of_an_expert_after_steps_without_it_is_algorithm_1():
    """With a term of no gradient, as for DistributedDataParallel."""
    net, opt = mixture()
    expert, seen = net.experts[1], []
    model = Algorithm1(copy.deepcopy(expert))
    for step, chosen in enumerate((0, 1, 0, 1)):
        opt.zero_grad()
        handle = expert.register_forward_hook(
            lambda m, args, y: (
                seen.append(args[0].detach()),
                y.register_hook(seen.append),
                None,
            )[-1]
        )
        (net(batch(step), chosen).square().sum() + EXTRA["0 * sum"](net)).backward()
        handle.remove()
        if chosen == 1:
            model.step(*seen, expert.weight.grad, expert.bias.grad)
            seen.clear()
        elif step == 0:  # no momentum yet, so decay alone
            model.weight, model.bias = (
                (1 - 2e-4) * p for p in (model.weight, model.bias)
            )
        else:  # no samples, so the identity
            zeros = torch.zeros(1, 5), torch.zeros(1, 5)
            model.step(*zeros, expert.weight.grad, expert.bias.grad)
        opt.step()
    # Measured 4e-16.
    assert oracles.relative_error(expert.weight, model.weight) < 1e-12


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_a_layer_is_let_go_on_proof_and_comes_back_when_it_is_called(fallback):
    net, opt = attention(fallback=fallback)
    steps(net, opt, [False] * 2)
    assert "b.weight" in by(opt, "frog")
    match = rf"b: its weight .* {fallback} updates it"
    with pytest.warns(UserWarning, match=match) as caught:
        steps(net, opt, [False], 2)
    called_step = steps.__code__.co_filename
    assert [warning.filename for warning in caught] == [called_step]
    assert by(opt, fallback)[:2] == ["b.weight", "b.bias"]
    assert "without calling the module" in reason_of(opt, "b.weight")
    # From here on torch's own optimizer does the same with it.
    twin = copy.deepcopy(net.b)
    rate = opt.param_groups[1]["lr"]
    torchs = {
        "adamw": lambda p, wd: torch.optim.AdamW(p, rate, weight_decay=wd),
        "sgd": lambda p, wd: torch.optim.SGD(
            p, rate, momentum=0.9, nesterov=True, weight_decay=0
        ),
    }[fallback]
    others = [torchs([twin.weight], 1e-2), torchs([twin.bias], 0.0)]
    if fallback == "adamw":
        for other, param in zip(others, (net.b.weight, net.b.bias), strict=True):
            ours = opt.state[param]
            (theirs,) = other.param_groups[0]["params"]
            other.state[theirs] = {key: value.clone() for key, value in ours.items()}
    else:
        for other, param in zip(others, (net.b.weight, net.b.bias), strict=True):
            (theirs,) = other.param_groups[0]["params"]
            ours = opt.state[param]["momentum_buffer"].clone()
            other.state[theirs] = {"momentum_buffer": ours}
    for step in range(3, 6):
        opt.zero_grad()
        net(batch(step)).square().sum().backward()
        with torch.no_grad():
            for p, q in zip(twin.parameters(), net.b.parameters(), strict=True):
                p.grad = q.grad.clone()
            if fallback == "sgd":  # decoupled, unlike torch's
                twin.weight.mul_(1 - rate * 1e-2)
        opt.step()
        for other in others:
            other.step()
    for p, q in zip(twin.parameters(), net.b.parameters(), strict=True):
        # Measured 6e-17.
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    # Called: FROG's again from this very step on, with a momentum of zero.
    model, seen = Algorithm1(copy.deepcopy(net.b)), []
    handle = net.b.register_forward_hook(
        lambda m, args, y: (
            seen.append(args[0].detach()),
            y.register_hook(seen.append),
            None,
        )[-1]
    )
    for step in (6, 7):
        opt.zero_grad()
        net(batch(step), True).square().sum().backward()
        model.step(*seen, net.b.weight.grad, net.b.bias.grad)
        seen.clear()
        opt.step()
    handle.remove()
    assert "b.weight" in by(opt, "frog")
    # Measured 4e-16.
    assert oracles.relative_error(net.b.weight, model.weight) < 1e-12
    steps(net, opt, [False] * 2, 8)
    assert "b.weight" in by(opt, "frog")  # the count began anew


def test_a_gradient_of_zero_proves_nothing():
    net, opt = mixture()
    for step in range(8):
        opt.zero_grad()
        (net(batch(step), 0).square().sum() + EXTRA["0 * sum"](net)).backward()
        opt.step()
    assert "experts.1.weight" in by(opt, "frog")


def test_eval_mode_is_no_proof():
    net, opt = attention()
    net.eval()
    with pytest.warns(UserWarning, match="eval mode"):
        steps(net, opt, [True] * 5)
    assert "b.weight" in by(opt, "frog")


def test_a_run_that_lets_go_and_takes_back_resumes_with_the_same_bits():
    calls = [False, False, False, False, True, True, False, False, False]

    def run(cut):
        net, opt = attention()
        steps(net, opt, calls[:cut])
        file = io.BytesIO()
        torch.save([net.state_dict(), opt.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        net, opt = attention()
        net.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        steps(net, opt, calls[cut:], cut)
        return [*net.parameters()], by(opt, "frog")

    with pytest.warns(UserWarning, match="without calling"):
        whole, frog = run(0)
        for cut in range(1, len(calls)):
            weights, theirs = run(cut)
            assert theirs == frog
            assert all(map(torch.equal, weights, whole))


def test_a_state_of_version_1_with_layers_that_were_let_go():
    """They had been moved behind the rest of their group."""
    net, opt = attention()
    with pytest.warns(UserWarning, match="without calling"):
        steps(net, opt, [False] * 3)
    saved = copy.deepcopy(opt.state_dict())
    half, rest = saved["param_groups"]
    ids = half["params"]  # of a.weight, a.bias, b.weight, b.bias
    half["params"], rest["params"] = ids[:2], rest["params"] + ids[2:]
    saved |= {"version": 1, "unhooked": ["b.weight", "b.bias"]}
    del saved["misses"], saved["let_go"]
    other, second = attention()
    other.load_state_dict(net.state_dict())
    second.load_state_dict(saved)
    assert by(second, "adamw") == by(opt, "adamw")
    for model, optimizer in ((net, opt), (other, second)):
        steps(model, optimizer, [False, True], 3)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


@pytest.mark.parametrize("at", [2, 4])
def test_a_step_that_fails_takes_its_decisions_back(at, monkeypatch):
    """No memory left, in the very step that lets go of a layer, or takes it back."""
    calls = [False] * 3 + [True] * 3
    net, opt = attention()
    twin, second = attention()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, call in enumerate(calls):
            for model, optimizer in ((net, opt), (twin, second)):
                optimizer.zero_grad()
                model(batch(step), call).square().sum().backward()
            if step in (at, at + 1):
                before = snapshot(net, opt)
                with monkeypatch.context() as patch:

                    def fail(*args):
                        raise torch.OutOfMemoryError("no memory")

                    patch.setattr("frog_triton.gathering.layer_step", fail)
                    with pytest.raises(torch.OutOfMemoryError):
                        opt.step()
                assert_same(before, snapshot(net, opt))
            opt.step()
            second.step()
            assert by(opt, "frog") == by(second, "frog")
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_a_graph_in_eval_mode_is_not_remembered_in_training():
    net, opt = attention()
    compiled = torch.compile(net, backend="aot_eager")
    net.eval()
    compiled(batch(0), True).square().sum().backward()
    with pytest.warns(UserWarning, match="eval mode"):
        opt.step()
    net.train()
    with pytest.warns(UserWarning, match="b: "):
        steps(net, opt, [False] * 3)
    assert by(opt, "adamw")[:2] == ["b.weight", "b.bias"]


def test_a_layer_let_go_of_with_a_frozen_weight_resumes_with_the_same_bits():
    def run(cut):
        net, opt = attention()
        net.b.weight.requires_grad_(False)
        steps(net, opt, [False] * cut)
        saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
        net, opt = attention()
        net.b.weight.requires_grad_(False)
        net.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        steps(net, opt, [False] * (6 - cut), cut)
        return list(net.parameters())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run(0)
        for cut in range(1, 6):
            assert all(map(torch.equal, run(cut), whole))


# -- state that is not there -----------------------------------------------------------


def cleared(net, opt):
    opt.state.clear()


def replaced(net, opt):
    opt.state = defaultdict(dict)


def loaded_empty(net, opt):
    opt.load_state_dict({**opt.state_dict(), "state": {}})


def one_weight(net, opt):
    del opt.state[net.a.weight]


def one_bias(net, opt):
    del opt.state[net.b.bias]


def one_of_the_rest(net, opt):
    del opt.state[net.out.weight]


def the_counter(net, opt):
    del opt.state[net.a.weight]["step"]


def emptied(net, opt):
    opt.state[net.b.weight].clear()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "lose",
    [
        cleared,
        replaced,
        loaded_empty,
        one_weight,
        one_bias,
        one_of_the_rest,
        the_counter,
        emptied,
    ],
)
def test_state_that_was_lost_is_made_again(lose, capturable):
    """As torch does: of zeros, and all other state stays."""
    net, opt = attention(capturable=capturable)
    steps(net, opt, [True] * 2)
    before = {
        p: {k: v.clone() for k, v in opt.state[p].items()} for p in net.parameters()
    }
    lose(net, opt)
    left = {(p, key) for p in net.parameters() for key in opt.state.get(p, {})}
    lost = {(p, k) for p, s in before.items() for k in s} - left
    assert lost
    twin = copy.deepcopy(net)
    second = FROG(twin, sample_size=EVERYTHING, capturable=capturable)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        second.state[q] = {
            key: torch.zeros_like(value) if (p, key) in lost else value.clone()
            for key, value in before[p].items()
        }
    for model, optimizer in ((net, opt), (twin, second)):
        steps(model, optimizer, [True] * 2, 2)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    saved = opt.state_dict()["state"]
    assert len(saved) == len(list(net.parameters()))


def test_no_state_is_made_inside_a_cuda_graph(monkeypatch):
    """Each replay would make it anew; so nothing is changed, and the remedy named."""
    net, opt = attention(capturable=True)
    monkeypatch.setattr("frog_triton.guards.is_capturing", lambda: True)
    before = [p.detach().clone() for p in net.parameters()]
    net(batch(0), True).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"a\.weight has no state.*a few steps be"):
        opt.step()
    assert all(map(torch.equal, before, net.parameters()))
    monkeypatch.undo()
    opt.step()
    monkeypatch.setattr("frog_triton.guards.is_capturing", lambda: True)
    steps(net, opt, [True], 1)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_the_rest_loses_its_state_like_torchs_own(fallback):
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(net)
    opt = FROG(net, output_layers="1", fallback=fallback, weight_decay=0.0)
    rate = opt.param_groups[1]["lr"]
    other = {
        "adamw": lambda p: torch.optim.AdamW(p, rate, weight_decay=0.0),
        "sgd": lambda p: torch.optim.SGD(p, rate, momentum=0.9, nesterov=True),
    }[fallback](twin.parameters())
    for step in range(4):
        for model, optimizer in ((net, opt), (twin, other)):
            optimizer.zero_grad()
            model(batch(step)).square().sum().backward()
            optimizer.step()
            if step == 1:
                optimizer.state = defaultdict(dict)
            if step == 2:
                del optimizer.state[next(model.parameters())]
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        # Measured 4e-17: torch's SGD begins its momentum with the gradient, too.
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_a_frozen_layer_is_named_and_has_no_state():
    net, opt = attention()
    net.a.requires_grad_(False)
    steps(net, opt, [True] * 4)
    assert reason_of(opt, "a.weight") == "Linear; frozen"
    assert reason_of(opt, "b.weight") == "Linear; gram, N = 6"
    assert not opt.state.get(net.a.weight) and net.a.weight.grad is None
    net.a.requires_grad_(True)
    steps(net, opt, [True], 4)
    assert "frozen" not in str(opt.describe(file=io.StringIO()))
    assert opt.state[net.a.weight]["step"] == 1
