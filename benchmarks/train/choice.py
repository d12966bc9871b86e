"""Which optimizers a command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace

from .peers import Peer, reference
from .studies import STUDIES
from .workload import Workload


def variants(workload: Workload, study: str | None) -> dict[str, Peer]:
    """The workload's optimizers, or those of a study, by name and as it adapts them."""
    peers = STUDIES[study] if study else workload.peers
    return {peer.name: workload.adapt(peer) for peer in peers}


def offered(workload: Workload, args: argparse.Namespace) -> dict[str, Peer]:
    """Who may take part.

    Raises:
        ValueError: the checkout of the reference has no optimizer.
    """
    found = variants(workload, args.study)
    if args.reference is not None:
        peer = reference(args.reference)
        found[peer.name] = peer
    return found


def choose(
    offered: Mapping[str, Peer],
    args: argparse.Namespace,
    tell: Callable[[str], None],
) -> list[Peer]:
    """Those asked for and installed.

    Args:
        offered: by name.
        args: the command line.
        tell: is told who is left out, and what of.

    Raises:
        ValueError: there is no such optimizer, or none is left.
    """
    names = list(args.peers or offered)
    unknown = [name for name in names if name not in offered]
    if unknown:
        raise ValueError(
            f"no peer is called {unknown[0]!r}; there are: {', '.join(offered)}"
        )
    chosen = []
    for name in names:
        missing = offered[name].missing()
        if missing:
            tell(
                f"{name} is left out: it needs {', '.join(missing)} "
                "(pip install 'frog-triton[peers]')"
            )
        else:
            chosen.append(
                offered[name]
                if args.lrs is None
                else replace(offered[name], lrs=tuple(args.lrs))
            )
    if not chosen:
        raise ValueError("no optimizer is left to be run")
    return chosen
