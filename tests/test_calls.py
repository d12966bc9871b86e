"""Calls of layers that are no ordinary eager ones, and what others put on a module.

Whatever torch transforms, traces, copies or records is as without FROG, and nothing is
sampled; layers whose calls cannot be sampled train, and say why they are not FROG's.

More than 400 lines: one case after the other of what may wrap a module's call.
"""

import copy
import io
import warnings

import oracles
import pytest
import torch
import torch.nn.functional as F
from algorithm1 import Algorithm1
from call_net import batch, by, make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from frog_triton import FROG

EVERYTHING = 1000


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


# -- transforms, traces, fakes ---------------------------------------------------------


def loss_of(net):
    def loss(params, x):
        return functional_call(net, params, (x[None],)).square().sum()

    return loss


def params_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def per_sample_gradients(net, x):
    each = vmap(grad(loss_of(net)), in_dims=(None, 0))
    return each(params_of(net), x)


def compiled_per_sample_gradients(net, x):
    each = vmap(grad(loss_of(net)), in_dims=(None, 0))
    return torch.compile(each, backend="aot_eager")(params_of(net), x)


def fake(net, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = net(mode.from_tensor(x))
        y.sum().backward()
    return {0: torch.tensor(y.shape)}


def on_meta(net, x):
    params = {name: p.detach().to("meta") for name, p in net.named_parameters()}
    y = functional_call(net, params, (x.to("meta"),))
    return {0: torch.tensor(y.shape)}


def scripted(net, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    return {0: torch.jit.load(file)(x).detach()}


def exported(strict):
    def run(net, x):
        program = torch.export.export(net, (x,), strict=strict)
        names = [str(node.target) for node in program.graph.nodes]
        assert not any("frog" in name for name in names)
        return {0: torch.tensor(len(names)), 1: program.module()(x).detach()}

    return run


def traced(net, x):
    program = torch.jit.trace(net, x)
    nodes = list(program.inlined_graph.nodes())
    return {0: program(x).detach(), 1: torch.tensor(len(nodes))}


def recorded(net, x):
    program = make_fx(lambda x: net(x).detach(), tracing_mode="real")(x)
    return {0: torch.tensor(len(program.graph.nodes)), 1: program(x)}


def symbolic(net, x):
    program = torch.fx.symbolic_trace(net)
    return {0: torch.tensor(len(program.graph.nodes))}


TRANSFORMS = {
    "vmap of grad": per_sample_gradients,
    "vmap of grad, compiled": compiled_per_sample_gradients,
    "vmap": lambda net, x: {0: vmap(lambda x: net(x[None]))(x).detach()},
    "grad": lambda net, x: {0: grad(lambda x: net(x).square().sum())(x)},
    "jacrev": lambda net, x: {0: jacrev(lambda x: net(x))(x).detach()},
    "jacfwd": lambda net, x: {0: jacfwd(lambda x: net(x))(x).detach()},
    "hessian": lambda net, x: {0: hessian(lambda x: net(x).sum())(x).detach()},
    "jvp": lambda net, x: {0: jvp(net, (x,), (x,))[1].detach()},
    "vjp": lambda net, x: {0: vjp(net, x)[1](torch.ones(5, 2).double())[0]},
    "FakeTensor": fake,
    "meta": on_meta,
    "jit.script": scripted,
    "jit.trace": traced,
    "export": exported(strict=False),
    "export, strict": exported(strict=True),
    "make_fx": recorded,
    "symbolic_trace": symbolic,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_transform_is_as_without_and_samples_nothing(transform, trained):
    plain, net = make(), make()
    opt = FROG(net, sample_size=EVERYTHING)
    if trained:  # then its parameters have hooks, too
        net(batch(3)).square().sum().backward()
        opt.step()
        net.load_state_dict(plain.state_dict())
        opt.state.clear()
    opt.zero_grad()
    expected = TRANSFORMS[transform](plain, batch(0))
    found = TRANSFORMS[transform](net, batch(0))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Measured 0: the same operations.
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-13)
    assert not list(opt.capture.tensors()) and not opt.capture.called
    # A step after it is one that had nothing before it.
    for param in net.parameters():
        param.grad = None
    twin = make()
    second = FROG(twin, sample_size=EVERYTHING)
    for model, optimizer in ((net, opt), (twin, second)):
        model(batch(1)).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_many_gradients_at_once_and_dual_numbers():
    """Ordinary forward passes; what follows is not the weights' gradient."""
    net, twin = make(), make()
    opt, second = (FROG(m, sample_size=EVERYTHING) for m in (net, twin))
    x = batch(0).requires_grad_()
    torch.autograd.functional.jacobian(net, x, vectorize=True)
    torch.autograd.functional.hessian(lambda x: net(x).sum(), x)
    with forward_ad.dual_level():
        net(forward_ad.make_dual(batch(0), batch(1))).sum()
    for model, optimizer in ((net, opt), (twin, second)):
        with forward_ad.dual_level():
            dual = batch(1)
            if model is net:
                dual = forward_ad.make_dual(dual, batch(2))
            model(dual).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_a_mode_of_the_users_own_is_no_obstacle():
    class Quiet(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    net = make()
    opt = FROG(net)
    with Quiet():
        net(batch(0)).sum().backward()
    assert opt.capture.calls("0") and opt.capture.calls("3")


# -- what others put on a module -------------------------------------------------------


def doubled(module, args, output):
    return 2 * output


def doubled_in_place(module, args, output):
    output.mul_(2)


def input_doubled(module, args):
    return (2 * args[0],)


def put(layer, kind, **how):
    if kind is input_doubled:
        return layer.register_forward_pre_hook(kind, **how)
    return layer.register_forward_hook(kind, **how)


@pytest.mark.parametrize("kind", [doubled, doubled_in_place, input_doubled])
@pytest.mark.parametrize("when", ["first", "after"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_hook_that_changes_a_layers_output_or_input(kind, when, compiled):
    """X and Y are what the layer itself got and made, in either order of the hooks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = Algorithm1(copy.deepcopy(net[0]))
    if when == "first":
        put(net[0], kind)
    opt = FROG(net, sample_size=EVERYTHING)
    if when == "after":
        put(net[0], kind)
    forward = net
    if compiled:
        forward = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 3, dtype=torch.float64)
    forward(x).square().sum().backward()
    # The same by hand.
    weight, bias = (p.detach().clone().requires_grad_() for p in net[0].parameters())
    given = 2 * x if kind is input_doubled else x
    made = F.linear(given, weight, bias)
    made.retain_grad()
    y = made if kind is input_doubled else 2 * made
    F.linear(torch.tanh(y), *net[2].parameters()).square().sum().backward()
    model.step(given, made.grad, weight.grad, bias.grad)
    opt.step()
    # Measured 3e-16.
    assert oracles.relative_error(net[0].weight, model.weight) < 1e-12


def test_a_hook_put_in_front_of_ours_gives_way_to_it():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    opt = FROG(net, sample_size=EVERYTHING)
    net[0].register_forward_hook(doubled, prepend=True)
    x = torch.randn(6, 3, dtype=torch.float64)
    net(x).square().sum().backward()
    assert not opt.capture.calls("0")  # better none than wrong ones
    with pytest.warns(UserWarning, match="another hook came first"):
        opt.step()
    opt.zero_grad()
    model, seen = Algorithm1(copy.deepcopy(net[0])), []
    weight, bias = (p.detach().clone().requires_grad_() for p in net[0].parameters())
    made = F.linear(x, weight, bias)
    made.register_hook(seen.append)
    F.linear(torch.tanh(2 * made), *net[2].parameters()).square().sum().backward()
    net[2].zero_grad()
    net(x).square().sum().backward()
    (call,) = opt.capture.calls("0")
    # Measured 2e-17.
    torch.testing.assert_close(call.y, seen[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(call.x, x) and model is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3)])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_a_hook_on_the_output_that_changes_its_gradient(kind, shape):
    """Clipped or reversed: Y is what the layer's own gradient is made of."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4) if kind is nn.Linear else nn.Conv1d(3, 4, 1)
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(*(shape if kind is nn.Linear else (6, 3, 3))).double()
    net(x)
    opt = FROG(net, sample_size=EVERYTHING, sampling="examples")
    y = net[0](x)
    y.register_hook(lambda grad: -grad.clamp(-0.02, 0.02))
    net[1:](y).square().sum().backward()
    (call,) = opt.capture.calls("0")
    given = call.y.movedim(1, -1) if kind is nn.Conv1d else call.y
    # Measured 0.
    torch.testing.assert_close(
        given.reshape(-1, 4).sum(0), net[0].bias.grad, rtol=1e-12, atol=1e-14
    )


class Stop(torch.autograd.Function):
    """Hands back no gradient at all."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_output_that_gets_no_gradient():
    net = make()
    opt = FROG(net, sample_size=EVERYTHING)
    h = net[:3](batch(0))
    y = net[3](h)
    (h.square().sum() + Stop.apply(y).sum() + net[5](y.detach()).sum()).backward()
    assert not opt.capture.calls("3") and opt.capture.calls("0")
    opt.step()


def test_gradcheck_of_a_hooked_model():
    net = make()
    FROG(net)
    x = batch(0).requires_grad_()
    assert torch.autograd.gradcheck(net, (x,))
    assert torch.autograd.gradgradcheck(net, (x,))


def test_global_hooks_come_before_any_modules():
    net = make()
    opt = FROG(net)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, y: 2 * y if module is net[3] else None
    )
    try:
        net(batch(0)).sum().backward()
    finally:
        handle.remove()
    assert not opt.capture.calls("3")
    with pytest.warns(UserWarning, match="another hook came first"):
        opt.step()


def test_torchs_own_global_hooks_only_look():
    net, plain = make(), make()
    opt = FROG(net)
    flops = []
    for model in (net, plain):
        with FlopCounterMode(display=False) as counter:
            model(batch(0)).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] and opt.capture.calls("3")


@pytest.mark.parametrize("change", ["hook", "class"])
def test_a_compiled_layer_that_others_have_changed(change):
    """None rather than wrong samples."""
    net = make()
    opt = FROG(net, sample_size=EVERYTHING)
    if change == "hook":
        net[3].register_forward_hook(doubled, prepend=True)
    else:
        net[3].__class__ = Tripled
    forward = torch.compile(net, backend="aot_eager", fullgraph=True)
    forward(batch(0)).square().sum().backward()
    assert not opt.capture.calls("3") and opt.capture.calls("0")
    with pytest.warns(UserWarning, match=r"^3: a gradient but no samples"):
        opt.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_moves_hooks_to_other_modules():
    net, plain = make().float(), make().float()
    FROG(net)
    for model in (net, plain):
        model.eval()
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    x = batch(0).float()
    assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_replaced_forward_with_other_names(compiled):
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
    FROG(net)
    inner = net[0].forward
    net[0].forward = lambda hidden: inner(hidden)

    def forward(x):
        return net[1](net[0](hidden=x))

    if compiled:
        forward = torch.compile(forward, backend="aot_eager")
    forward(torch.randn(5, 3)).sum().backward()


@pytest.mark.parametrize("bias", [False, True])
def test_a_pruned_layer_is_still_sampled(bias):
    """Its weight is computed from the layer's parameter."""
    net = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2))
    opt = FROG(net)
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    net(torch.randn(5, 3)).square().sum().backward()
    assert opt.capture.calls("0")
    opt.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_another_default_device(capturable):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    opt = FROG(net, sample_size=4, capturable=capturable)
    x = torch.randn(20, 3)
    with torch.device("meta"):
        for _ in range(2):
            net(x).square().sum().backward()
            opt.step()
    assert opt.anomalies() == {}


def test_the_whole_training_under_fake_tensors():
    """As estimators of memory run it."""
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        opt = FROG(net)
        for _ in range(4):
            opt.zero_grad()
            net(torch.randn(5, 3)).square().sum().backward()
            opt.step()
    assert opt.memory_usage()["state"] > 0


def wrapped(layer):
    inner = layer.forward
    layer.forward = lambda x: 3 * inner(x)


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def another_class(layer):
    layer.__class__ = Tripled


@pytest.mark.parametrize("change", [wrapped, another_class])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_not_the_classs(change, when):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    if when == "before":
        change(net[0])
    opt = FROG(net)
    reason = "its forward is not F.linear of its weight"
    if when == "after":
        change(net[0])
        reason = "its forward, or its class, was replaced"
    for step in range(3):
        net(torch.randn(9, 3)).square().sum().backward()
        assert not opt.capture.calls("0") and opt.capture.calls("2")
        if step == 1:
            opt.step()
        else:
            with pytest.warns(UserWarning, match=reason):
                opt.step()
        opt.zero_grad()
    assert by(opt, "adamw")[:2] == ["0.weight", "0.bias"]
    (found,) = (r.reason for r in opt.describe() if r.name == "0.weight")
    assert reason in found


def test_replicas_of_data_parallel_are_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    opt = FROG(net)
    # What nn.DataParallel does on each GPU: a copy whose parameters are computed.
    replica = net[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = net[0].weight * 1, net[0].bias * 1
    with pytest.warns(UserWarning, match=r"^0: .*DataParallel.*DistributedDataPar"):
        y = net[2](torch.tanh(replica(torch.randn(5, 3))))
    y.sum().backward()
    with pytest.warns(UserWarning, match=r"^0: a gradient but no .*DataParallel"):
        opt.step()


# -- inputs of other kinds -------------------------------------------------------------


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, generator=generator).double() for n in (2, 4, 1)]


def jagged():
    return torch.nested.nested_tensor(rows(), layout=torch.jagged)


def strided_nested():
    return torch.nested.nested_tensor(rows())


def sparse():
    return torch.cat(rows()).to_sparse()


class Subclass(torch.Tensor):
    """Whose operations return the like."""


KINDS = {
    jagged: "nested tensors",
    strided_nested: "nested tensors",
    sparse: "sparse tensors",
    lambda: torch.cat(rows()).as_subclass(Subclass): "its output is a Subclass",
}


def reduced(y):
    if y.is_nested:
        return sum(part.square().sum() for part in y.unbind())
    return y.square().sum()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_cannot_be_sampled_train_by_the_fallback_and_say_so(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    opt = FROG(net, exclude=["1"], exclude_output_layer=False)
    start = reduced(net(kind())).item()
    for step in range(3):
        opt.zero_grad()
        reduced(net(kind())).backward()
        if step == 1:
            opt.step()
        else:
            with pytest.warns(UserWarning, match=KINDS[kind]):
                opt.step()
    assert by(opt, "frog") == []
    twin = copy.deepcopy(net[0])
    theirs = [
        torch.optim.AdamW([twin.weight], 3e-3, weight_decay=1e-2),
        torch.optim.AdamW([twin.bias], 3e-3, weight_decay=0.0),
    ]
    for other, param in zip(theirs, net[0].parameters(), strict=True):
        state = {k: v.clone() for k, v in opt.state[param].items()}
        other.state[other.param_groups[0]["params"][0]] = state
    for _ in range(20):
        opt.zero_grad()
        reduced(net(kind())).backward()
        for p, q in zip(twin.parameters(), net[0].parameters(), strict=True):
            p.grad = q.grad.clone()
        opt.step()
        for other in theirs:
            other.step()
    assert reduced(net(kind())).item() < start
    for p, q in zip(twin.parameters(), net[0].parameters(), strict=True):
        # Measured 0.
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    net(torch.cat(rows())).square().sum().backward()
    opt.step()
    assert by(opt, "frog") == ["0.weight", "0.bias"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_in_a_compiled_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    opt = FROG(net)
    forward = torch.compile(net, backend="aot_eager")
    for step in range(3):
        opt.zero_grad()
        forward(jagged()).values().square().sum().backward()
        if step == 1:
            opt.step()
        else:
            with pytest.warns(UserWarning, match="nested tensors"):
                opt.step()
    assert by(opt, "frog") == []


@pytest.mark.parametrize("sampling", ["examples", "positions"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sequences_of_length_zero(sampling, capturable, compiled):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    options = {"sampling": sampling, "capturable": capturable, "sample_size": 6}
    opt = FROG(net, **options)
    twin = copy.deepcopy(net)
    second = FROG(twin, **options)
    forward = torch.compile(net, backend="aot_eager") if compiled else net
    full = torch.randn(4, 5, 3, dtype=torch.float64)
    empty = torch.zeros(4, 0, 3, dtype=torch.float64)
    for x in (full, empty):
        (forward(x).square().sum() + 0 * net[0].weight.sum()).backward()
    twin(full).square().sum().backward()
    for optimizer in (opt, second):
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        # Measured 0: what was empty adds nothing, and takes no sample's place.
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    (forward(empty).square().sum() + net[0].weight.sum()).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
    assert any("inputs were empty" in str(w.message) for w in caught)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(3, 0), (0, 3)])
def test_layers_without_elements(sizes):
    net = nn.ModuleList([nn.Linear(*sizes), nn.Linear(3, 3), nn.Linear(3, 2)])
    opt = FROG(net)
    assert by(opt, "frog") == ["1.weight", "1.bias"]
    for _ in range(2):
        opt.zero_grad()
        y = net[0](torch.randn(4, sizes[0]))
        loss = net[2](net[1](torch.randn(4, 3))).square().sum() + y.square().sum()
        loss.backward()
        opt.step()
    assert opt.anomalies() == {}


# -- what the hooks cost ---------------------------------------------------------------


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layers", "passes", "most"),
    # Torch's operations a call; before samples were tied to gradients they were 36, 61,
    # 102 and 191.
    [("linear", 1, 26), ("conv", 1, 51), ("linear", 4, 88), ("again", 4, 146)],
)
def test_operations_of_the_hooks(layers, passes, most):
    def count(hooked):
        depth = 4
        if layers == "conv":
            net = nn.Sequential(*[nn.Conv1d(2, 2, 3, padding=1) for _ in range(depth)])
            x = torch.randn(512, 2, 4)
        else:
            net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
            x = torch.randn(512, 4)
        forward = net
        if layers == "again":
            net, forward = net[0], lambda x: net(net(net(net(x))))
        opt = FROG(net, sample_size=64, exclude_output_layer=False) if hooked else None
        with Counting() as counting:
            for _ in range(passes):
                forward(x).sum().backward()
        if opt is not None:
            assert opt.capture.calls("weight" if layers == "again" else "0")
        return counting.count / depth / passes

    assert count(True) - count(False) <= most


@pytest.mark.parametrize(
    ("layer", "shape", "most"),
    # Two products of attention at what two Linear layers take; an LSTM's 16 steps are
    # run again forward and backward, at 45 operations a step.
    [(nn.MultiheadAttention(8, 2), (64, 8, 8), 56), (nn.LSTM(8, 8), (16, 32, 8), 726)],
)
def test_operations_inside_of_a_module(layer, shape, most):
    attends, x = isinstance(layer, nn.MultiheadAttention), torch.randn(shape)

    def count(hooked):
        opt = (
            FROG(layer, sample_size=64, exclude_output_layer=False) if hooked else None
        )
        with Counting() as counting:
            layer(*[x] * (3 if attends else 1))[0].sum().backward()
        if opt is not None:
            assert all(opt.capture.calls(name) for name in opt._plan.layers)
            opt.close()
        return counting.count

    assert count(True) - count(False) <= most
