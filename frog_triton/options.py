"""Options of FROG: their defaults, and what their values must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .capture.sampling import SAMPLINGS
from .fallback import FALLBACKS
from .linalg.rows import is_number
from .ops import BACKENDS
from .solve import FORMULATIONS

if TYPE_CHECKING:
    from .distributed.division import Group
    from .model.routing import Exclusion

ADAMW_LR = 3e-3
"""Of parameters that AdamW updates beside FROG, unless `fallback_lr` says otherwise."""

MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Check(NamedTuple):
    """What a value must be.

    Attributes:
        is_kind: whether a value is of the right kind; reads no tensor.
        kind_error: what the error says where it is not.
        in_range: whether each of its numbers may be what it is; reads it.
        range_error: what the error says where one may not; "" says the same.
    """

    is_kind: Callable[[Any], bool]
    kind_error: str
    in_range: Callable[[Any], bool] = lambda number: True
    range_error: str = ""

    def run(self, name: str, value: Any, may_read: Callable[[Any], bool]) -> None:
        """Raise ValueError for a value that does not pass.

        Args:
            name: of the option.
            value: its value.
            may_read: tells of each number whether to look at it.
        """
        if not self.is_kind(value):
            raise ValueError(f"{name} {self.kind_error.format(value)}")
        numbers = value if isinstance(value, tuple | list) else (value,)
        if not all(self.in_range(n) for n in numbers if may_read(n)):
            text = self.range_error or self.kind_error
            raise ValueError(f"{name} {text.format(value)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_pair(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(map(is_number, value))


def _one_of(choices: Sequence[Any]) -> Check:
    return Check(
        lambda value: value in choices, f"must be one of {choices}, got {{!r}}"
    )


_RATE = Check(
    is_number,
    "must be one number, got {!r}",
    lambda number: bool(0 <= number < math.inf),
    "must not be negative or infinite, got {}",
)
_FRACTION = Check(
    is_number,
    "must be one number in [0, 1), got {!r}",
    lambda number: bool(0 <= number < 1),
)
_COUNT = Check(_is_count, "must be a positive integer, got {!r}")
_FLAG = Check(lambda value: isinstance(value, bool), "must be True or False, got {!r}")

ENTRIES = {
    "lr": _RATE,
    "momentum": _FRACTION,
    "weight_decay": _RATE,
    "betas": _FRACTION._replace(
        is_kind=_is_pair, kind_error="must be two numbers in [0, 1), got {!r}"
    ),
    "eps": _RATE,
    "damping": Check(
        is_number,
        "must be positive and finite, got {!r}",
        lambda number: bool(0 < number < math.inf),
    ),
    "cg_iters": _COUNT,
    "nesterov": _FLAG,
    "orthogonalize": _FLAG,
    "capturable": _FLAG,
}
"""Of parameter groups."""

MAY_BE_MISSING = ("betas", "eps")
"""Of groups: those that are not AdamW's have none."""

CHECKS = ENTRIES | {
    "sampling": _one_of(tuple(SAMPLINGS)),
    "sample_size": _COUNT,
    "sample_steps": _COUNT,
    "seed": Check(
        lambda value: isinstance(value, Integral), "must be an integer, got {!r}"
    ),
    "exclude_output_layer": _FLAG,
    "fallback": _one_of(tuple(FALLBACKS)),
    "momentum_dtype": Check(
        lambda dtype: dtype is None or dtype in MOMENTUM_DTYPES,
        f"must be one of {MOMENTUM_DTYPES} or None, got {{!r}}",
    ),
    "formulation": _one_of(("auto", *FORMULATIONS)),
    "backend": _one_of(BACKENDS),
}


def check(**options: Any) -> None:
    """Raise ValueError for the first option that no step can use."""
    for name, value in options.items():
        CHECKS[name].run(name, value, lambda number: True)


def check_group(group: Mapping[str, Any], places: bool = True) -> None:
    """Raise ValueError for a group entry that no step can use.

    Args:
        group: its entries.
        places: whether tensors of a capturable group must lie with its parameters;
            if so, all tensors are read. Else those that the host would have to wait
            for are taken as they are.
    """
    for name in ENTRIES:
        if name not in group and name not in MAY_BE_MISSING:
            raise ValueError(f"{name} is missing: put it back into the group")
    if group["capturable"] and places:
        _check_places(group)

    def may_read(value: Any) -> bool:
        waits = isinstance(value, Tensor) and (group["capturable"] or not value.is_cpu)
        return places or not waits

    for name, entry in ENTRIES.items():
        if name in group:
            entry.run(name, group[name], may_read)


def _check_places(group: Mapping[str, Any]) -> None:
    """A tensor entry of a capturable group lies where its parameters do."""
    devices = {param.device for param in group["params"]}
    for name, value in group.items():
        if isinstance(value, Tensor) and {value.device} != devices:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"{name} is a tensor on {value.device}, but its parameters are on "
                f"{where}; with capturable=True move it there"
            )


def scalar(value: Any) -> Any:
    """A tensor of one number without dimensions, in the same memory; else the value."""
    if isinstance(value, Tensor) and value.ndim and value.numel() == 1:
        return value.view(())
    return value


@dataclass
class Options:
    """What holds for all groups of a FROG, which describes each option.

    Attributes:
        size: `sample_size`, or its default.

    Raises:
        ValueError: an option that no step can use.
    """

    sampling: str
    sample_size: int | None
    sample_steps: int
    fallback: str
    fallback_lr: float | Tensor | None
    momentum_dtype: torch.dtype | None
    formulation: str
    backend: str
    exclude: Sequence[Exclusion]
    exclude_output_layer: bool
    output_layers: Sequence[Exclusion] | None
    process_group: Group
    capturable: bool
    size: int = field(init=False)

    def __post_init__(self) -> None:
        """Check all, and bring them to one form."""
        check(sampling=self.sampling)
        default = SAMPLINGS[self.sampling]
        self.size = default if self.sample_size is None else self.sample_size
        check(sample_size=self.size, sample_steps=self.sample_steps)
        if self.sample_steps > 1 and self.sampling != "positions":
            raise ValueError(
                f"sample_steps={self.sample_steps} joins positions of several steps; "
                f"with sampling={self.sampling!r} leave it at 1"
            )
        names = ("fallback", "momentum_dtype", "formulation", "backend")
        check(exclude_output_layer=self.exclude_output_layer)
        check(**{name: getattr(self, name) for name in names})
        if self.output_layers is not None and not self.exclude_output_layer:
            raise ValueError(
                "output_layers names layers for the fallback, which "
                "exclude_output_layer=False keeps: leave one of them out"
            )
        self.fallback_lr = scalar(self.fallback_lr)
        self.exclude = _listed(self.exclude)
        if self.output_layers is not None:
            self.output_layers = _listed(self.output_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """What ranks that train together must have alike."""
        names = ("sampling", "formulation", "momentum_dtype")
        return {"sample_size": self.size} | {n: getattr(self, n) for n in names}

    def own_fallback_lr(self, lr: float | Tensor) -> float | Tensor:
        """`fallback_lr`, or its default.

        Args:
            lr: FROG's.
        """
        if self.fallback_lr is not None:
            return self.fallback_lr
        return lr if self.fallback == "sgd" else ADAMW_LR


def _listed(exclusions: Any) -> tuple[Exclusion, ...]:
    # What is no list at all is refused as an entry of one, where entries are read.
    alone = isinstance(exclusions, str | type) or not isinstance(exclusions, Iterable)
    return (exclusions,) if alone else tuple(exclusions)
