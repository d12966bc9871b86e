"""Which layers are output layers, by what a training pass does.

More than 400 lines: small passes, each with its own net.
"""

import gc
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from output_nets import Net, by_passes, total, watched, x
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton.model.outputs import OutputSearch

# -- by what happens -------------------------------------------------------------------


def looped(net, steps=3):
    h = x()
    for _ in range(steps):
        h = net.b(net.a(h).relu()).tanh()
    return h


def autoregressive(net):
    h, y = x(), x()
    for _ in range(3):
        h = net.cell(h + y).tanh()
        y = net.head(h)
    return y + net.value(h)


def residual(net):
    h = net.stem(x())
    h = h + net.b(net.a(h).relu())
    return h + net.d(net.c(h).relu())


def checkpointed(use_reentrant):
    def forward(net):
        h = net.first(x())
        h = checkpoint(
            lambda h: net.b(net.a(h).relu()).relu(), h, use_reentrant=use_reentrant
        )
        return net.head(h)

    return forward


def in_place(net):
    h = net.a(x(2, 3, 4)).relu_()  # a view, whose node this takes out of the graph
    h = net.b(h).mul_(2)
    h = net.c(h[:, 0])
    h.relu_()
    return net.head(h).exp_()


def in_place_at_the_end(net):
    return net.a(net.b(x(2, 3, 4)).relu_()).sigmoid_()


def in_place_transposed(net):
    return net.head(net.a(x(2, 4, 4)).transpose(1, 2).relu_())


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a)
        return 2 * a, b.clone()

    @staticmethod
    def backward(ctx, da, db):
        return 2 * da, db


def custom(net):
    h, other = Double.apply(net.a(x()), net.b(x()))
    return net.head(h) + other


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, da):
        return None


def skipped_head(net):
    h = net.body(x())
    net.aux(h)  # its output is not in the loss
    return net.head(h)


def intermediate(net):
    h = net.body(x())
    net.pooler(h[:, :4]).tanh()
    return h


def frozen_consumer(net):
    net.frozen.requires_grad_(False)
    return net.frozen(net.a(x()))


NETS = {
    "chain": ("a b", lambda n: n.b(n.a(x()).relu()), "b"),
    "one layer": ("a", lambda n: n.a(x()), "a"),
    "head before its body": ("head body", lambda n: n.head(n.body(x())), "head"),
    "autoencoder, declared in any order": (
        "dec2 enc1 dec1 enc2",
        lambda n: n.dec2(n.dec1(n.enc2(n.enc1(x()).relu()).relu()).relu()),
        "dec2",
    ),
    "actor and critic": (
        "actor critic body",
        lambda n: n.actor(h := n.body(x()).tanh()) + n.critic(h),
        "actor critic",
    ),
    "two towers": (
        "image text image_projection text_projection",
        lambda n: (
            n.image_projection(n.image(x()).relu())
            @ n.text_projection(n.text(x()).relu()).T
        ),
        "image_projection text_projection",
    ),
    "siamese": (
        "body projection",
        lambda n: n.projection(n.body(x())) * n.projection(n.body(x())),
        "projection",
    ),
    "residual": ("stem a b c d", residual, "d"),
    "residual and head": ("head stem a b c d", lambda n: n.head(residual(n)), "head"),
    "recurrent": ("cell", lambda n: n.cell(n.cell(n.cell(x()).tanh()).tanh()), "cell"),
    "loop of two": ("b a", looped, "b"),
    "head fed back": ("head value cell", autoregressive, "head value"),
    "shared by body and head": ("a", lambda n: n.a(n.a(x())), "a"),
    "checkpoint": ("head first a b", checkpointed(False), "head"),
    "reentrant checkpoint": ("head first a b", checkpointed(True), "head"),
    "in place": ("head a b c", in_place, "head"),
    "in place at the end": ("a b", in_place_at_the_end, "a"),
    "in place on a transposed view": ("head a", in_place_transposed, "head"),
    "custom function": ("head a b", custom, "head"),  # one node for both outputs
    "no gradient": ("a b", lambda n: Stop.apply(n.a(x())) + n.b(x()), "b"),
    "skipped auxiliary head": ("head aux body", skipped_head, "head"),
    "unused pooler": ("body pooler", intermediate, "body"),
    "detached": ("a b", lambda n: n.b(n.a(x()).detach()) + n.a(x()), "a b"),
    "frozen consumer": ("a frozen", frozen_consumer, "frozen"),
    "without a batch": ("b a", lambda n: n.b(n.a(x(4)).relu_()), "b"),
}


@pytest.mark.parametrize("case", NETS)
def test_output_is_what_no_layer_follows(case):
    names, forward, outputs = NETS[case]
    net = Net(names, forward)
    assert by_passes(net, lambda n: total(n())) == set(outputs.split())


@pytest.mark.parametrize("spread", [dict, tuple, OrderedDict, "dataclass"])
def test_outputs_and_inputs_in_any_nesting(spread):
    @dataclass
    class Pair:
        h: object
        none: object = None

    def nest(h):
        if spread == "dataclass":
            return Pair([h])
        return spread([("h", h)]) if spread is not tuple else (None, (h, 1))

    def unnest(y):
        if spread == "dataclass":
            return y.h[0]
        return y["h"] if spread is not tuple else y[1][0]

    search = OutputSearch()
    first = nest(nn.Linear(4, 4)(x()))
    search.saw("first", ((x(),), {}), first)
    second = nest(nn.Linear(4, 4)(unnest(first)))
    search.saw("second", ((), {"states": first}), second)
    total(unnest(second)).backward()
    assert search.found() == {"second"}


def test_a_unit_that_returns_its_input_leaves_it_an_output():
    search, layer = OutputSearch(), nn.Linear(4, 4)
    y = layer(x())
    search.saw("layer", (x(),), y)
    search.saw("same", (y,), y)
    total(y).backward()
    assert search.found() == {"layer", "same"}


def test_accumulated_passes_add_up():
    net = Net("head_a head_b body", None)
    a = lambda n: total(n.head_a(n.body(x())))  # noqa: E731
    b = lambda n: total(n.head_b(n.body(x())))  # noqa: E731
    assert by_passes(net, a, a) == {"head_a"}
    assert by_passes(net, a, b) == {"head_a", "head_b"}


def test_one_loss_of_several_graphs():
    net = Net("head body", lambda n: n.head(n.body(x())))
    assert by_passes(net, lambda n: total(n()) + total(n())) == {"head"}


def test_two_nets_of_a_gan():
    net = Net("judge2 judge1 maker2 maker1", None)
    make = lambda n: n.maker2(n.maker1(x()).relu())  # noqa: E731
    judge = lambda n, y: total(n.judge2(n.judge1(y).relu()))  # noqa: E731
    fools = lambda n: judge(n, make(n))  # noqa: E731
    judges = lambda n: judge(n, make(n).detach()) - judge(n, x())  # noqa: E731
    assert by_passes(net, judges) == {"judge2"}
    assert by_passes(net, fools, judges) == {"judge2"}
    assert by_passes(net, lambda n: total(make(n)), judges) == {"judge2", "maker2"}


def test_graph_kept_for_two_passes():
    net = Net("head body", lambda n: n.head(n.body(x())))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    loss.backward(retain_graph=True)
    loss.backward()
    assert search.found() == {"head"}


def test_forgets_and_hears_of_a_graph_from_before():
    net = Net("head body", lambda n: n.head(n.body(x())))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    loss.backward(retain_graph=True)
    search.forget()
    assert search.found() is None
    loss.backward()
    assert search.found() == {"head"}


def test_a_pass_to_some_parameters_only():
    net = Net("head body other", None)
    with watched(net, OutputSearch()) as search:
        loss = total(net.head(net.body(x()))) + total(net.other(x()))
    loss.backward(inputs=[net.body.weight])
    assert search.found() == {"head"}


def test_penalty_of_a_derivative():
    net = Net("head body", lambda n, y: n.head(n.body(y).tanh()))

    def loss(net):
        y = x().requires_grad_()
        (slope,) = torch.autograd.grad(net(y).sum(), y, create_graph=True)
        return total(slope)

    assert by_passes(net, loss) == {"head"}


def test_nothing_is_known_without_a_backward_pass():
    net = Net("a", lambda n: n.a(x()))
    search = OutputSearch()
    assert search.found() is None
    with watched(net, search):
        total(net())
        with torch.no_grad():
            net()
    assert search.found() is None


def test_transforms_and_tracing_are_left_out():
    net = Net("a", lambda n, y: n.a(y))
    sloped = Net("", lambda n, y: torch.autograd.grad(total(net(y)), net.a.weight)[0])
    sloped.net = net
    with watched(net, OutputSearch()) as search:
        torch.func.grad(lambda y: total(net(y)))(x())
        torch.jit.trace(sloped, x(), check_trace=False)
    assert search.found() is None


def test_compiled_graphs_are_left_out():
    net = Net("a", lambda n, y: n.a(y))
    with watched(net, OutputSearch()) as search:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        total(compiled(x())).backward()
    assert search.found() is None


# -- what it costs ---------------------------------------------------------------------


def graph(*tensors):
    """All nodes of the graph behind tensors."""
    nodes, waiting = set(), [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [before for before, _ in node.next_functions]
    return nodes


def test_each_node_is_visited_once():
    """Layers that take all that came before: paths are many more than nodes."""
    depth = 40
    net = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
    before, inputs = [x()], []
    with watched(net, OutputSearch()) as search:
        for layer in net:
            inputs.append(sum(before))
            before.append(layer(inputs[-1]))
    nodes = graph(*inputs[1:])
    total(before[-1]).backward()
    assert search.found() == {str(depth - 1)}
    assert search.visited == len(nodes)


def test_activations_are_freed_by_the_backward_pass():
    net = Net("a b head", lambda n: n.head(n.b(n.a(x()).relu()).relu()))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    saved = [node for node in graph(loss) if hasattr(node, "_saved_mat1")]
    assert len(saved) == 3
    loss.backward()
    assert search.found() == {"head"}
    for node in saved:
        with pytest.raises(RuntimeError, match="already been freed"):
            node._saved_mat1  # noqa: B018


class Held(torch.autograd.Function):
    """Its saved tensor can be followed by a weak reference to what it is packed in."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.clone()

    @staticmethod
    def backward(ctx, da):
        (a,) = ctx.saved_tensors
        return da + 0 * a


class Packed:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def packed():
    """Weak references to all that graphs save."""
    held = []

    def pack(tensor):
        held.append(weakref.ref(box := Packed(tensor)))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        yield lambda: [ref for ref in held if ref() is not None]


def test_nothing_saved_is_held_after_a_backward_pass(packed):
    net = Net("a b head", lambda n: n.head(Held.apply(n.b(n.a(x()).exp()).sin())))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    assert packed()
    loss.backward()
    assert not packed()
    assert search.found() == {"head"}


def test_a_graph_without_a_backward_pass_is_not_held(packed):
    net = Net("a b head", lambda n: n.head(n.b(n.a(x()).sin()).sin()))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    assert packed()
    del loss
    assert not packed() and search.found() is None


def test_graph_goes_when_forgotten_or_with_the_search():
    net = Net("a head", lambda n: n.head(n.a(x())))

    def made(search):
        with watched(net, search):
            loss = total(y := net())
        y.grad_fn.metadata["box"] = box = Packed(None)
        loss.backward()
        return weakref.ref(box)

    search = OutputSearch()
    box = made(search)
    assert box() is not None
    search.forget()
    assert box() is None

    box, alive = made(search), weakref.ref(search)
    del search
    gc.collect()
    assert alive() is None and box() is None
