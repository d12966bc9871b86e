"""Output layers by what a model calls its parts, in small nets and real models."""

import pytest
import torch
from output_nets import by_name, by_passes, total, x
from torch import nn

# -- by name ---------------------------------------------------------------------------


def linear():
    return nn.Linear(4, 4)


def mlp(depth=2):
    return nn.Sequential(*(linear() for _ in range(depth)))


class Model(nn.Module):
    """Children by name, in the order given."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Telling(Model):
    """Its method tells its output."""

    def __init__(self, told, **children):
        super().__init__(**children)
        self.told = [told]

    def get_output_embeddings(self):
        (told,) = self.told
        return (
            told(self) if callable(told) and not isinstance(told, nn.Module) else told
        )


def tied():
    embedding, body = nn.Embedding(4, 4), linear()
    model = Telling(embedding, projection=linear(), embedding=embedding, body=body)
    model.projection.weight = embedding.weight
    return model


def raising(model):
    raise NotImplementedError


def heads_and_body(**heads):
    return Model(**heads, body=mlp())


NAMED = {
    "sequence": (lambda: mlp(), None),
    "a layer": (linear, None),
    "unknown names": (lambda: Model(stem=mlp(), pooler=mlp()), None),
    "head before its body": (lambda: heads_and_body(head=linear()), "head"),
    "head of layers": (lambda: heads_and_body(classifier=mlp(3)), "classifier.2"),
    "head in a head": (
        lambda: heads_and_body(head=Model(classifier=linear(), scale=linear())),
        "head.classifier",
    ),
    "two heads": (
        lambda: heads_and_body(actor=mlp(), critic=linear()),
        "actor.1 critic",
    ),
    "dict of heads": (
        lambda: heads_and_body(heads=nn.ModuleDict({"a": mlp(), "b": linear()})),
        "heads.a.1 heads.b",
    ),
    "head without layers": (
        lambda: Model(body=mlp(), head=nn.Identity(), fc_norm=nn.LayerNorm(4)),
        None,
    ),
    "head of norms": (lambda: Model(body=mlp(), head=nn.LayerNorm(4)), None),
    "head of another kind": (
        lambda: Model(body=mlp(), head=nn.Bilinear(4, 4, 4)),
        "head",
    ),
    "fc last": (lambda: Model(body=mlp(), fc=linear(), drop=nn.Dropout()), "fc"),
    "fc inside": (lambda: Model(fc=linear(), body=mlp()), None),
    "fc beside a head": (lambda: Model(head=linear(), fc=linear()), "head"),
    "fc and auxiliary": (
        lambda: Model(body=mlp(), aux1=mlp(), fc=linear()),
        "aux1.1 fc",
    ),
    "auxiliary alone": (lambda: Model(body=mlp(), aux1=mlp()), None),
    "two projections": (
        lambda: Model(text_projection=linear(), visual_projection=linear(), b=mlp()),
        "text_projection visual_projection",
    ),
    "projection into a model": (
        lambda: Model(visual_projection=linear(), text=mlp()),
        None,
    ),
    "block of a model": (
        lambda: Model(blocks=nn.Sequential(Model(head=linear(), b=linear()), mlp())),
        None,
    ),
    "told": (
        lambda: Telling(child := linear(), anything=child, body=mlp()),
        "anything",
    ),
    "told and a head": (
        lambda: Telling(child := linear(), lm=child, body=mlp(), score=linear()),
        "lm score",
    ),
    "told an embedding": (tied, "projection"),
    "told an embedding alone": (
        lambda: Telling(child := nn.Embedding(4, 4), shared=child, body=mlp()),
        "shared",
    ),
    "told nothing": (lambda: Telling(None, body=mlp(), head=linear()), "head"),
    "raises": (lambda: Telling(raising, body=mlp(), head=linear()), "head"),
    "wrapped": (
        lambda: Model(module=Model(net=heads_and_body(head=mlp()), loss=nn.MSELoss())),
        "module.net.head.1",
    ),
    "one child beside a weight": (
        lambda: Model(net=heads_and_body(head=mlp()), w=nn.Parameter(x())),
        None,
    ),
    "compiled": (
        lambda: torch.compile(heads_and_body(head=mlp())),
        "_orig_mod.head.1",
    ),
    "only a head": (lambda: Model(head=mlp()), "head.1"),
}


@pytest.mark.parametrize("case", NAMED)
def test_outputs_by_name(case):
    make, outputs = NAMED[case]
    assert by_name(make()) == (outputs and set(outputs.split()))


# -- real models, tiny -----------------------------------------------------------------


TEXT = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=20,
)
IMAGE = dict(TEXT, image_size=16, patch_size=8)
del IMAGE["vocab_size"]
SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
TRANSLATION = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
)


def tokens():
    return torch.randint(3, 20, (2, 5))


def pixels(size=16):
    return torch.randn(2, 3, size, size)


def labelled():
    return dict(input_ids=tokens(), labels=tokens())


def seen():
    return dict(pixel_values=pixels(), labels=torch.tensor([0, 1]))


def both():
    return dict(input_ids=tokens(), pixel_values=pixels(), return_loss=True)


DETR = dict(
    TRANSLATION,
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    backbone=None,
    num_queries=3,
)

TRANSFORMERS = {
    # model: its configuration's kind and options, a batch, its outputs
    "BertForSequenceClassification": (
        ("BertConfig", TEXT),
        lambda: dict(input_ids=tokens(), labels=torch.tensor([0, 1])),
        "classifier",
    ),
    "BertForPreTraining": (
        ("BertConfig", TEXT),
        lambda: dict(labelled(), next_sentence_label=torch.tensor([0, 1])),
        "cls.predictions.decoder cls.seq_relationship",
    ),
    "GPT2LMHeadModel": (
        ("GPT2Config", dict(SPECIAL, vocab_size=20, n_embd=16, n_layer=1, n_head=2)),
        labelled,
        "lm_head",
    ),
    "T5ForConditionalGeneration": (
        (
            "T5Config",
            dict(
                vocab_size=20,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
            ),
        ),
        labelled,
        "lm_head",
    ),
    "WhisperForConditionalGeneration": (
        (
            "WhisperConfig",
            dict(
                TRANSLATION,
                **SPECIAL,
                vocab_size=20,
                num_mel_bins=8,
                max_source_positions=4,
                decoder_start_token_id=1,
            ),
        ),
        lambda: dict(input_features=torch.randn(2, 8, 8), labels=tokens()),
        "proj_out",
    ),
    "CLIPModel": (
        (
            "CLIPConfig",
            dict(text_config=TEXT | SPECIAL, vision_config=IMAGE, projection_dim=8),
        ),
        both,
        "text_projection visual_projection",
    ),
    "Dinov2ForImageClassification": (("Dinov2Config", IMAGE), seen, "classifier"),
    "ViTForImageClassification": (("ViTConfig", IMAGE), seen, "classifier"),
    "MixtralForCausalLM": (
        (
            "MixtralConfig",
            dict(TEXT, **SPECIAL, num_key_value_heads=1, num_local_experts=2),
        ),
        labelled,
        "lm_head",
    ),
    "MambaForCausalLM": (
        (
            "MambaConfig",
            dict(SPECIAL, vocab_size=20, hidden_size=16, num_hidden_layers=1),
        ),
        labelled,
        "lm_head",
    ),
    "CamembertForMaskedLM": (("CamembertConfig", TEXT), labelled, "lm_head.decoder"),
}


def of_transformers(name, config):
    transformers = pytest.importorskip("transformers")
    kind, options = config
    return getattr(transformers, name)(getattr(transformers, kind)(**options))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name):
    config, batch, outputs = TRANSFORMERS[name]
    model = of_transformers(name, config)
    assert by_name(model) == set(outputs.split())
    assert by_passes(model, lambda m: m(**batch()).loss) == set(outputs.split())


def test_bert_whose_pooler_is_not_in_the_loss():
    model = of_transformers("BertModel", ("BertConfig", TEXT))
    assert by_name(model) is None
    found = by_passes(model, lambda m: total(m(tokens()).last_hidden_state))
    assert found == {"encoder.layer.0.output.dense"}
    found = by_passes(model, lambda m: total(m(tokens()).pooler_output))
    assert found == {"pooler.dense"}


def test_siglip_whose_heads_are_inside():
    config = dict(text_config={**TEXT, "projection_size": 16}, vision_config=IMAGE)
    model = of_transformers("SiglipModel", ("SiglipConfig", config))
    assert by_name(model) is None
    found = by_passes(model, lambda m: m(**both()).loss)
    assert found == {"text_model.head", "vision_model.head.mlp.fc2"}


def test_detr_with_two_heads():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage4"],
    )
    options = dict(DETR, backbone_config=backbone)
    model = of_transformers("DetrForObjectDetection", ("DetrConfig", options))
    outputs = {"class_labels_classifier", "bbox_predictor.layers.2"}
    assert by_name(model) == outputs

    def loss(model):
        out = model(pixels(32))
        return total(out.logits) + total(out.pred_boxes)

    assert by_passes(model, loss) == outputs


TIMM = {
    "resnet18": "fc",
    "mobilenetv3_small_100": "classifier",
    "convnext_atto": "head.fc",
    "vit_tiny_patch16_224": "head",
    "resnetv2_50x1_bit": "head.fc",
    "deit_tiny_distilled_patch16_224": "head head_dist",
    "levit_128s": "head.linear head_dist.linear",
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert by_name(timm.create_model(name, num_classes=5)) == set(
            TIMM[name].split()
        )
        assert by_name(timm.create_model(name, num_classes=0)) is None


def test_distilled_heads_of_timm_in_a_pass():
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    model.set_distilled_training()
    both = lambda m: sum(total(y) for y in m(pixels(32)))  # noqa: E731
    assert by_passes(model, both) == {"head", "head_dist"}
    assert by_passes(model, lambda m: total(m(pixels(32))[0])) == {"head"}


TORCHVISION = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "vit_b_16": "heads.head",
    "googlenet": "aux1.fc2 aux2.fc2 fc",
    "fcn_resnet50": "classifier.4 aux_classifier.4",
    "retinanet_resnet50_fpn": (
        "head.classification_head.cls_logits head.regression_head.bbox_reg"
    ),
}


def of_torchvision(name):
    models = pytest.importorskip("torchvision").models
    no_backbone = dict(weights_backbone=None) if "resnet50" in name else {}
    aux = dict(aux_loss=True) if "fcn" in name else {}
    return models.get_model(name, weights=None, **no_backbone, **aux)


@pytest.mark.parametrize("name", TORCHVISION)
def test_models_of_torchvision(name):
    with torch.device("meta"):
        assert by_name(of_torchvision(name)) == set(TORCHVISION[name].split())


def test_segmentation_of_torchvision_in_a_pass():
    model = of_torchvision("fcn_resnet50")
    found = by_passes(model, lambda m: sum(map(total, m(pixels(32)).values())))
    assert found == {"classifier.4", "aux_classifier.4"}
    found = by_passes(model, lambda m: total(m(pixels(32))["out"]))
    assert found == {"classifier.4"}
