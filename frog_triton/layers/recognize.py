"""Whether a layer's own ``forward`` still is the linear map of its weight.

A subclass that overrides ``forward`` may compute anything. Most compute what their
parent does, and FROG can serve some of the others with the rows of ``X`` and the output
gradients as they are. Which it is shows in the numbers of one call: `recognize`
compares outputs at a few positions with

    output[n, j, p] = a_j <x[n, p], w_j> + b_j <x[n, p], 1> + bias_j

where a_j = 1 and b_j = 0, or else both are constants of the row that are fitted. Such
are layers that standardise their weight, scale it (equalized learning rate, gains), or
divide it by one norm (spectral normalization inside ``forward``).

There the gradient of an output by its row ``w_j`` is ``a_j x`` if a_j and b_j are
numbers, and ``a_j (I - projections) x`` if they are made of the row: onto its own
direction, onto the constant row. The factor cancels in the normalized Fisher matrix;
the projections are left out of it, and so is what a norm of the whole weight adds from
other rows. The bias is not scaled, but its coordinate stays 1 beside ``x``, not 1/a_j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import torch_ops
from .base import LayerAdapter
from .conv import ConvAdapter, SameConvAdapter
from .rows import Weight, named, owner

_POSITIONS = 64  # that are looked at, and up to four more at the ends
_ROWS = 64
# Outputs that must agree (where constants are fitted: of each row) to prove it.
_ENOUGH = 8

# Root mean square over positions of the difference in outputs of one row, each in
# parts of `_Sample.sizes`: three unit roundoffs of a 16-bit type, and 256 of the
# others, where the order of long sums shows. On a CPU at most 0.9 and 18 of them were
# measured, the weights made in steps that round too.
_TOLERANCES = {
    torch.float64: 256 * 2.0**-53,
    torch.float32: 256 * 2.0**-24,
    torch.float16: 3 * 2.0**-11,
    torch.bfloat16: 3 * 2.0**-8,
}
_TF32_TOLERANCE = 3 * 2.0**-11  # accelerators may round float32 factors to tf32

_OTHER_PADDINGS: dict[type[LayerAdapter], tuple[LayerAdapter, ...]] = {
    ConvAdapter: (SameConvAdapter(),)
}


def recognize(
    module: nn.Module, adapter: LayerAdapter, x: Tensor, y: Tensor
) -> LayerAdapter | str | None:
    """The adapter that serves a layer whose ``forward`` is its own, or why none does.

    Looks at up to 68 positions and about 64 rows of one call, in float64 on the host,
    and so waits for the device. What depends on the call (dropout that is not active,
    a branch not taken) does not show, nor does what the type of the products rounds
    away. Nothing is written, and no random numbers are drawn.

    Args:
        module: the layer, with the weights that the call has used.
        adapter: that serves layers of its parent's kind.
        x: the call's input, detached and batched.
        y: its output, detached and batched.

    Returns:
        The given adapter, or another if the padding is another; where both paddings
        are the same for inputs of this size, the given one. A string says why there is
        none. None says that this call proves nothing, since its values are not finite,
        or its outputs are few, or nothing but biases as with a weight of zeros: take no
        samples of it, and ask again at the next.
    """
    weight = adapter.weights(module)[0]
    form = "F.linear of" if named(module, weight.name).ndim < 3 else "a convolution by"
    if not y.numel():
        return None
    if not {x.dtype, y.dtype} <= _TOLERANCES.keys():
        return f"its forward is not {form} its weight: {x.dtype} in, {y.dtype} out"
    adapters = (adapter, *_OTHER_PADDINGS.get(type(adapter), ()))
    fitting = [a for a in adapters if _makes_shape(module, a, weight, x, y)]
    if not fitting:
        return f"its output does not have the shape of {form} its weight"
    samples = [_draw(module, a, weight, x, y) for a in fitting]
    for explain in (_as_it_is, _by_constants):
        for candidate, sample in zip(fitting, samples, strict=True):
            explained = explain(sample)
            if explained is not False:
                return candidate if explained else None
    return f"its forward is not {form} its weight, nor of its rows times constants"


@dataclass(frozen=True)
class _Sample:
    """A few outputs and what they should be made of, in float64 on the host.

    Attributes:
        x: rows of X, ``(groups, N, D)``, rounded to `dtype`.
        y: outputs ``(groups, N, R)``.
        w: rows of the weight ``(groups, R, D)``.
        bias: ``(groups, 1, R)``.
        dtype: of the products, as far as is known.
        tolerance: what rounding to it may do.
    """

    x: Tensor
    y: Tensor
    w: Tensor
    bias: Tensor
    dtype: torch.dtype
    tolerance: float

    def is_finite(self) -> bool:
        """Whether all that takes part is."""
        parts = (self.x, self.y, self.w, self.bias)
        return all(bool(part.isfinite().all()) for part in parts)

    def sizes(self, w: Tensor) -> Tensor:
        """Of numbers whose rounding is in the outputs, the summed squares.

        The D products, rounded independently, count as ``sum_d (x_d w_d)^2``; their sum
        and the bias as they are.
        """
        squares = self.x.square() @ w.square().mT + self.bias.square()
        sizes = squares + (self.x @ w.mT + self.bias).square()
        # Below a type's smallest normal number its rounding does not get finer.
        return sizes.clamp_min(max(torch.finfo(self.dtype).tiny ** 2, 1e-300))


def _as_it_is(sample: _Sample) -> bool | None:
    """Whether outputs are ``<x, w_j> + bias_j``; None if nothing is proven."""
    if not sample.is_finite():
        return None
    w = sample.w.to(sample.dtype).double()  # as autocast does
    sizes, products = sample.sizes(w), sample.x @ w.mT
    if not _agrees(sample, products, sizes):
        return False
    telling = _tells(sample, products, sizes).sum() * products.shape[1]
    return True if telling >= _ENOUGH else None


def _by_constants(sample: _Sample) -> bool | None:
    """Whether outputs are ``a_j <x, w_j> + b_j <x, 1> + bias_j``, by least squares."""
    norms = sample.x.norm(dim=2, keepdim=True)
    norms = torch.where(norms == 0, 1, norms)  # so that each position counts the same
    x, y = sample.x / norms, (sample.y - sample.bias) / norms
    # Centred rows span the same with the constant, and lose nothing to a large mean.
    w = sample.w - sample.w.mean(2, keepdim=True)
    by_row, by_one = x @ w.mT, x.sum(2, keepdim=True)
    free = by_row - by_one * _least_squares(by_one, by_row)
    a = _least_squares(free, y)
    b = _least_squares(by_one, y - a * by_row)
    fitted = a.mT * w + b.mT
    sizes = sample.sizes(fitted)
    if not _agrees(sample, sample.x @ fitted.mT, sizes):
        return False
    telling = _tells(sample, a * free * norms, sizes).any()
    return True if telling and x.shape[1] >= _ENOUGH else None


def _agrees(sample: _Sample, products: Tensor, sizes: Tensor) -> bool:
    """Whether all rows' outputs are these products and the bias, but for rounding."""
    errors = ((sample.y - sample.bias - products).square() / sizes).mean(1)
    return bool((errors <= sample.tolerance**2).all())


def _tells(sample: _Sample, part: Tensor, sizes: Tensor) -> Tensor:
    """In which rows a part of the outputs is well above rounding ``(groups, R)``."""
    return (part.square() / sizes).mean(1) > (4 * sample.tolerance) ** 2


def _least_squares(column: Tensor, y: Tensor) -> Tensor:
    """The factor of a column that leaves the least of ``y``, over the positions."""
    squares = column.square().sum(1, keepdim=True)
    return (column * y).sum(1, keepdim=True) / torch.where(squares == 0, 1, squares)


def _makes_shape(
    module: nn.Module, adapter: LayerAdapter, weight: Weight, x: Tensor, y: Tensor
) -> bool:
    """Whether the adapter's map takes such inputs and makes outputs of such a shape."""
    dimensions = named(module, weight.name).ndim
    if x.ndim != y.ndim or x.shape[0] != y.shape[0] or dimensions not in (2, x.ndim):
        return False
    geometry = adapter.geometry(module)
    map_ = adapter.linear_map(module, x[:1], bias=False)
    return (
        map_.dim == geometry.dim
        and map_.samples * map_.positions == adapter.positions(y)
        and map_.output_shape in ((), y.shape[2:])
        and y.shape[-1 if dimensions == 2 else 1] == geometry.rows
    )


def _draw(
    module: nn.Module, adapter: LayerAdapter, weight: Weight, x: Tensor, y: Tensor
) -> _Sample:
    """Positions and rows of a call, drawn evenly."""
    geometry = adapter.geometry(module)
    groups = _spread(geometry.groups, _ROWS)
    in_group = geometry.rows // geometry.groups
    rows = groups[:, None] * in_group + _spread(in_group, max(1, _ROWS // len(groups)))
    positions = adapter.positions(y)
    total = y.shape[0] * positions
    # Another padding mode shows in the corners alone.
    ends = torch.tensor([0, positions - 1, total - positions, total - 1])
    index = torch.cat([_spread(total, _POSITIONS), ends]).unique().to(y.device)
    w = named(module, weight.name).detach()
    dtype = _product_dtype(x, w, y)
    at = adapter.take_input_positions(module, x, y.shape, index, torch_ops)
    at = at.to(dtype).unflatten(1, (geometry.groups, -1))[:, groups.to(x.device)]
    outputs = adapter.take_output_positions(y, index)[:, rows.to(y.device)]
    matrix = weight.axes.matrix(w)[rows.to(w.device)]
    bias = _bias(module, weight)
    bias = matrix.new_zeros(rows.shape) if bias is None else bias[rows.to(bias.device)]
    wide = dtype == torch.float32 and y.device.type != "cpu"
    return _Sample(
        at.transpose(0, 1).cpu().double(),
        outputs.transpose(0, 1).cpu().double(),
        matrix.cpu().double(),
        bias.unsqueeze(1).cpu().double(),
        dtype,
        _TF32_TOLERANCE if wide else _TOLERANCES[dtype],
    )


def _spread(total: int, count: int) -> Tensor:
    """Up to `count` of the numbers below `total`: one from each of equal parts.

    Where in its part goes by multiples of the golden ratio, so that no period of an
    image's positions is met.
    """
    i = torch.arange(min(total, count), dtype=torch.float64)
    return ((i + i * 0.6180339887498949 % 1) * total / max(len(i), 1)).long()


def _product_dtype(*tensors: Tensor) -> torch.dtype:
    """The coarsest type that the products can have been made in."""
    dtypes = {tensor.dtype for tensor in tensors}
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        dtypes.add(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: _TOLERANCES[dtype])


def _bias(module: nn.Module, weight: Weight) -> Tensor | None:
    """The bias of the rows, be it a parameter or computed."""
    if weight.bias is None:
        return None
    held, name = owner(module, weight.bias)
    bias: Tensor | None = getattr(held, name, None)
    return None if bias is None else bias.detach()
