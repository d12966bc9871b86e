"""The models that ``frog-triton bench coverage`` trains.

Sizes are such that twenty steps take seconds on one core.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import frog_triton

from . import zoo_packages as packages
from . import zoo_torch as nets
from .zoo_packages import DECODER, EXPERTS, PATCHES, RESNET, SIZES
from .zoo_torch import Trained


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        name: of the row.
        package: the module that it comes from.
        build: makes it; random numbers are torch's global ones.
    """

    name: str
    package: str
    build: Callable[[], Trained]

    @property
    def installed(self) -> bool:
        """Whether its package can be found."""
        return importlib.util.find_spec(self.package) is not None


def _models(package: str, named: dict[str, Callable[[], Trained]]) -> tuple[Model, ...]:
    return tuple(Model(name, package, build) for name, build in named.items())


def _causal(kind: str, **sizes: Any) -> Callable[[], Trained]:
    return partial(packages.causal, kind, **sizes)


_BARE = {"bare parameters": nets.bare} if hasattr(frog_triton, "linear") else {}
_LAYERS = [1, 1, 1, 1]
_CHANNELS = [16, 32, 64, 128]
_timm = partial(partial, packages.timm_classifier)
_images = partial(partial, packages.images)

MODELS: tuple[Model, ...] = (
    *_models(
        "transformers",
        {
            "GPT-2": _causal(
                "GPT2LMHeadModel",
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=32,
                bos_token_id=0,
                eos_token_id=0,
            ),
            "BERT, masked symbols": _causal("BertForMaskedLM", **SIZES),
            "BERT, classes": packages.bert_classes,
            "T5": packages.t5,
            "Whisper": packages.whisper,
            "CLIP": packages.clip,
            "Llama": _causal("LlamaForCausalLM", **DECODER),
            "Mixtral": _causal("MixtralForCausalLM", num_local_experts=4, **EXPERTS),
            "Qwen3-MoE": _causal(
                "Qwen3MoeForCausalLM",
                num_experts=4,
                moe_intermediate_size=64,
                **EXPERTS,
            ),
            "DeepSeek-V3": _causal(
                "DeepseekV3ForCausalLM",
                n_routed_experts=4,
                n_group=2,
                topk_group=1,
                moe_intermediate_size=64,
                first_k_dense_replace=1,
                kv_lora_rank=16,
                q_lora_rank=24,
                qk_rope_head_dim=8,
                qk_nope_head_dim=16,
                v_head_dim=16,
                num_experts_per_tok=2,
                **SIZES,
            ),
            "GPT-OSS": _causal("GptOssForCausalLM", num_local_experts=4, **EXPERTS),
            "Mamba": _causal(
                "MambaForCausalLM", hidden_size=64, state_size=8, num_hidden_layers=2
            ),
            "ViT": _images("ViTForImageClassification", **PATCHES),
            "DINOv2": _images("Dinov2ForImageClassification", **PATCHES),
            "BiT": _images("BitForImageClassification", num_groups=8, **RESNET),
            "DETR": packages.detr,
        },
    ),
    *_models(
        "timm",
        {
            "ResNet-50, narrow": _timm("resnet50", layers=_LAYERS, channels=_CHANNELS),
            "MobileNetV3": _timm("mobilenetv3_small_050"),
            "MobileNetV4": _timm("mobilenetv4_conv_small_050"),
            "GhostNet": _timm("ghostnet_050"),
            "ConvNeXt": _timm("convnext_atto", depths=_LAYERS, dims=_CHANNELS),
            "BiT (timm)": _timm(
                "resnetv2_50x1_bit", channels=(128, 128, 256, 256), stem_chs=32
            ),
            "EfficientNet": _timm("tf_efficientnet_b0"),
        },
    ),
    *_models(
        "torchvision",
        {
            "ViT (torchvision)": packages.torchvision_vit,
            "ResNet (torchvision)": packages.torchvision_resnet,
        },
    ),
    *_models("diffusers", {"UNet, diffusion": packages.unet}),
    *_models("peft", {"LoRA on Llama": packages.lora}),
    *_models(
        "torch",
        {
            "TransformerEncoder": nets.encoder,
            "MultiheadAttention": nets.attention,
            "LSTM": partial(nets.recurrent, nn.LSTM),
            "GRU": partial(nets.recurrent, nn.GRU),
            "DCGAN generator": partial(nets.dcgan, "generator"),
            "DCGAN discriminator": partial(nets.dcgan, "discriminator"),
            "autoencoder": nets.autoencoder,
            "actor and critic": nets.actor_critic,
            "weight_norm": partial(nets.normed, weight_norm),
            "spectral_norm": partial(nets.normed, spectral_norm),
            **(
                {"bare parameters": nets.bare} if hasattr(frog_triton, "linear") else {}
            ),
        },
    ),
)
