"""Conjugate gradients on the rows themselves.

Three launches an iteration (four where the positions are split), with nothing between
them: partial sums that one launch leaves behind are added up, in order, by whoever
needs them in the next. Scalars of rows have one slot an iteration: no program writes
what another may still read. Vectors are stored in the column order of `samples`.

With DEPTHWISE a row sees one channel, and no matrix product serves one channel: all
groups of a layer count as one problem, and taps are summed one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import Rows
from .common import DAMPING, load_scalar, ordered_sum
from .config import Config
from .samples import Samples

# (4 * 2^-23)^2: what is left of an exactly solved row is a few roundings of m.
FLOOR: tl.constexpr = tl.constexpr(2.2737368e-13)


@triton.jit
def step_length(
    scalars_ptr, pap_partial_ptr, pp_ptr, rho_ptr, active_ptr, blocks_n, total, at, mask
):
    """Alpha of the current iteration, ``rho`` and which rows still move."""
    damping = load_scalar(scalars_ptr, DAMPING)
    pap = ordered_sum(pap_partial_ptr, blocks_n, total, at, mask)
    pap += damping * tl.load(pp_ptr + at, mask=mask, other=0.0)
    rho = tl.load(rho_ptr + at, mask=mask, other=0.0)
    active = tl.load(active_ptr + at, mask=mask, other=0) != 0
    active = active & (pap > 0)
    alpha = tl.div_rn(rho, tl.where(active, pap, 1.0))
    return tl.where(active, alpha, 0.0), rho, active


@dataclass
class PrimalState:
    """Scratch memory of a solve.

    Attributes:
        samples: of the layers.
        forward: configuration of the forward products.
        adjoint: configuration of the adjoint products.
        ms: right-hand sides of each layer.
        scales: of their rows ``(L, R)``.
        status: of the rows ``(L, R)``.
        iteration: how many forward products have been made.
        directions: p of even and of odd iterations ``(L, R, D)``.
        factor: p in bfloat16 where the products with samples are, its rows with zeros
            behind them; else None.
        r: residuals.
        z: iterates.
        t: ``Lambda * (X p)`` ``(L, N, R)``, in the type of its next product.
        pap: partial sums of ``p^T Lambda p`` ``(blocks, L, R)``.
        rho_partial: partial sums of ``|r|^2`` ``(blocks, L, R)``.
        rho: ``|r|^2`` before each iteration ``(iters, L, R)``.
        active: rows that move, before and after each step length ``(2 iters, L, R)``.
        pp: ``|p|^2`` ``(L, R)``.
        zm: ``<z, m>`` so far ``(L, R)``.
        ap: partial ``X^T T`` where the positions are split ``(splits, L, R, D)``.
    """

    samples: Samples
    forward: Config
    adjoint: Config
    ms: Sequence[Rows]
    scales: Tensor
    status: Tensor
    iteration: int
    directions: tuple[Rows, Rows]
    factor: Tensor | None
    r: Rows
    z: Rows
    t: Tensor
    pap: Tensor
    rho_partial: Tensor
    rho: Tensor
    active: Tensor
    pp: Tensor
    zm: Tensor
    ap: Rows | None = None
