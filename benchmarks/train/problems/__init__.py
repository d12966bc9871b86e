"""Small problems for a CPU, one a file: all of them make ``bench train all``."""

from __future__ import annotations

from ..workload import Workload
from . import (
    autoencoder,
    char_gpt,
    deep_mlp,
    depthwise,
    gan,
    lora,
    lstm,
    plain_cnn,
    poisson,
    unet,
    vit,
)

PROBLEMS: dict[str, Workload] = {
    module.WORKLOAD.name: module.WORKLOAD
    for module in (
        depthwise,
        vit,
        plain_cnn,
        unet,
        char_gpt,
        lstm,
        lora,
        deep_mlp,
        autoencoder,
        poisson,
        gan,
    )
}
"""By name."""
