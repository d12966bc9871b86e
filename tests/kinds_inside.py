"""`kinds` whose products happen inside of a forward: experts, recurrent layers."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from kinds import Kind, experts, experts_second, randn, rows_first
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

# -- experts ---------------------------------------------------------------------------

PRODUCTS = {
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "matmul": lambda x, weight, bias: x @ weight + bias,
}


class Experts(nn.Module):
    """Two stacked layers in a loop over experts, or in products of all at once."""

    def __init__(self, product="linear", second=False):
        super().__init__()
        self.num_experts, self.hidden_size, self.product = 4, 4, product
        up, down = ((4, 6), (6, 4)) if second else ((6, 4), (4, 6))
        self.up = nn.Parameter(torch.empty(4, *up))
        self.up_bias = nn.Parameter(torch.empty(4, 6))
        self.down = nn.Parameter(torch.empty(4, *down))
        self.down_bias = nn.Parameter(torch.empty(4, 4))

    def forward(self, x, ids=None, weights=None):
        if ids is None:
            return self.layer(F.silu(self.layer(x, "up")), "down")
        out = torch.zeros_like(x)
        for e in ids.unique():
            token, slot = torch.where(ids == e)
            hidden = F.silu(self.one(x[token], "up", e))
            each = self.one(hidden, "down", e) * weights[token, slot, None]
            out = out.index_add(0, token, each)
        return out

    def one(self, x, name, e):
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        return PRODUCTS[self.product](x, weight[e], bias[e])

    def layer(self, x, name):
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        weight = weight if self.product == "matmul" else weight.transpose(1, 2)
        return torch.bmm(x, weight) + bias[:, None]


def routed():
    """Tokens, their two experts and weights; no expert has twice its fair share."""
    counts = (2, 7, 4, 3)  # of experts' tokens; 16 in all
    ids = torch.arange(4).repeat_interleave(torch.tensor(counts)).view(2, 8).T
    order = torch.randperm(8)
    return torch.randn(8, 4), ids[order].contiguous(), torch.rand(8, 2)


def _expert(record, params, x, name, group, second):
    weight, bias = params[name][group], params.get(f"{name}_bias")
    bias = None if bias is None else bias[group]
    return record.linear(name, x, weight.T if second else weight, bias, group)


def experts_by_hand(record, net, params, x, ids, weights, names, second, gate):
    out = torch.zeros_like(x)
    for e in range(net.num_experts):
        token, slot = torch.where(ids == e)
        if len(token):
            hidden = gate(_expert(record, params, x[token], names[0], e, second))
            each = _expert(record, params, hidden, names[1], e, second)
            out = out.index_add(0, token, each * weights[token, slot, None])
    return out


def all_by_hand(record, net, params, x, second):
    outs = []
    for e in range(4):
        hidden = F.silu(_expert(record, params, x[e], "up", e, second))
        outs.append(_expert(record, params, hidden, "down", e, second))
    return torch.stack(outs)


def _stacked(names, second, biased=True):
    axes = experts_second if second else experts
    return {name: (f"{name}_bias" if biased else None, axes) for name in names}


def _own(product, second):
    names = ("up", "down")
    by_hand = partial(experts_by_hand, names=names, second=second, gate=F.silu)
    build = partial(Experts, product, second)
    return Kind(build, routed, by_hand, _stacked(names, second))


def _all(product, second):
    by_hand, matrices = partial(all_by_hand, second=second), _stacked(_UP, second)
    return Kind(partial(Experts, product, second), randn((4, 3, 4)), by_hand, matrices)


_UP, _GATED = ("up", "down"), ("gate_up_proj", "down_proj")


def _mixtral(implementation):
    from transformers.models.mixtral import modeling_mixtral as mixtral

    config = mixtral.MixtralConfig(
        hidden_size=4, intermediate_size=4, num_local_experts=4
    )
    config._experts_implementation = implementation
    return mixtral.MixtralExperts(config)


def _gpt_oss(implementation):
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    config = gpt_oss.GptOssConfig(
        hidden_size=4, intermediate_size=4, num_local_experts=4
    )
    config._experts_implementation = implementation
    return gpt_oss.GptOssExperts(config)


def _swiglu(up):
    gate, up = up.chunk(2, -1)
    return F.silu(gate) * up


def _clamped_swiglu(up):
    gate, up = up[..., ::2].clamp(max=7), up[..., 1::2].clamp(-7, 7)
    return (up + 1) * gate * (1.702 * gate).sigmoid()


def _of_transformers(build, implementation, second, gate):
    def call(module, x, ids, weights):
        from transformers.integrations import moe

        # torch's own grouped product knows no float64.
        wide = {} if x.dtype != torch.float64 else {"return_value": False}
        known = mock.patch.object(
            moe, "_can_use_grouped_mm", wraps=moe._can_use_grouped_mm, **wide
        )
        with known:
            return module(x, ids, weights)

    return Kind(
        partial(build, implementation),
        routed,
        partial(experts_by_hand, names=_GATED, second=second, gate=gate),
        _stacked(_GATED, second, biased=second),
        call,
    )


EXPERTS = {
    "loop-linear": _own("linear", second=False),
    "loop-matmul": _own("matmul", second=True),
    "bmm-turned": _all("linear", second=False),
    "bmm": _all("matmul", second=True),
    **{
        f"{name}-{implementation}": _of_transformers(
            build, implementation, second, gate
        )
        for name, build, second, gate in (
            ("mixtral", _mixtral, False, _swiglu),
            ("gpt-oss", _gpt_oss, True, _clamped_swiglu),
        )
        for implementation in ("eager", "grouped_mm", "batched_mm")
    },
}


# -- recurrent layers ------------------------------------------------------------------


def step_by_hand(record, params, mode, suffix, x, state):
    """The new state of one sequence, from its input and its state."""
    parts = []
    for kind, value in (("ih", x), ("hh", state[0])):
        weight, bias = (f"{name}_{kind}{suffix}" for name in ("weight", "bias"))
        made = record.linear(weight, value[None], params[weight], params.get(bias))
        parts.append(made[0])
    x, h = parts
    if mode == "LSTM":
        i, f, g, o = (x + h).chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        name = f"weight_hr{suffix}"
        return (
            record.linear(name, h[None], params[name])[0] if name in params else h,
            c,
        )
    if mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3), h.chunk(3)
        z, n = (xz + hz).sigmoid(), (xn + (xr + hr).sigmoid() * hn).tanh()
        return ((1 - z) * n + z * state[0],)
    return ((x + h).relu() if mode.endswith("RELU") else (x + h).tanh(),)


def one_sequence(record, net, params, x, states):
    """Outputs ``(T, size)`` and last states, from states by layer and direction."""
    ends = []
    for layer in range(net.num_layers):
        ways = []
        for way in ("", "_reverse")[: 1 + net.bidirectional]:
            state, outputs = tuple(each[len(ends)] for each in states), []
            for step in x.flip(0) if way else x:
                suffix = f"_l{layer}{way}"
                state = step_by_hand(record, params, net.mode, suffix, step, state)
                outputs.append(state[0])
            ends.append(state)
            ways.append(torch.stack(outputs[::-1] if way else outputs))
        x = torch.cat(ways, -1)
    return x, [torch.stack(each) for each in zip(*ends, strict=True)]


def recurrent_by_hand(record, net, params, x, *given):
    packed = isinstance(x, PackedSequence)
    batched = packed or x.ndim == 3
    if packed:
        sequences = unpack_sequence(x)
    else:
        time_first = batched and not net.batch_first
        sequences = (x.transpose(0, 1) if time_first else x) if batched else x[None]
    count = net.num_layers * (1 + net.bidirectional)
    sizes = [net.proj_size or net.hidden_size, net.hidden_size]
    sizes = sizes[: 2 if net.mode == "LSTM" else 1]
    outs, ends = [], []
    for n, sequence in enumerate(sequences):
        states = [sequence.new_zeros(count, size) for size in sizes]
        if given:
            states = [each[:, n] if batched else each for each in given]
        out, end = one_sequence(record, net, params, sequence, states)
        outs.append(out)
        ends.append(end)
    if not batched:
        return outs[0], ends[0]
    joined = [torch.stack(each, 1) for each in zip(*ends, strict=True)]
    if packed:
        return pack_sequence(outs, enforce_sorted=False), joined
    return torch.stack(outs, 0 if net.batch_first else 1), joined


class Cell(nn.Module):
    """A cell, step after step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


def cell_by_hand(record, net, params, x):
    cell = net.cell
    mode = type(cell).__name__.removesuffix("Cell")
    params = {name: param for name, param in params.items()}
    every = []
    for sequence in x.transpose(0, 1):
        state, outputs = [sequence.new_zeros(cell.hidden_size)] * 2, []
        for step in sequence:
            state = step_by_hand(_Inner(record), _inner(params), mode, "", step, state)
            outputs.append(state[0])
        every.append(torch.stack(outputs))
    return torch.stack(every, 1)


class _Inner:
    """Names products as the net around a cell does."""

    def __init__(self, record):
        self.record = record

    def linear(self, name, *rest):
        return self.record.linear(f"cell.{name}", *rest)


def _inner(params):
    return {name.removeprefix("cell."): param for name, param in params.items()}


def _recurrent(build, inputs, steps, **by_hand):
    module = build()
    matrices = {
        name: (_bias_of(name, module), rows_first)
        for name, _ in module.named_parameters()
        if "weight" in name
    }

    def call(module, x, *given):
        state = (given if len(given) > 1 else given[0],) if given else ()
        return module(x, *state)

    hand = cell_by_hand if isinstance(module, Cell) else recurrent_by_hand
    return Kind(build, inputs, hand, matrices, call, steps=steps)


def _bias_of(name, module):
    bias = name.replace("weight", "bias")
    return bias if bias in dict(module.named_parameters()) else None


def _packed():
    sequences = [torch.randn(steps, 3) for steps in (2, 4, 1)]
    return (pack_sequence(sequences, enforce_sorted=False),)


_deep = {"num_layers": 2, "bidirectional": True}
RECURRENT = {
    "lstm": _recurrent(partial(nn.LSTM, 3, 4), randn((4, 2, 3)), 4),
    "lstm-deep": _recurrent(
        partial(nn.LSTM, 3, 4, batch_first=True, **_deep), randn((2, 3, 3)), 3
    ),
    "lstm-projected": _recurrent(
        partial(nn.LSTM, 3, 4, proj_size=2),
        randn((3, 2, 3), (1, 2, 2), (1, 2, 4)),
        3,
    ),
    "gru": _recurrent(
        partial(nn.GRU, 3, 4, bias=False), randn((3, 2, 3), (1, 2, 4)), 3
    ),
    "gru-packed": _recurrent(partial(nn.GRU, 3, 4, bidirectional=True), _packed, 4),
    "rnn": _recurrent(partial(nn.RNN, 3, 4, 2), randn((5, 3)), 5),
    "rnn-relu": _recurrent(
        partial(nn.RNN, 3, 4, nonlinearity="relu"), randn((3, 2, 3)), 3
    ),
    "lstm-cell": _recurrent(lambda: Cell(nn.LSTMCell(3, 4)), randn((3, 2, 3)), 1),
    "gru-cell": _recurrent(lambda: Cell(nn.GRUCell(3, 4)), randn((3, 2, 3)), 1),
    "rnn-cell": _recurrent(lambda: Cell(nn.RNNCell(3, 4)), randn((3, 2, 3)), 1),
}
