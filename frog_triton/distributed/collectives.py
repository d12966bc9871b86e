"""Many tensors in one collective: packed as bytes, each at a multiple of 16.

Every collective here is called by all ranks of a group with sizes that all of them
know, whatever data each of them holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor on its way."""

BUCKET_BYTES = 1 << 28
"""Of rows on their way in one collective: bounds the memory they need."""

_ALIGN = 16  # what kernels like best, and what any dtype may be viewed at


def nbytes(specs: Sequence[Spec]) -> int:
    """Bytes that tensors take when packed."""
    return sum(_padded(spec) for spec in specs)


def all_gather_ints(
    values: Tensor, group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """A small int64 tensor of every rank, ``(W, *values.shape)``, on the host."""
    out = values.new_empty(group.size(), *values.shape, device=device)
    dist.all_gather(list(out), values.to(device), group=group)
    return out.cpu()


def all_to_all(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Spec]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Tensor]]:
    """Send each rank its own list of tensors.

    Args:
        outgoing: the tensors for each rank.
        incoming: what each rank has for this one.
        group: of the ranks.
        device: that the group's collectives run on.

    Returns:
        The tensors of each rank, views of one buffer.
    """
    sent = [[(tuple(t.shape), t.dtype) for t in part] for part in outgoing]
    send_sizes = [nbytes(specs) for specs in sent]
    sizes = [nbytes(specs) for specs in incoming]
    send = torch.empty(sum(send_sizes), dtype=torch.uint8, device=device)
    receive = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    for part, specs, buffer in zip(outgoing, sent, send.split(send_sizes), strict=True):
        copy_(_views(buffer, specs), part)
    dist.all_to_all_single(receive, send, sizes, send_sizes, group=group)
    return [
        _views(buffer, specs)
        for buffer, specs in zip(receive.split(sizes), incoming, strict=True)
    ]


def all_gather(
    mine: Sequence[Tensor],
    specs: Sequence[Sequence[Spec]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Tensor]]:
    """Send all ranks the same tensors; sizes may differ between ranks.

    Args:
        mine: this rank's tensors.
        specs: what each rank sends.
        group: of the ranks.
        device: that the group's collectives run on.

    Returns:
        The tensors of each rank, views of one buffer.
    """
    size = max(nbytes(part) for part in specs)
    buffers = torch.empty(len(specs), size, dtype=torch.uint8, device=device)
    send = torch.empty(size, dtype=torch.uint8, device=device)
    copy_(_views(send, [(tuple(t.shape), t.dtype) for t in mine]), mine)
    dist.all_gather(list(buffers), send, group=group)
    return [_views(*pair) for pair in zip(buffers, specs, strict=True)]


def copy_(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy each tensor of a list, in few launches."""
    if to:
        torch._foreach_copy_(list(to), list(tensors))


def _views(buffer: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    views, start = [], 0
    for shape, dtype in specs:
        end = start + math.prod(shape) * dtype.itemsize
        views.append(buffer[start:end].view(dtype).view(shape))
        start += _padded((shape, dtype))
    return views


def _padded(spec: Spec) -> int:
    shape, dtype = spec
    return -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN


def collective_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where a group's collectives run for `device`: gloo sends from the host."""
    if dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    if device.type == "cpu" and torch.cuda.is_available():  # nothing of a GPU to send
        return torch.device("cuda", torch.cuda.current_device())
    return device
