"""Replayed recurrent layers against autograd through torch's own fused modules.

The oracle runs every sequence alone, without batch, padding or packing, through the
module itself: what a few sequences add to a weight's gradient is the sum of theirs.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from frog_triton.layers.recurrent import (
    RecurrentAdapter,
    batch_size,
    length,
    outputs_of,
    replay,
    take_grads,
    take_sequences,
)
from frog_triton.layers.rows import Seen

INPUT, HIDDEN, STEPS = 3, 4, 5
deep = {"num_layers": 2, "bidirectional": True}
LAYERS = {
    "lstm": partial(nn.LSTM, INPUT, HIDDEN),
    "lstm-deep": partial(nn.LSTM, INPUT, HIDDEN, **deep),
    "lstm-nobias": partial(nn.LSTM, INPUT, HIDDEN, bias=False),
    "lstm-projected": partial(nn.LSTM, INPUT, HIDDEN, proj_size=2, **deep),
    "gru": partial(nn.GRU, INPUT, HIDDEN),
    "gru-deep": partial(nn.GRU, INPUT, HIDDEN, **deep),
    "gru-nobias": partial(nn.GRU, INPUT, HIDDEN, bias=False, num_layers=3),
    "rnn": partial(nn.RNN, INPUT, HIDDEN),
    "rnn-relu": partial(nn.RNN, INPUT, HIDDEN, nonlinearity="relu", **deep),
    "rnn-nobias": partial(nn.RNN, INPUT, HIDDEN, bias=False, bidirectional=True),
}
CELLS = {
    "lstm": partial(nn.LSTMCell, INPUT, HIDDEN),
    "gru": partial(nn.GRUCell, INPUT, HIDDEN),
    "rnn": partial(nn.RNNCell, INPUT, HIDDEN),
    "rnn-relu": partial(nn.RNNCell, INPUT, HIDDEN, nonlinearity="relu"),
    "lstm-nobias": partial(nn.LSTMCell, INPUT, HIDDEN, bias=False),
    "gru-nobias": partial(nn.GRUCell, INPUT, HIDDEN, bias=False),
}
LENGTHS = {
    "time-first": [STEPS] * 3,
    "batch-first": [STEPS] * 3,
    "unbatched": [STEPS],
    "packed": [2, 5, 1, 3],
    "packed-sorted": [5, 3, 3, 1],
}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Problem:
    """Sequences one by one, and the module's arguments and gradients made of them."""

    def __init__(self, build, form, given):
        torch.manual_seed(0)
        first = {"batch_first": True} if form == "batch-first" else {}
        self.module = build(**first).double()
        self.form = form
        self.xs = [randn(steps, INPUT) for steps in LENGTHS[form]]
        with torch.no_grad():
            out, *states = outputs_of(self.module, self.module(self.xs[0]))
        self.hx = [[randn(*s.shape) for s in states] for _ in self.xs] if given else []
        self.grads = [
            [randn(len(x), out.shape[1]), *(randn(*s.shape) for s in states)]
            for x in self.xs
        ]

    def joined(self, each):
        """Inputs or outputs, as one call has them."""
        if self.form == "unbatched":
            return each[0]
        if "packed" in self.form:
            return pack_sequence(each, enforce_sorted=self.form == "packed-sorted")
        return torch.stack(each, 0 if self.form == "batch-first" else 1)

    def joined_states(self, each):
        if self.form == "unbatched":
            return each[0]
        return [torch.stack(states, 1) for states in zip(*each, strict=True)]

    def call(self):
        hx = as_hx(self.joined_states(self.hx)) if self.hx else None
        return (self.joined(self.xs),), {"hx": hx} if self.hx else {}

    def call_grads(self):
        out = self.joined([grad[0] for grad in self.grads])
        out = out.data if "packed" in self.form else out
        return [out, *self.joined_states([grad[1:] for grad in self.grads])]

    def chosen(self, index):
        """Which sequences an index means: packed ones count longest first."""
        order = getattr(self.call()[0][0], "sorted_indices", None)
        return index.tolist() if order is None else order[index].tolist()

    def expected(self, index, arrive):
        """The gradients of the parameters that the chosen sequences make."""
        self.module.zero_grad()
        for i in self.chosen(index):
            hx = as_hx(self.hx[i]) if self.hx else None
            outputs = outputs_of(self.module, self.module(self.xs[i], hx))
            pairs = zip(outputs, self.grads[i], strict=True)
            sum(
                (o * g).sum() for n, (o, g) in enumerate(pairs) if n in arrive
            ).backward()
        return {name: p.grad for name, p in self.module.named_parameters()}

    def replayed(self, index, arrive):
        args, kwargs = self.call()
        sequences = take_sequences(self.module, args, kwargs, index)
        grads = [g if n in arrive else None for n, g in enumerate(self.call_grads())]
        grads = take_grads(self.module, sequences, grads)
        return sequences, replay(self.module, sequences, grads, params(self.module))


def as_hx(states):
    return tuple(states) if len(states) > 1 else states[0]


def params(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def assert_gradients(module, samples, expected):
    """Every parameter's gradient is that of its weight's samples."""
    seen = []
    for weight in RecurrentAdapter().weights(module):
        x, y = samples[weight.name]
        found = {weight.name: y.T @ x}
        if weight.bias:
            found[weight.bias] = y.sum(0)
        for name, actual in found.items():
            # Measured: 3e-15.
            torch.testing.assert_close(actual, expected[name], rtol=0, atol=1e-13)
        seen += found
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("form", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_all_sequences_make_the_gradient(name, form, given):
    problem = Problem(LAYERS[name], form, given)
    index, arrive = torch.arange(len(problem.xs)), {0, 1, 2}
    sequences, samples = problem.replayed(index, arrive)
    assert sequences.steps == sum(LENGTHS[form])
    assert {len(x) for x, _ in samples.values()} == {sequences.steps}
    assert_gradients(problem.module, samples, problem.expected(index, arrive))


@pytest.mark.parametrize("form", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_some_sequences_make_their_part(name, form):
    problem = Problem(LAYERS[name], form, given=True)
    index = torch.tensor([2, 1] if len(problem.xs) > 1 else [0])
    sequences, samples = problem.replayed(index, {0, 1, 2})
    lengths = [len(problem.xs[i]) for i in problem.chosen(index)]
    assert sequences.steps == sum(lengths)
    assert sequences.x.shape == (max(lengths), len(lengths), INPUT)
    assert_gradients(problem.module, samples, problem.expected(index, {0, 1, 2}))


@pytest.mark.parametrize("arrive", [{0}, {1}, {2}, {1, 2}])
@pytest.mark.parametrize("form", ["time-first", "packed"])
@pytest.mark.parametrize("name", ["lstm-deep", "lstm-projected"])
def test_gradients_of_some_outputs(name, form, arrive):
    problem = Problem(LAYERS[name], form, given=True)
    index = torch.tensor([0, 2])
    _, samples = problem.replayed(index, arrive)
    expected = problem.expected(index, arrive)
    # What no gradient reaches has zeros here and none there.
    filled = {
        k: torch.zeros_like(p) if expected[k] is None else expected[k]
        for k, p in params(problem.module).items()
    }
    assert_gradients(problem.module, samples, filled)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("batch", [None, 4], ids=["unbatched", "batched"])
@pytest.mark.parametrize(
    ("name", "arrive"),
    [*((name, {0, 1}) for name in CELLS), ("lstm", {0}), ("lstm", {1})],
)
def test_cells(name, batch, given, arrive):
    torch.manual_seed(0)
    module = CELLS[name]().double()
    lead = [] if batch is None else [batch]
    states = 2 if isinstance(module, nn.LSTMCell) else 1
    x, hx = randn(*lead, INPUT), [randn(*lead, HIDDEN) for _ in range(states)]
    grads = [randn(*lead, HIDDEN) if n in arrive else None for n in range(states)]
    args = (x, as_hx(hx)) if given else (x,)
    index = torch.tensor([0] if batch is None else [3, 1])
    assert batch_size(module, args, {}) == (batch or 1)
    assert length(module, args, {}) == 1

    sequences = take_sequences(module, args, {}, index)
    taken = take_grads(module, sequences, grads)
    samples = replay(module, sequences, taken, params(module))

    rows = slice(None) if batch is None else index
    outputs = module(x[rows], as_hx([h[rows] for h in hx]) if given else None)
    pairs = zip(outputs_of(module, outputs), grads, strict=True)
    sum((o * g[rows]).sum() for o, g in pairs if g is not None).backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    assert_gradients(module, samples, expected)


@pytest.mark.parametrize("form", ["time-first", "packed"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_rows_are_those_of_each_step(kind, form):
    # With more inputs than rows the gradient of an input says all of a row of Y.
    problem = Problem(LAYERS["lstm"], form, given=False)
    module = kind(30, HIDDEN).double()
    xs = [randn(len(x), 30).requires_grad_() for x in problem.xs]
    args = (problem.joined([x.detach() for x in xs]),)
    index = torch.tensor([1, 2])
    chosen = problem.chosen(index)
    sequences = take_sequences(module, args, {}, index)
    grads = [problem.call_grads()[0], *([None] * (1 + (kind is nn.LSTM)))]
    taken = take_grads(module, sequences, grads)
    samples = replay(module, sequences, taken, params(module))
    inputs, before, by_input = [], [], []
    for i in chosen:
        out, _ = module(xs[i])
        (out * problem.grads[i][0]).sum().backward()
        inputs.append(xs[i])
        before.append(torch.cat([out.new_zeros(1, HIDDEN), out[:-1]]))
        by_input.append(xs[i].grad)

    def stepwise(each):
        steps = range(max(map(len, each)))
        return torch.stack([s[t] for t in steps for s in each if t < len(s)])

    x, y = samples["weight_ih_l0"]
    torch.testing.assert_close(x, stepwise(inputs).detach(), rtol=0, atol=0)
    # Measured: 3e-16.
    actual = y @ module.weight_ih_l0.detach()
    torch.testing.assert_close(actual, stepwise(by_input), rtol=0, atol=1e-14)
    h, by_state = samples["weight_hh_l0"]
    torch.testing.assert_close(h, stepwise(before).detach(), rtol=0, atol=1e-14)
    if kind is not nn.GRU:  # both products are simply added
        torch.testing.assert_close(by_state, y, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["time-first", "packed"])
@pytest.mark.parametrize("name", ["lstm-projected", "gru-deep", "rnn-relu"])
def test_within_a_running_backward_pass(name, form):
    problem = Problem(LAYERS[name], form, given=True)
    module = problem.module
    index = torch.arange(len(problem.xs))
    args, kwargs = problem.call()
    sequences = take_sequences(module, args, kwargs, index)
    outputs = outputs_of(module, module(*args, **kwargs))
    found = {}

    def arrived(grads):
        taken = take_grads(module, sequences, grads)
        random = torch.get_rng_state()
        found.update(replay(module, sequences, taken, params(module)))
        assert torch.equal(random, torch.get_rng_state())
        assert not torch.is_grad_enabled()
        assert all(p.requires_grad and p.grad is None for p in module.parameters())

    torch.autograd.graph.register_multi_grad_hook(outputs, arrived)
    loss = sum(o.square().sum() for o in outputs[1:])  # nothing reaches the first
    loss.backward()
    assert_gradients(module, found, {k: p.grad for k, p in module.named_parameters()})
    assert not any(t.requires_grad for pair in found.values() for t in pair)


def test_dropout_is_left_out_and_draws_nothing():
    build = partial(nn.LSTM, INPUT, HIDDEN, num_layers=2)
    problem = Problem(partial(build, dropout=0.5), "time-first", given=True)
    plain = Problem(build, "time-first", given=True)
    index, arrive = torch.arange(3), {0, 1, 2}
    before = torch.get_rng_state()
    samples = problem.replayed(index, arrive)[1]
    assert torch.equal(before, torch.get_rng_state())
    plain.xs, plain.hx, plain.grads = problem.xs, problem.hx, problem.grads
    assert_gradients(plain.module, samples, plain.expected(index, arrive))


def test_autocast_is_off_and_the_dtype_that_of_the_weights():
    problem = Problem(LAYERS["gru"], "packed", given=True)
    module = problem.module.float()
    args, kwargs = problem.call()
    index = torch.tensor([1, 0])
    sequences = take_sequences(module, args, kwargs, index)
    grads = take_grads(module, sequences, [g.half() for g in problem.call_grads()])
    expected = replay(module, sequences, grads, params(module))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = replay(module, sequences, grads, params(module))
    for name, pair in actual.items():
        assert [t.dtype for t in pair] == [torch.float32] * 2
        assert not any(t.requires_grad for t in pair)
        torch.testing.assert_close(pair, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["time-first", "packed"])
def test_what_was_taken_is_a_copy_and_other_sequences_do_not_matter(form):
    problem = Problem(LAYERS["lstm-deep"], form, given=True)
    index = torch.tensor([1])
    expected = problem.replayed(index, {0, 1, 2})[1]
    for i in set(range(len(problem.xs))) - set(problem.chosen(index)):
        for tensor in (problem.xs[i], *problem.hx[i], *problem.grads[i]):
            tensor.fill_(torch.nan)
    (x,), kwargs = problem.call()
    grads = problem.call_grads()
    sequences = take_sequences(problem.module, (x,), kwargs, index)
    taken = take_grads(problem.module, sequences, grads)
    for tensor in (x.data, *kwargs["hx"], *grads):
        tensor.fill_(torch.nan)
    actual = replay(problem.module, sequences, taken, params(problem.module))
    for name, pair in actual.items():
        torch.testing.assert_close(pair, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "build",
    [*LAYERS.values(), *CELLS.values()],
    ids=[*LAYERS, *(f"{c}-cell" for c in CELLS)],
)
def test_weights_and_their_geometry(build):
    module = build()
    adapter = RecurrentAdapter()
    weights = adapter.weights(module)
    listed = [n for n, _ in module.named_parameters()]
    assert [w.name for w in weights] == [n for n in listed if "weight" in n]
    assert {w.bias for w in weights if w.bias} == {n for n in listed if "bias" in n}
    assert adapter.geometry(module) == adapter.geometry(module, weights[0])
    for weight in weights:
        assert weight.seen is Seen.REPLAY and weight.label == weight.name
        assert weight.bias in (None, weight.name.replace("weight", "bias"))
        geometry = adapter.geometry(module, weight)
        sizes = (geometry.rows, geometry.dim)
        assert sizes == tuple(weight.of(module).shape)
        assert geometry.groups == 1
        assert geometry.bias == (weight.bias_of(module) is not None)


@pytest.mark.parametrize("form", LENGTHS)
def test_extent_of_a_call(form):
    problem = Problem(LAYERS["gru"], form, given=True)
    args, kwargs = problem.call()
    lengths = LENGTHS[form]
    assert batch_size(problem.module, args, kwargs) == len(lengths)
    assert length(problem.module, (), {"input": args[0]}) == max(lengths)
