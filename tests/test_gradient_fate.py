"""Samples share the fate of the gradient they belong to, whoever decides on it.

Each situation ends in one step that Algorithm 1 takes in float64 too, fed with the
inputs and output gradients of those passes alone whose gradient is in ``weight.grad``.
"""

import copy
import gc
import weakref

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from cases import PAPER
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton import FROG

EVERYTHING = 1000  # samples: all of a batch
PLAIN = PAPER | {"damping": 1e-2, "cg_iters": 2}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)))


class Watched:
    """A net under FROG, and Algorithm 1 for its two layers.

    Its input is noted by hooks on a twin that FROG knows nothing of.
    """

    def __init__(self, compiled=False, dtype=torch.float64, **options):
        torch.manual_seed(0)
        self.net = Net().to(dtype)
        self.seen = {}
        build = ("backend", "capturable", "formulation", "sampling", "fallback")
        how = {key: options.pop(key) for key in build if key in options}
        self.opt = FROG(self.net, sample_size=EVERYTHING, **how, **options)
        # The same net without hooks but these.
        self.twin = copy.deepcopy(self.net)
        self.layers = {"first": self.twin.first, "second": self.twin.second}
        self.models = {
            name: Algorithm1(copy.deepcopy(layer), **options)
            for name, layer in self.layers.items()
        }
        self.forward = self.net
        if compiled:
            self.forward = torch.compile(self.net, backend="aot_eager", fullgraph=True)

    def step(self, *xs):
        """A step of each; Algorithm 1 is given the samples of these batches alone."""
        self._expect(xs)
        self.opt.step()
        self.net.zero_grad()
        self.twin.load_state_dict(self.net.state_dict())

    def _expect(self, xs):
        seen = {name: [] for name in self.layers}
        handles = []
        for name, layer in self.layers.items():

            def hook(module, args, y, name=name):
                pair = [args[0].detach(), None]
                seen[name].append(pair)
                y.register_hook(lambda grad: pair.__setitem__(1, grad))

            handles.append(layer.register_forward_hook(hook))
        self.twin.zero_grad()
        for x in xs:
            loss(self.twin, x).backward()
        for handle in handles:
            handle.remove()
        for name, layer in self.layers.items():
            x, y = (torch.cat(part) for part in zip(*seen[name], strict=True))
            bias = None if layer.bias is None else layer.bias.grad
            self.models[name].step(x, y, layer.weight.grad, bias)

    def check(self, limit=1e-12):
        # Measured 1.2e-15 at most in float64, 1.7e-6 in float32.
        for name, model in self.models.items():
            weight = self.net.get_submodule(name).weight
            assert oracles.relative_error(weight, model.weight) < limit


def batch(seed, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype)


def loss(net, x):
    return net(x).square().sum()


class Wrapper(torch.optim.Optimizer):
    """As SAM and Lookahead are written: an optimizer around another."""

    def __init__(self, inner):
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})


def each(change):
    def drop(net, opt):
        for param in net.parameters():
            change(param)

    return drop


def foreach_zero(net, opt):
    torch._foreach_zero_([p.grad for p in net.parameters()])


DROPS = {
    "opt.zero_grad": lambda net, opt: opt.zero_grad(),
    "opt.zero_grad, zeros": lambda net, opt: opt.zero_grad(set_to_none=False),
    "model.zero_grad": lambda net, opt: net.zero_grad(),
    "model.zero_grad, zeros": lambda net, opt: net.zero_grad(set_to_none=False),
    "None": each(lambda p: setattr(p, "grad", None)),
    "zero_": each(lambda p: p.grad.zero_()),
    "data.zero_": each(lambda p: p.grad.data.zero_()),
    "detach_().zero_": each(lambda p: p.grad.detach_().zero_()),
    "mul_(0)": each(lambda p: p.grad.mul_(0)),
    "other zeros": each(lambda p: setattr(p, "grad", torch.zeros_like(p))),
    "foreach_zero": foreach_zero,
    "wrapper": lambda net, opt: Wrapper(opt).zero_grad(),
    "wrapper, zeros": lambda net, opt: Wrapper(opt).zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("options", [{}, PLAIN], ids=["default", "plain"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_dropped_gradient_takes_its_samples_along(drop, options, compiled):
    run = Watched(compiled, **options)
    for step in range(2):
        loss(run.forward, 50 * batch(10 + step)).backward()
        DROPS[drop](run.net, run.opt)
        loss(run.forward, batch(step)).backward()
        run.step(batch(step))
    run.check()


@pytest.mark.parametrize("drop", [d for d in DROPS if d != "data.zero_"])
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
def test_the_bits_do_not_tell_who_dropped_it(drop, when):
    """Nor do the draws, of samples that are few."""

    def train(drop):
        torch.manual_seed(0)
        net = Net()
        opt = FROG(net, sample_size=3)
        for step in range(3):
            loss(net, batch(10 + step, dtype=torch.float32)).backward()
            if when == "before the forward":
                DROPS[drop](net, opt)
            value = loss(net, batch(step, dtype=torch.float32))
            if when == "before the backward":
                DROPS[drop](net, opt)
            value.backward()
            opt.step()
            net.zero_grad()
        return [p.detach() for p in net.parameters()]

    zeros = "zero" in drop and drop not in ("opt.zero_grad", "model.zero_grad")
    reference = "opt.zero_grad, zeros" if zeros else "opt.zero_grad"
    assert all(map(torch.equal, train(drop), train(reference)))


@pytest.mark.parametrize("drop", [d for d in DROPS if d != "data.zero_"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_where_the_host_may_not_ask_whether_it_is_zero(drop, compiled):
    """On a GPU, and with capturable: samples of what was zeroed become zero."""
    run = Watched(compiled, capturable=True)
    x = batch(9)
    x[0] = float("inf")  # an overflow: what a GradScaler skips
    loss(run.forward, x).backward()
    DROPS[drop](run.net, run.opt)
    if run.net.first.weight.grad is not None:
        # mul_(0) leaves NaN, and then nothing was dropped.
        for param in run.net.parameters():
            param.grad.nan_to_num_(0.0, 0.0, 0.0)
    loss(run.forward, batch(0)).backward()
    run.step(batch(0))
    run.check()
    assert run.opt.anomalies() == {}


@pytest.mark.parametrize("drop", ["model.zero_grad", "zero_"])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
def test_by_the_kernels(drop, formulation):
    run = Watched(dtype=torch.float32, backend="triton", formulation=formulation)
    for step in range(2):
        loss(run.net, batch(10 + step, dtype=torch.float32)).backward()
        DROPS[drop](run.net, run.opt)
        loss(run.net, batch(step, dtype=torch.float32)).backward()
        run.step(batch(step, dtype=torch.float32))
    run.check(2e-5)


def clip(net):
    nn.utils.clip_grad_norm_(net.parameters(), 1e9)


def replace(net):
    for param in net.parameters():
        param.grad = param.grad.clone()


CHANGES = {
    "nothing": lambda net: None,
    "clipped": clip,
    "scaled": each(lambda p: p.grad.mul_(1.0)),
    "by data": each(lambda p: p.grad.data.mul_(1.0)),
    "replaced": replace,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gradient_that_is_changed_is_still_there(change, capturable, compiled):
    """Accumulation, with what trainers do to gradients between the passes."""
    run = Watched(compiled, capturable=capturable)
    for step in range(2):
        xs = [batch(10 * step + micro) for micro in range(3)]
        for x in xs:
            loss(run.forward, x).backward()
            act = CHANGES[change]
            act(run.net, None) if change in ("scaled", "by data") else act(run.net)
        run.step(*xs)
    run.check()


def test_a_gradient_that_accumulates_out_of_place():
    """As autograd does with create_graph."""
    run = Watched()
    xs = batch(0), batch(1)
    for x in xs:
        loss(run.net, x).backward(create_graph=True)
    run.step(*xs)
    run.check()


def test_gradients_can_be_saved_copied_and_cast(tmp_path):
    """They carry a mark, which is in nobody's way."""
    run = Watched()
    loss(run.net, batch(0)).backward()
    grads = [p.grad for p in run.net.parameters()]
    torch.save(grads, tmp_path / "grads")
    for other in (
        torch.load(tmp_path / "grads", weights_only=True),
        copy.deepcopy(grads),
    ):
        assert all(map(torch.equal, grads, other))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        run.net.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p.grad.dtype == torch.float32 for p in run.net.parameters())


def test_no_hook_is_left_on_a_parameter():
    run = Watched()
    loss(run.net, batch(0)).backward()
    run.opt.close()
    assert not any(p._post_accumulate_grad_hooks for p in run.net.parameters())
    run.net.requires_grad_(False)
    opt = FROG(run.net)
    run.net(batch(0))
    del opt
    assert not any(p._post_accumulate_grad_hooks for p in run.net.parameters())


# -- passes that write no gradient of the weight's -------------------------------------


def gradient_of_inputs(net, x):
    x = x.clone().requires_grad_()
    torch.autograd.grad(loss(net, 3 * x), x)


def penalty(net, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(net, 3 * x), x, create_graph=True)
    assert grad.requires_grad


def backward_into_inputs(net, x):
    x = x.clone().requires_grad_()
    loss(net, 3 * x).backward(inputs=[x])


def gradient_of_the_weights(net, x):
    torch.autograd.grad(loss(net, 3 * x), list(net.parameters()))


def frozen(net, x):
    """A GAN's discriminator in the generator's phase."""
    net.requires_grad_(False)
    loss(net, 3 * x.clone().requires_grad_()).backward()
    net.requires_grad_(True)


def without_gradients(net, x):
    with torch.no_grad():
        net(3 * x)


def no_backward(net, x):
    net(3 * x)


def many_at_once(net, x):
    x = x.clone().requires_grad_()
    y = net(3 * x)
    seeds = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    torch.autograd.grad(y, x, seeds, is_grads_batched=True)


def evaluation(net, x):
    net.eval()
    loss(net, 3 * x.clone().requires_grad_())
    net.train()


FOREIGN = [
    gradient_of_inputs,
    penalty,
    backward_into_inputs,
    gradient_of_the_weights,
    frozen,
    without_gradients,
    no_backward,
    many_at_once,
    evaluation,
]


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_only_passes_that_wrote_the_gradient_count(foreign, when, compiled):
    if compiled and foreign in (penalty, many_at_once):
        pytest.skip("torch.compile takes no derivative of a derivative, nor many")
    run = Watched(compiled)
    for step in range(2):
        x, z = batch(step), batch(20 + step)
        if when == "before":
            foreign(run.forward, z)
        loss(run.forward, x).backward()
        if when == "between":
            foreign(run.forward, z)
        loss(run.forward, 2 * x).backward()
        if when == "after":
            foreign(run.forward, z)
        run.step(x, 2 * x)
    run.check()


def test_the_derivative_inside_a_loss_is_not_the_losss():
    """A physics-informed net: the inner pass counts for nothing, the outer once."""
    run, seen = Watched(), []
    x = batch(0).requires_grad_()
    run.net.first.register_forward_hook(
        lambda m, a, y: (y.register_hook(seen.append), None)[1]
    )
    u = run.net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (du.square().sum() + u.square().sum()).backward()
    inner, outer = seen
    assert not torch.equal(inner, outer)
    (call,) = run.opt.capture.calls("first")
    assert torch.equal(call.x, x) and torch.equal(call.y, outer)


@pytest.mark.parametrize("sets", ["grad", "adds to grad"])
def test_a_gradient_set_by_hand_has_the_samples_of_its_pass(sets):
    """Gradients of tasks are computed apart, and put together by hand."""
    run = Watched()
    params = list(run.net.parameters())
    for step in range(2):
        x = batch(step)
        for param, grad in zip(
            params, torch.autograd.grad(loss(run.net, x), params), strict=True
        ):
            param.grad = grad if sets == "grad" else grad / 2 + grad / 2
        run.step(x)
    run.check()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("drop", ["model.zero_grad", "zero_"])
def test_a_layer_inside_and_outside_of_a_checkpoint(reentrant, drop):
    torch.manual_seed(0)
    net = Net().double()
    opt = FROG(net, sample_size=EVERYTHING)
    twin = copy.deepcopy(net)
    twin_opt = FROG(twin, sample_size=EVERYTHING)

    def forward(model, x, through):
        x = torch.tanh(model.first(x))
        x = torch.tanh(model.second(x))
        x = torch.tanh(through(model.second, x))
        return model.head(torch.tanh(model.second(x)))

    def checkpointed(module, x):
        return checkpoint(module, x, use_reentrant=reentrant)

    for step in range(2):
        forward(net, batch(10 + step), checkpointed).square().sum().backward()
        DROPS[drop](net, opt)
        forward(net, batch(step), checkpointed).square().sum().backward()
        plain = forward(twin, batch(step), lambda module, x: module(x))
        plain.square().sum().backward()
        for optimizer in (opt, twin_opt):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        # Measured 1e-15: the same samples in another order.
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_sharpness_aware_minimization():
    """Two passes a step; the gradient, and so the samples, are the second's."""
    run = Watched()
    params = list(run.net.parameters())
    for step in range(2):
        x = batch(step)
        loss(run.net, x).backward()
        with torch.no_grad():
            steps = [0.05 * p.grad / p.grad.norm() for p in params]
            torch._foreach_add_(params, steps)
        run.net.zero_grad()
        loss(run.net, x).backward()
        with torch.no_grad():
            torch._foreach_add_(list(run.twin.parameters()), steps)
            torch._foreach_sub_(params, steps)
        run.step(x)
    run.check()


@pytest.mark.parametrize("written", ["0 * sum", "penalty"])
def test_a_pass_without_calls_leaves_no_samples_of_a_dropped_one(written):
    run = Watched()
    loss(run.net, batch(0)).backward()
    run.net.zero_grad()
    total = sum(p.square().sum() for p in run.net.parameters())
    (0 * total if written == "0 * sum" else total).backward()
    assert run.opt.capture.calls("first") == run.opt.capture.calls("second") == []
    # Such a term beside a loss changes no sample.
    run.net.zero_grad()
    loss(run.net, batch(0)).backward()
    held = run.opt.capture.calls("first")
    sum(p.square().sum() for p in run.net.parameters()).backward()
    assert run.opt.capture.calls("first") == held != []


def test_a_scaler_skips_and_the_model_drops():
    """What Hugging Face's Trainer does after an overflow."""
    torch.manual_seed(0)
    nets = [Net(), None]
    nets[1] = copy.deepcopy(nets[0])
    opts = [FROG(net) for net in nets]
    for net, opt in zip(nets, opts, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            x = batch(step, dtype=torch.float32)
            if step == 1:
                x = x * float("inf")
            if step == 1 and net is nets[1]:
                continue
            scaler.scale(F.mse_loss(net(x), torch.ones(6, 2))).backward()
            scaler.step(opt)
            scaler.update(4.0)
            net.zero_grad()
        assert opt.anomalies() == {}
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("penalty", ["zero", "squares", "create_graph"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_pass_without_calls_after_a_change_keeps_the_samples(
    change, penalty, capturable
):
    """A weight penalty of its own backward pass, after clipping."""
    run = Watched(capturable=capturable)
    x = batch(0)
    loss(run.net, x).backward()
    act = CHANGES[change]
    act(run.net, None) if change in ("scaled", "by data") else act(run.net)
    total = sum(p.square().sum() for p in run.net.parameters())
    (0 * total if penalty == "zero" else 1e-30 * total).backward(
        create_graph=penalty == "create_graph"
    )
    run.step(x)
    run.check()


def test_zeros_after_inputs_of_zero():
    """Where the weight's gradient was zero anyway, the bias's tells."""
    run = Watched()
    loss(run.net, torch.zeros(6, 3).double()).backward()
    torch._foreach_zero_([p.grad for p in run.net.parameters()])
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


@pytest.mark.parametrize("inner", [1, 3, 8, 20])
def test_passes_inside_a_pass(inner):
    """An implicit layer solves for its gradient by passes inside the backward pass."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]).double()
    opt = FROG(net, sample_size=EVERYTHING)
    twin, seen = copy.deepcopy(net), []
    model = Algorithm1(copy.deepcopy(net[0]))

    def solved(layers, x, hook=None):
        handle = hook and layers[0].register_forward_hook(hook)
        y = 0.5 * torch.tanh(layers[0](x))
        if handle:
            handle.remove()
        z0 = x.clone().requires_grad_()
        f0 = 0.5 * torch.tanh(layers[0](z0))

        def backward(grad):
            total = grad
            for _ in range(inner):
                (step,) = torch.autograd.grad(f0, z0, total, retain_graph=True)
                total = grad + step
            return total

        y.register_hook(backward)
        return layers[1](y)

    x = batch(0)
    solved(net, x).square().sum().backward()

    def hook(module, args, y):
        seen.append(args[0])
        y.register_hook(seen.append)

    solved(twin, x, hook).square().sum().backward()
    model.step(*seen, net[0].weight.grad, net[0].bias.grad)
    opt.step()
    # Measured 4e-16.
    assert oracles.relative_error(net[0].weight, model.weight) < 1e-12


@pytest.mark.parametrize("depth", [2, 6])
def test_checkpoints_in_checkpoints(depth):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]).double()
    opt = FROG(net, sample_size=EVERYTHING)

    def nested(x, left):
        x = torch.tanh(net[0](x))
        if left:
            x = checkpoint(nested, x, left - 1, use_reentrant=True)
        return torch.tanh(net[0](x))

    x = batch(0).requires_grad_()
    net[1](nested(x, depth)).square().sum().backward()
    calls = opt.capture.calls("0")
    assert len(calls) == 2 * (depth + 1)
    total = sum(call.y.T @ call.x for call in calls)
    # Measured 1e-16.
    torch.testing.assert_close(total, net[0].weight.grad, rtol=1e-12, atol=1e-14)


def test_frozen_between_forward_and_backward():
    run = Watched()
    value = loss(run.net, 9 * batch(3))
    run.net.requires_grad_(False)
    value.backward()
    run.net.requires_grad_(True)
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


@pytest.mark.parametrize("drop", [d for d in DROPS if d != "data.zero_"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_penalty_of_its_own_pass_after_a_drop(drop, capturable):
    run = Watched(capturable=capturable)
    loss(run.net, 9 * batch(5)).backward()
    DROPS[drop](run.net, run.opt)
    (0 * sum(p.square().sum() for p in run.net.parameters())).backward()
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


def test_samples_do_not_live_as_long_as_the_loss():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = FROG(net, sample_size=4)
    losses = []
    for step in range(3):
        opt.zero_grad()
        losses.append(loss(net, batch(step, dtype=torch.float32)))
        losses[-1].backward()
        (call,) = opt.capture.calls("0")
        seen = weakref.ref(call.x)
        del call
        opt.step()
        gc.collect()
        assert seen() is None


def test_a_graph_that_is_retained_keeps_its_samples():
    run = Watched()
    value = loss(run.net, batch(0))
    value.backward(retain_graph=True)
    run.net.zero_grad()
    value.backward()
    run.step(batch(0))
    run.check()


def test_passes_that_raise_leave_little_behind():
    run = Watched()
    handle = run.net.first.weight.register_hook(lambda grad: 1 / 0)
    most = 0
    for step in range(40):
        run.net.zero_grad()
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            loss(run.net, batch(step)).backward()
        most = max(most, run.opt.memory_usage()["samples"])
    one = 8 * 6 * (3 + 5 + 5 + 5)  # bytes of both layers' samples of one pass
    assert most <= 19 * one
    handle.remove()
    run.net.zero_grad()
    loss(run.net, batch(0)).backward()
    run.step(batch(0))
    run.check()


def test_gradients_of_inference_mode():
    run = Watched()
    loss(run.net, batch(0)).backward()
    with torch.inference_mode():
        grads = [p.grad * 1 for p in run.net.parameters()]
    for param, grad in zip(run.net.parameters(), grads, strict=True):
        param.grad = grad
    run.net(batch(1))
    run.step(batch(0))
    run.check()


def test_a_foreign_pass_and_a_penalty_make_no_samples():
    run = Watched()
    x = batch(0).requires_grad_()
    torch.autograd.grad(loss(run.net, x), x)
    sum(p.square().sum() for p in run.net.parameters()).backward()
    assert run.opt.capture.calls("first") == []


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_other_weights_in_a_functional_call(leaf, compiled):
    """Leaves of their own are not the layer's; what is computed from it may be."""
    run = Watched()
    params = dict(run.net.named_parameters())
    other = {k: 3 * p for k, p in params.items()}
    if leaf:
        other = {k: p.detach().requires_grad_() for k, p in other.items()}

    def both(x, z):
        y = torch.func.functional_call(run.net, other, z)
        return loss(run.net, x) + y.square().sum()

    if compiled:
        both = torch.compile(both, backend="aot_eager")
    both(batch(0), (10 * batch(5),)).backward()
    assert len(run.opt.capture.calls("first")) == (1 if leaf else 2)
    if leaf:
        run.step(batch(0))
        run.check()


def test_a_gradient_set_by_hand_after_others_were_dropped_is_said():
    """Tasks whose gradients are put together by hand, with a backward pass each."""
    run, merged = Watched(), []
    for task in range(2):
        loss(run.net, batch(task)).backward()
        merged.append([p.grad for p in run.net.parameters()])
        run.opt.zero_grad()
    for param, *grads in zip(run.net.parameters(), *merged, strict=True):
        param.grad = sum(grads)
    with pytest.warns(UserWarning, match=r"first, second: .* set by hand\?"):
        run.opt.step()


# -- what it costs ---------------------------------------------------------------------


def test_a_frozen_backbone_costs_nothing():
    net = nn.Sequential(nn.Linear(3, 4), *[nn.Linear(4, 4) for _ in range(3)])
    net.append(nn.Linear(4, 2))
    opt = FROG(net, output_layers="4")
    net[:3].requires_grad_(False)  # as under adapters: gradients pass through
    loss(net, batch(0, dtype=torch.float32).requires_grad_()).backward()
    assert opt.memory_usage()["samples"] == 4 * 6 * (4 + 4)
    opt.step()
    assert opt.memory_usage()["state"] == 4 * (20 + 1) + 2 * 4 * (10 + 1)
    assert all(not opt.state.get(p) for p in net[:3].parameters())


def test_layers_without_a_gradient_have_no_state():
    net = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(11)])
    opt = FROG(net)
    net[:9].requires_grad_(False)
    assert opt.memory_usage()["state"] == 0
    loss(net, torch.randn(4, 32)).backward()
    opt.step()
    # A momentum and a counter; AdamW's averages of the output layer and a counter.
    assert opt.memory_usage()["state"] == 4 * (32 * 32 + 1) + 4 * (2 * 32 * 32 + 1)
    assert [r.reason for r in opt.describe()].count("Linear; frozen") == 9
