"""What a solve costs in each formulation, and which costs less.

The torch backend is counted from formulas. For the Triton backend the very launches of
a step are counted, with their precision, by `frog_triton.kernels.work`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..kernels.gpu import GPU, GPUS, detect
from ..kernels.table import Table, active, kernel_key, tuned_formulation, using
from ..kernels.work import Work, work
from ..linalg.precision import tf32_convolutions
from ..ops.backend import Backend
from . import FORMULATIONS, Batch
from .launches import Bucket, shape_of, step_launches


def layer_key(bucket: Bucket) -> str:
    """Sizes of layers of one geometry, rounded up, for their formulation."""
    shape = bucket.shape
    sizes = {"n": shape.samples, "r": shape.rows, "d": shape.dim, "g": shape.groups}
    kind = "matrix" if shape.conv is None else "images"
    sizes |= {"c": bucket.count, "k": bucket.iters}
    return kernel_key("layer", sizes, bucket.dtypes[:1], kind)


@dataclass(frozen=True)
class Count:
    """Arithmetic and memory traffic of the torch backend.

    Attributes:
        operations: floating-point operations, a multiply-add counted as two.
        elements: elements read from and written to memory.
    """

    operations: int
    elements: int

    @property
    def price(self) -> int:
        """Both in operations."""
        return self.operations + OPERATIONS_PER_ELEMENT * self.elements


# Operations that take a CPU core pair as long as moving one element: 100 GFLOP/s over
# 20 GB/s / 4 bytes = 20. In doubt the formulation with less arithmetic wins.
OPERATIONS_PER_ELEMENT = 32


def count_primal(n: int, d: int, r: int, iters: int) -> Count:
    """Count k forward and k - 1 adjoint products, with T and the vectors p, r, z.

    Args:
        n: samples, all positions counted.
        d: weights in a row, the bias included.
        r: rows.
        iters: CG iterations.
    """
    return Count(
        operations=(4 * iters - 2) * n * d * r,
        elements=(2 * iters - 1) * (n * d + 2 * n * r) + 7 * iters * d * r,
    )


def count_gram(n: int, d: int, r: int, groups: int, iters: int) -> Count:
    """Count K and C once, k products with K, and the last combination ``X^T u``.

    Args:
        n: samples, all positions counted.
        d: weights in a row, the bias included.
        r: rows.
        groups: groups, each with a K of its own.
        iters: CG iterations.
    """
    return Count(
        operations=2 * n * n * d * groups + 4 * n * d * r + 2 * iters * n * n * r,
        elements=3 * n * d * groups
        + groups * n * n * (iters + 1)
        + 8 * iters * n * r
        + 4 * d * r,
    )


@lru_cache(maxsize=4096)
def cheaper(
    n: int, d: int, r: int, iters: int, groups: int = 1, shared: float = 1.0
) -> str:
    """``"primal"`` or ``"gram"``, whichever costs torch's backend less.

    Args:
        n: samples, all positions counted.
        d: weights in a row, the bias included.
        r: rows.
        iters: CG iterations.
        groups: groups.
        shared: how much dearer Gram space may be.
    """
    primal = count_primal(n, d, r, iters).price
    gram = count_gram(n, d, r, groups, iters).price
    return "primal" if primal * shared <= gram else "gram"


def count_works(
    bucket: Bucket, formulation: str, orthogonalize: bool = False
) -> list[Work]:
    """What each launch of a step does, for layers of one geometry.

    Args:
        bucket: the layers.
        formulation: ``"primal"`` or ``"gram"``.
        orthogonalize: as for `FROG`; its own products are not counted here.
    """
    shape = bucket.shape
    if shape.volume and formulation == "primal":
        # Three dimensions have no kernel: torch's, counted from the formulas.
        done = count_primal(shape.samples, shape.row_length, shape.rows, bucket.iters)
        operations = bucket.count * done.operations
        return [Work(operations, operations, bucket.count * 4 * done.elements, 0)]
    launches = step_launches(bucket, formulation, orthogonalize)
    return [work(launch) for launch in launches]


@lru_cache(maxsize=4096)
def predict(
    bucket: Bucket, gpu: GPU, table: Table, allow_tf32: bool
) -> dict[str, float]:
    """Microseconds a step takes at least in each formulation: floors and launches.

    Args:
        bucket: the layers.
        gpu: whose rates.
        table: says into how many launches and splits a product falls.
        allow_tf32: what `tf32_convolutions` says now: it sets the price of images in
            float32.
    """
    times = {}
    for formulation in FORMULATIONS:
        with using(table):
            works = count_works(bucket, formulation)
        launches = sum(w.launches for w in works)
        times[formulation] = sum(w.floor(gpu) for w in works) + launches * gpu.launch_us
    return times


def choose(bucket: Bucket, gpu: GPU) -> str:
    """The formulation that was measured to be faster, or whose launches cost less.

    With more samples than weights in a row, Gram's coordinates are redundant and lose
    accuracy (measured: 9e-5 where the rows themselves have 7e-6 after three steps of a
    small net in float32), so the rows are solved for then.
    """
    if bucket.shape.samples > bucket.shape.row_length:
        return "primal"
    known = tuned_formulation(layer_key(bucket))
    if known is not None:
        return known
    times = predict(bucket, gpu, active(), tf32_convolutions())
    return min(times, key=lambda name: times[name])


def choose_formulation(backend: Backend, batch: Batch, iters: int) -> str:
    """``"primal"`` or ``"gram"``, whichever costs less.

    Args:
        backend: a module of `frog_triton.ops`.
        batch: prepared systems.
        iters: k.
    """
    shape = shape_of(batch)
    if not backend.GROUPS_LAYERS or shape.volume:
        n, d, r = shape.samples, shape.row_length, shape.rows
        return cheaper(n, d, r, iters, shape.groups)
    m = batch.ms[0].weight
    param = m if batch.grads is None else batch.grads[0].weight
    dtypes = (batch.xs[0].dtype, param.dtype, m.dtype)
    gpu = detect(m.device) or GPUS["h200"]
    bucket = Bucket(shape, len(batch.ms), iters, batch.nesterov, dtypes)
    return choose(bucket, gpu)
