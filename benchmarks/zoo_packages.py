"""Small models of other packages, each with a loss on one batch that it can learn.

Each is built from its configuration with random weights; nothing is fetched. Images are
``(8, 3, 32, 32)`` and texts ``(4, 16)`` unless a builder says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .zoo_torch import CLASSES, VOCABULARY, Trained, classifier, text


def _package(name: str) -> Any:
    """A package; the others import torchvision where it is installed.

    Operators of a torchvision for CUDA do not load beside a torch for the CPU, and its
    import then fails for want of two names, of operators that no model here uses.
    """
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")
            # The names are gone once the library is.
            importlib.import_module("torchvision").__dict__["_names"] = library
    return importlib.import_module(name)


# -- transformers -------------------------------------------------------------------

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PATCHES = {**SIZES, "image_size": 32, "patch_size": 8}
DECODER = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {**DECODER, "num_experts_per_tok": 2, "head_dim": 16}


def _made(name: str, **sizes: Any) -> nn.Module:
    """A class of transformers and its configuration, of which the name says both."""
    package = _package("transformers")
    kind = getattr(package, name)
    model: nn.Module = kind(kind.config_class(**sizes))
    return model.train()


def causal(name: str, **sizes: Any) -> Trained:
    """A model of text that computes its own loss."""
    model, ids = _made(name, **{"vocab_size": VOCABULARY, **sizes}), text()
    return Trained(model, lambda: model(input_ids=ids, labels=ids).loss)


def images(name: str, **sizes: Any) -> Trained:
    """A classifier of images."""
    return classifier(_made(name, num_labels=CLASSES, **sizes))


def bert_classes() -> Trained:
    """BERT with a head on its pooled first symbol."""
    name = "BertForSequenceClassification"
    model = _made(name, vocab_size=VOCABULARY, num_labels=CLASSES, **SIZES)
    return classifier(model, text(8))


def t5() -> Trained:
    """Sixteen symbols to eight."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    more = {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    model = _made("T5ForConditionalGeneration", **sizes, **more)
    ids, labels = text(), text(length=8)
    return Trained(model, lambda: model(input_ids=ids, labels=labels).loss)


def whisper() -> Trained:
    """Sounds are ``(4, 16 mel bins, 64 frames)``."""
    both = ("encoder", "decoder")
    model = _made(
        "WhisperForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=64,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        **{f"{half}_layers": 2 for half in both},
        **{f"{half}_attention_heads": 4 for half in both},
        **{f"{half}_ffn_dim": 128 for half in both},
        **{f"{end}_token_id": i for i, end in enumerate(("pad", "bos", "eos"))},
        decoder_start_token_id=1,
    )
    sounds, labels = torch.randn(4, 16, 64), text(length=8)
    return Trained(model, lambda: model(input_features=sounds, labels=labels).loss)


def clip() -> Trained:
    """Eight pairs of text and image, contrastive."""
    words = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
    ends = {"bos_token_id": 0, "eos_token_id": VOCABULARY - 1}
    model = _made(
        "CLIPModel",
        text_config={**words, **ends},
        vision_config=PATCHES,
        projection_dim=32,
    )
    ids, images = text(8), torch.randn(8, 3, 32, 32)
    ids[:, -1] = VOCABULARY - 1
    return Trained(
        model,
        lambda: model(input_ids=ids, pixel_values=images, return_loss=True).loss,
    )


RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
}


def detr() -> Trained:
    """Two boxes an image; images are ``(2, 3, 64, 64)``."""
    backbone = _package("transformers").ResNetConfig
    both = ("encoder", "decoder")
    model = _made(
        "DetrForObjectDetection",
        backbone_config=backbone(**RESNET, out_features=["stage4"]),
        d_model=32,
        num_queries=8,
        num_labels=CLASSES,
        **{f"{half}_layers": 2 for half in both},
        **{f"{half}_attention_heads": 4 for half in both},
        **{f"{half}_ffn_dim": 64 for half in both},
    )
    images, boxes = torch.randn(2, 3, 64, 64), torch.rand(2, 2, 4) / 2 + 0.2
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": own} for own in boxes]
    return Trained(model, lambda: model(pixel_values=images, labels=labels).loss)


def lora() -> Trained:
    """Adapters of rank 8 on a frozen Llama."""
    peft = _package("peft")
    plain = _made("LlamaForCausalLM", vocab_size=VOCABULARY, **DECODER)
    chosen = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model, ids = peft.get_peft_model(plain, chosen), text()
    return Trained(model, lambda: model(input_ids=ids, labels=ids).loss)


# -- timm, torchvision, diffusers ---------------------------------------------------


def timm_classifier(name: str, **sizes: Any) -> Trained:
    """A classifier of images by its name in timm."""
    timm = _package("timm")
    return classifier(timm.create_model(name, num_classes=CLASSES, **sizes).train())


def torchvision_vit() -> Trained:
    """Two blocks of width 64."""
    models = _package("torchvision").models
    # Its head begins at zero, so that the first step moves the head alone.
    return classifier(
        models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=CLASSES)
    )


def torchvision_resnet() -> Trained:
    """One basic block a stage."""
    models = _package("torchvision").models
    return classifier(
        models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    )


def unet() -> Trained:
    """Predicts the noise in images ``(4, 3, 16, 16)``."""
    diffusers = _package("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    images, noise = torch.randn(2, 4, 3, 16, 16)
    times = torch.tensor([50, 300, 600, 950])
    noisy = diffusers.DDPMScheduler().add_noise(images, noise, times)
    return Trained(model, lambda: F.mse_loss(model(noisy, times).sample, noise))
