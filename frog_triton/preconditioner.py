"""From samples and momentum of a layer to its normalized direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .layers import Seen, adapter_for
from .layers.rows import named
from .linalg.numbers import Numbers
from .linalg.rows import Rows
from .ops.backend import Backend
from .options import check
from .solve import FORMULATIONS, Batch, Solution, prepared
from .solve.formulation import choose_formulation


def solve(
    backend: Backend,
    batch: Batch,
    *,
    cg_iters: int,
    formulation: str = "auto",
) -> Solution:
    """Solve the row systems of layers of one geometry.

    Args:
        backend: a module of `frog_triton.ops`.
        batch: the systems, samples as captured.
        cg_iters: k.
        formulation: ``"primal"``, ``"gram"`` or ``"auto"``.
    """
    batch = prepared(backend, batch)
    if formulation == "auto":
        formulation = choose_formulation(backend, batch, cg_iters)
    return FORMULATIONS[formulation](backend, batch, cg_iters)


@torch.no_grad()
def precondition(
    module: nn.Module,
    inputs: Tensor,
    output_grads: Tensor,
    momentum: Tensor,
    momentum_bias: Tensor | None = None,
    *,
    damping: float = 1.0,
    cg_iters: int = 4,
    formulation: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Direction of one layer from given samples, equation (2).

    It is ``z_j / sqrt(<z_j, m_j>)``, where ``z_j`` is the result of `cg_iters`
    conjugate-gradient iterations, from zero, on
    ``(X^T Lambda_j X + damping I) z_j = m_j`` with the normalized Fisher weights of
    equation (4). For authors of other optimizers: ``theta -= lr * direction`` is FROG
    with ``orthogonalize=False``.

    Args:
        module: a layer of a supported kind; only its geometry is used.
        inputs: the layer's input for the sampled examples.
        output_grads: the loss gradient at the layer's output for the same examples.
            Any common factor cancels.
        momentum: what to precondition, in the shape of ``module.weight``.
        momentum_bias: the same for the bias. None solves for the weight alone.
        damping: tau, added to the normalized Fisher (its mean diagonal is 1). The
            default is `FROG`'s; the paper advises 1e-6 to 1e-2.
        cg_iters: k; the paper advises 3 to 5.
        formulation: ``"primal"``, ``"gram"``, or ``"auto"``: whichever counts cheaper.
        backend: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        The direction shaped like ``module.weight`` and the one shaped like
        ``module.bias``, None without `momentum_bias`. float32, or float64 where
        `momentum` is float64. Rows without sampled gradient, or touched by samples
        that are not finite, get ``m_j / |m_j|``; rows with zero momentum get zeros.

    Raises:
        TypeError: no adapter serves the module.
        ValueError: an option, or a shape, that does not fit.

    Examples:
        >>> direction, direction_bias = frog_triton.precondition(
        ...     layer, inputs, output_grads, momentum, momentum_bias
        ... )
        >>> layer.weight.data.sub_(direction, alpha=lr)
    """
    check(damping=damping, cg_iters=cg_iters)
    check(formulation=formulation, backend=backend)
    adapter = adapter_for(module)
    kind = type(module).__name__
    if adapter is None:
        raise TypeError(
            f"{kind} has no adapter; register one with frog_triton.layers.register"
        )
    spec = adapter.weights(module)[0]
    if spec.seen is not Seen.CALL:
        raise TypeError(
            f"{kind} has several products inside; pass the layer of one of them"
        )
    weight, geometry = named(module, spec.name), adapter.geometry(module, spec)
    _check_shape(kind, "momentum", momentum, weight.shape)
    if momentum_bias is not None:
        if not geometry.bias:
            raise ValueError(f"{kind} has no bias: leave momentum_bias out")
        shape = torch.Size([geometry.rows])
        _check_shape(kind, "momentum_bias", momentum_bias, shape)
    inputs = adapter.batched(module, inputs)
    output_grads = adapter.batched(module, output_grads)
    dtype = torch.promote_types(momentum.dtype, torch.float32)
    x = adapter.linear_map(module, inputs, momentum_bias is not None)
    y = adapter.canonical(output_grads)
    expected = (x.samples, geometry.rows, x.positions)
    if tuple(y.shape) != expected:
        raise ValueError(
            f"{kind}: output_grads of shape {tuple(output_grads.shape)} do not belong "
            f"to inputs of shape {tuple(inputs.shape)}; pass the gradient of the loss "
            "at this layer's output for the same examples"
        )
    m = Rows(
        spec.axes.matrix(momentum.to(dtype)).contiguous(),
        None if momentum_bias is None else momentum_bias.to(dtype),
    )
    chosen = ops.resolve(backend, momentum.device, dtype)
    if x.samples * x.positions == 0:
        raise ValueError(f"{kind}: no samples; inputs has shape {tuple(inputs.shape)}")
    with torch.autocast(momentum.device.type, enabled=False):
        batch = Batch([x], [y], [m], numbers=Numbers(damping=damping))
        solution = solve(chosen, batch, cg_iters=cg_iters, formulation=formulation)
        z = solution.rows()
    direction = spec.axes.back(z.weight[0], weight)
    return direction, None if z.bias is None else z.bias[0]


def _check_shape(kind: str, name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{kind}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)} "
            "like the parameter it belongs to"
        )
