"""Variants of FROG that answer one question each: ``bench train --study NAME``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ... import FROG
from .peers import PEERS, Peer, frog_then_sgd

# The studies below compare variants of the published method, and of what became the
# default; these were their settings.
_EXAMPLES = PEERS["FROG paper"]
_FROG = _EXAMPLES.with_options("FROG", sampling="positions")
_ORTHOGONAL = PEERS["FROG"].with_options(
    "FROG orthogonal", damping=1e-4, fallback="sgd", fallback_lr=6e-2
)
_DEFAULT = PEERS["FROG"]
_MUON = PEERS["Muon"]


def _varied(base: Peer, option: str, label: str, values: tuple[Any, ...]) -> list[Peer]:
    return [base.with_options(f"{label} {v}", **{option: v}) for v in values]


def _grow_damping(optimizer: Any, done: float) -> None:
    """From 1e-4 to 0.1, in equal factors."""
    optimizer.param_groups[0]["damping"] = 1e-4 * 1e3**done


def _raise_damping(optimizer: Any, done: float) -> None:
    """From 1 to 100, in equal factors: less and less of the Fisher."""
    optimizer.param_groups[0]["damping"] = 100**done


def _every_second(optimizer: Any, done: float) -> None:
    """The Fisher in every second step only: in the others damping drowns it."""
    group = optimizer.param_groups[0]
    group["damping"] = 1.0 if group["damping"] != 1.0 else 1e6


def _tied(model: nn.Module, lr: float, **options: Any) -> FROG:
    """AdamW's rate follows: 3e-3 where FROG's is 0.06, as the default is there."""
    return FROG(model, lr, fallback_lr=lr / 20, **options)


def _hand_over(optimizer: Any, done: float) -> None:
    """At two thirds of the steps."""
    if done >= 2 / 3 and optimizer.turn == 0:
        optimizer.hand_over()


STUDIES: dict[str, tuple[Peer, ...]] = {
    # How many samples, and of which kind.
    "samples": (
        *_varied(_EXAMPLES, "sample_size", "examples", (24, 32)),
        *_varied(_FROG, "sample_size", "positions", (32, 64, 128, 256, 512, 1024)),
    ),
    # What fewer samples cost in quality, under the defaults.
    "sample-size": tuple(
        variant
        for label in ("FROG", "FROG plain")
        for variant in _varied(
            PEERS[label], "sample_size", f"{label}, N =", (64, 128, 256)
        )
    ),
    "examples": tuple(_varied(_EXAMPLES, "sample_size", "r =", (8, 16, 32, 64))),
    "iterations": tuple(_varied(_FROG, "cg_iters", "k =", (2, 3, 4, 5, 8, 16))),
    "damping": (
        *_varied(_FROG, "damping", "tau =", (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)),
        replace(_FROG, name="tau grows, 1e-4 to 0.1", adjust=_grow_damping),
        *_varied(_ORTHOGONAL, "damping", "orthogonal, tau =", (1e-4, 1e-2, 1.0)),
    ),
    # What damping the defaults want, with and without orthogonalization.
    "safe-damping": tuple(
        variant
        for label in ("FROG", "FROG plain")
        for variant in _varied(
            PEERS[label], "damping", f"{label}, tau =", (1e-4, 1e-2, 1e-1, 1.0, 10.0)
        )
    ),
    # Who sees to the rest of the net.
    "fallback": (
        *_varied(_DEFAULT, "fallback_lr", "AdamW at", (1e-3, 3e-3, 1e-2)),
        _DEFAULT.with_options("SGD at 0.06", fallback="sgd", fallback_lr=6e-2),
        _DEFAULT.with_options("output layer, too", exclude_output_layer=False),
    ),
    "momentum": (
        *_varied(_FROG, "momentum", "momentum", (0.8, 0.9, 0.95)),
        *(
            _FROG.with_options(f"Nesterov {beta}", momentum=beta, nesterov=True)
            for beta in (0.8, 0.9, 0.95)
        ),
    ),
    # The paper leaves the output layer to the fallback.
    "output-layer": tuple(
        peer.with_options(name, exclude_output_layer=not included)
        for peer, label in ((_FROG, "FROG"), (_ORTHOGONAL, "orthogonal"))
        for included, name in (
            (False, label),
            (True, f"{label}, output layer, too"),
        )
    ),
    # Beside Muon, at the same momenta.
    "orthogonal": (
        _FROG,
        _FROG.with_options("FROG, Nesterov", nesterov=True),
        *_varied(_MUON, "momentum", "Muon, momentum", (0.9, 0.95)),
        *_varied(_ORTHOGONAL, "momentum", "orthogonal, momentum", (0.9, 0.95)),
        _ORTHOGONAL.with_options("orthogonal, k = 8", cg_iters=8),
    ),
    # What helps at the end of a long run.
    "late": (
        PEERS["SGD"],
        _MUON,
        _FROG,
        replace(_FROG, name="FROG, damping grows", adjust=_grow_damping),
        replace(
            _FROG,
            name="FROG, then SGD",
            build=frog_then_sgd,
            options={},
            adjust=_hand_over,
        ),
        _ORTHOGONAL,
    ),
    # One line for everything: what is worth changing in the defaults.
    "lines": (
        _DEFAULT,
        *_varied(_DEFAULT, "damping", "damping", (0.1, 10.0, 100.0)),
        replace(_DEFAULT, name="damping grows, 1 to 100", adjust=_raise_damping),
        replace(_DEFAULT, name="Fisher every second step", adjust=_every_second),
        _DEFAULT.with_options("momentum 0.95", momentum=0.95),
        _DEFAULT.with_options("AdamW at 0.01", fallback_lr=1e-2),
        replace(_DEFAULT, name="AdamW at lr / 20", build=_tied),
        _DEFAULT.with_options("output layer, too", exclude_output_layer=False),
        _DEFAULT.with_options("k = 8", cg_iters=8),
        _DEFAULT.with_options("512 positions", sample_size=512),
        _DEFAULT.with_options("samples of 2 steps", sample_steps=2),
        _DEFAULT.with_options("samples of 4 steps", sample_steps=4),
        _DEFAULT.with_options("of 4 steps, damping 0.1", sample_steps=4, damping=0.1),
        PEERS["FROG, no Fisher"],
    ),
    # One trajectory up to rounding, at different cost. Gram space over whole examples
    # would need the square of all their positions.
    "formulation": (
        *_varied(_FROG, "formulation", "positions,", ("primal", "gram")),
        _EXAMPLES.with_options("examples, primal", formulation="primal"),
    ),
}
"""Who takes part, by the study's name."""
