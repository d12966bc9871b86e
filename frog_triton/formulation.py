"""What a solve costs, counted from its sizes, and the formulation that costs less."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic.

    Attributes:
        operations: floating-point operations, a multiply-add counted as two.
        elements: elements read from and written to memory.
    """

    operations: int
    elements: int


# Operations that take as long as moving one element: float32 on a CPU core pair and
# bf16 on recent GPUs both lie within a factor of two or so (600 TFLOP/s over
# 3 TB/s / 4 bytes = 800; 100 GFLOP/s over 20 GB/s / 4 bytes = 20). Low on purpose: in
# doubt the formulation with less arithmetic wins.
OPERATIONS_PER_ELEMENT = 32


def primal_work(n: int, d: int, r: int, iters: int) -> Work:
    """Count k forward and k - 1 adjoint products, with T and the vectors p, r, z."""
    return Work(
        operations=(4 * iters - 2) * n * d * r,
        elements=(2 * iters - 1) * (n * d + 2 * n * r) + 7 * iters * d * r,
    )


def gram_work(n: int, d: int, r: int, groups: int, iters: int) -> Work:
    """Count K and C once, k products with K, and the last combination ``X^T u``.

    Args:
        n: samples.
        d: weights in a row.
        r: rows.
        groups: groups, each with a K of its own.
        iters: CG iterations.
    """
    return Work(
        operations=2 * n * n * d * groups + 4 * n * d * r + 2 * iters * n * n * r,
        elements=3 * n * d * groups
        + groups * n * n * (iters + 1)
        + 8 * iters * n * r
        + 4 * d * r,
    )


def choose_formulation(n: int, d: int, r: int, groups: int, iters: int) -> str:
    """``"primal"`` or ``"gram"``, whichever counts cheaper.

    Args:
        n: samples, all positions counted.
        d: weights in a row, the bias included.
        r: rows.
        groups: groups.
        iters: CG iterations.
    """
    primal, gram = primal_work(n, d, r, iters), gram_work(n, d, r, groups, iters)
    return "gram" if _price(gram) < _price(primal) else "primal"


def _price(work: Work) -> int:
    return work.operations + OPERATIONS_PER_ELEMENT * work.elements
