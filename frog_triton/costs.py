"""What FROG costs in a training step, counted from what it would launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .capture.capture import SAMPLINGS
from .counting import CountedStep, sampled, stand_ins, without_memory
from .eager import Launched
from .kernels.gpu import GPUS, assuming
from .kernels.work import Work
from .layers import ConvMap, LinearMap, Seen, adapter_for
from .model.plan import Layer
from .model.routing import Exclusion, route
from .solve.formulation import choose
from .solve.launches import Bucket, LayerShape


@dataclass(frozen=True)
class LayerCost:
    """One line of a report.

    Attributes:
        layer: the layer.
        formulation: ``"primal"`` or ``"gram"``.
        shared_by: how many layers are of its geometry, and share their launches.
        launches: of the geometry; those of others may be parts of the same.
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
    """What the preconditioned layers of a model cost in a training step.

    Attributes:
        layers: a line each, for their solve and update.
        gpu: whose rates the floor is for.
        launched: launches by name: of kernels, of torch's operations, and copies from
            the host. Those of `layers` are among them, many as parts of one that serves
            several geometries, and those of `beside`.
        beside: launches that belong to no geometry: that draw ``"samples"`` in forward
            and backward passes, look at the ``"gradients"``, and bring ``"numbers"``
            such as the rate to the device.
        operations: in all.
        bytes: in all.
        state_bytes: in all.
        sample_bytes: in all.
        floor_us: sum of the floors.
    """

    layers: tuple[LayerCost, ...]
    gpu: str
    launched: Mapping[str, int]
    beside: Mapping[str, int]
    operations: int
    bytes: int
    state_bytes: int
    sample_bytes: int
    floor_us: float

    @property
    def launches(self) -> int:
        """In all."""
        return sum(self.launched.values())

    def __str__(self) -> str:
        """A table, with what there is beside the layers, and the totals at last."""
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
        beside = ", ".join(f"{count} for {what}" for what, count in self.beside.items())
        lines += [
            f"beside the layers: {beside}; the fallback is not counted",
            f"total: {self.launches} launches, {self.operations / 1e9:.2f} GFLOP, "
            f"{self.bytes / 1e6:.1f} MB moved, {self.state_bytes / 1e6:.1f} MB state, "
            f"{self.sample_bytes / 1e6:.1f} MB samples, floor {self.floor_us:.0f} us "
            f"on {self.gpu} (datasheet rates; nothing was timed)",
        ]
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
    """Count what `FROG` costs a training step with the Triton backend; needs no GPU.

    What is counted is a step itself, on tensors without memory: samples as hooks draw
    them in forward and backward, the look at the gradients, numbers and addresses that
    come from the host, and momentum, solve, orthogonalization and update of each
    geometry, with all that torch does between the kernels. The parameters of the
    fallback are not counted, nor is what is done once: state, and checks of the first
    calls.

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
        gpu: whose datasheet the floors are for: a name of
            `frog_triton.kernels.gpu.GPUS`, such as ``"h200"`` and ``"a100"``.

    Returns:
        What each layer costs, and all together. Printed, it is a table.

    Raises:
        ValueError: an unknown GPU or sampling, or a model whose positions are not
            known.

    Examples:
        >>> print(frog_triton.cost(model, sample_size=64))
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {tuple(GPUS)}, got {gpu!r}")
    if sampling not in SAMPLINGS:
        raise ValueError(
            f"sampling must be one of {tuple(SAMPLINGS)}, got {sampling!r}"
        )
    served: Iterable[tuple[LayerShape, Layer]]
    if isinstance(model_or_layers, nn.Module):
        size = sample_size or SAMPLINGS[sampling]
        model = model_or_layers
        plan = route(
            model, dict.fromkeys(model.parameters(), 0), exclude, exclude_output_layer
        )
        shapes = _shapes(model, plan.served(), inputs, size, sampling)
        served = [(shape, plan.layers[shape.name]) for shape in shapes]
    else:
        shapes = list(model_or_layers)
        served = zip(shapes, stand_ins(shapes), strict=True)
    dtypes = (sample_dtype, param_dtype, momentum_dtype)
    group = {
        "momentum": 0.9,
        "damping": 1.0,
        "lr": 2e-2,
        "weight_decay": 1e-2,
        "nesterov": nesterov,
        "cg_iters": cg_iters,
        "orthogonalize": orthogonalize,
    }
    shaped = [(shape, without_memory(x, param_dtype)) for shape, x in served]
    step = CountedStep(shaped, dtypes, group)
    lines: dict[str, LayerCost] = {}
    for members in step.geometries():
        count, shape = len(members), step.shape(members[0])
        bucket = Bucket(shape, count, cg_iters, nesterov, dtypes)
        chosen = choose(bucket, GPUS[gpu]) if formulation == "auto" else formulation
        done, floor = _summed(step.solve(members, chosen), gpu)
        for member in members:
            shape = step.shape(member)
            lines[shape.name] = LayerCost(
                shape,
                chosen,
                count,
                done.launches,
                done.operations // count,
                done.bytes // count,
                shape.rows * shape.row_length * momentum_dtype.itemsize,
                sum(sampled(shape)) * sample_dtype.itemsize,
                floor / count,
            )
    with assuming(GPUS[gpu]):
        everything = step.solve(None, formulation)
    beside = step.beside()
    everything += chain(*beside.values())
    total, floor = _summed(everything, gpu)
    ordered = tuple(lines[shape.name] for shape in shapes)
    return Cost(
        ordered,
        gpu,
        Counter(launched.name for launched in everything),
        {what: len(launched) for what, launched in beside.items()},
        total.operations,
        total.bytes,
        sum(line.state_bytes for line in ordered),
        sum(line.sample_bytes for line in ordered),
        floor,
    )


def _summed(everything: Sequence[Launched], gpu: str) -> tuple[Work, float]:
    """All launches together, and the sum of their floors."""
    works = [launched.work for launched in everything]
    return sum(works, Work()), sum(work.floor(GPUS[gpu]) for work in works)


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
