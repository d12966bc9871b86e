"""What a step costs, counted from the very launches it would make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture.capture import SAMPLINGS
from .eager import eager_work
from .kernels.gpu import GPUS
from .kernels.work import Work
from .layers import ConvMap, LinearMap, Seen, adapter_for
from .linalg.rows import Rows
from .model.routing import Exclusion, route
from .solve.formulation import choose, count_works
from .solve.launches import Bucket, LayerShape, together
from .solve.orthogonal import orthogonalize as directions


@dataclass(frozen=True)
class LayerCost:
    """One line of a report; launches are those of all layers of its geometry.

    Attributes:
        layer: the layer.
        formulation: ``"primal"`` or ``"gram"``.
        shared_by: how many layers share the launches.
        launches: of the geometry.
        operations: of this layer.
        bytes: through device memory, of this layer.
        state_bytes: what the optimizer keeps for it.
        sample_bytes: what capture keeps for it between forward and step.
        floor_us: microseconds below which the GPU cannot do it.
    """

    layer: LayerShape
    formulation: str
    shared_by: int
    launches: int
    operations: int
    bytes: int
    state_bytes: int
    sample_bytes: int
    floor_us: float


@dataclass(frozen=True)
class Cost:
    """What the preconditioned layers of a model cost in a step.

    Attributes:
        layers: a line each.
        gpu: whose rates the floor is for.
        launches: in all.
        operations: in all.
        bytes: in all.
        state_bytes: in all.
        sample_bytes: in all.
        floor_us: sum of the floors.
    """

    layers: tuple[LayerCost, ...]
    gpu: str
    launches: int
    operations: int
    bytes: int
    state_bytes: int
    sample_bytes: int
    floor_us: float

    def __str__(self) -> str:
        """A table, with the totals in the last line."""
        lines = [
            f"{'layer':28} {'R':>6} {'D':>6} {'N':>6}  {'solve':7} "
            f"{'GFLOP':>8} {'MB':>8} {'floor us':>9}"
        ]
        for c in self.layers:
            s = c.layer
            lines.append(
                f"{s.name:28} {s.rows:6} {s.dim:6} {s.samples:6}  {c.formulation:7} "
                f"{c.operations / 1e9:8.2f} {c.bytes / 1e6:8.2f} {c.floor_us:9.1f}"
            )
        lines.append(
            f"total: {self.launches} launches, {self.operations / 1e9:.2f} GFLOP, "
            f"{self.bytes / 1e6:.1f} MB moved, {self.state_bytes / 1e6:.1f} MB state, "
            f"{self.sample_bytes / 1e6:.1f} MB samples, floor {self.floor_us:.0f} us "
            f"on {self.gpu} (datasheet rates; nothing was timed)"
        )
        return "\n".join(lines)


def cost(
    model_or_layers: nn.Module | Sequence[LayerShape],
    inputs: Any = None,
    *,
    sample_size: int | None = None,
    sampling: str = "positions",
    cg_iters: int = 4,
    nesterov: bool = True,
    orthogonalize: bool = True,
    formulation: str = "auto",
    sample_dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype = torch.float32,
    exclude: Sequence[Exclusion] = (),
    exclude_output_layer: bool = True,
    gpu: str = "h200",
) -> Cost:
    """Count what `FROG`'s step costs with the Triton backend; needs no GPU.

    The look at the gradients before a step is counted, and so are the operations of
    `orthogonalize`, which are torch's. The parameters of the fallback are not, nor is
    drawing the samples, which happens in the forward and backward passes.

    Args:
        model_or_layers: a model, or shapes of layers.
        inputs: a batch to run the model on once, for the positions of its layers; may
            be left out where ``sampling="positions"``.
        sample_size: as for `FROG`.
        sampling: as for `FROG`.
        cg_iters: as for `FROG`.
        nesterov: as for `FROG`.
        orthogonalize: as for `FROG`.
        formulation: as for `FROG`.
        sample_dtype: of activations and output gradients.
        param_dtype: of parameters and gradients.
        momentum_dtype: of the momentum.
        exclude: as for `FROG`.
        exclude_output_layer: as for `FROG`.
        gpu: a name of `frog_triton.kernels.gpu.GPUS`.

    Raises:
        ValueError: an unknown GPU or sampling, or a model whose positions are not
            known.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {tuple(GPUS)}, got {gpu!r}")
    if sampling not in SAMPLINGS:
        raise ValueError(
            f"sampling must be one of {tuple(SAMPLINGS)}, got {sampling!r}"
        )
    if isinstance(model_or_layers, nn.Module):
        size = sample_size or SAMPLINGS[sampling]
        model = model_or_layers
        plan = route(
            model, dict.fromkeys(model.parameters(), 0), exclude, exclude_output_layer
        )
        shapes = _shapes(model, plan.served(), inputs, size, sampling)
    else:
        shapes = list(model_or_layers)
    lines: dict[str, LayerCost] = {}
    dtypes = (sample_dtype, param_dtype, momentum_dtype)
    total = Work()
    floor = 0.0
    for members in together(shapes, lambda shape: shape, lambda shape: shape.groups):
        bucket = Bucket(members[0], len(members), cg_iters, nesterov, dtypes)
        chosen = choose(bucket, GPUS[gpu]) if formulation == "auto" else formulation
        works = count_works(bucket, chosen, orthogonalize)
        works += _beside_the_kernels(bucket, orthogonalize)
        done = sum(works, Work())
        time = sum(w.floor(GPUS[gpu]) for w in works)
        total, floor = total + done, floor + time
        count = len(members)
        for shape in members:
            entries = shape.rows * (shape.dim + shape.bias)
            kept = shape.samples * (shape.rows + shape.dim * shape.groups)
            if shape.image is not None and shape.conv is not None:
                kept = shape.samples * shape.rows + _images(shape)
            lines[shape.name] = LayerCost(
                shape,
                chosen,
                count,
                done.launches,
                done.operations // count,
                done.bytes // count,
                entries * momentum_dtype.itemsize,
                kept * sample_dtype.itemsize,
                time / count,
            )
    ordered = tuple(lines[shape.name] for shape in shapes)
    return Cost(
        ordered,
        gpu,
        total.launches,
        total.operations,
        total.bytes,
        sum(line.state_bytes for line in ordered),
        sum(line.sample_bytes for line in ordered),
        floor,
    )


def _beside_the_kernels(bucket: Bucket, orthogonalize: bool) -> list[Work]:
    """Torch's operations: the look at gradients, and orthogonalization."""
    shape, (_, param, momentum) = bucket.shape, bucket.dtypes

    def rows(*sizes: int, dtype: torch.dtype) -> Rows:
        weight = torch.empty(*sizes, shape.dim, dtype=dtype, device="meta")
        return Rows(weight, weight.new_empty(sizes) if shape.bias else None)

    entries = bucket.count * shape.rows * shape.row_length
    works = [Work(bytes=entries * param.itemsize, launches=1)]
    if orthogonalize:
        wide = torch.promote_types(momentum, torch.float32)
        z = rows(bucket.count, shape.rows, dtype=wide)
        finite = z.weight.new_empty(z.weight.shape[:2], dtype=torch.bool)
        works.append(eager_work(lambda: directions(z, finite, shape.groups)))
    return works


def _images(shape: LayerShape) -> int:
    """Entries of the sampled images."""
    assert shape.image is not None and shape.conv is not None
    one = ConvMap(torch.empty(1, *shape.image, device="meta"), shape.conv, False)
    return shape.samples // one.positions * math.prod(shape.image)


def _shapes(
    model: nn.Module, layers: Any, inputs: Any, size: int, sampling: str
) -> list[LayerShape]:
    """Shapes of a model's layers, those of their samples from one forward pass."""
    seen: dict[nn.Module, LinearMap] = {}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        adapter = adapter_for(module)
        assert adapter is not None
        x = adapter.input(module, args, {})
        x = adapter.batched(module, x)[:1].to("meta")
        seen.setdefault(module, adapter.linear_map(module, x, False))

    if inputs is not None:
        handles = [
            module.register_forward_hook(hook)
            for layer in layers
            if layer.uses[0].weight.seen is Seen.CALL
            for module in layer.modules
        ]
        try:
            with torch.no_grad():
                model(inputs)
        finally:
            for handle in handles:
                handle.remove()
    shapes = []
    for layer in layers:
        g = layer.geometry
        base = LayerShape(layer.name, g.rows, g.dim, size, g.groups, g.bias)
        if layer.uses[0].weight.seen is not Seen.CALL:  # always by position
            inside = size * (SAMPLINGS["positions"] // SAMPLINGS[sampling])
            base = replace(base, samples=inside)
        elif sampling == "examples":
            one = seen.get(layer.modules[0])
            if one is None and inputs is not None:
                continue  # not part of this forward pass
            if one is None:
                raise ValueError(
                    f"{layer.name}: how many positions an example has is not known; "
                    "pass inputs=, a batch to run the model on once"
                )
            base = replace(base, samples=size * one.samples * one.positions)
            if isinstance(one, ConvMap):
                base = replace(base, image=tuple(one.x.shape[1:]), conv=one.spec)
        shapes.append(base)
    return shapes
