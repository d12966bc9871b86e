"""Loading: hooks see all first, a refusal changes nothing, orders may differ."""

import copy

import pytest
import torch
from attention_net import (
    assert_same,
    attention,
    batch,
    snapshot,
    steps,
)
from torch import nn

from frog_triton import FROG


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
