"""What steps show of output layers, and who updates which layer from then on."""

import copy
import io
import logging
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from attention_net import EVERYTHING, by, reason_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import frog_triton
from frog_triton import FROG
from frog_triton.model.routing import OUTPUT_LAYER
from frog_triton.unhooked import PATIENCE

D = 4


class Net(nn.Module):
    """Linear layers by name, in the order given, and a forward function."""

    def __init__(self, names, forward):
        super().__init__()
        torch.manual_seed(1)
        for name in names.split():
            setattr(self, name, nn.Linear(D, D))
        self.run = forward
        self.double()

    def forward(self, x, step=0):
        return self.run(self, x, step)


def chain(names):
    """A forward function: one layer after another."""

    def forward(net, x, step):
        *body, head = names.split()
        for name in body:
            x = getattr(net, name)(x).tanh()
        return getattr(net, head)(x)

    return forward


def head_first():
    """The guess is wrong: b is declared last."""
    return Net("z a b", chain("a b z"))


def batch(step, size=6):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, D, generator=generator, dtype=torch.float64)


def train(net, opt, count, start=0, before=None, factor=1.0):
    for step in range(start, start + count):
        if before is not None:
            before(net, opt, step)
        opt.zero_grad()
        (factor * net(batch(step), step).square().mean()).backward()
        opt.step()


def outputs(opt):
    """Names of layers that go to the fallback as outputs; all others are FROG's."""
    found = {
        r.name.removesuffix(".weight"): r
        for r in opt.routes()
        if r.name.endswith("weight")
    }
    gone = {name for name, r in found.items() if r.updated_by == "adamw"}
    assert all(found[name].reason.startswith(OUTPUT_LAYER) for name in gone)
    return gone


def sought(net):
    """Names of modules that are watched to find output layers."""
    return [
        name
        for name, module in net.named_modules()
        if any("seeking" in hook.__name__ for hook in module._forward_hooks.values())
    ]


# -- what steps show -------------------------------------------------------------------


def taking_turns(*heads):
    def forward(net, x, step):
        return getattr(net, heads[step % len(heads)])(net.a(x).tanh())

    return forward


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


def heads_of(net, x, step):
    """By all heads that there are."""
    h = net.b(net.a(x).tanh()).tanh()
    return sum(getattr(net, name)(h) for name in "yz" if hasattr(net, name))


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


def saved(net, opt):
    file = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


# -- options, and what is told ---------------------------------------------------------


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


# -- bare parameters -------------------------------------------------------------------


class Bare(nn.Module):
    """Uses a parameter by FROG's linear, if it is told to, and another by torch's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.z = nn.Linear(D, D), nn.Linear(D, 3)
        self.w = nn.Parameter(torch.randn(D, D) / 2)
        self.v = nn.Parameter(torch.randn(D, D) / 2)
        self.double()

    def forward(self, x, told):
        linear = frog_triton.linear if told else F.linear
        x = linear(self.a(x).tanh(), self.w)
        return self.z(F.linear(x.tanh(), self.v))


def bare_steps(net, opt, calls, start=0):
    for step, told in enumerate(calls, start):
        opt.zero_grad()
        net(batch(step), told).square().mean().backward()
        opt.step()


@pytest.mark.filterwarnings("ignore:FROG preconditions")
def test_a_bare_parameter_is_promoted_at_its_first_samples_and_let_go_without():
    net = Bare()
    opt = FROG(net, sample_size=EVERYTHING)
    bare = {"w", "v"}
    assert bare <= {*by(opt)}
    bare_steps(net, opt, [False] * 2)
    assert bare <= {*by(opt)} and "frog_triton.linear" in reason_of(opt, "w")
    bare_steps(net, opt, [True], 2)
    assert "w" in by(opt, "frog") and "v" in by(opt)
    layer, samples = nn.Linear(D, D, bias=False).double(), []
    layer.weight.data.copy_(net.w.data)
    model = Algorithm1(layer)
    model.m = opt.state[net.w]["momentum_buffer"].numpy().copy()
    original = frog_triton.linear

    def linear(x, weight):
        y = original(x, weight)
        samples.append(x.detach())
        y.register_hook(samples.append)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frog_triton, "linear", linear)
        opt.zero_grad()
        net(batch(3), True).square().mean().backward()
    model.step(*samples, net.w.grad)
    opt.step()
    # Measured 1e-15.
    expected = torch.from_numpy(model.weight)
    torch.testing.assert_close(net.w, expected, rtol=1e-11, atol=1e-12)
    bare_steps(net, opt, [False] * (PATIENCE - 1), 4)
    assert "w" in by(opt, "frog")
    with pytest.warns(UserWarning, match="^w: its weight is used without.*adamw"):
        bare_steps(net, opt, [False], 4 + PATIENCE)
    assert bare <= {*by(opt)}
    bare_steps(net, opt, [True], 5 + PATIENCE)
    assert "w" in by(opt, "frog")


@pytest.mark.filterwarnings("ignore:FROG preconditions")
def test_a_bare_parameter_that_never_appears_costs_a_hook():
    net = Bare()
    twin = copy.deepcopy(net)
    opt = FROG(net)
    adamw = torch.optim.AdamW([twin.v], 3e-3)
    assert len(net.v._backward_hooks) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            opt.zero_grad()
            net(batch(step), True).square().mean().backward()
            twin.v.grad = net.v.grad.clone()
            assert opt.capture.calls("w") and not opt.capture.calls("v")
            opt.step()
            adamw.step()
            torch.testing.assert_close(net.v, twin.v, rtol=1e-13, atol=1e-14)
    assert opt.state[net.v].keys() == adamw.state[twin.v].keys()
    opt.close()
    assert not net.v._backward_hooks and not net.w._backward_hooks


@pytest.mark.parametrize("cut", range(1, 9))
def test_bare_parameters_resume_with_the_same_bits(cut):
    calls = [False, True, True, False, False, False, False, True, True]

    def run(cut):
        net = Bare()
        opt = FROG(net, sample_size=3)
        bare_steps(net, opt, calls[:cut])
        if cut:
            weights, state = saved(net, opt)
            net = Bare()
            opt = FROG(net, sample_size=3)
            net.load_state_dict(weights)
            opt.load_state_dict(state)
        bare_steps(net, opt, calls[cut:], cut)
        return [*net.parameters()], by(opt, "frog")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (whole, frog), (weights, theirs) = run(0), run(cut)
    assert theirs == frog and "w" in frog
    assert all(map(torch.equal, weights, whole))


def penalty(critic, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("act", [nn.LeakyReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("dropped", ["before all", "after the penalty"])
def test_losses_with_derivatives_of_the_model(act, dropped):
    """A critic under a gradient penalty: the way back from slopes skips the last."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        *(nn.Linear(4, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 1))
    )
    opt = FROG(critic)
    for _ in range(2):
        if dropped == "before all":
            opt.zero_grad()
        slopes = penalty(critic, torch.randn(6, 4))
        if dropped == "after the penalty":
            opt.zero_grad()
        (critic(torch.randn(6, 4)).mean() + 10 * slopes).backward()
        opt.step()
    served = opt.describe().updated_by("frog")
    assert served == ["0.weight", "0.bias", "2.weight", "2.bias"]
