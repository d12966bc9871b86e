"""Every layer kind under torch.compile: whole graphs, and the steps of plain runs."""

import copy
import io
import shutil
import warnings
from functools import partial

import kinds_on_ranks as cases
import pytest
import torch
import torch.nn.functional as F
from kinds_on_ranks import EVERYTHING, NETS, WIDTH, Net
from torch import nn

from frog_triton import FROG
from frog_triton.capture import taps
from frog_triton.unhooked import PATIENCE

whole = partial(torch.compile, backend="aot_eager", fullgraph=True)
broken = partial(torch.compile, backend="aot_eager")
in_one_graph = partial(Net, lambda: cases.Experts(5, WIDTH, False, every=True))

NOT_SAMPLED = ["experts", "experts, inputs first", "lstm", "bare"]
SAMPLED = [kind for kind in NETS if kind not in NOT_SAMPLED]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


def samples(opt):
    """Of each layer, X and Y of each call."""
    calls = {name: opt.capture.calls(name) for name in opt._plan.layers}
    return {name: [(c.x, c.y) for c in found] for name, found in calls.items()}


def step(net, forward, opt, seed, size=8):
    """One step; returns what was sampled for it."""
    x, y = cases.batch(seed, size)
    opt.zero_grad()
    F.cross_entropy(forward(x).mean(1), y).backward()
    taken = samples(opt)
    opt.step()
    return taken


def assert_same_run(net, compiled, sizes=(8, 8, 8), **options):
    """A compiled run samples what a plain one does, and steps as it does."""
    twin = copied(net)
    options = {"sample_size": EVERYTHING, "output_layers": "head"} | options
    opt, twin_opt = FROG(net, **options), FROG(twin, **options)
    forward = compiled(net)
    for seed, size in enumerate(sizes):
        taken = step(net, forward, opt, seed, size)
        expected = step(twin, twin, twin_opt, seed, size)
        assert all(expected.values())
        # Measured: the same bits; 3e-15 of the largest entry with Inductor.
        torch.testing.assert_close(taken, expected, rtol=1e-9, atol=1e-11)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def copied(net):
    """Weight normalization of the old kind keeps a tensor that cannot be copied."""
    with torch.no_grad():
        for module in net.modules():
            if "weight" in vars(module):
                module.weight = module.weight.detach()
    return copy.deepcopy(net)


def reason_of(opt, name):
    table = opt.describe(file=io.StringIO())
    (found,) = ((r.updated_by, r.reason) for r in table if r.name == name)
    return found


# -- kinds that are sampled ------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_compiled_run_is_the_plain_run(kind):
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_run(cases.make(kind), whole)


@pytest.mark.parametrize("kind", ["memory", "bilinear", "transposed, groups"])
@pytest.mark.parametrize("sampling", ["positions", "examples"])
def test_draws_are_the_same(kind, sampling):
    assert_same_run(cases.make(kind), whole, sample_size=5, sampling=sampling)


@pytest.mark.parametrize("kind", ["self", "three", "transposed", "own forward"])
def test_batches_of_changing_size(kind):
    assert_same_run(cases.make(kind), whole, sizes=(8, 3, 4, 9))


@pytest.mark.skipif(shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_inductor():
    assert_same_run(
        cases.make("memory"), partial(torch.compile, fullgraph=True), sizes=(8, 8)
    )


def test_a_layer_of_a_transformer():
    def build():
        return nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True)

    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_run(Net(build, out=WIDTH).double(), whole)


def apart(layer, x, _):
    torch._dynamo.graph_break()
    x = layer(x, x, x)[0]
    torch._dynamo.graph_break()
    return x


class Apart(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return super().forward(*args, **kwargs)


def attention_with_a_hook():
    layer = cases.attention()
    layer.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return layer


@pytest.mark.parametrize(
    "net",
    [
        partial(Net, cases.attention, apart, WIDTH),
        partial(Net, partial(Apart, WIDTH, 2, batch_first=True), cases.attend, WIDTH),
        partial(Net, attention_with_a_hook, cases.attend, WIDTH),
    ],
    ids=["around", "inside", "hook"],
)
def test_attention_where_graphs_break(net):
    assert_same_run(net().double(), broken)


def test_attention_in_evaluation_and_in_training_again():
    net = cases.make("memory")
    opt = FROG(net, sample_size=EVERYTHING)
    forward = whole(net)
    step(net, forward, opt, 0)
    net.eval()
    with pytest.warns(UserWarning, match="eval mode"):
        taken = step(net, forward, opt, 1)
    assert not any(taken.values())
    net.train()
    assert all(step(net, forward, opt, 2).values())


def test_compiled_autograd_of_attention():
    net = cases.make("memory")
    twin = copied(net)
    opts = [FROG(model, sample_size=EVERYTHING) for model in (net, twin)]
    forward = torch.compile(net, backend="aot_eager")
    backward = torch.compile(backend="aot_eager")
    for seed in range(2):
        with torch._dynamo.compiled_autograd._enable(backward):
            taken = step(net, forward, opts[0], seed)
        assert len(taken["layer.in_proj"]) == 2
        step(twin, twin, opts[1], seed)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)  # the same bits


# -- a forward of its own --------------------------------------------------------------


class Rectified(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias).relu()


@pytest.mark.parametrize(
    ("kind", "reason"), [(cases.Halved, None), (Rectified, "its forward is not")]
)
def test_a_forward_is_proven_or_refuted_once(monkeypatch, kind, reason):
    """Inside of the operator that takes samples, which waits for it."""
    looked = []

    def counted(*args):
        looked.append(args)
        return recognize(*args)

    recognize = taps.recognize
    monkeypatch.setattr(taps, "recognize", counted)
    net = Net(lambda: kind(WIDTH, 5)).double()
    opt = FROG(net, sample_size=EVERYTHING, output_layers="head")
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward = whole(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            taken = [step(net, forward, opt, seed) for seed in range(PATIENCE)]
    assert len(looked) == 1
    assert [len(each["layer"]) for each in taken] == [0 if reason else 1] * PATIENCE
    by, why = reason_of(opt, "layer.weight")
    assert by == ("adamw" if reason else "frog")
    assert reason is None or reason in why


# -- kinds that are not sampled --------------------------------------------------------


def breaks(net):
    """Of the graph that Dynamo makes, and how many graphs."""
    explained = torch._dynamo.explain(net)(cases.batch(0)[0])
    return explained.graph_break_count, explained.graph_count


@pytest.mark.parametrize(
    ("net", "weight", "why"),
    [
        (partial(in_one_graph, cases.routed), "weight", "products of stacked experts"),
        (NETS["experts, inputs first"], "weight", "products of stacked experts"),
        (NETS["lstm"], "weight_hh_l0", "recurrent layers are not sampled"),
    ],
    ids=["experts", "routed experts", "lstm"],
)
def test_what_is_not_sampled_is_said(net, weight, why):
    net = net().double()
    with torch._dynamo.config.patch(allow_rnn=True):
        before = breaks(net)
        torch.compiler.reset()
        opt = FROG(net, sample_size=EVERYTHING)
        assert breaks(net) == before
        torch.compiler.reset()
        forward = torch.compile(net, backend="aot_eager")
        for seed in range(PATIENCE):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(net, forward, opt, seed)
            told = [str(w.message) for w in caught if "FROG" in str(w.message)]
            told += [str(w.message) for w in caught if "Fisher" in str(w.message)]
            assert len(told) == (seed in (0, PATIENCE - 1))
            assert all(why in text for text in told)
    by, reason = reason_of(opt, f"layer.{weight}")
    assert by == "adamw" and reason.startswith(why)
    assert reason_of(opt, "first.weight")[0] == "frog"


def test_recurrent_layers_outside_of_graphs_are_sampled():
    """Dynamo leaves them alone unless told otherwise."""
    assert_same_run(cases.make("lstm"), broken)


# -- output layers ---------------------------------------------------------------------


class Unnamed(nn.Module):
    """Its output layer is declared first."""

    def __init__(self):
        super().__init__()
        self.c, self.a, self.b = nn.Linear(5, 3), nn.Linear(6, WIDTH), nn.Linear(8, 5)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_the_guess_of_the_output_layer_stands():
    net = Unnamed().double()
    before = breaks(net)
    torch.compiler.reset()
    opt = FROG(net, sample_size=EVERYTHING)
    assert breaks(net) == before == (0, 1)
    torch.compiler.reset()
    forward = whole(net)
    for seed in range(2):
        taken = step(net, forward, opt, seed)
        assert {name for name, calls in taken.items() if calls} >= {"a", "c"}
    assert reason_of(opt, "b.weight")[1].startswith("output layer")
    assert reason_of(opt, "c.weight")[0] == "frog"
