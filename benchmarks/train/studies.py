"""Variants of FROG that answer one question each: ``bench train --study NAME``."""

from __future__ import annotations

from typing import Any

from .peers import PEERS, Peer

_FROG = PEERS["FROG"]
_EXAMPLES = PEERS["FROG examples"]


def _varied(base: Peer, option: str, label: str, values: tuple[Any, ...]) -> list[Peer]:
    return [base.with_options(f"{label} {v}", **{option: v}) for v in values]


STUDIES: dict[str, tuple[Peer, ...]] = {
    # How many samples, and of which kind.
    "samples": (
        *_varied(_EXAMPLES, "sample_size", "examples", (24, 32)),
        *_varied(_FROG, "sample_size", "positions", (32, 64, 128, 256, 512, 1024)),
    ),
    "iterations": tuple(_varied(_FROG, "cg_iters", "k =", (2, 3, 4, 5, 8, 16))),
    "damping": tuple(
        _varied(_FROG, "damping", "tau =", (1e-6, 1e-4, 1e-3, 1e-2, 1e-1))
    ),
    "momentum": tuple(_varied(_FROG, "momentum", "momentum", (0.8, 0.9, 0.95))),
    "nesterov": tuple(_varied(_FROG, "nesterov", "Nesterov", (False, True))),
    # One trajectory up to rounding, at different cost.
    "formulation": tuple(
        _varied(_FROG, "formulation", "formulation", ("primal", "gram"))
    ),
}
"""Who takes part, by the study's name."""
