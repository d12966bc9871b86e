"""Tuned configurations by key, and how a launcher asks for one.

A key is the kernel, its sizes as far as they tell kernels apart (`Kernel.tuned`), each
rounded up to a power of two so that a change of batch size does not call for new
tuning, and the dtypes it reads. A table belongs to one GPU and one version of Triton;
`using` says which table holds in a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch

from .config import Config, next_power_of_two

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Table:
    """What tuning found; never changes.

    Attributes:
        configs: a configuration for each key of `kernel_key`.
        formulations: ``"primal"`` or ``"gram"`` for each key of
            `frog_triton.solve.formulation.layer_key`.
    """

    configs: Mapping[str, Config] = field(default_factory=dict)
    formulations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies, so that a change of what was given cannot change the hash.
        object.__setattr__(self, "configs", dict(self.configs))
        object.__setattr__(self, "formulations", dict(self.formulations))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        parts = self.configs.items(), self.formulations.items()
        return hash(tuple(map(frozenset, parts)))

    def merged(self, other: Table) -> Table:
        """Both; where both have an entry, the other's."""
        return Table(
            {**self.configs, **other.configs},
            {**self.formulations, **other.formulations},
        )


_DEFAULTS = Table()
_ACTIVE: ContextVar[Table] = ContextVar("table", default=_DEFAULTS)


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Let launches in this context take their configurations from a table."""
    token = _ACTIVE.set(table)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> Table:
    """The table in force; empty where none is."""
    return _ACTIVE.get()


def tuned(
    kernel: str,
    default: C,
    sizes: Mapping[str, int],
    dtypes: Sequence[torch.dtype] = (),
    kind: str = "",
) -> C:
    """The table's configuration for a launch, else the default; it knows its key.

    Args:
        kernel: its name.
        default: its default.
        sizes: that matter to its speed, by letter.
        dtypes: of what it reads.
        kind: what else makes another kernel of it, such as how samples are addressed.
    """
    key = kernel_key(kernel, sizes, dtypes, kind)
    found = active().configs.get(key)
    # A table made by another version may hold another kind of configuration.
    chosen = found if type(found) is type(default) else default
    return replace(chosen, key=key)


def tuned_formulation(key: str) -> str | None:
    """The table's formulation for a layer, if it has one."""
    return active().formulations.get(key)


def kernel_key(
    kernel: str,
    sizes: Mapping[str, int],
    dtypes: Sequence[torch.dtype] = (),
    kind: str = "",
) -> str:
    """A kernel's name, sizes rounded up to powers of two, dtypes and kind."""
    name = kernel.strip("_").removesuffix("_kernel")
    rounded = [f"{letter}{next_power_of_two(size)}" for letter, size in sizes.items()]
    types = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " ".join([name, *rounded, *types, *([kind] if kind else [])])
