"""What a step checks, and keeps away, before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.board import Pages, paging
from .wrapping import replaced


def problem_with_grads(
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[nn.Parameter, str],
    model: nn.Module,
    stepped: bool,
) -> str | None:
    """Why no step can be made with the gradients that are there, if none can.

    Args:
        groups: parameter groups.
        names: of the parameters.
        model: whose they were when FROG was built.
        stepped: whether there has been a step; without one there must be a gradient.
    """
    found = [p for group in groups for p in group["params"] if p.grad is not None]
    for param in found:
        assert param.grad is not None
        if param.grad.layout != torch.strided:
            return (
                f"{names[param]} has a sparse gradient, which FROG does not support; "
                "build its layer with sparse=False"
            )
    if (not found or not stepped) and (problem := replaced(groups, names, model)):
        return problem
    if not found and not stepped:
        return (
            "step() before any backward: no parameter has a gradient; call "
            "loss.backward() first"
        )
    return None


def modes(
    groups: Iterable[Mapping[str, Any]], pages: Pages
) -> AbstractContextManager[Any]:
    """What a step runs in, whatever modes are on outside.

    Products in a lower precision are for the model, not for its optimizer; and a CUDA
    graph that captures the step copies what it needs of the host in one piece.

    Args:
        groups: parameter groups; autocast is off on the devices of their parameters.
        pages: the host's memory for such graphs.
    """
    stack = ExitStack()
    stack.enter_context(paging(pages))
    devices = {p.device.type for group in groups for p in group["params"]}
    for device in sorted(devices & {"cpu", "cuda"}):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def may_read(number: Tensor, capturable: bool) -> bool:
    """Whether the host may read a number: on a CPU, and if it is no fake."""
    return number.is_cpu and not capturable and type(number) is Tensor


def refuse_to_step(closed: bool, capturable: bool) -> None:
    """Raise RuntimeError where no step can be made, whatever the gradients.

    Args:
        closed: whether the hooks are gone.
        capturable: whether steps may be captured in a CUDA graph.
    """
    if closed:
        raise RuntimeError("this FROG is closed: its hooks are gone; build a new one")
    if not capturable and is_capturing():
        raise RuntimeError("to capture step() in a CUDA graph: capturable=True")


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured; builds without CUDA cannot tell."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_to_make_in_graph(name: str) -> None:
    """Raise RuntimeError if a CUDA graph is being captured.

    Args:
        name: of what has no state yet.
    """
    if is_capturing():
        raise RuntimeError(
            f"{name} has no state yet, and a CUDA graph that made it would make it "
            "anew in each replay: take a few steps before the capture, with gradients "
            "for all that it will train"
        )
