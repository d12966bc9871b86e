"""ResNet-18 and ResNet-50, enough to know their layers.

He et al., "Deep Residual Learning for Image Recognition", 2015. The CIFAR form has a
3x3 stem without pooling.
"""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or a 1x1, a 3x3 and a 1x1.

    Args:
        c_in: channels that come in.
        width: channels inside.
        stride: of the first 3x3 convolution.
        bottleneck: whether the block has three convolutions.
    """

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        sizes = [(c_in, width, 3, stride), (width, width, 3, 1)]
        c_out = width
        if bottleneck:
            c_out = 4 * width
            sizes = [(c_in, width, 1, 1), (width, width, 3, stride)]
            sizes += [(width, c_out, 1, 1)]
        layers: list[nn.Module] = []
        for i, (a, b, kernel, step) in enumerate(sizes):
            if i:
                layers.append(nn.ReLU(inplace=True))
            layers.append(nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            layers.append(nn.BatchNorm2d(b))
        self.body = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions say to the input."""
        out: Tensor = (self.body(x) + self.shortcut(x)).relu()
        return out


def resnet(
    depth: int, classes: int = 10, small_images: bool = True, width: int = 64
) -> nn.Sequential:
    """A residual network.

    Args:
        depth: 18 or 50.
        classes: number of outputs.
        small_images: the CIFAR form.
        width: of the first stage.
    """
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    bottleneck = depth == 50
    stem: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    if not small_images:
        stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False)]
    stem += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    if not small_images:
        stem.append(nn.MaxPool2d(3, 2, 1))
    layers: list[nn.Module] = stem
    c_in = width
    for stage, count in enumerate(blocks):
        inside = width * 2**stage
        for i in range(count):
            stride = 2 if i == 0 and stage > 0 else 1
            layers.append(Block(c_in, inside, stride, bottleneck))
            c_in = 4 * inside if bottleneck else inside
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)]
    return nn.Sequential(*layers)
