"""Recurrent layers: `torch.nn.LSTM`, `GRU`, `RNN` and their cells.

Their gates are computed in a fused kernel, so what goes into a product and the
gradient that comes back are not seen there. Instead a few sequences of the batch are
kept, and once the gradients of the module's outputs have arrived they are run again
step by step. Every weight is a linear map on its own, with the time steps of the
sequences as positions:

    weight_ih   x_t                  -> its part of the gates, with bias_ih
    weight_hh   h_{t-1}              -> its part of the gates, with bias_hh
    weight_hr   the hidden state     -> the projected hidden state (`proj_size`)

`take_sequences` in the forward pass; `take_grads` and `replay` in the backward pass.

More than 400 lines: all that torch's recurrent layers may be called with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .base import Geometry
from .computed import row_wise
from .linear import LinearAdapter
from .rows import Seen, Weight, named

_State = tuple[Tensor, ...]
_Kwargs = Mapping[str, Any]


class RecurrentAdapter(LinearAdapter):
    """All weights of a recurrent layer or cell, each seen by replay."""

    any_forward = False

    def weights(self, module: nn.Module) -> tuple[Weight, ...]:
        """In the module's own order: ``weight_ih_l0``, ``weight_hh_l0``, ..."""
        found = []
        for suffix in chain.from_iterable(_suffixes(module)):
            for kind in _kinds(module):
                name, bias = f"weight_{kind}{suffix}", f"bias_{kind}{suffix}"
                own = bias if getattr(module, bias, None) is not None else None
                weight = Weight(name, own, seen=Seen.REPLAY, label=name)
                found.append(row_wise(module, weight))
        return tuple(found)

    def geometry(self, module: nn.Module, weight: Weight | None = None) -> Geometry:
        own = self.weights(module)[0] if weight is None else weight
        rows, dim = named(module, own.name).shape
        return Geometry(rows, dim, groups=1, bias=own.bias_of(module) is not None)


def params_of(module: nn.Module) -> dict[str, Tensor]:
    """Weights and biases by name, whether they are parameters or computed.

    What computes them does so as in evaluation: spectral normalization would go on
    with its power iterations.
    """
    found = {}
    computing = getattr(module, "parametrizations", nn.ModuleDict()).modules()
    training = [each for each in computing if each.training]
    for each in training:
        each.training = False
    for suffix in chain.from_iterable(_suffixes(module)):
        for kind in _kinds(module):
            for name in (f"weight_{kind}{suffix}", f"bias_{kind}{suffix}"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    found[name] = tensor
    for each in training:
        each.training = True
    return found


@dataclass(frozen=True)
class Sequences:
    """A few sequences of a batch, as they entered the module.

    A cell's call is a sequence of one step. S sequences, T steps of the longest.

    Attributes:
        x: inputs ``(T, S, input_size)``, zero past the end of a sequence.
        states: the initial states, h and for an LSTM c, each
            ``(layers * directions, S, size)``; none where the call gave none.
        index: where the sequences lie in the batch dimension of the states.
        batched: whether the call had a batch dimension.
        places: int64 ``(T, S)`` on the CPU, where each step lies in the data of a
            `PackedSequence`, -1 past the end; None if the input was a tensor.
    """

    x: Tensor
    states: tuple[Tensor, ...]
    index: Tensor
    batched: bool = True
    places: Tensor | None = None

    @property
    def steps(self) -> int:
        """N, the time steps of all sequences together."""
        if self.places is None:
            return self.x.shape[:2].numel()
        return int((self.places >= 0).sum())


def batch_size(module: nn.Module, args: Sequence[Any], kwargs: _Kwargs) -> int:
    """How many sequences a call of the module has; one without a batch dimension."""
    return _extent(module, _arguments(args, kwargs)[0])[1]


def length(module: nn.Module, args: Sequence[Any], kwargs: _Kwargs) -> int:
    """T, the time steps of the longest sequence of a call; one for a cell."""
    return _extent(module, _arguments(args, kwargs)[0])[0]


@torch.no_grad()
def take_sequences(
    module: nn.Module, args: Sequence[Any], kwargs: _Kwargs, index: Tensor
) -> Sequences:
    """Copy some sequences of a call.

    Args:
        module: the layer or cell.
        args: what it was called with.
        kwargs: likewise, by name.
        index: int64 ``(S,)``, which sequences of the batch. Those of a
            `PackedSequence` count as they are packed, longest first; with an index
            on the CPU nothing waits for the device.
    """
    x, hx = _arguments(args, kwargs)
    places = None
    if isinstance(x, PackedSequence):
        batched, places = True, _places(x.batch_sizes, index.cpu())
        index = index.to(x.data.device)
        taken = _unpacked(x.data, places)
        if x.sorted_indices is not None:  # states are in the order before packing
            index = x.sorted_indices[index]
    else:
        batched, index = _batched(module, x), index.to(x.device)
        taken = _time_major(module, x, batched).index_select(1, index)
    states = tuple(_take_state(each, batched, index) for each in _as_tuple(hx))
    return Sequences(taken, states, index, batched, places)


def outputs_of(module: nn.Module, output: Any) -> list[Tensor]:
    """The tensors of the module's output that gradients arrive at.

    Returns:
        The output of the last layer (a packed one's data; a cell has none), the final
        h, and for an LSTM the final c.
    """
    if not isinstance(module, nn.RNNBase):
        return list(_as_tuple(output))
    out, states = output
    data = out.data if isinstance(out, PackedSequence) else out
    return [data, *_as_tuple(states)]


@torch.no_grad()
def take_grads(
    module: nn.Module, sequences: Sequences, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The sampled sequences' part of the gradients.

    Args:
        module: the layer or cell.
        sequences: what `take_sequences` returned.
        grads: of each of `outputs_of`, in its shape; None where no gradient came.

    Returns:
        For each the gradient ``(T, S, directions * size)`` of the output, zero past
        the end of a sequence, and ``(layers * directions, S, size)`` of a final
        state; None where none came.
    """
    outputs = int(isinstance(module, nn.RNNBase))  # in front of the states
    return [
        None
        if grad is None
        else _take_output(module, sequences, grad)
        if i < outputs
        else _take_state(grad, sequences.batched, sequences.index)
        for i, grad in enumerate(grads)
    ]


def replay(
    module: nn.Module,
    sequences: Sequences,
    grads: Sequence[Tensor | None],
    params: Mapping[str, Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the sequences again: inputs and output gradients of every weight's product.

    ``Y^T X`` is what the sequences add to the weight's gradient, and the sum of Y
    what they add to the bias's: exactly, but for dropout between layers, which is
    left out, so that no random number is drawn. The work is done in the dtype of the
    weights, whatever autocast says. It may be called within a backward pass.

    Args:
        module: the layer or cell; its own parameters are not read.
        sequences: what `take_sequences` returned.
        grads: what `take_grads` returned.
        params: the module's parameters by name.

    Returns:
        For the name of each weight ``(R, D)`` the inputs X ``(N, D)`` and the
        gradients Y ``(N, R)``, N being `Sequences.steps`. Steps come in the order
        in which the layer goes through them, all sequences of a step together.
    """
    products = _Products({k: p.detach() for k, p in params.items() if p is not None})
    device = sequences.x.device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        outputs = _run(module, sequences, products)
        ends = [
            torch.zeros_like(y) if grad is None else grad.to(y.dtype)
            for y, grad in zip(outputs, grads, strict=True)
        ]
        results = [y for calls in products.calls.values() for _, y in calls]
        found = torch.autograd.grad(outputs, results, ends)
    kept = None
    if sequences.places is not None:
        kept = (sequences.places.flatten() >= 0).nonzero().flatten().to(device)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        rows = torch.cat([part.detach().flatten(0, -2) for part in parts])
        return rows if kept is None else rows.index_select(0, kept)

    ys = iter(found)
    return {
        name: (joined([x for x, _ in calls]), joined([next(ys) for _ in calls]))
        for name, calls in products.calls.items()
    }


class _Products:
    """Products with weights; `calls` keeps the inputs and results of each weight."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """The product of ``weight_<name>`` and `x`, with its bias if it has one."""
        weight, bias = self.params[f"weight_{name}"], self.params.get(f"bias_{name}")
        # The first products depend on nothing that has a gradient.
        result = F.linear(x, weight, bias).requires_grad_()
        self.calls[f"weight_{name}"].append((x, result))
        return result


def _run(module: nn.Module, sequences: Sequences, products: _Products) -> list[Tensor]:
    """What the module computes of the sequences, as `take_grads` shapes it."""
    dtype = next(iter(products.params.values())).dtype
    x, *given = (tensor.to(dtype) for tensor in (sequences.x, *sequences.states))
    steps = torch.arange(len(x))[:, None]
    valid, reverse = None, len(x) - 1 - steps
    if sequences.places is not None:
        inside = sequences.places >= 0
        reverse = (inside.sum(0) - 1 - steps).where(inside, steps)
        valid = inside.unsqueeze(-1).to(x.device)
    reverse = reverse.unsqueeze(-1).to(x.device)
    finals: list[_State] = []
    for layer in _suffixes(module):
        outputs = []
        for suffix in layer:
            # Given states are in the order that final states come in.
            state = tuple(each[len(finals)] for each in given)
            if not state:
                weight = products.params[f"weight_hh{suffix}"]
                state = _zero_state(module, weight, batch=x.shape[1])
            order = reverse if suffix.endswith("_reverse") else None
            turned = _reordered(x, order)
            out, final = _scan(module, suffix, turned, state, valid, products)
            outputs.append(_reordered(out, order))
            finals.append(final)
        x = torch.cat(outputs, -1)
    states = [torch.stack(each) for each in zip(*finals, strict=True)]
    return [x, *states] if isinstance(module, nn.RNNBase) else states


def _scan(
    module: nn.Module,
    suffix: str,
    x: Tensor,
    state: _State,
    valid: Tensor | None,
    products: _Products,
) -> tuple[Tensor, _State]:
    """One layer in one direction: the output of every step, and the last state."""
    step, outputs = _STEPS[_mode(module)], []
    for t, ih in enumerate(products(f"ih{suffix}", x).unbind()):
        new = step(ih, products(f"hh{suffix}", state[0]), state)
        if "hr" in _kinds(module):
            new = (products(f"hr{suffix}", new[0]), *new[1:])
        if valid is not None:  # a sequence that has ended keeps its state
            pairs = zip(new, state, strict=True)
            new = tuple(now.where(valid[t], before) for now, before in pairs)
        state = new
        outputs.append(state[0])
    return torch.stack(outputs), state


def _lstm(x: Tensor, h: Tensor, state: _State) -> _State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: _State) -> _State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + (xz + hz).sigmoid() * (state[0] - n),)


_STEPS: dict[str, Callable[[Tensor, Tensor, _State], _State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda x, h, state: ((x + h).tanh(),),
    "RNN_RELU": lambda x, h, state: ((x + h).relu(),),
}
"""By torch's name of a mode: the parts of the gates and the state to the new state."""


def _mode(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase):
        return module.mode
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"


def _kinds(module: nn.Module) -> tuple[str, ...]:
    return ("ih", "hh", "hr") if getattr(module, "proj_size", 0) else ("ih", "hh")


def _suffixes(module: nn.Module) -> list[tuple[str, ...]]:
    """How names of parameters end: for each layer those of its directions."""
    if not isinstance(module, nn.RNNBase):
        return [("",)]
    directions = ("", "_reverse") if module.bidirectional else ("",)
    layers = range(module.num_layers)
    return [tuple(f"_l{layer}{way}" for way in directions) for layer in layers]


def _zero_state(module: nn.Module, weight: Tensor, batch: int) -> _State:
    """What a direction starts with, given its ``weight_hh``."""
    rows, size = weight.shape
    sizes = (size, rows // 4) if _mode(module) == "LSTM" else (size,)
    return tuple(weight.new_zeros(batch, size) for size in sizes)


def _reordered(x: Tensor, order: Tensor | None) -> Tensor:
    """``(T, S, F)`` with the steps in another order, ``(T, S or 1, 1)``."""
    return x if order is None else x.gather(0, order.expand_as(x))


def _arguments(args: Sequence[Any], kwargs: _Kwargs) -> tuple[Any, Any]:
    """The input and the initial states of a call."""
    named_args = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
    return named_args["input"], named_args.get("hx")


def _extent(module: nn.Module, x: Any) -> tuple[int, int]:
    """T and the batch size of an input."""
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    steps, batch, _ = _time_major(module, x, _batched(module, x)).shape
    return steps, batch


def _as_tuple(states: Any) -> _State:
    """States as a module takes and returns them, as a tuple; empty for None."""
    return (states,) if isinstance(states, Tensor) else tuple(states or ())


def _batched(module: nn.Module, x: Tensor) -> bool:
    return x.ndim == (3 if isinstance(module, nn.RNNBase) else 2)


def _layer_major(state: Tensor, batched: bool) -> Tensor:
    """A state as ``(layers * directions, B, size)``; a cell has one layer."""
    state = state if batched else state.unsqueeze(-2)
    return state.unsqueeze(0) if state.ndim == 2 else state


def _time_major(module: nn.Module, x: Tensor, batched: bool) -> Tensor:
    """An input or output as ``(T, B, F)``; a cell has one step."""
    first = batched and getattr(module, "batch_first", False)
    return x.transpose(0, 1) if first else _layer_major(x, batched)


def _take_state(state: Tensor, batched: bool, index: Tensor) -> Tensor:
    return _layer_major(state, batched).index_select(1, index)


def _take_output(module: nn.Module, sequences: Sequences, grad: Tensor) -> Tensor:
    if sequences.places is not None:
        return _unpacked(grad, sequences.places)
    grad = _time_major(module, grad, sequences.batched)
    return grad.index_select(1, sequences.index)


def _places(sizes: Tensor, index: Tensor) -> Tensor:
    """Where the steps of some sequences lie in packed data: ``(T, S)``, -1 for none.

    `sizes` are the sequences that have each step, `index` counts the longest first.
    """
    inside = index < sizes[:, None]
    places = (sizes.cumsum(0) - sizes)[:, None] + index
    return places.where(inside, -1)[inside.any(1)]


def _unpacked(data: Tensor, places: Tensor) -> Tensor:
    """Packed data at `places`, zero where there is none."""
    places = places.to(data.device)
    rows = data.index_select(0, places.clamp_min(0).flatten())
    placed: Tensor = rows.unflatten(0, places.shape)
    return placed.masked_fill(places.unsqueeze(-1) < 0, 0)
