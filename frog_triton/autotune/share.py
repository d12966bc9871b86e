"""One choice for all ranks: what differs between ranks would differ in its bits."""

from __future__ import annotations

import torch
import torch.distributed as dist


def broadcast(text: str, device: torch.device) -> str:
    """Rank 0's text on every rank of the default group; as it is without ranks.

    Args:
        text: of this rank; matters on rank 0.
        device: of tensors that the group's backend can send.
    """
    if not dist.is_available() or not dist.is_initialized():
        return text
    if dist.get_world_size() == 1:
        return text
    content = text.encode()
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(buffer, 0)
    return bytes(buffer.tolist()).decode()


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    ranks = dist.is_available() and dist.is_initialized()
    return not ranks or dist.get_rank() == 0
