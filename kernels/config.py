"""A frozen configuration for each kernel: block sizes, warps, stages."""

from __future__ import annotations

from dataclasses import dataclass, field


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
        return {name: v for name, v in vars(self).items() if name != "key"}

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


def next_power_of_two(n: int) -> int:
    """No less than n; zero for zero."""
    return 0 if n <= 0 else 1 << (n - 1).bit_length()


def tile_side(n: int) -> int:
    """The next power of two, at least 16, the smallest side of a matrix product."""
    return max(16, next_power_of_two(n))
