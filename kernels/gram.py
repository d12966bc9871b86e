"""``K = X X^T``."""

import triton
import triton.language as tl

from .common import layer_pointer, load_scale


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
):
    """One tile of ``X X^T`` over one slice of D; one more everywhere with a bias.

    X is scaled, and so is that one.

    Slices are summed in order by `_sum_splits_kernel`. 16-bit samples fit tf32 exactly,
    so their products need PRECISION no higher than that.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    problem = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    layer, group = problem // GROUPS, problem % GROUPS
    i = (tl.program_id(0) // blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
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
