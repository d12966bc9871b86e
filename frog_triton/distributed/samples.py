"""Samples on their way: what each rank brings of a layer, and who is sent what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..capture.calls import joined
from ..capture.capture import SampleCapture
from ..layers import ConvAdapter, LinearMap, MatrixMap
from ..linalg.rows import local, written_out
from ..model.plan import Layer
from ..step import Samples, no_samples
from ..unhooked import Known
from . import collectives
from .collectives import Spec
from .division import Division

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_DIMS = 4  # of one example of a convolution: channels and three axes


class _Header(NamedTuple):
    """What a rank tells the others of a layer, all in integers.

    Attributes:
        weight_grad: whether the weight has a gradient.
        bias_grad: whether the bias has one.
        called: whether a module of its was called since the last step.
        used: whether its gradient is not zero, where that matters.
        decided: whether this step shows if it is an output layer.
        output: whether it is.
        samples: n.
        positions: P.
        x_dtype: its place in `_DTYPES`.
        y_dtype: the same of Y.
        module: which of the layer's modules saw whole inputs; -1 where the samples are
            rows of X, written out.
        shape: of one example.
    """

    weight_grad: int
    bias_grad: int
    called: int
    used: int
    decided: int
    output: int
    samples: int
    positions: int
    x_dtype: int
    y_dtype: int
    module: int
    shape: tuple[int, ...]

    def pack(self) -> list[int]:
        return [*self[:-1], *self.shape, *(0,) * (_MAX_DIMS - len(self.shape))]

    @classmethod
    def unpack(cls, values: Sequence[int]) -> _Header:
        fixed = len(cls._fields) - 1
        shape = tuple(size for size in values[fixed:] if size)
        return cls._make([*values[:fixed], shape])


_WIDTH = len(_Header._fields) - 1 + _MAX_DIMS


@dataclass
class _LocalSamples:
    """Samples of one layer, of this rank, as they travel.

    Attributes:
        x: whole inputs, or rows of X.
        y: their output gradients ``(n, R, P)``.
        module: as in `_Header`.
    """

    x: Tensor
    y: Tensor
    module: int

    def written_out(self, layer: Layer) -> _LocalSamples:
        """The same, as rows of X."""
        if self.module < 0:
            return self
        use = layer.uses[self.module]
        map_ = use.adapter.linear_map(use.module, self.x, False)
        return _LocalSamples(map_.matrix().x, written_out(self.y), -1)


class SampleExchange:
    """Samples of all ranks for the rows of this one.

    Args:
        division: of the rows.

    Attributes:
        notice_bytes: that this rank sent, to all others, to say what it brings.
        sample_bytes: of samples that it sent, by layer.
    """

    def __init__(self, division: Division) -> None:
        self._division = division
        self._headers: dict[str, list[_Header]] = {}
        self._held: dict[str, _LocalSamples] = {}
        self._samples: dict[str, tuple[_Form, Tensor, Tensor]] = {}
        self.notice_bytes = 0
        self.sample_bytes: dict[str, int] = {}

    def agree(
        self,
        layers: Sequence[Layer],
        capture: SampleCapture,
        known: Known,
    ) -> Known:
        """Tell the others what this rank brings, and hear what they bring.

        Args:
            layers: all that are preconditioned, the same on all ranks.
            capture: holds this rank's samples.
            known: here.

        Returns:
            What is so on any rank.

        Raises:
            RuntimeError: a layer has a gradient on some ranks only; on all ranks.
        """
        self._held, self._samples, self.sample_bytes = {}, {}, {}
        headers = [[int(known.bad), *(0,) * (_WIDTH - 1)]]
        for layer in layers:
            held = _hold(layer, capture)
            if held is not None:
                self._held[layer.name] = held
            headers.append(_notice(layer, held, known).pack())
        values = torch.tensor(headers, dtype=torch.int64)
        heard = collectives.all_gather_ints(
            values, self._division.group, self._division.device(layers)
        )
        self.notice_bytes = 8 * values.numel() * (self._division.size - 1)
        first, *by_layer = zip(*heard.tolist(), strict=True)
        self._headers = {
            layer.name: [_Header.unpack(values) for values in ranks]
            for layer, ranks in zip(layers, by_layer, strict=True)
        }
        for name, ranks in self._headers.items():
            for rank, header in enumerate(ranks):
                if header[:2] != ranks[0][:2]:
                    raise RuntimeError(
                        f"{name} has a gradient on only one of ranks 0 and {rank}; "
                        "gradients must be averaged over all ranks before step()"
                    )

        def where(field: str) -> set[str]:
            headers = self._headers.items()
            return {n for n, ranks in headers if any(getattr(r, field) for r in ranks)}

        bad = any(values[0] for values in first)
        return Known(
            where("called"),
            where("samples"),
            where("used"),
            where("decided"),
            where("output"),
            bad,
        )

    def send(self, layers: Sequence[Layer]) -> None:
        """Send each rank X, and the columns of Y that belong to its rows.

        Args:
            layers: that have a gradient, the same on all ranks.
        """
        if not layers:
            return
        forms = {layer.name: _Form.of(self._headers[layer.name]) for layer in layers}
        outgoing: list[list[Tensor]] = [[] for _ in range(self._division.size)]
        incoming: list[list[Spec]] = [[] for _ in range(self._division.size)]
        for layer in layers:
            form = forms[layer.name]
            held = self._held.get(layer.name)
            if held is not None and form.module < 0:
                held = held.written_out(layer)
            mine = self._division.mine(layer)
            bytes_ = 0
            for rank, header in enumerate(self._headers[layer.name]):
                theirs = self._division.solved(layer, rank)
                if held is not None and theirs:
                    part = [
                        held.x.to(form.x_dtype),
                        held.y[:, theirs.start : theirs.stop].to(form.y_dtype),
                    ]
                    outgoing[rank] += part
                    if rank != self._division.rank:
                        bytes_ += sum(t.nbytes for t in part)
                if header.samples and mine:
                    incoming[rank] += form.specs(layer, header, len(mine))
            self.sample_bytes[layer.name] = bytes_
        received = collectives.all_to_all(
            outgoing, incoming, self._division.group, self._division.device(layers)
        )
        parts = [iter(tensors) for tensors in received]
        for layer in layers:
            mine = self._division.mine(layer)
            brought = [
                (next(parts[rank]), next(parts[rank]))
                for rank, header in enumerate(self._headers[layer.name])
                if header.samples and mine
            ]
            if brought:
                device = local(layer.weight).device
                x, y = (torch.cat(t).to(device) for t in zip(*brought, strict=True))
                self._samples[layer.name] = forms[layer.name], x, y
        self._held = {}

    def samples(self, layer: Layer, bias: bool, dtype: torch.dtype) -> Samples | None:
        """All ranks' samples for this rank's rows, or None if no rank has any.

        Args:
            layer: whose.
            bias: whether its bias takes part.
            dtype: of the momentum.
        """
        if not any(header.samples for header in self._headers[layer.name]):
            return None
        found = self._samples.pop(layer.name, None)
        if found is None:  # no row of it is solved here
            return no_samples(layer, bias, dtype, 0)
        form, x, y = found
        return form.map(layer, x, bias), y


@dataclass(frozen=True)
class _Form:
    """How all ranks send a layer's samples.

    Attributes:
        module: as in `_Header`.
        shape: of one example.
        x_dtype: of X.
        y_dtype: of Y.
    """

    module: int
    shape: tuple[int, ...]
    x_dtype: torch.dtype
    y_dtype: torch.dtype

    @classmethod
    def of(cls, headers: Sequence[_Header]) -> _Form:
        """Whole inputs if those of all ranks fit together, else rows of X."""
        bring = [header for header in headers if header.samples]
        shapes = {(header.module, header.shape) for header in bring}
        module, shape = shapes.pop() if len(shapes) == 1 else (-1, ())
        x_dtype = y_dtype = torch.float32
        for i, header in enumerate(bring):
            x, y = _DTYPES[header.x_dtype], _DTYPES[header.y_dtype]
            x_dtype = torch.promote_types(x_dtype, x) if i else x
            y_dtype = torch.promote_types(y_dtype, y) if i else y
        return cls(module, shape, x_dtype, y_dtype)

    def specs(self, layer: Layer, header: _Header, rows: int) -> list[Spec]:
        """Of X and Y that a rank sends for `rows` rows."""
        n, positions, shape = header.samples, header.positions, self.shape
        if self.module < 0:
            geometry = layer.geometry
            n, positions = n * positions, 1
            shape = (geometry.groups * geometry.dim,)
        return [((n, *shape), self.x_dtype), ((n, rows, positions), self.y_dtype)]

    def map(self, layer: Layer, x: Tensor, bias: bool) -> LinearMap:
        """Received samples as a linear map."""
        if self.module < 0:
            return MatrixMap(x, layer.geometry.groups, bias)
        use = layer.uses[self.module]
        return use.adapter.linear_map(use.module, x, bias)


def _hold(layer: Layer, capture: SampleCapture) -> _LocalSamples | None:
    """This rank's samples of a layer, whole inputs if they are of one shape."""
    calls = capture.calls(layer.name)
    if not calls:
        return None
    adapters = {call.adapter for call in calls}
    forms = {(layer.modules.index(c.module), c.x.shape[1:]) for c in calls}
    fits = len(forms) == 1 and calls[0].x.ndim <= _MAX_DIMS + 1
    if fits and all(type(adapter) is ConvAdapter for adapter in adapters):
        module = layer.modules.index(calls[0].module)
        ys = [call.y.flatten(2) for call in calls]
        return _LocalSamples(
            torch.cat([call.x for call in calls]), torch.cat(ys), module
        )
    map_, y = joined(layer.geometry, calls, False)
    x, groups = map_.matrix().x, layer.geometry.groups
    if map_.groups < groups:  # the same inputs for all
        x = x.repeat(1, groups)
    return _LocalSamples(x, written_out(y), -1)


def _notice(layer: Layer, held: _LocalSamples | None, known: Known) -> _Header:
    facts = (
        int(layer.weight.grad is not None),
        int(layer.bias is not None and layer.bias.grad is not None),
        int(layer.name in known.called),
        int(layer.name in known.used),
        int(layer.name in known.decided),
        int(layer.name in known.outputs),
    )
    if held is None:
        return _Header(*facts, 0, 0, 0, 0, -1, ())
    return _Header(
        *facts,
        held.x.shape[0],
        held.y.shape[2],
        _DTYPES.index(held.x.dtype),
        _DTYPES.index(held.y.dtype),
        held.module,
        tuple(held.x.shape[1:]),
    )
