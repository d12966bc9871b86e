"""Which layers are output layers: by name, and by what a training pass does."""

import gc
import weakref
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton.outputs import OutputSearch, named_outputs

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS)]


def by_name(model, kinds=LAYERS):
    names = {module: name for name, module in model.named_modules()}
    found = named_outputs(
        model, [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    )
    return None if found is None else {names[module] for module in found}


@contextmanager
def watched(model, search):
    """Tell the search of each call of a layer, by the layer's name."""

    def hook(name):
        return lambda module, args, kwargs, y: search.saw(name, (args, kwargs), y)

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in layers(model)
    ]
    yield search
    for handle in handles:
        handle.remove()


def by_passes(model, *losses):
    """What is found after a backward pass for each of `losses`."""
    with watched(model, OutputSearch()) as search:
        for loss in losses:
            loss(model).backward()
    return search.found()


def x(*shape):
    return torch.randn(*(shape or (3, 4)))


class Net(nn.Module):
    """Linear layers of width 4 by name, in the order given, and a forward function."""

    def __init__(self, names, forward):
        super().__init__()
        for name in names.split():
            setattr(self, name, nn.Linear(4, 4))
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def total(y):
    return y.square().sum()


# -- by what happens -------------------------------------------------------------------


def looped(net, steps=3):
    h = x()
    for _ in range(steps):
        h = net.b(net.a(h).relu()).tanh()
    return h


def autoregressive(net):
    h, y = x(), x()
    for _ in range(3):
        h = net.cell(h + y).tanh()
        y = net.head(h)
    return y + net.value(h)


def residual(net):
    h = net.stem(x())
    h = h + net.b(net.a(h).relu())
    return h + net.d(net.c(h).relu())


def checkpointed(use_reentrant):
    def forward(net):
        h = net.first(x())
        h = checkpoint(
            lambda h: net.b(net.a(h).relu()).relu(), h, use_reentrant=use_reentrant
        )
        return net.head(h)

    return forward


def in_place(net):
    h = net.a(x(2, 3, 4)).relu_()  # a view, whose node this takes out of the graph
    h = net.b(h).mul_(2)
    h = net.c(h[:, 0])
    h.relu_()
    return net.head(h).exp_()


def in_place_at_the_end(net):
    return net.a(net.b(x(2, 3, 4)).relu_()).sigmoid_()


def in_place_transposed(net):
    return net.head(net.a(x(2, 4, 4)).transpose(1, 2).relu_())


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a)
        return 2 * a, b.clone()

    @staticmethod
    def backward(ctx, da, db):
        return 2 * da, db


def custom(net):
    h, other = Double.apply(net.a(x()), net.b(x()))
    return net.head(h) + other


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, da):
        return None


def skipped_head(net):
    h = net.body(x())
    net.aux(h)  # its output is not in the loss
    return net.head(h)


def intermediate(net):
    h = net.body(x())
    net.pooler(h[:, :4]).tanh()
    return h


def frozen_consumer(net):
    net.frozen.requires_grad_(False)
    return net.frozen(net.a(x()))


NETS = {
    "chain": ("a b", lambda n: n.b(n.a(x()).relu()), "b"),
    "one layer": ("a", lambda n: n.a(x()), "a"),
    "head before its body": ("head body", lambda n: n.head(n.body(x())), "head"),
    "autoencoder, declared in any order": (
        "dec2 enc1 dec1 enc2",
        lambda n: n.dec2(n.dec1(n.enc2(n.enc1(x()).relu()).relu()).relu()),
        "dec2",
    ),
    "actor and critic": (
        "actor critic body",
        lambda n: n.actor(h := n.body(x()).tanh()) + n.critic(h),
        "actor critic",
    ),
    "two towers": (
        "image text image_projection text_projection",
        lambda n: (
            n.image_projection(n.image(x()).relu())
            @ n.text_projection(n.text(x()).relu()).T
        ),
        "image_projection text_projection",
    ),
    "siamese": (
        "body projection",
        lambda n: n.projection(n.body(x())) * n.projection(n.body(x())),
        "projection",
    ),
    "residual": ("stem a b c d", residual, "d"),
    "residual and head": ("head stem a b c d", lambda n: n.head(residual(n)), "head"),
    "recurrent": ("cell", lambda n: n.cell(n.cell(n.cell(x()).tanh()).tanh()), "cell"),
    "loop of two": ("b a", looped, "b"),
    "head fed back": ("head value cell", autoregressive, "head value"),
    "shared by body and head": ("a", lambda n: n.a(n.a(x())), "a"),
    "checkpoint": ("head first a b", checkpointed(False), "head"),
    "reentrant checkpoint": ("head first a b", checkpointed(True), "head"),
    "in place": ("head a b c", in_place, "head"),
    "in place at the end": ("a b", in_place_at_the_end, "a"),
    "in place on a transposed view": ("head a", in_place_transposed, "head"),
    "custom function": ("head a b", custom, "head"),  # one node for both outputs
    "no gradient": ("a b", lambda n: Stop.apply(n.a(x())) + n.b(x()), "b"),
    "skipped auxiliary head": ("head aux body", skipped_head, "head"),
    "unused pooler": ("body pooler", intermediate, "body"),
    "detached": ("a b", lambda n: n.b(n.a(x()).detach()) + n.a(x()), "a b"),
    "frozen consumer": ("a frozen", frozen_consumer, "frozen"),
    "without a batch": ("b a", lambda n: n.b(n.a(x(4)).relu_()), "b"),
}


@pytest.mark.parametrize("case", NETS)
def test_output_is_what_no_layer_follows(case):
    names, forward, outputs = NETS[case]
    net = Net(names, forward)
    assert by_passes(net, lambda n: total(n())) == set(outputs.split())


@pytest.mark.parametrize("spread", [dict, tuple, OrderedDict, "dataclass"])
def test_outputs_and_inputs_in_any_nesting(spread):
    @dataclass
    class Pair:
        h: object
        none: object = None

    def nest(h):
        if spread == "dataclass":
            return Pair([h])
        return spread([("h", h)]) if spread is not tuple else (None, (h, 1))

    def unnest(y):
        if spread == "dataclass":
            return y.h[0]
        return y["h"] if spread is not tuple else y[1][0]

    search = OutputSearch()
    first = nest(nn.Linear(4, 4)(x()))
    search.saw("first", ((x(),), {}), first)
    second = nest(nn.Linear(4, 4)(unnest(first)))
    search.saw("second", ((), {"states": first}), second)
    total(unnest(second)).backward()
    assert search.found() == {"second"}


def test_a_unit_that_returns_its_input_leaves_it_an_output():
    search, layer = OutputSearch(), nn.Linear(4, 4)
    y = layer(x())
    search.saw("layer", (x(),), y)
    search.saw("same", (y,), y)
    total(y).backward()
    assert search.found() == {"layer", "same"}


def test_accumulated_passes_add_up():
    net = Net("head_a head_b body", None)
    a = lambda n: total(n.head_a(n.body(x())))  # noqa: E731
    b = lambda n: total(n.head_b(n.body(x())))  # noqa: E731
    assert by_passes(net, a, a) == {"head_a"}
    assert by_passes(net, a, b) == {"head_a", "head_b"}


def test_one_loss_of_several_graphs():
    net = Net("head body", lambda n: n.head(n.body(x())))
    assert by_passes(net, lambda n: total(n()) + total(n())) == {"head"}


def test_two_nets_of_a_gan():
    net = Net("judge2 judge1 maker2 maker1", None)
    make = lambda n: n.maker2(n.maker1(x()).relu())  # noqa: E731
    judge = lambda n, y: total(n.judge2(n.judge1(y).relu()))  # noqa: E731
    fools = lambda n: judge(n, make(n))  # noqa: E731
    judges = lambda n: judge(n, make(n).detach()) - judge(n, x())  # noqa: E731
    assert by_passes(net, judges) == {"judge2"}
    assert by_passes(net, fools, judges) == {"judge2"}
    assert by_passes(net, lambda n: total(make(n)), judges) == {"judge2", "maker2"}


def test_graph_kept_for_two_passes():
    net = Net("head body", lambda n: n.head(n.body(x())))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    loss.backward(retain_graph=True)
    loss.backward()
    assert search.found() == {"head"}


def test_forgets_and_hears_of_a_graph_from_before():
    net = Net("head body", lambda n: n.head(n.body(x())))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    loss.backward(retain_graph=True)
    search.forget()
    assert search.found() is None
    loss.backward()
    assert search.found() == {"head"}


def test_a_pass_to_some_parameters_only():
    net = Net("head body other", None)
    with watched(net, OutputSearch()) as search:
        loss = total(net.head(net.body(x()))) + total(net.other(x()))
    loss.backward(inputs=[net.body.weight])
    assert search.found() == {"head"}


def test_penalty_of_a_derivative():
    net = Net("head body", lambda n, y: n.head(n.body(y).tanh()))

    def loss(net):
        y = x().requires_grad_()
        (slope,) = torch.autograd.grad(net(y).sum(), y, create_graph=True)
        return total(slope)

    assert by_passes(net, loss) == {"head"}


def test_nothing_is_known_without_a_backward_pass():
    net = Net("a", lambda n: n.a(x()))
    search = OutputSearch()
    assert search.found() is None
    with watched(net, search):
        total(net())
        with torch.no_grad():
            net()
    assert search.found() is None


def test_transforms_and_tracing_are_left_out():
    net = Net("a", lambda n, y: n.a(y))
    sloped = Net("", lambda n, y: torch.autograd.grad(total(net(y)), net.a.weight)[0])
    sloped.net = net
    with watched(net, OutputSearch()) as search:
        torch.func.grad(lambda y: total(net(y)))(x())
        torch.jit.trace(sloped, x(), check_trace=False)
    assert search.found() is None


def test_compiled_graphs_are_left_out():
    net = Net("a", lambda n, y: n.a(y))
    with watched(net, OutputSearch()) as search:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        total(compiled(x())).backward()
    assert search.found() is None


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


# -- what it costs ---------------------------------------------------------------------


def graph(*tensors):
    """All nodes of the graph behind tensors."""
    nodes, waiting = set(), [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [before for before, _ in node.next_functions]
    return nodes


def test_each_node_is_visited_once():
    """Layers that take all that came before: paths are many more than nodes."""
    depth = 40
    net = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
    before, inputs = [x()], []
    with watched(net, OutputSearch()) as search:
        for layer in net:
            inputs.append(sum(before))
            before.append(layer(inputs[-1]))
    nodes = graph(*inputs[1:])
    total(before[-1]).backward()
    assert search.found() == {str(depth - 1)}
    assert search.visited == len(nodes)


def test_activations_are_freed_by_the_backward_pass():
    net = Net("a b head", lambda n: n.head(n.b(n.a(x()).relu()).relu()))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    saved = [node for node in graph(loss) if hasattr(node, "_saved_mat1")]
    assert len(saved) == 3
    loss.backward()
    assert search.found() == {"head"}
    for node in saved:
        with pytest.raises(RuntimeError, match="already been freed"):
            node._saved_mat1  # noqa: B018


class Held(torch.autograd.Function):
    """Its saved tensor can be followed by a weak reference to what it is packed in."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.clone()

    @staticmethod
    def backward(ctx, da):
        (a,) = ctx.saved_tensors
        return da + 0 * a


class Packed:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def packed():
    """Weak references to all that graphs save."""
    held = []

    def pack(tensor):
        held.append(weakref.ref(box := Packed(tensor)))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        yield lambda: [ref for ref in held if ref() is not None]


def test_nothing_saved_is_held_after_a_backward_pass(packed):
    net = Net("a b head", lambda n: n.head(Held.apply(n.b(n.a(x()).exp()).sin())))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    assert packed()
    loss.backward()
    assert not packed()
    assert search.found() == {"head"}


def test_a_graph_without_a_backward_pass_is_not_held(packed):
    net = Net("a b head", lambda n: n.head(n.b(n.a(x()).sin()).sin()))
    with watched(net, OutputSearch()) as search:
        loss = total(net())
    assert packed()
    del loss
    assert not packed() and search.found() is None


def test_graph_goes_when_forgotten_or_with_the_search():
    net = Net("a head", lambda n: n.head(n.a(x())))

    def made(search):
        with watched(net, search):
            loss = total(y := net())
        y.grad_fn.metadata["box"] = box = Packed(None)
        loss.backward()
        return weakref.ref(box)

    search = OutputSearch()
    box = made(search)
    assert box() is not None
    search.forget()
    assert box() is None

    box, alive = made(search), weakref.ref(search)
    del search
    gc.collect()
    assert alive() is None and box() is None
