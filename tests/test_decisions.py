"""What an optimizer decides early, it can take back; what it refuses, changes nothing.

Each situation against Algorithm 1 in float64, or beside torch.optim.AdamW in it.
"""

import copy
import io
import math
import warnings
from collections import defaultdict

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn

from frog_triton import FROG

EVERYTHING = 1000


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


def batch(seed, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)


def by(opt, name="adamw"):
    return opt.describe(file=io.StringIO()).updated_by(name)


def reason_of(opt, name):
    (found,) = (r.reason for r in opt.describe(file=io.StringIO()) if r.name == name)
    return found


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


class Attention(nn.Module):
    """Uses the weight of a projection without calling it, unless told to."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(5, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x, call=False):
        x = torch.tanh(self.a(x))
        x = self.b(x) if call else F.linear(x, self.b.weight, self.b.bias)
        return self.out(torch.tanh(x))


def attention(**options):
    torch.manual_seed(0)
    net = Attention().double()
    return net, FROG(net, sample_size=EVERYTHING, **options)


def steps(net, opt, calls, start=0):
    for step, call in enumerate(calls, start):
        opt.zero_grad()
        net(batch(step), call).square().sum().backward()
        opt.step()


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_a_layer_is_let_go_on_proof_and_comes_back_when_it_is_called(fallback):
    net, opt = attention(fallback=fallback)
    steps(net, opt, [False] * 2)
    assert "b.weight" in by(opt, "frog")
    match = rf"b: its weight .* {fallback} updates it"
    with pytest.warns(UserWarning, match=match) as caught:
        steps(net, opt, [False], 2)
    assert [warning.filename for warning in caught] == [__file__]  # who called step
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

                    patch.setattr("frog_triton.optimizer.layer_step", fail)
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


# -- loading ---------------------------------------------------------------------------


def snapshot(net, opt):
    groups = [
        {k: [id(p) for p in v] if k == "params" else v for k, v in group.items()}
        for group in opt.param_groups
    ]
    state = {
        (name, key): value.clone()
        for name, p in net.named_parameters()
        for key, value in opt.state.get(p, {}).items()
    }
    hooks = [len(m._forward_hooks) for m in net.modules()]
    return groups, state, hooks, str(opt.describe(file=io.StringIO()))


def assert_same(a, b):
    assert a[0] == b[0] and a[2:] == b[2:] and a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def other_shape(saved):
    saved["state"][0]["momentum_buffer"] = torch.zeros(2, 2)


def other_counter(saved):
    saved["state"][0]["step"] = torch.zeros(3)


def complex_average(saved):
    saved["state"][4]["exp_avg"] = torch.zeros(3, 5, dtype=torch.complex64)


def sparse_momentum(saved):
    saved["state"][0]["momentum_buffer"] = torch.zeros(5, 6).to_sparse()


def no_version(saved):
    saved["version"] = None


def later_version(saved):
    saved["version"] = 99


def fewer_groups(saved):
    saved["param_groups"].pop()


def fewer_params(saved):
    saved["param_groups"][1]["params"].pop()


def bad_rate(saved):
    saved["param_groups"][1]["lr"] = float("nan")


def bad_damping(saved):
    saved["param_groups"][0]["damping"] = -1.0


def groups_swapped(saved):
    saved["param_groups"].reverse()


def unknown_fallback(saved):
    saved["param_groups"][1]["updated_by"] = "adagrad"


def no_momentum(saved):
    saved["state"][0]["momentum_buffer"] = None


def misses_in_a_list(saved):
    saved["misses"] = ["a"]


def let_go_in_a_list(saved):
    saved["let_go"] = ["b"]


BROKEN = {
    complex_average: r"out\.weight: its saved exp_avg is .*complex64",
    sparse_momentum: r"a\.weight: its saved momentum_buffer is torch.sparse_coo",
    no_version: "version None",
    no_momentum: r"a\.weight has shape.*its saved momentum_buffer has None",
    misses_in_a_list: "saved misses must map",
    let_go_in_a_list: "saved let_go must map",
    other_shape: r"a\.weight has shape \(5, 6\).*momentum_buffer has \(2, 2\)",
    other_counter: r"a\.weight has shape.*its saved step has \(3,\)",
    later_version: "version 99",
    fewer_groups: "different number of parameter groups",
    fewer_params: "doesn't match the size",
    bad_rate: r"saved param_groups\[1\]: lr must not be",
    bad_damping: r"saved param_groups\[0\]: damping must be positive",
    groups_swapped: r"saved param_groups\[0\]: updated_by must be one of \('frog',\)",
    unknown_fallback: r"saved param_groups\[1\]: updated_by must be one of",
}


@pytest.mark.parametrize("breaks", BROKEN)
def test_a_refused_state_changes_nothing(breaks):
    net, opt = attention()
    with pytest.warns(UserWarning, match="without calling"):
        steps(net, opt, [False] * 3)  # so that b is let go of in what is saved
    saved = copy.deepcopy(opt.state_dict())
    breaks(saved)
    other, second = attention()
    steps(other, second, [True])
    before = snapshot(other, second)
    called = []
    second.register_load_state_dict_post_hook(called.append)
    with pytest.raises(ValueError, match=BROKEN[breaks]):
        second.load_state_dict(saved)
    assert_same(before, snapshot(other, second))
    assert not called and len(second._optimizer_load_state_dict_pre_hooks) == 0
    # And goes on as if nothing had been.
    twin, third = attention()
    steps(twin, third, [True] * 2)
    steps(other, second, [True], 1)
    assert all(map(torch.equal, other.parameters(), twin.parameters()))


def test_a_pre_hook_changes_what_is_loaded_before_it_is_checked():
    net, opt = attention()
    steps(net, opt, [True] * 2)
    saved = opt.state_dict()
    broken = copy.deepcopy(saved)
    other_shape(broken)
    broken["version"] = 99
    other, second = attention()
    seen = []

    def mend(optimizer, state_dict):
        seen.append(state_dict["version"])
        return {**saved, "version": 2}

    second.register_load_state_dict_pre_hook(mend)
    second.load_state_dict(broken)
    other.load_state_dict(net.state_dict())
    assert seen == [99]
    for model, optimizer in ((net, opt), (other, second)):
        steps(model, optimizer, [True], 2)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_a_pre_hook_in_place_on_the_top_level_as_torch_allows():
    net, opt = attention()
    steps(net, opt, [True])
    _, second = attention()
    second.register_load_state_dict_pre_hook(
        lambda optimizer, saved: saved.update(state={})
    )
    second.load_state_dict(opt.state_dict())
    assert not second.state


def test_counters_saved_as_numbers():
    """As some tools write them."""
    net, opt = attention()
    steps(net, opt, [True] * 2)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    other, second = attention()
    other.load_state_dict(net.state_dict())
    second.load_state_dict(saved)
    for model, optimizer in ((net, opt), (other, second)):
        steps(model, optimizer, [True], 2)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


TYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("saved", TYPES)
@pytest.mark.parametrize("here", TYPES)
def test_a_model_of_another_type_loads_and_goes_on(here, saved, fallback):
    net, opt = attention(fallback=fallback)
    net.to(saved)

    def step(model, optimizer, dtype):
        optimizer.zero_grad()
        model(batch(0, dtype=dtype), True).square().sum().backward()
        optimizer.step()

    step(net, opt, saved)
    other, second = attention(fallback=fallback)
    other.to(here)
    second.load_state_dict(opt.state_dict())
    step(other, second, here)
    net.to(here)  # in mid run, too
    step(net, opt, here)
    for param in second.param_groups[1]["params"]:
        for key, value in second.state[param].items():
            assert key == "step" or value.dtype == here


def test_a_state_dict_hook_sees_and_changes_all_of_it():
    net, opt = attention()
    with pytest.warns(UserWarning, match="without calling"):
        steps(net, opt, [False] * 3)

    def note(optimizer, saved):
        assert saved["version"] == 2 and list(saved["let_go"]) == ["b"]
        saved["note"] = "mine"

    opt.register_state_dict_post_hook(note)
    assert opt.state_dict()["note"] == "mine"
    assert len(opt._optimizer_state_dict_post_hooks) == 1


def test_what_the_user_keeps_in_the_state_outlives_a_decision():
    net, opt = attention()
    steps(net, opt, [False])
    opt.state[net.b.weight]["note"] = "mine"
    with pytest.warns(UserWarning, match="without calling"):
        steps(net, opt, [False] * 2, 1)
    assert set(opt.state[net.b.weight]) == {"note", "step", "exp_avg", "exp_avg_sq"}
    steps(net, opt, [True], 3)
    assert set(opt.state[net.b.weight]) == {"note", "step", "momentum_buffer"}


def test_a_post_hook_keeps_what_it_put_in():
    net, opt = attention()
    steps(net, opt, [True] * 2)
    other, second = attention()
    weight = other.a.weight
    found = []

    def put(optimizer):
        found.append(optimizer.state[weight]["momentum_buffer"].clone())
        optimizer.state[weight]["momentum_buffer"] = torch.ones(5, 6).double()
        optimizer.state[weight]["note"] = "mine"
        optimizer.param_groups[0]["lr"] = 0.125

    second.register_load_state_dict_post_hook(put)
    second.load_state_dict(opt.state_dict())
    assert torch.equal(found[0], opt.state[net.a.weight]["momentum_buffer"])
    assert torch.equal(second.state[weight]["momentum_buffer"], torch.ones(5, 6))
    assert second.param_groups[0]["lr"] == 0.125
    steps(other, second, [True])
    assert second.state[weight]["note"] == "mine"
    second.memory_usage()


def named(names):
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(6, 6) for name in names}).double()
    opt = FROG(net, params=net.named_parameters(), exclude_output_layer=False)
    return net, opt


def named_step(net, opt, order, seed):
    opt.zero_grad()
    x = batch(seed)
    for name in order:
        x = torch.tanh(net[name](x))
    x.square().sum().backward()
    opt.step()


def test_groups_reordered_by_a_hook_as_torch_documents_it():
    """Layers are registered in another order, so state would go to the wrong ones."""
    net, opt = named("abc")
    named_step(net, opt, "abc", 0)
    other, second = named("cab")
    other.load_state_dict(net.state_dict())

    def reorder(optimizer, saved):
        adapted = copy.deepcopy(optimizer.state_dict())
        for ours, theirs in zip(
            adapted["param_groups"], saved["param_groups"], strict=True
        ):
            for index, name in zip(ours["params"], ours["param_names"], strict=True):
                place = theirs["params"][theirs["param_names"].index(name)]
                if place in saved["state"]:
                    adapted["state"][index] = copy.deepcopy(saved["state"][place])
        return adapted

    second.register_load_state_dict_pre_hook(reorder)
    second.load_state_dict(opt.state_dict())
    for model, optimizer in ((net, opt), (other, second)):
        named_step(model, optimizer, "abc", 1)
    for name, param in net.named_parameters():
        twin = other.get_parameter(name)
        # Measured 1e-17: layers solved together in another order.
        torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-13)


def test_whole_groups_in_another_order():
    def build(first, second):
        torch.manual_seed(0)
        net = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}).double()
        groups = {
            "a": {"params": list(net.a.parameters()), "lr": 0.1},
            "b": {"params": list(net.b.parameters())},
        }
        params = [groups[first], groups[second]]
        return net, FROG(net, params=params, exclude_output_layer=False)

    net, opt = build("a", "b")
    named_step(net, opt, "ab", 0)
    other, second = build("b", "a")
    other.load_state_dict(net.state_dict())

    def swap(optimizer, saved):
        groups = saved["param_groups"]
        return {**saved, "param_groups": groups[2:] + groups[:2]}

    second.register_load_state_dict_pre_hook(swap)
    second.load_state_dict(opt.state_dict())
    assert [g["lr"] for g in second.param_groups][::2] == [2e-2, 0.1]
    for model, optimizer in ((net, opt), (other, second)):
        named_step(model, optimizer, "ab", 1)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


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
    for module in ("guards", "optimizer"):
        monkeypatch.setattr(f"frog_triton.{module}.is_capturing", lambda: True)
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
    opt = FROG(net, exclude_output_layer=True, fallback=fallback, weight_decay=0.0)
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


# -- entries of groups -----------------------------------------------------------------

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
    ("weight_decay", math.nan),
    ("weight_decay", -1.0),
    ("cg_iters", 0),
    ("cg_iters", 2.5),
    ("betas", (0.9, 1.0)),
    ("betas", 0.9),
    ("eps", math.nan),
    ("eps", -1e-8),
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
