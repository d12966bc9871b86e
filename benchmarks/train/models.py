"""Networks of the trainings, most of them small enough for two CPU cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def small_cnn(channels: int, classes: int, size: int, width: int = 32) -> nn.Module:
    """Convolutions with batch norm, halving the map until it is 4 wide or less.

    Args:
        channels: of the images.
        classes: number of outputs.
        size: of the images.
        width: channels of the first stage; doubled at each halving, up to 4 times.
    """
    layers: list[nn.Module] = []

    def stage(c_in: int, c_out: int, stride: int) -> None:
        layers.extend(
            [
                nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            ]
        )

    current = width
    stage(channels, current, 1)
    while size > 4:
        wider = min(2 * current, 4 * width)
        stage(current, wider, 2)
        current, size = wider, (size + 1) // 2
    stage(current, current, 1)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(current, classes)]
    return nn.Sequential(*layers)


class GPT(nn.Module):
    """A causal transformer in the form of GPT-2, without dropout or tied weights.

    Args:
        symbols: size of the alphabet.
        context: longest sequence.
        depth: blocks.
        width: of the residual stream.
        heads: of attention.
    """

    def __init__(
        self, symbols: int, context: int, depth: int, width: int, heads: int
    ) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                into_stream = name.endswith("out.weight")
                scale = (2 * depth) ** -0.5 if into_stream else 1.0
                nn.init.normal_(param, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, length, symbols)`` of the next symbols."""
        place = torch.arange(x.shape[1], device=x.device)
        logits: Tensor = self.head(
            self.norm(self.blocks(self.symbol(x) + self.position(place)))
        )
        return logits


class Block(nn.Module):
    """A transformer's block: attention, then two layers, each after a norm.

    Args:
        width: of the residual stream.
        heads: of attention.
        is_causal: whether places see only those before them.
    """

    def __init__(self, width: int, heads: int, is_causal: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The stream ``(batch, length, width)`` after the block."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = nn.functional.gelu(self.expand(self.norm2(x)))
        out: Tensor = x + self.mlp_out(hidden)
        return out


class ViT(nn.Module):
    """A vision transformer: patches, blocks that look both ways, and their mean.

    Args:
        channels: of the images.
        classes: number of outputs.
        size: of the images, a multiple of `patch`.
        patch: height and width of a patch.
        depth: blocks.
        width: of the residual stream.
        heads: of attention.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: int,
        *,
        patch: int,
        depth: int,
        width: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, is_causal=False) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits
