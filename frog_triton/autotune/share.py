"""One choice for all ranks: what differs between ranks would differ in its bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def broadcast(text: str, device: torch.device, group: Any) -> str:
    """The text of a group's first rank, on all of its ranks.

    Args:
        text: of this rank; matters on the first.
        device: of tensors that the group's backend can send.
        group: a process group.
    """
    content = text.encode()
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    dist.broadcast(size, group=group, group_src=0)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if dist.get_rank(group) == 0:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(buffer, group=group, group_src=0)
    return bytes(buffer.tolist()).decode()
