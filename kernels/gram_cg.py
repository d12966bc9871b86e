"""Conjugate gradients in the coordinates ``v = s m + X^T u``, all iterations at once.

    X v     = s c + K u
    A v     : s' = tau s,  u' = Lambda * (X v) + tau u
    <v, m>  = s |m|^2 + <c, u>
    <v, v>  = s <v, m> + <u, X v>

The last adjoint is never formed: k - 1 products with K serve k iterations. Squares of p
come from those of r, to which the p before is orthogonal: ``|p|^2 = |r|^2 + beta^2
|p|^2``; as a sum of their own they would be all rounding where p is short beside m.

More than 400 lines: both ways to hold the vectors, with the recurrence they share.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.numbers import Numbers
from .common import DAMPING, load_scalar, problem_base, programs, sum_of_products
from .config import Config, tile_side
from .kernel import TILES, WARPS, Args, Kernel, Values, blocks, covering
from .launchers import PRECISION, by_group, stored
from .tables import numbers_on
from .work import Sizes

# Eight roundings of float32, 2^-20. A sum that much below its terms is all rounding.
ROUNDING: tl.constexpr = tl.constexpr(9.5367432e-07)


@triton.jit
def _step_length(rho, pap, active):
    """Alpha, and which rows still move: ``p^T A p`` must be positive."""
    active = active & (pap > 0)
    return tl.where(active, tl.div_rn(rho, tl.where(active, pap, 1.0)), 0.0), active


@triton.jit
def _next_direction(rho, s_r, mm, c_u, u_x, active):
    """``|r|^2``, beta, and which rows still move: the residual must exceed rounding."""
    rho_new = s_r * (s_r * mm + c_u) + u_x
    terms = tl.abs(s_r) * (tl.abs(s_r) * mm + tl.abs(c_u)) + tl.abs(u_x)
    active = active & (rho_new > terms * ROUNDING)
    beta = tl.div_rn(rho_new, tl.where(active, rho, 1.0))
    return rho_new, tl.where(active, beta, 0.0), active


@triton.jit
def _normalizer(s, c_u, m_squared, status):
    """``1 / sqrt(<z, m>)``, and s: one for rows on the identity Fisher."""
    s = tl.where(status == 0, s, 1.0)
    zm = s * m_squared + tl.where(status == 0, c_u, 0.0)
    usable = (zm > 0) & (zm < float("inf"))
    root = tl.sqrt_rn(tl.where(usable, zm, 1.0))
    return tl.where(usable, tl.div_rn(1.0, root), 0.0), s


@triton.jit
def _gram_cg_kernel(
    k_ptr,
    c_ptr,
    weights_ptr,
    m_squared_ptr,
    status_ptr,
    scalars_ptr,
    s_ptr,
    u_ptr,
    N,
    R,
    GROUPS,
    ITERS,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """All iterations of a block of rows, with every vector in registers.

    One block spans all N samples. Where K does not fit beside it (BLOCK_K < BLOCK_N),
    the product with K goes through `u_ptr` as scratch, BLOCK_K columns at a time, and c
    and Lambda are read again each time to make room.
    """
    program = programs(within)
    problem = program[1].to(tl.int64)
    damping = load_scalar(scalars_ptr, DAMPING)
    rows = program[0] * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    n = tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & row_ok[None, :]
    stride_n = R * GROUPS
    base = problem_base(problem, GROUPS, N, R)
    at = base + n[:, None].to(tl.int64) * stride_n + rows[None, :]
    k_ptr += problem * N * N

    mm = tl.load(m_squared_ptr + problem * R + rows, mask=row_ok, other=0.0)
    status = tl.load(status_ptr + problem * R + rows, mask=row_ok, other=1)
    c0 = tl.load(c_ptr + at, mask=mask, other=0.0)
    weights0 = tl.load(weights_ptr + at, mask=mask, other=0.0)

    zero = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    s = tl.zeros((BLOCK_R,), tl.float32)
    s_r = s + 1.0
    s_p = s + 1.0
    u, u_r, u_p, x_p = zero, zero, zero, c0
    rho, pp = mm, mm
    active = rho > 0
    for _ in range(ITERS - 1):
        if BLOCK_K == BLOCK_N:
            c, weights = c0, weights0
        else:
            c = tl.load(c_ptr + at, mask=mask, other=0.0)
            weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
        t = weights * x_p
        pap = sum_of_products(t, x_p, axis=0) + damping * pp
        alpha, active = _step_length(rho, pap, active)
        s += alpha * s_p
        u += alpha[None, :] * u_p
        s_r -= alpha * damping * s_p
        u_r -= alpha[None, :] * (t + damping * u_p)
        x_r = s_r[None, :] * c
        if BLOCK_K == BLOCK_N:
            k = tl.load(
                k_ptr + n[:, None] * N + n[None, :],
                mask=(n < N)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            x_r = tl.dot(k, u_r, acc=x_r, input_precision=PRECISION)
        else:
            tl.debug_barrier()
            tl.store(u_ptr + at, u_r, mask=mask)
            tl.debug_barrier()
            for start in range(0, N, BLOCK_K):
                kn = start + tl.arange(0, BLOCK_K)
                k = tl.load(
                    k_ptr + n[:, None] * N + kn[None, :],
                    mask=(n < N)[:, None] & (kn < N)[None, :],
                    other=0.0,
                )
                part = tl.load(
                    u_ptr + base + kn[:, None].to(tl.int64) * stride_n + rows[None, :],
                    mask=(kn < N)[:, None] & row_ok[None, :],
                    other=0.0,
                )
                x_r = tl.dot(k, part, acc=x_r, input_precision=PRECISION)
        c_u = sum_of_products(c, u_r, axis=0)
        u_x = sum_of_products(u_r, x_r, axis=0)
        rho, beta, active = _next_direction(rho, s_r, mm, c_u, u_x, active)
        pp = rho + beta * beta * pp
        s_p = s_r + beta * s_p
        u_p = u_r + beta[None, :] * u_p
        x_p = x_r + beta[None, :] * x_p

    if BLOCK_K == BLOCK_N:
        c, weights = c0, weights0
    else:
        c = tl.load(c_ptr + at, mask=mask, other=0.0)
        weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
    pap = sum_of_products(weights * x_p, x_p, axis=0) + damping * pp
    alpha, active = _step_length(rho, pap, active)
    s += alpha * s_p
    u += alpha[None, :] * u_p
    scale, s = _normalizer(s, sum_of_products(c, u, axis=0), mm, status)
    tl.store(s_ptr + problem * R + rows, s * scale, mask=row_ok)
    u = tl.where((status == 0)[None, :], u * scale[None, :], 0.0)
    tl.debug_barrier()
    tl.store(u_ptr + at, u, mask=mask)


@triton.jit
def _gram_cg_tiled_kernel(
    k_ptr,
    c_ptr,
    weights_ptr,
    m_squared_ptr,
    status_ptr,
    scalars_ptr,
    s_ptr,
    u_ptr,
    u_r_ptr,
    u_p_ptr,
    x_r_ptr,
    x_p_ptr,
    N,
    R,
    GROUPS,
    ITERS,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """The same for any N: vectors of length N live in scratch memory, tile by tile.

    A program touches only its own rows of the scratch, so it stays in the cache; the
    barriers order the program's own stores and loads.
    """
    program = programs(within)
    problem = program[1].to(tl.int64)
    damping = load_scalar(scalars_ptr, DAMPING)
    rows = program[0] * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < R
    stride_n = R * GROUPS
    base = problem_base(problem, GROUPS, N, R)
    k_ptr += problem * N * N
    c_ptr += base
    weights_ptr += base
    u_ptr += base
    u_r_ptr += base
    u_p_ptr += base
    x_r_ptr += base
    x_p_ptr += base
    mm = tl.load(m_squared_ptr + problem * R + rows, mask=row_ok, other=0.0)
    status = tl.load(status_ptr + problem * R + rows, mask=row_ok, other=1)

    zero_n = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        at = n[:, None] * stride_n + rows[None, :]
        mask = (n < N)[:, None] & row_ok[None, :]
        c = tl.load(c_ptr + at, mask=mask, other=0.0)
        tl.store(x_r_ptr + at, c, mask=mask)
        tl.store(x_p_ptr + at, zero_n, mask=mask)
        tl.store(u_ptr + at, zero_n, mask=mask)
        tl.store(u_r_ptr + at, zero_n, mask=mask)
        tl.store(u_p_ptr + at, zero_n, mask=mask)
    tl.debug_barrier()

    zero = tl.zeros((BLOCK_R,), tl.float32)
    s, s_r, s_p, beta = zero, zero + 1.0, zero, zero
    rho, pp = mm, zero
    active = rho > 0
    for iteration in range(ITERS):
        # p = r + beta p, and p^T A p.
        s_p = s_r + beta * s_p
        pp = rho + beta * beta * pp
        txp = zero
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            at = n[:, None] * stride_n + rows[None, :]
            mask = (n < N)[:, None] & row_ok[None, :]
            u_p = tl.load(u_p_ptr + at, mask=mask, other=0.0)
            u_p = tl.load(u_r_ptr + at, mask=mask, other=0.0) + beta[None, :] * u_p
            x_p = tl.load(x_p_ptr + at, mask=mask, other=0.0)
            x_p = tl.load(x_r_ptr + at, mask=mask, other=0.0) + beta[None, :] * x_p
            tl.store(u_p_ptr + at, u_p, mask=mask)
            tl.store(x_p_ptr + at, x_p, mask=mask)
            weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
            txp += sum_of_products(weights * x_p, x_p, axis=0)
        tl.debug_barrier()
        pap = txp + damping * pp
        alpha, active = _step_length(rho, pap, active)
        s += alpha * s_p
        s_r -= alpha * damping * s_p
        # z += alpha p, r -= alpha A p.
        c_u = zero
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            at = n[:, None] * stride_n + rows[None, :]
            mask = (n < N)[:, None] & row_ok[None, :]
            u_p = tl.load(u_p_ptr + at, mask=mask, other=0.0)
            u = tl.load(u_ptr + at, mask=mask, other=0.0) + alpha[None, :] * u_p
            tl.store(u_ptr + at, u, mask=mask)
            t = tl.load(weights_ptr + at, mask=mask, other=0.0)
            t *= tl.load(x_p_ptr + at, mask=mask, other=0.0)
            u_r = tl.load(u_r_ptr + at, mask=mask, other=0.0)
            u_r -= alpha[None, :] * (t + damping * u_p)
            tl.store(u_r_ptr + at, u_r, mask=mask)
            c = tl.load(c_ptr + at, mask=mask, other=0.0)
            c_u += sum_of_products(c, u_r, axis=0)
        tl.debug_barrier()
        if iteration < ITERS - 1:
            u_x = zero
            for start in range(0, N, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N).to(tl.int64)
                at = n[:, None] * stride_n + rows[None, :]
                mask = (n < N)[:, None] & row_ok[None, :]
                x_r = s_r[None, :] * tl.load(c_ptr + at, mask=mask, other=0.0)
                for k_start in range(0, N, BLOCK_K):
                    kn = k_start + tl.arange(0, BLOCK_K).to(tl.int64)
                    k = tl.load(
                        k_ptr + n[:, None] * N + kn[None, :],
                        mask=(n < N)[:, None] & (kn < N)[None, :],
                        other=0.0,
                    )
                    part = tl.load(
                        u_r_ptr + kn[:, None] * stride_n + rows[None, :],
                        mask=(kn < N)[:, None] & row_ok[None, :],
                        other=0.0,
                    )
                    x_r = tl.dot(k, part, acc=x_r, input_precision=PRECISION)
                tl.store(x_r_ptr + at, x_r, mask=mask)
                u_r = tl.load(u_r_ptr + at, mask=mask, other=0.0)
                u_x += sum_of_products(u_r, x_r, axis=0)
            tl.debug_barrier()
            rho, beta, active = _next_direction(rho, s_r, mm, c_u, u_x, active)

    c_u = zero
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        at = n[:, None] * stride_n + rows[None, :]
        mask = (n < N)[:, None] & row_ok[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0)
        c = tl.load(c_ptr + at, mask=mask, other=0.0)
        c_u += sum_of_products(c, u, axis=0)
    scale, s = _normalizer(s, c_u, mm, status)
    tl.store(s_ptr + problem * R + rows, s * scale, mask=row_ok)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        at = n[:, None] * stride_n + rows[None, :]
        mask = (n < N)[:, None] & row_ok[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0)
        u = tl.where((status == 0)[None, :], u * scale[None, :], 0.0)
        tl.store(u_ptr + at, u, mask=mask)


@dataclass(frozen=True)
class GramCGConfig(Config):
    """`GRAM_CG` and `GRAM_CG_TILED`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 16
    BLOCK_K: int = 64


RESIDENT_SAMPLES = 128
"""Up to so many samples the default keeps the vectors of CG in Gram space in registers.

A tuned configuration whose BLOCK_N is no less than N does so for more."""


def gram_cg_config(n: int) -> GramCGConfig:
    """Resident up to `RESIDENT_SAMPLES`, tiled beyond.

    The tiles are the fastest of 11 measured on an H200 that do not spill.
    """
    block_n = tile_side(n)
    if block_n > RESIDENT_SAMPLES:
        return GramCGConfig(BLOCK_N=128, BLOCK_R=32, BLOCK_K=32, num_warps=8)
    if block_n <= 64:
        return GramCGConfig(BLOCK_N=block_n, BLOCK_K=block_n)
    return GramCGConfig(BLOCK_N=block_n, BLOCK_K=16, num_warps=8)


def _count(s: Sizes) -> tuple[int, int]:
    operations = 2 * (s.args["ITERS"] - 1) * s.n * s.nr
    return operations, 4 * (s.nn + 3 * s.nr + 3 * s.rows)


def _count_tiled(s: Sizes) -> tuple[int, int]:
    operations, moved = _count(s)
    return operations, moved + 4 * 4 * s.nr  # scratch, written back once


def _again(s: Sizes, values: Values) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    repeats: int = s.args["ITERS"] - 1
    again = 4 * s.nn * (rows * repeats - 1.0)
    resident = values["BLOCK_N"] >= s.n and values["BLOCK_K"] >= values["BLOCK_N"]
    return again + (0 if resident else 4 * 4 * s.nr * repeats)


def _rule(values: Values, sizes: Mapping[str, int], kind: str) -> str | None:
    if values["BLOCK_K"] > values["BLOCK_N"]:
        return "BLOCK_K beyond BLOCK_N"
    if values["BLOCK_N"] > tile_side(sizes["n"]):
        return "BLOCK_N beyond the samples"
    return None


def _variant(kernel: Kernel, args: Args, values: Values) -> Kernel:
    return GRAM_CG if args["N"] <= values["BLOCK_N"] else GRAM_CG_TILED


GRAM_CG = Kernel(
    fn=_gram_cg_kernel,
    config=GramCGConfig,
    parts=covering("R"),
    count=_count,
    again=_again,
    values={
        "BLOCK_N": (*TILES, 256),
        "BLOCK_R": (16, 32),
        "BLOCK_K": TILES,
        "num_warps": WARPS,
    },
    tiles=(("BLOCK_N", "BLOCK_K"),),
    rule=_rule,
    variant=_variant,
)

GRAM_CG_TILED = replace(GRAM_CG, fn=_gram_cg_tiled_kernel, count=_count_tiled)


def gram_cg(
    k: Tensor,
    c: Tensor,
    weights: Tensor,
    m_squared: Tensor,
    status: Tensor,
    numbers: Numbers,
    iters: int,
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.gram_cg`; all iterations in one launch."""
    layers, groups, n, rows = c.shape
    c, weights = stored(c), stored(weights)
    s = torch.empty_like(m_squared)
    u = torch.empty_like(c)
    config = GRAM_CG.tuned(
        gram_cg_config(n), {"n": n, "r": rows, "p": layers * groups, "k": iters}
    )
    scratch = {}
    if n > config.BLOCK_N:
        names = ("u_r_ptr", "u_p_ptr", "x_r_ptr", "x_p_ptr")
        scratch = {name: torch.empty_like(c) for name in names}
    GRAM_CG.launch(
        config,
        layers * groups,
        k_ptr=k,
        c_ptr=c,
        weights_ptr=weights,
        m_squared_ptr=m_squared,
        status_ptr=status,
        scalars_ptr=numbers_on(numbers, c.device),
        s_ptr=s,
        u_ptr=u,
        **scratch,
        N=n,
        R=rows,
        GROUPS=groups,
        ITERS=iters,
        PRECISION=PRECISION,
    )
    return s, by_group(u, groups)
