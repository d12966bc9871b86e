"""A frozen configuration for each kernel, and its default for given sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Config:
    """What every kernel has; subclasses add block sizes under the kernel's names.

    Attributes:
        num_warps: warps of a program.
        num_stages: of Triton's software pipeline.
        key: what it was asked for; see `table.tuned`.
    """

    num_warps: int = 4
    num_stages: int = 2
    key: str = field(default="", compare=False, kw_only=True)

    def values(self) -> dict[str, int]:
        """All that can be tuned, by name."""
        return {name: v for name, v in asdict(self).items() if name != "key"}

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {name: v for name, v in self.values().items() if name != "programs"}


@dataclass(frozen=True)
class SplitConfig(Config):
    """Of kernels that split a reduction where it is long.

    Attributes:
        programs: how many to split for. The default fills a large GPU about twice; it
            is a constant, so that results do not depend on the card.
    """

    programs: int = 256


@dataclass(frozen=True)
class SumConfig(Config):
    """`_sum_splits_kernel`."""

    BLOCK: int = 1024


@dataclass(frozen=True)
class LargestConfig(Config):
    """`_largest_kernel`."""

    num_warps: int = 8
    BLOCK: int = 4096


@dataclass(frozen=True)
class WeightsConfig(Config):
    """`_fisher_weights_kernel`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 32


@dataclass(frozen=True)
class ScaleConfig(SplitConfig):
    """`_row_scale_kernel`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 16


@dataclass(frozen=True)
class ProjectConfig(Config):
    """`_momentum_project_kernel`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 32
    BLOCK_D: int = 32


@dataclass(frozen=True)
class GramConfig(SplitConfig):
    """`_gram_kernel`."""

    BLOCK_N: int = 64
    BLOCK_D: int = 32


@dataclass(frozen=True)
class GramCGConfig(Config):
    """`_gram_cg_kernel` and `_gram_cg_tiled_kernel`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 16
    BLOCK_K: int = 64


@dataclass(frozen=True)
class UpdateConfig(Config):
    """`_update_kernel`."""

    BLOCK_N: int = 32
    BLOCK_R: int = 64
    BLOCK_D: int = 64
    GROUP_M: int = 1


@dataclass(frozen=True)
class GatherConfig(Config):
    """`_gather_kernel`."""

    BLOCK_D: int = 512


@dataclass(frozen=True)
class ForwardConfig(Config):
    """`_primal_forward_kernel`."""

    BLOCK_N: int = 64
    BLOCK_R: int = 32
    BLOCK_D: int = 32
    GROUP_M: int = 1


@dataclass(frozen=True)
class AdjointConfig(SplitConfig):
    """`_primal_adjoint_kernel`."""

    BLOCK_N: int = 32
    BLOCK_R: int = 64
    BLOCK_D: int = 64
    GROUP_M: int = 1


@dataclass(frozen=True)
class FinishConfig(Config):
    """`_primal_update_kernel`."""

    num_warps: int = 8
    BLOCK_R: int = 16
    BLOCK_D: int = 128


@dataclass(frozen=True)
class NormsConfig(Config):
    """`_row_norms_kernel`."""

    BLOCK_N: int = 16
    BLOCK_D: int = 128


RESIDENT_SAMPLES = 128
"""Up to so many samples the default keeps the vectors of CG in Gram space in registers.

A tuned configuration whose BLOCK_N is no less than N does so for more."""

# The defaults below were chosen by offline compilation for sm_80, 86, 89, 90, 100 and
# 120: they fit the smallest of them, and do not spill on 80, 90 and 100; on others the
# assembler at times sets two registers aside. Times were measured of `gram_cg` alone.


def weights_config(n: int) -> WeightsConfig:
    """All samples in one block up to 256, so that Y is read once."""
    block_n = min(power_of_two(n), 256)
    return WeightsConfig(BLOCK_N=block_n, BLOCK_R=max(16, 2048 // block_n))


def project_config(n: int) -> ProjectConfig:
    """Up to 128 samples beside a block of rows; without any, long pieces of rows."""
    if n == 0:
        return ProjectConfig(BLOCK_N=16, BLOCK_R=8, BLOCK_D=64)
    block_n = min(power_of_two(n), 128)
    if block_n <= 32:
        return ProjectConfig(BLOCK_N=block_n, BLOCK_R=16, num_stages=3)
    if block_n == 64:
        return ProjectConfig(num_warps=8)
    return ProjectConfig(BLOCK_N=block_n, BLOCK_D=16, num_warps=8)


def gram_config(n: int) -> GramConfig:
    """A single tile up to 64 samples."""
    return GramConfig(BLOCK_N=min(power_of_two(n), 64))


def gram_cg_config(n: int) -> GramCGConfig:
    """Resident up to `RESIDENT_SAMPLES`, tiled beyond.

    The tiles are the fastest of 11 measured on an H200 that do not spill.
    """
    block_n = power_of_two(n)
    if block_n > RESIDENT_SAMPLES:
        return GramCGConfig(BLOCK_N=128, BLOCK_R=32, BLOCK_K=32, num_warps=8)
    if block_n <= 64:
        return GramCGConfig(BLOCK_N=block_n, BLOCK_K=block_n)
    return GramCGConfig(BLOCK_N=block_n, BLOCK_K=16, num_warps=8)


def update_config(n: int) -> UpdateConfig:
    """Samples a piece at a time, to pipeline their loads."""
    return UpdateConfig(BLOCK_N=min(power_of_two(n), 32), num_stages=3)


def scale_config(n: int) -> ScaleConfig:
    """Tiles of samples by rows, of which a program sees many."""
    return ScaleConfig(BLOCK_N=min(power_of_two(n), 64), num_warps=8)


def forward_config(n: int, dim: int, kind: str) -> ForwardConfig:
    """Tiles of samples by rows; more rows where windows repeat each sample often.

    Args:
        n: samples.
        dim: weights in a row.
        kind: how samples are addressed: ``"matrix"``, ``"window"`` or ``"depthwise"``.
    """
    if kind == "depthwise":
        return ForwardConfig(BLOCK_N=min(power_of_two(n), 64), BLOCK_D=16)
    if n <= 32:
        return ForwardConfig(BLOCK_N=power_of_two(n), BLOCK_R=16)
    # Rows that do not begin at multiples of 16 bytes take more registers to load.
    if kind == "matrix":
        return ForwardConfig(BLOCK_N=32 if dim % 16 else 64, num_warps=8)
    stages, block_r = 2 if dim % 16 else 3, 32 if dim <= 64 else 64
    return ForwardConfig(num_warps=8, num_stages=stages, BLOCK_R=block_r)


def adjoint_config(n: int, depthwise: bool = False) -> AdjointConfig:
    """Tiles of rows by weights; of a depthwise layer, rows by one weight."""
    if depthwise:
        block_n = min(power_of_two(n), 64)
        return AdjointConfig(BLOCK_N=block_n, BLOCK_R=32, BLOCK_D=1)
    return AdjointConfig(BLOCK_N=min(power_of_two(n), 32), num_warps=8)


def gather_config(row: int) -> GatherConfig:
    """A row at a time, up to 1024 entries."""
    return GatherConfig(BLOCK_D=min(power_of_two(row), 1024))


def power_of_two(n: int) -> int:
    """The next power of two, at least 16, the smallest side of a matrix product."""
    return max(16, 1 << (n - 1).bit_length())
