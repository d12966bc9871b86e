"""``K = X X^T``, as the product ``K u`` of conjugate gradients reads it.

K needs float32's accuracy, and two terms of float16 have it (2^-22 of the largest
entry): with three of their four products CG is as close to float64 after k = 4
iterations as with float32, in ill-conditioned systems too, at half the price of tf32's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import SampleMap
from .common import layer_pointer, load_scale, power_of_two, programs
from .config import Config, SplitConfig, tile_side
from .kernel import STAGES, TILES, WARPS, Args, Kernel, Parts, Values, blocks, ceil_div
from .largest import largest_of
from .launchers import DTYPES, flat_samples
from .products import gram_precision, product
from .tables import Tables
from .work import Sizes


@triton.jit
def _tile_of_gram(
    x_ptr,
    i,
    j,
    N,
    begin,
    end,
    stride_xn,
    scale,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of samples i with samples j over columns from `begin` to `end`."""
    k = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < end
        xi = tl.load(
            x_ptr + i[:, None] * stride_xn + d[None, :],
            mask=(i < N)[:, None] & d_ok[None, :],
            other=0.0,
        )
        xj = tl.load(
            x_ptr + j[None, :] * stride_xn + d[:, None],
            mask=(j < N)[None, :] & d_ok[:, None],
            other=0.0,
        )
        if SCALED:
            xi = xi.to(tl.float32) * scale
            xj = xj.to(tl.float32) * scale
        k = product(xi, xj, k, PRECISION)
    return k


@triton.jit
def _gram_kernel(
    x_table_ptr,
    x_largest_table_ptr,
    k_ptr,
    N,
    D,
    GROUPS,
    PROBLEMS,
    split_length,
    stride_xn,
    ALIGN: tl.constexpr,
    X_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    within=None,
):
    """One tile of ``X X^T`` over one slice of D; one more everywhere with a bias.

    X is scaled, and so is that one. The scale is one in ordinary training; 16-bit
    samples then go from memory to the tensor cores as they are.
    """
    program = programs(within)
    blocks = tl.cdiv(N, BLOCK_N)
    problem = program[1].to(tl.int64)
    split = program[2].to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    i = (program[0] // blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    j = (program[0] % blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    x_ptr = layer_pointer(x_table_ptr, layer, X_DTYPE, ALIGN) + group * D
    scale = load_scale(x_largest_table_ptr, layer, group)

    begin = split * split_length
    end = tl.minimum(begin + split_length, D)
    if scale == 1.0:
        k = _tile_of_gram(
            x_ptr,
            i,
            j,
            N,
            begin,
            end,
            stride_xn,
            scale,
            False,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
    else:
        k = _tile_of_gram(
            x_ptr,
            i,
            j,
            N,
            begin,
            end,
            stride_xn,
            scale,
            True,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
    if HAS_BIAS:
        k += tl.where(split == 0, scale * scale, 0.0)
    at = (split * PROBLEMS + problem) * N * N + i[:, None] * N + j[None, :]
    tl.store(k_ptr + at, k, mask=(i < N)[:, None] & (j < N)[None, :])


@triton.jit
def _gram_terms_kernel(
    partial_ptr,
    high_ptr,
    low_ptr,
    scale_ptr,
    norms_ptr,
    N,
    PROBLEMS,
    SPLITS,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    within=None,
):
    """K of all slices, added up in order, in two terms at a scale; and its diagonal.

    The scale is the power of two that brings the largest ``|x|^2`` to between 1 and 2.
    No entry of K is larger. The diagonal, those ``|x|^2``, is as it is.
    """
    program = programs(within)
    problem = program[1].to(tl.int64)
    n = tl.arange(0, SIDE)
    norms = tl.zeros((SIDE,), tl.float32)
    for i in range(SPLITS):
        at = (i * PROBLEMS + problem) * N * N + n * (N + 1)
        norms += tl.load(partial_ptr + at, mask=n < N, other=0.0)
    scale = power_of_two(tl.max(norms, axis=0))
    if program[0] == 0:
        tl.store(norms_ptr + problem * N + n, norms, mask=n < N)
        tl.store(scale_ptr + problem, scale)

    entry = program[0] * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = entry < N * N
    k = tl.zeros((BLOCK,), tl.float32)
    for i in range(SPLITS):
        at = (i * PROBLEMS + problem) * N * N + entry
        k += tl.load(partial_ptr + at, mask=mask, other=0.0)
    k *= scale
    high = k.to(tl.float16)
    low = (k - high.to(tl.float32)).to(tl.float16)
    tl.store(high_ptr + problem * N * N + entry, high, mask=mask)
    tl.store(low_ptr + problem * N * N + entry, low, mask=mask)


@dataclass(frozen=True)
class GramConfig(SplitConfig):
    """`GRAM`."""

    BLOCK_N: int = 64
    BLOCK_D: int = 32


def gram_config(n: int) -> GramConfig:
    """A single tile up to 64 samples."""
    return GramConfig(BLOCK_N=min(tile_side(n), 64))


def _parts(args: Args, problems: int, values: Values) -> Parts:
    """Tiles of K, in pieces of no less than 256 columns where that fills the GPU."""
    dim, block = args["D"], values["BLOCK_D"]
    tiles = blocks(args["N"], values["BLOCK_N"]) ** 2
    splits = max(1, min(values["programs"] // (tiles * problems), dim // 256))
    length = ceil_div(ceil_div(dim, splits), block) * block
    splits = blocks(dim, max(length, 1))
    return [((tiles, problems, splits), {"split_length": length})]


def _count(s: Sizes) -> tuple[int, int]:
    splits = -(-s.args["D"] // max(1, s.args["split_length"])) or 1
    operations = 2 * s.n * s.n * s.args["D"] * s.problems
    return operations, s.x_entries * s.size("X_DTYPE") + 4 * splits * s.nn


def _again(s: Sizes, values: Values) -> float:
    tiles = blocks(s.n, values["BLOCK_N"])
    return s.x_entries * s.size("X_DTYPE") * (2.0 * tiles - 1)


GRAM = Kernel(
    fn=_gram_kernel,
    config=GramConfig,
    parts=_parts,
    count=_count,
    again=_again,
    values={
        "BLOCK_N": TILES,
        "BLOCK_D": TILES,
        "num_warps": WARPS,
        "num_stages": STAGES,
        "programs": (128, 256, 512),
    },
    accumulator=("BLOCK_N", "BLOCK_N"),
    tiles=(("BLOCK_N", "BLOCK_D"), ("BLOCK_N", "BLOCK_D")),
    loop="D",
)


@dataclass(frozen=True)
class TermsConfig(Config):
    """`GRAM_TERMS`."""

    BLOCK: int = 4096
    num_warps: int = 8


def _terms_parts(args: Args, problems: int, values: Values) -> Parts:
    return [((blocks(args["N"] ** 2, values["BLOCK"]), problems), {})]


def _count_terms(s: Sizes) -> tuple[int, int]:
    return 0, 4 * s.nn * (s.args["SPLITS"] + 1) + 4 * (s.n + 1) * s.problems


GRAM_TERMS = Kernel(
    fn=_gram_terms_kernel,
    config=TermsConfig,
    parts=_terms_parts,
    count=_count_terms,
)


@dataclass(frozen=True)
class GramTerms:
    """``K scale`` in two terms, and the diagonal of K, of every group of every layer.

    Attributes:
        high: float16 ``(L, groups, N, N)``.
        low: float16, what the first has left.
        scale: a power of two ``(L, groups)``.
        norms: ``|x|^2`` of each sample ``(L, groups, N)``.
    """

    high: Tensor
    low: Tensor
    scale: Tensor
    norms: Tensor


def gram(xs: Sequence[SampleMap]) -> GramTerms:
    """See `torch_ops.gram`; two launches."""
    x, samples = flat_samples(xs)
    layers, n, problems = len(xs), x.samples, len(xs) * x.groups
    sizes = {"n": n, "d": x.dim, "p": problems}
    config = GRAM.tuned(gram_config(n), sizes, (samples[0].dtype,))
    (((_, _, splits), _),) = _parts({"N": n, "D": x.dim}, problems, config.values())
    tables = Tables([samples, largest_of(xs)])
    partial = samples[0].new_empty(splits, layers, x.groups, n, n, dtype=torch.float32)
    GRAM.launch(
        config,
        problems,
        x_table_ptr=tables[0],
        x_largest_table_ptr=tables[1],
        k_ptr=partial,
        N=n,
        D=x.dim,
        GROUPS=x.groups,
        PROBLEMS=problems,
        stride_xn=samples[0].stride(0),
        ALIGN=tables.align,
        X_DTYPE=DTYPES[samples[0].dtype],
        HAS_BIAS=x.bias,
        PRECISION=gram_precision(samples[0].dtype),
    )
    high = torch.empty_like(partial[0], dtype=torch.float16)
    terms = GramTerms(
        high,
        torch.empty_like(high),
        partial.new_empty(layers, x.groups),
        partial.new_empty(layers, x.groups, n),
    )
    GRAM_TERMS.launch(
        TermsConfig(),
        problems,
        partial_ptr=partial,
        high_ptr=terms.high,
        low_ptr=terms.low,
        scale_ptr=terms.scale,
        norms_ptr=terms.norms,
        N=n,
        PROBLEMS=problems,
        SPLITS=splits,
        SIDE=tile_side(n),
    )
    return terms
