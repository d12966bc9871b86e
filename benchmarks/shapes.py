"""Layers of well-known models, as far as an optimizer's step is concerned."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..solve.launches import Bucket, LayerShape, buckets


def gpt2_small(samples: int, blocks: int = 12) -> list[LayerShape]:
    """GPT-2 small's Linear layers: 4 in each block, embedding and head left out.

    Sizes: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    Args:
        samples: N, positions drawn for each layer.
        blocks: depth.
    """
    kinds = (
        ("attn.qkv", 2304, 768),
        ("attn.proj", 768, 768),
        ("mlp.up", 3072, 768),
        ("mlp.down", 768, 3072),
    )
    return [
        LayerShape(f"h.{i}.{name}", rows, dim, samples)
        for i in range(blocks)
        for name, rows, dim in kinds
    ]


def llama_1b(samples: int, blocks: int = 16) -> list[LayerShape]:
    """The Linear layers of Llama 3.2 with a billion parameters, without the embedding.

    Sizes: the model's configuration, as its authors publish it: width 2048, 8 heads of
    keys and values of 64, 8192 in between.

    Args:
        samples: N, positions drawn for each layer.
        blocks: depth.
    """
    kinds = (
        ("attn.q", 2048, 2048),
        ("attn.k", 512, 2048),
        ("attn.v", 512, 2048),
        ("attn.o", 2048, 2048),
        ("mlp.gate", 8192, 2048),
        ("mlp.up", 8192, 2048),
        ("mlp.down", 2048, 8192),
    )
    return [
        LayerShape(f"{i}.{name}", rows, dim, samples, bias=False)
        for i in range(blocks)
        for name, rows, dim in kinds
    ]


def resnet50(samples: int) -> list[LayerShape]:
    """ResNet-50's convolutions (torchvision's, stride in the 3x3), no biases.

    Sizes: He et al., "Deep Residual Learning for Image Recognition", 2015.

    Args:
        samples: N, positions drawn for each layer.
    """
    layers = [LayerShape("conv1", 64, 3 * 49, samples, bias=False)]
    c_in = 64
    for stage, (width, blocks) in enumerate(
        ((64, 3), (128, 4), (256, 6), (512, 3)), start=1
    ):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            sizes = [
                ("conv1", width, c_in),
                ("conv2", width, 9 * width),
                ("conv3", 4 * width, width),
            ]
            if block == 0:
                sizes.append(("downsample", 4 * width, c_in))
            layers += [
                LayerShape(f"{name}.{part}", rows, dim, samples, bias=False)
                for part, rows, dim in sizes
            ]
            c_in = 4 * width
    return layers


def tiny(samples: int) -> list[LayerShape]:
    """Two geometries, with biases and without, for a trial of what uses them."""
    return [
        LayerShape("a.0", 24, 40, samples),
        LayerShape("a.1", 24, 40, samples),
        LayerShape("b", 18, 24, samples, bias=False),
    ]


MODELS = {
    "gpt2-small": gpt2_small,
    "llama-1b": llama_1b,
    "resnet50": resnet50,
    "tiny": tiny,
}
REAL = ("gpt2-small", "resnet50")
"""Those that results are about."""


def grouped(shapes: Iterable[LayerShape], sample_dtype: torch.dtype) -> list[Bucket]:
    """Layers by geometry, as a step with k = 4 sees them, named after the first."""
    return buckets(shapes, (sample_dtype, torch.float32, torch.float32))
