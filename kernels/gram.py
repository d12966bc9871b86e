"""``K = X X^T``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linalg.rows import SampleMap
from .common import layer_pointer, load_scale, programs
from .config import SplitConfig, tile_side
from .kernel import STAGES, TILES, WARPS, Args, Kernel, Parts, Values, blocks, ceil_div
from .largest import largest_of
from .launchers import DTYPES, PRECISION, flat_samples
from .splits import sum_splits
from .tables import Tables
from .work import Sizes


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

    X is scaled, and so is that one.

    Slices are summed in order by `_sum_splits_kernel`. 16-bit samples fit tf32 exactly,
    so their products need PRECISION no higher than that.
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

    k = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    begin = split * split_length
    end = tl.minimum(begin + split_length, D)
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
        xi = xi.to(tl.float32) * scale
        xj = xj.to(tl.float32) * scale
        k = tl.dot(xi, xj, acc=k, input_precision=PRECISION)
    if HAS_BIAS:
        k += tl.where(split == 0, scale * scale, 0.0)
    at = (split * PROBLEMS + problem) * N * N + i[:, None] * N + j[None, :]
    tl.store(k_ptr + at, k, mask=(i < N)[:, None] & (j < N)[None, :])


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


def gram(xs: Sequence[SampleMap]) -> Tensor:
    """See `torch_ops.gram`; one launch, two where D is split."""
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
        PRECISION=PRECISION if samples[0].dtype == torch.float32 else "tf32",
    )
    return sum_splits(partial)
