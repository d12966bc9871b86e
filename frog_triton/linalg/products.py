"""Products of matrices on a CPU, by whichever of torch's libraries is quicker there."""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 2**20
"""Multiplications from which oneDNN is worth the 10 microseconds of its call."""

LONGEST, LONGEST_ROW = 192, 576
"""Terms that oneDNN may add up one after the other, fewer where a cut is no copy. MKL
cuts its sums, too; uncut, a direction's median error was half as large again."""


def on_host(tensor: Tensor) -> bool:
    """Whether reading a number of this tensor waits for nothing: on a CPU, no fake."""
    return tensor.is_cpu and type(tensor) is Tensor


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``A B^T``, in the precision of the dtype.

    torch multiplies float32 by MKL, which an AMD CPU runs at half the speed of its own
    vector units (measured: 110 of 250 GFLOP/s a core); oneDNN, with which it multiplies
    16-bit numbers, takes them whole. Both round as float32 does.

    Args:
        a: ``(..., m, k)``.
        b: ``(..., n, k)``, of any strides.
    """
    if not _by_onednn(a, b):
        return a @ b.mT
    if a.ndim == 2:
        terms = a.shape[1]
        longest = LONGEST_ROW if b.is_contiguous() else LONGEST
        cuts = range(0, terms, -(-terms // -(-terms // longest)))
        parts = [(a[:, i : i + cuts.step], b[:, i : i + cuts.step]) for i in cuts]
        total, *others = (_onednn(*part) for part in parts)
        for other in others:
            total += other
        return total
    return torch.stack([times_transposed(x, y) for x, y in zip(a, b, strict=True)])


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        b = b.contiguous()  # oneDNN reads others entry by entry
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


def plus_product(x: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta X + alpha A B`` of matrices, or of batches.

    Args:
        x: ``(..., m, n)``.
        a: ``(..., m, k)``.
        b: ``(..., k, n)``.
        beta: of x.
        alpha: of the product.
    """
    if _by_onednn(a, b.mT):
        return times_transposed(a, b.mT).mul_(alpha).add_(x, alpha=beta)
    fused = torch.addmm if x.ndim == 2 else torch.baddbmm
    return fused(x, a, b, beta=beta, alpha=alpha)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 run on units of their own, as on a GPU."""
    if device.type != "cpu":
        return True
    cpu = torch.cpu  # what it tells is older than the module's public names
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    large = a.shape[-2] * a.shape[-1] * b.shape[-2] >= LARGE
    return (
        large
        and a.dtype == torch.float32
        and a.is_cpu
        and a.ndim == b.ndim < 4
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
