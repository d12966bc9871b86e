"""What the user says of output layers, what is told, and by whose options they go."""

import copy
import logging

import pytest
import torch
from algorithm1 import Algorithm1
from attention_net import EVERYTHING, by, reason_of
from seeking_nets import (
    D,
    Net,
    batch,
    chain,
    head_first,
    heads_of,
    outputs,
    taking_turns,
    train,
)
from torch import nn

from frog_triton import FROG


class Kind(nn.Linear):
    """A type of its own."""


def of_kind():
    net = head_first()
    net.z.__class__ = Kind
    return net


OPTIONS = {
    "a name": ({"output_layers": "a"}, "a"),
    "names": ({"output_layers": ["a", "z"]}, "a z"),
    "a pattern": ({"output_layers": ["[ab]"]}, "a b"),
    "a type": ({"output_layers": Kind}, "z"),
    "all": ({"output_layers": [nn.Linear]}, "z a b"),
    "none": ({"output_layers": []}, ""),
    "kept": ({"exclude_output_layer": False}, ""),
}


@pytest.mark.filterwarnings("ignore:FROG preconditions")
@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_user_says_holds(name):
    options, expected = OPTIONS[name]
    net = of_kind()
    opt = FROG(net, **options)
    assert outputs(opt) == set(expected.split())
    train(net, opt, 3)
    assert outputs(opt) == set(expected.split())


WRONG = {
    "no such module": (
        {"output_layers": ["zz"]},
        "output_layers names 'zz', but the model has no such module",
    ),
    "no such type": (
        {"output_layers": nn.Conv2d},
        "output_layers names Conv2d, but the model has no module of that type",
    ),
    "kept, and named": (
        {"output_layers": ["z"], "exclude_output_layer": False},
        "which exclude_output_layer=False keeps: leave one of them out",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_user_may_not_say(name):
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        FROG(head_first(), **options)
    with pytest.raises(TypeError, match="output_layers takes names, patterns or"):
        FROG(head_first(), output_layers=[3])


@pytest.mark.filterwarnings("ignore:FROG preconditions")
@pytest.mark.parametrize("names", ["z a b", "a b z"])
def test_an_excluded_head_leaves_no_other_as_output(names):
    net = Net(names, chain("a b z"))
    opt = FROG(net, exclude=["z"])
    train(net, opt, 2)
    assert by(opt) == ["z.weight", "z.bias"]
    assert reason_of(opt, "z.weight") == "excluded by 'z'"


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "frog_triton")
    return caplog


def shown(told):
    """What was told of output layers; what is preconditioned now comes after it."""
    texts = [text for text in told.messages if "output layers" in text]
    return [text.partition(". FROG preconditions ")[0] for text in texts]


TOLD = {
    "as guessed": ("a b z", chain("a b z"), []),
    "another": ("z a b", chain("a b z"), ["z"]),
    "several": ("y z a b", heads_of, ["y, z"]),
    "one after the other": ("a b y z", taking_turns("y", "z"), ["y"]),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_was_not_expected_is_told_once(name, told):
    names, forward, expected = TOLD[name]
    net = Net(names, forward)
    opt = FROG(net)
    train(net, opt, 5)
    text = "FROG: output layers, as a step shows: "
    assert shown(told) == [text + layers for layers in expected]


NAMED = {
    "right": ("head a b", chain("a b head"), "head", None),
    "hidden": ("head a z", chain("head a z"), "head", "z"),
    "heads of attention": (
        "actor critic a z",
        lambda net, x, s: net.z(net.a((net.actor(x) * net.critic(x)).tanh())),
        "actor critic",
        "z",
    ),
    "without a gradient": ("head a z", chain("a z"), "head", None),
    "one of two": (
        "a head z",
        lambda net, x, s: net.head(h := net.a(x)) + net.z(h),
        "head",
        None,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_that_a_step_contradicts_are_told_and_stay(name, told):
    names, forward, expected, other = NAMED[name]
    net = Net(names, forward)
    opt = FROG(net)
    assert outputs(opt) == set(expected.split())
    train(net, opt, 4)
    assert outputs(opt) == set(expected.split())
    text = f"FROG: the step shows {other} as output layers, but others are named so"
    assert shown(told) == ([] if other is None else [f"{text}; see output_layers"])


LONE = {
    "a layer": lambda: nn.Linear(D, 3),
    "beside a norm": lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3)),
    "called head": lambda: Net("head", chain("head")),
    "called head, wrapped": lambda: nn.Sequential(Net("head", chain("head"))),
}


@pytest.mark.parametrize("name", LONE)
def test_a_lone_layer_is_preconditioned(name, told):
    net = LONE[name]().double()
    opt = FROG(net)
    for step in range(3):
        opt.zero_grad()
        net(batch(step)).square().mean().backward()
        opt.step()
    matrices = [name for name, p in net.named_parameters() if p.ndim == 2]
    assert set(matrices) < set(by(opt, "frog")) and shown(told) == []


# -- by whose options ------------------------------------------------------------------


def seen(layer):
    """Inputs and output gradients of a layer, as they come."""
    found = []
    layer.register_forward_hook(
        lambda m, args, y: (
            found.append(args[0].detach()),
            y.register_hook(found.append),
            None,
        )[-1]
    )
    return found


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_layer_has_the_options_of_the_half_that_it_belongs_to(scheduled):
    """The head is found in group 0, and the guess in group 1 is promoted."""
    net = head_first()
    opt = FROG(net, sample_size=EVERYTHING)
    rows, rest = opt.param_groups
    rows |= {"lr": 0.05, "weight_decay": 0.2}
    rest |= {"lr": 0.004, "weight_decay": 0.3}
    assert any(net.z.weight is p for p in rows["params"])
    assert any(net.b.weight is p for p in rest["params"])
    head, samples = copy.deepcopy(net.z), seen(net.b)
    options = {"lr": 0.004}
    adamw = torch.optim.AdamW(
        [
            {"params": [head.weight], "weight_decay": 0.3},
            {"params": [head.bias], "weight_decay": 0.0},
        ],
        **options,
    )
    model = Algorithm1(net.b, lr=0.05, weight_decay=0.2)
    both = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, adamw)]
    for step in range(4):
        opt.zero_grad()
        net(batch(step)).square().mean().backward()
        model.options["lr"] = 0.05 * (0.5**step if scheduled else 1)
        model.step(*samples, net.b.weight.grad, net.b.bias.grad)
        samples.clear()
        head.weight.grad, head.bias.grad = (p.grad.clone() for p in net.z.parameters())
        opt.step()
        adamw.step()
        for scheduler in both if scheduled else ():
            scheduler.step()
        # Measured 1e-16.
        torch.testing.assert_close(net.z.weight, head.weight, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(net.z.bias, head.bias, rtol=1e-13, atol=1e-14)
        for param, expected in ((net.b.weight, model.weight), (net.b.bias, model.bias)):
            # Measured 1e-15.
            expected = torch.from_numpy(expected)
            torch.testing.assert_close(param, expected, rtol=1e-11, atol=1e-12)
    assert outputs(opt) == {"z"}
