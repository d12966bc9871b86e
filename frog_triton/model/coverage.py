"""How much of a model FROG preconditions, in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from .table import Route

_LONGEST = 200
"""Characters of a coverage line, beyond which groups are left out."""

_SHOWN = 3
"""Groups of a coverage line, at most."""

_WORTH_A_NAME = 0.01
"""Share of the parameters from which a group's largest tensor is named."""

_FAMILIES = {"embedding": "embeddings", "norm": "norms"}
"""By a part of a module kind's name: what all kinds with that part are called."""

_FALLBACKS = {"adamw": "AdamW", "sgd": "SGD"}


@dataclass(frozen=True)
class LeftOut:
    """Trainable parameters that FROG does not precondition, all for one reason.

    Attributes:
        what: the kind of their modules, or the reason.
        names: of the parameters, the largest first.
        parameters: their elements, summed.
        updated_by: the fallback's name.
    """

    what: str
    names: tuple[str, ...]
    parameters: int
    updated_by: str


@dataclass(frozen=True)
class Coverage:
    """How much of a model's trainable parameters FROG preconditions.

    Frozen parameters, and those that are not optimized, count in neither number.

    Attributes:
        tensors: preconditioned.
        all_tensors: trainable.
        parameters: elements of the preconditioned tensors.
        all_parameters: elements of the trainable tensors.
        left_out: what goes to the fallback, the largest group first.
        frozen: elements that take no gradient.
        not_optimized: other elements that no parameter group holds.
    """

    tensors: int
    all_tensors: int
    parameters: int
    all_parameters: int
    left_out: tuple[LeftOut, ...]
    frozen: int
    not_optimized: int

    @classmethod
    def of(cls, routes: Iterable[Route]) -> Self:
        """The coverage of a model, given the routes of all its parameters."""
        counted: dict[str, list[Route]] = {"frozen": [], "-": [], "frog": []}
        groups: dict[tuple[str, str], list[Route]] = {}
        for route in routes:
            if route.counts_as in counted:
                counted[route.counts_as].append(route)
            else:
                key = (_what(route.kind), route.updated_by)
                groups.setdefault(key, []).append(route)
        left = [
            LeftOut(what, _largest_first(some), _elements(some), updated_by)
            for (what, updated_by), some in groups.items()
        ]
        left.sort(key=lambda group: -group.parameters)
        own = counted["frog"]
        return cls(
            tensors=len(own),
            all_tensors=len(own) + sum(len(group.names) for group in left),
            parameters=_elements(own),
            all_parameters=_elements(own) + sum(group.parameters for group in left),
            left_out=tuple(left),
            frozen=_elements(counted["frozen"]),
            not_optimized=_elements(counted["-"]),
        )

    @property
    def share(self) -> float:
        """Of the trainable parameters, what is preconditioned; 0 if there are none."""
        return self.parameters / self.all_parameters if self.all_parameters else 0.0

    @property
    def low(self) -> bool:
        """Whether less than half of the trainable parameters is preconditioned.

        All trainable parameters count: embeddings and the output layer, too, so the
        line's groups say whether something is amiss or the model is mostly embeddings.
        """
        return self.share < 0.5 and self.all_parameters > 0

    def __str__(self) -> str:
        """One line, of about 200 characters at most."""
        most = min(_SHOWN, len(self.left_out))
        texts = (
            f"FROG preconditions {self._amount()}{self._left(shown)}{self._aside()}"
            for shown in range(most, min(most, 1) - 1, -1)
        )
        return min(texts, key=lambda text: max(0, len(text) - _LONGEST))

    def _amount(self) -> str:
        if not self.all_tensors:
            return "nothing: no parameter is trainable"
        part = f"{self.tensors or 'none'}" if self.left_out else "all"
        tensors = f"{part} of {self.all_tensors} tensors"
        share = percent(self.parameters, self.all_parameters)
        return f"{tensors}, {share} of {magnitude(self.all_parameters)} parameters"

    def _left(self, shown: int) -> str:
        if not self.left_out:
            return ""
        who = dict.fromkeys(
            _FALLBACKS.get(g.updated_by, g.updated_by) for g in self.left_out
        )
        told = [self._group(group) for group in self.left_out[:shown]]
        if other := sum(group.parameters for group in self.left_out[shown:]):
            told.append(f"other {percent(other, self.all_parameters)}")
        return f"; left to {' and '.join(who)}: {', '.join(told)}"

    def _group(self, group: LeftOut) -> str:
        told = f"{group.what} {percent(group.parameters, self.all_parameters)}"
        if group.parameters < _WORTH_A_NAME * self.all_parameters:
            return told
        more = ", ..." if len(group.names) > 1 else ""
        return f"{told} ({group.names[0]}{more})"

    def _aside(self) -> str:
        told = [("frozen", self.frozen), ("not in params", self.not_optimized)]
        return "".join(f"; {magnitude(n)} {what}" for what, n in told if n)


def tell(text: str) -> None:
    """Say something once where the user sees it.

    Goes to the logger ``"frog_triton"`` at level INFO if logging has been set up: if
    that logger or one above it has handlers. Otherwise it is a line on standard error.
    Either of these silences it::

        logging.getLogger("frog_triton").setLevel(logging.WARNING)
        logging.getLogger("frog_triton").addHandler(logging.NullHandler())

    Args:
        text: one line.
    """
    log = logging.getLogger("frog_triton")
    if log.hasHandlers():
        log.info(text)
        return
    # Where nothing is set up, the root logger's own level, WARNING, says nothing about
    # what the user wants; a level of this very logger does.
    unwanted = max(log.level, log.manager.disable + 1) > logging.INFO
    if not (unwanted or log.disabled):
        print(text, file=sys.stderr)


def percent(part: int, whole: int) -> str:
    """A share as text; ``"0%"`` and ``"100%"`` only where it is exactly that."""
    if part in (0, whole):
        return "100%" if part else "0%"
    share = 100 * part / whole
    if share < 0.1:
        return "<0.1%"
    return ">99.9%" if share > 99.9 else f"{share:.1f}%"


def magnitude(count: int) -> str:
    """A number as text: all digits up to a million, then three or four of them."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:,}"


def _what(kind: str) -> str:
    """What a group is called, given the reason why it is left out."""
    module = kind.removeprefix("no adapter for ")
    if module == kind:
        return kind
    found = (name for part, name in _FAMILIES.items() if part in module.lower())
    return next(found, module)


def _elements(routes: Iterable[Route]) -> int:
    return sum(route.parameters for route in routes)


def _largest_first(routes: Iterable[Route]) -> tuple[str, ...]:
    return tuple(r.name for r in sorted(routes, key=lambda r: -r.parameters))
