"""One choice for all ranks: what differs between ranks would differ in its bits."""

from __future__ import annotations

import torch
import torch.distributed as dist


def several() -> bool:
    """Whether there is more than one rank."""
    ranks = dist.is_available() and dist.is_initialized()
    return ranks and dist.get_world_size() > 1


def broadcast(text: str, device: torch.device) -> str:
    """Rank 0's text on every rank of the default group.

    Args:
        text: of this rank; matters on rank 0.
        device: of tensors that the group's backend can send.
    """
    content = text.encode()
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(buffer, 0)
    return bytes(buffer.tolist()).decode()
