"""Conjugate gradients in Gram space, all iterations at once; see `gram_recurrence`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.numbers import Numbers
from .common import (
    DAMPING,
    below,
    layer_pointer,
    load_scalar,
    power_of_two,
    problem_base,
    programs,
    reciprocal,
    sum_of_products,
)
from .config import Config, tile_side
from .gram import GramTerms
from .gram_cg_tiled import _gram_cg_tiled_kernel
from .gram_recurrence import (
    factor_of,
    fisher_weights,
    next_direction,
    normalizer,
    step_length,
    terms_of,
)
from .kernel import TILES, WARPS, Args, Kernel, Parts, Values, blocks, ceil_div
from .launchers import DTYPES, by_group, stored
from .outputs import OutputPlace, load_outputs, output_gradients
from .tables import Tables, numbers_on
from .work import Sizes


@triton.jit
def _outputs(y_ptr, n, rows, mask, place):
    """``Y^T``."""
    return tl.trans(load_outputs(y_ptr, n, rows, tl.trans(mask), place))


@triton.jit
def _times_k(high, low, k_high, k_low, acc):
    acc = tl.dot(high, k_low, acc=acc)
    acc = tl.dot(low, k_high, acc=acc)
    return tl.dot(high, k_high, acc=acc)


@triton.jit
def _gram_cg_kernel(
    k_high_ptr,
    k_low_ptr,
    k_scale_ptr,
    norms_ptr,
    c_ptr,
    y_table_ptr,
    m_squared_ptr,
    scalars_ptr,
    s_ptr,
    u_ptr,
    status_ptr,
    N,
    R,
    GROUPS,
    ITERS,
    row_length,
    block_step,
    y_place,
    ALIGN: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """All iterations of blocks of rows, with every vector in registers.

    One block spans all N samples. A program sees to every `block_step`-th block of
    rows, and where K fits beside one (BLOCK_K = BLOCK_N) reads it once. Else the
    product with K goes through `u_ptr` as scratch, BLOCK_K columns at a time. Y and c
    are read again each time, which leaves room for the vectors; they are in the cache.
    """
    program = programs(within)
    y_place = OutputPlace(*y_place)
    problem = program[1].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    damping = load_scalar(scalars_ptr, DAMPING)
    n = tl.arange(0, BLOCK_N)
    n_ok = below(n, N, EVEN_N)
    stride_n = R * GROUPS
    base = problem_base(problem, GROUPS, N, R)
    c_ptr += base
    u_ptr += base
    m_squared_ptr += problem * R
    s_ptr += problem * R
    status_ptr += problem * R
    norms_ptr += problem * N
    k_high_ptr += problem * N * N
    k_low_ptr += problem * N * N
    k_scale = tl.load(k_scale_ptr + problem)
    y_ptr = layer_pointer(y_table_ptr, layer, Y_DTYPE, ALIGN)
    y_ptr += group * R * y_place.stride_r
    if BLOCK_K == BLOCK_N:
        k_at = n[:, None] * N + n[None, :]
        k_mask = n_ok[:, None] & n_ok[None, :]
        k_high = tl.load(k_high_ptr + k_at, mask=k_mask, other=0.0)
        k_low = tl.load(k_low_ptr + k_at, mask=k_mask, other=0.0)

    for block in tl.range(
        program[0], tl.cdiv(R, BLOCK_R), block_step, disable_licm=True
    ):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        row_ok = below(rows, R, EVEN_R)
        mask = row_ok[:, None] & n_ok[None, :]
        at = rows[:, None] + n[None, :] * stride_n
        mm = tl.load(m_squared_ptr + rows, mask=row_ok, other=0.0)

        # Squares of a tiny Y underflow, so each row is first brought near one.
        y = _outputs(y_ptr, n, rows, mask, y_place)
        y_scale = power_of_two(tl.max(tl.abs(y), axis=1))
        norms = tl.load(norms_ptr + n, mask=n_ok, other=0.0)
        scaled = y * y_scale[:, None]
        norms = tl.broadcast_to(norms[None, :], (BLOCK_R, BLOCK_N))
        trace = sum_of_products(scaled * scaled, norms, axis=1)
        factor, status = factor_of(trace, row_length)
        tl.store(status_ptr + rows, status, mask=row_ok)

        zero = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        s = tl.zeros((BLOCK_R,), tl.float32)
        s_r = s + 1.0
        s_p = s + 1.0
        u, u_r, u_p = zero, zero, zero
        x_p = tl.load(c_ptr + at, mask=mask, other=0.0)
        rho, pp, zm = mm, mm, mm * 0.0
        active = rho > 0
        # Y and c are read anew each time, which leaves registers to the vectors.
        for _ in tl.range(0, ITERS - 1, disable_licm=True):
            y = _outputs(y_ptr, n, rows, mask, y_place)
            t = fisher_weights(y, y_scale[:, None], factor[:, None]) * x_p
            pap = sum_of_products(t, x_p, axis=1) + damping * pp
            alpha, active = step_length(rho, pap, active)
            s += alpha * s_p
            zm += alpha * rho
            u += alpha[:, None] * u_p
            s_r -= alpha * damping * s_p
            u_r -= alpha[:, None] * (t + damping * u_p)
            u_scale = power_of_two(tl.max(tl.abs(u_r), axis=1))
            product = zero
            if BLOCK_K == BLOCK_N:
                high, low = terms_of(u_r, u_scale[:, None])
                product = _times_k(high, low, k_high, k_low, product)
            else:
                tl.debug_barrier()
                tl.store(u_ptr + at, u_r, mask=mask)
                tl.debug_barrier()
                for start in range(0, N, BLOCK_K):
                    kn = start + tl.arange(0, BLOCK_K)
                    k_at = kn[:, None] * N + n[None, :]
                    kn_ok = below(kn, N, EVEN_N)
                    k_mask = kn_ok[:, None] & n_ok[None, :]
                    part = tl.load(
                        u_ptr + rows[:, None] + kn[None, :] * stride_n,
                        mask=row_ok[:, None] & kn_ok[None, :],
                        other=0.0,
                    )
                    high, low = terms_of(part, u_scale[:, None])
                    product = _times_k(
                        high,
                        low,
                        tl.load(k_high_ptr + k_at, mask=k_mask, other=0.0),
                        tl.load(k_low_ptr + k_at, mask=k_mask, other=0.0),
                        product,
                    )
            c = tl.load(c_ptr + at, mask=mask, other=0.0)
            x_r = s_r[:, None] * c
            x_r += product * reciprocal(k_scale) * reciprocal(u_scale)[:, None]
            c_u = sum_of_products(c, u_r, axis=1)
            u_x = sum_of_products(u_r, x_r, axis=1)
            rho, beta, active = next_direction(rho, s_r, mm, c_u, u_x, active)
            pp = rho + beta * beta * pp
            s_p = s_r + beta * s_p
            u_p = u_r + beta[:, None] * u_p
            x_p = x_r + beta[:, None] * x_p

        y = _outputs(y_ptr, n, rows, mask, y_place)
        t = fisher_weights(y, y_scale[:, None], factor[:, None]) * x_p
        pap = sum_of_products(t, x_p, axis=1) + damping * pp
        alpha, active = step_length(rho, pap, active)
        s += alpha * s_p
        u += alpha[:, None] * u_p
        scale, s = normalizer(s, zm + alpha * rho, mm, status)
        tl.store(s_ptr + rows, s * scale, mask=row_ok)
        u = tl.where((status == 0)[:, None], u * scale[:, None], 0.0)
        tl.debug_barrier()
        tl.store(u_ptr + at, u, mask=mask)


@dataclass(frozen=True)
class GramCGConfig(Config):
    """`GRAM_CG` and `GRAM_CG_TILED`.

    Attributes:
        programs: how many to make where a program reads K once for all its blocks of
            rows. The default is two for each of an H200's processors, one where it
            holds no more.
    """

    BLOCK_N: int = 64
    BLOCK_R: int = 16
    BLOCK_K: int = 64
    programs: int = 264


RESIDENT_SAMPLES = 128
"""Up to so many samples both terms of K fit a program's shared memory by default."""

REGISTER_SAMPLES = 256
"""Up to so many samples the default keeps the vectors of CG in registers.

A tuned configuration whose BLOCK_N is less than N keeps them in scratch memory."""


def gram_cg_config(n: int) -> GramCGConfig:
    """K resident, then vectors in registers, then in scratch.

    Vectors of 128 samples and more leave the compiler too few registers. A prototype on
    an H200 was fastest so nevertheless, and twice as fast as vectors in scratch, whose
    tiles are the fastest of 11 that do not spill.
    """
    block_n = tile_side(n)
    if block_n > REGISTER_SAMPLES:
        return GramCGConfig(BLOCK_N=128, BLOCK_R=32, BLOCK_K=32, num_warps=8)
    if block_n > RESIDENT_SAMPLES:
        return GramCGConfig(BLOCK_N=block_n, BLOCK_R=32, num_warps=8)
    if block_n == RESIDENT_SAMPLES:
        return GramCGConfig(
            BLOCK_N=block_n, BLOCK_R=32, BLOCK_K=block_n, num_warps=8, programs=132
        )
    return GramCGConfig(BLOCK_N=block_n, BLOCK_K=block_n)


def _parts(args: Args, problems: int, values: Values) -> Parts:
    """Blocks of rows, or as many programs as see to several each."""
    count = blocks(args["R"], values["BLOCK_R"])
    even = {
        "EVEN_N": args["N"] % values["BLOCK_N"] == 0,
        "EVEN_R": args["R"] % values["BLOCK_R"] == 0,
    }
    if args["N"] > values["BLOCK_N"]:
        return [((count, problems), even)]
    step = count
    if values["BLOCK_K"] == values["BLOCK_N"]:
        step = min(count, max(1, values["programs"] // problems))
        step = ceil_div(count, ceil_div(count, step))
    return [((step, problems), {"block_step": step, **even})]


def _count(s: Sizes) -> tuple[int, int]:
    operations = 2 * (s.args["ITERS"] - 1) * s.n * s.nr
    y = s.nr * s.size("Y_DTYPE")
    return operations, y + 4 * (s.nn + 2 * s.nr + 3 * s.rows + (s.n + 1) * s.problems)


def _count_tiled(s: Sizes) -> tuple[int, int]:
    operations, moved = _count(s)
    return operations, moved + 4 * 4 * s.nr  # scratch, written back once


def _again(s: Sizes, values: Values) -> float:
    rows = blocks(s.args["R"], values["BLOCK_R"])
    repeats: int = s.args["ITERS"] - 1
    vectors = repeats * s.nr * (4 + s.size("Y_DTYPE"))  # c and Y
    if values["BLOCK_N"] < s.n:
        vectors += 4 * 4 * s.nr * repeats
    elif values["BLOCK_K"] == values["BLOCK_N"]:
        step = _parts(s.args, s.problems, values)[0][0][0]
        return float(4 * s.nn * (step - 1) + vectors)
    return float(4 * s.nn * (rows * repeats - 1) + vectors)


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
    parts=_parts,
    count=_count,
    again=_again,
    values={
        "BLOCK_N": (*TILES, 256),
        "BLOCK_R": (16, 32, 64),
        "BLOCK_K": TILES,
        "num_warps": WARPS,
        "programs": (132, 264, 528),
    },
    tiles=(("BLOCK_N", "BLOCK_K"),),
    rule=_rule,
    variant=_variant,
)

GRAM_CG_TILED = replace(GRAM_CG, fn=_gram_cg_tiled_kernel, count=_count_tiled)


def gram_cg(
    k: GramTerms,
    c: Tensor,
    ys: Sequence[Tensor],
    m_squared: Tensor,
    row_length: int,
    numbers: Numbers,
    iters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_ops.gram_cg`; all iterations in one launch."""
    layers, groups, n, rows = c.shape
    c = stored(c)
    ys = [output_gradients(y) for y in ys]
    if len({y.stride() for y in ys}) > 1:
        ys = [y.contiguous() for y in ys]
    y = ys[0]
    s = torch.empty_like(m_squared)
    u = torch.empty_like(c)
    status = torch.empty_like(m_squared, dtype=torch.int32)
    tables = Tables([ys])
    config = GRAM_CG.tuned(
        gram_cg_config(n),
        {"n": n, "r": rows, "p": layers * groups, "k": iters},
        (y.dtype,),
    )
    scratch = {}
    if n > config.BLOCK_N:
        names = ("u_r_ptr", "u_p_ptr", "x_r_ptr", "x_p_ptr")
        scratch = {name: torch.empty_like(c) for name in names}
    GRAM_CG.launch(
        config,
        layers * groups,
        k_high_ptr=k.high,
        k_low_ptr=k.low,
        k_scale_ptr=k.scale,
        norms_ptr=k.norms,
        c_ptr=c,
        y_table_ptr=tables[0],
        m_squared_ptr=m_squared,
        scalars_ptr=numbers_on(numbers, c.device),
        s_ptr=s,
        u_ptr=u,
        status_ptr=status,
        **scratch,
        N=n,
        R=rows,
        GROUPS=groups,
        ITERS=iters,
        row_length=row_length,
        y_place=OutputPlace.of(y),
        ALIGN=tables.align,
        Y_DTYPE=DTYPES[y.dtype],
        PRECISION="fp16x2",
    )
    return s, by_group(u, groups), status
