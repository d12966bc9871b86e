"""Small networks that two CPU cores can train."""

from __future__ import annotations

from torch import nn


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
