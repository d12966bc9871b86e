"""Layers that tests of the tuner share."""

import torch

from frog_triton.layers.conv import ConvSpec
from frog_triton.solve.launches import Bucket, LayerShape

F32, BF16 = torch.float32, torch.bfloat16
LINEAR = LayerShape("linear", 768, 768, 64)
CONV = LayerShape(
    "conv",
    128,
    1152,
    4096,
    bias=False,
    image=(128, 8, 8),
    conv=ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), 1),
)
DEPTHWISE = LayerShape(
    "depthwise",
    64,
    9,
    4096,
    groups=64,
    image=(64, 8, 8),
    conv=ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), 64),
)
RAGGED = LayerShape("ragged", 300, 700, 200, groups=3, bias=False)
MANY = LayerShape("many", 64, 900, 1000)


def geometry(shape, count=2, dtype=BF16):
    return Bucket(shape, count, 4, False, (dtype, F32, F32))
