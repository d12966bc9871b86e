"""`kinds` of attention, and transformers' blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kinds import Kind, in_groups, randn, rows_first
from torch import nn


def attend(record, params, inputs, heads, mask=None, prefix=""):
    """Output and mean weights of attention; query, key and value are ``(B, L, E)``."""
    packed, parts = f"{prefix}in_proj_weight", []
    bias = params.get(f"{prefix}in_proj_bias")
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    for group, x in enumerate(inputs):
        if packed in params:
            weight = params[packed].chunk(3)[group]
            y = record.linear(packed, x, weight, biases[group], group)
        else:
            name = f"{prefix}{'qkv'[group]}_proj_weight"
            y = record.linear(name, x, params[name]) + biases[group]
        parts.append(y.unflatten(-1, (heads, -1)).transpose(1, 2))
    query, key, value = parts
    scores = query @ key.mT / query.shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    name = f"{prefix}out_proj"
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    return record.linear(f"{name}.weight", mixed, weight, bias), weights.mean(1)


def attention(shapes, which=(0, 0, 0), form="batch", masks=None, seen=True, **options):
    """Attention whose query, key and value are the inputs numbered in `which`.

    Args:
        shapes: of the inputs.
        which: of them is query, key and value.
        form: ``"batch"`` first, ``"time"`` first, or ``"one"`` without a batch.
        masks: of a query ``(B, L, E)``: what is added to scores, and the arguments.
        seen: whether the weights are asked for.
        options: of the module.
    """
    bias = "in_proj_bias" if options.get("bias", True) else None
    matrices = {"in_proj_weight": (bias, in_groups(3))}
    if "kdim" in options:
        matrices = {f"{name}_proj_weight": (None, rows_first) for name in "qkv"}
    matrices["out_proj.weight"] = (bias and "out_proj.bias", rows_first)

    def turned(x):
        return x.transpose(0, 1) if form == "time" else x

    def by_hand(record, net, params, *inputs):
        lead = (0,) if form == "one" else ()
        chosen = [inputs[i][None] if lead else turned(inputs[i]) for i in which]
        added = None if masks is None else masks(chosen[0])[0]
        out, mean = attend(record, params, chosen, net.num_heads, added)
        return (turned(out[lead] if lead else out), mean[lead] if lead else mean)[
            : 1 + seen
        ]

    def call(module, *inputs):
        given = {} if masks is None else masks(turned(inputs[0]))[1]
        chosen = [inputs[i] for i in which]
        return module(*chosen, need_weights=seen, **given)[: 1 + seen]

    def build():
        first = form == "batch"
        return nn.MultiheadAttention(4, 2, batch_first=first, **options)

    return Kind(build, randn(*shapes), by_hand, matrices, call)


def no_future(x):
    """A causal mask."""
    above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    added = torch.zeros(above.shape, dtype=x.dtype).masked_fill(above, -torch.inf)
    return added, {"attn_mask": above}


def causal(x):
    """The same, and said so."""
    added, given = no_future(x)
    return added, given | {"is_causal": True}


def padded(x):
    """The last key of the first sequence is padding."""
    ignored = torch.zeros(x.shape[:2], dtype=torch.bool)
    ignored[0, -1] = True
    added = torch.zeros(ignored.shape, dtype=x.dtype).masked_fill(ignored, -torch.inf)
    return added[:, None, None], {"key_padding_mask": ignored}


SELF, CROSS, OTHERS = [(2, 3, 4)], [(2, 3, 4), (2, 5, 4)], [(3, 2, 4), (5, 2, 4)]
ATTENTION = {
    "self": attention(SELF),
    "self-unseen": attention(SELF, seen=False),
    "self-time-first": attention([(3, 2, 4)], form="time", seen=False),
    "self-unbatched": attention([(5, 4)], form="one"),
    "self-no-bias": attention(SELF, bias=False, seen=False),
    "causal-mask": attention(SELF, masks=no_future, seen=False),
    "is-causal": attention(SELF, masks=causal, seen=False),
    "key-padding": attention(SELF, masks=padded),
    "cross": attention(CROSS, (0, 1, 1), seen=False),
    "cross-time-first": attention(OTHERS, (0, 1, 1), form="time"),
    "cross-three": attention([*CROSS, (2, 5, 4)], (0, 1, 2), seen=False),
    "cross-unbatched": attention([(2, 4), (5, 4)], (0, 1, 1), form="one", seen=False),
    "query-is-key": attention([(2, 3, 4), (2, 3, 4)], (0, 0, 1)),
    "other-sizes": attention(
        [(2, 3, 4), (2, 5, 3), (2, 5, 6)], (0, 1, 2), kdim=3, vdim=6, seen=False
    ),
    "other-sizes-time-first": attention(
        [(3, 2, 4), (5, 2, 8)], (0, 1, 1), form="time", kdim=8, vdim=8
    ),
}


# -- transformers' blocks --------------------------------------------------------------


def _norm(params, name, x):
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _feed_forward(record, params, x):
    def linear(name, x):
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return record.linear(f"{name}.weight", x, weight, bias)

    return linear("linear2", linear("linear1", x).relu())


def encoder(record, net, params, x):
    """Norms after each residual."""
    attended, _ = attend(record, params, (x, x, x), 2, prefix="self_attn.")
    x = _norm(params, "norm1", x + attended)
    return _norm(params, "norm2", x + _feed_forward(record, params, x))


def decoder(record, net, params, x, memory):
    """Norms first."""
    x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    y = _norm(params, "norm1", x)
    x = x + attend(record, params, (y, y, y), 2, prefix="self_attn.")[0]
    pair = (_norm(params, "norm2", x), memory, memory)
    x = x + attend(record, params, pair, 2, prefix="multihead_attn.")[0]
    x = x + _feed_forward(record, params, _norm(params, "norm3", x))
    return x.transpose(0, 1)


def _block(*attentions):
    found = {}
    for name in attentions:
        found[f"{name}.in_proj_weight"] = (f"{name}.in_proj_bias", in_groups(3))
        found[f"{name}.out_proj.weight"] = (f"{name}.out_proj.bias", rows_first)
    for name in ("linear1", "linear2"):
        found[f"{name}.weight"] = (f"{name}.bias", rows_first)
    return found


BLOCKS = {
    "encoder": Kind(
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0, batch_first=True),
        randn((2, 3, 4)),
        encoder,
        _block("self_attn"),
    ),
    "decoder": Kind(
        lambda: nn.TransformerDecoderLayer(4, 2, 6, 0, norm_first=True),
        randn((3, 2, 4), (5, 2, 4)),
        decoder,
        _block("self_attn", "multihead_attn"),
    ),
}
