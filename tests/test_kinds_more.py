"""What stays true around a step of layers that are watched inside of their forward."""

import copy
import io
import pickle
from dataclasses import replace
from unittest import mock

import pytest
import torch
from kinds import loss_of, tensors_of
from kinds_attention import ATTENTION, BLOCKS
from kinds_calls import CALLS, frog
from kinds_inside import EXPERTS, RECURRENT
from kinds_run import Run
from torch import nn
from torch.utils.checkpoint import checkpoint

from frog_triton.capture.taps import IN_EVAL_MODE

PRODUCTS = {**ATTENTION, **BLOCKS, **EXPERTS}
INSIDE = {**PRODUCTS, **RECURRENT}
KINDS = {**CALLS, **INSIDE}


@pytest.fixture(autouse=True)
def _transformers(request):
    name = request.node.name
    if any(its in name for its in ("transformers", "mixtral", "gpt-oss")):
        pytest.importorskip("transformers")


def modes():
    """How many modes of torch's function dispatch are open."""
    return torch._C._len_torch_function_stack()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", INSIDE)
def test_activation_checkpoints(name, reentrant):
    kind = INSIDE[name]
    run = Run(kind)

    def checkpointed(kind, net, batch):
        first, *rest = batch
        if isinstance(first, torch.Tensor):
            first = first.clone().requires_grad_()
        elif reentrant:
            pytest.skip("reentrant checkpoints want a tensor")

        def forward(*inputs):
            # A reentrant one sees no tensors inside of tuples.
            return tuple(tensors_of(kind.call(net, *inputs)))

        made = checkpoint(forward, first, *rest, use_reentrant=reentrant)
        loss_of(made).backward()

    for seed in range(2):
        run.step(kind.batch(seed), run=checkpointed)
    # Measured: 6.3e-13.
    assert run.error() < 1e-10
    assert modes() == 0


@pytest.mark.parametrize("name", KINDS)
def test_outputs_may_be_worked_on_in_place(name):
    kind = KINDS[name]

    def doubled(call, double):
        def doubling(*args):
            first, *rest = tensors_of(call(*args))
            return [double(first), *rest]

        return doubling

    run = Run(
        replace(
            kind,
            call=doubled(kind.call, lambda first: first.mul_(2)),
            by_hand=doubled(kind.by_hand, lambda first: 2 * first),
        )
    )
    for seed in range(2):
        run.step(kind.batch(seed))
    # Measured: 4.1e-13.
    assert run.error() < 1e-10


@pytest.mark.parametrize("name", INSIDE)
def test_gradients_of_many_directions_at_once(name):
    kind = INSIDE[name]

    def gradients(net):
        output = tensors_of(kind.call(net, *kind.batch(0)))[0]
        torch.manual_seed(0)
        directions = torch.randn(3, *output.shape, dtype=output.dtype)
        params = [p for p in net.parameters() if p.requires_grad]
        return torch.autograd.grad(
            output, params, directions, is_grads_batched=True, allow_unused=True
        )

    expected = gradients(kind.module())
    net = kind.module()
    opt = frog(net)
    for a, b in zip(gradients(net), expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert [*opt.capture.tensors()] == []


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_leaves_nothing(name):
    kind = KINDS[name]
    net = kind.module()
    opt = frog(net)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            kind.call(net, *kind.batch(0))
    assert not opt.capture.called and not opt.capture.unsampled_reasons()
    net.eval()
    loss_of(kind.call(net, *kind.batch(0))).backward()
    assert [*opt.capture.tensors()] == [] and modes() == 0
    assert {*opt.capture.unsampled_reasons().values()} == {IN_EVAL_MODE}


FUSED = {
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda net, x: net(x, x, x)[0],
        "_native_multi_head_attention",
    ),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, 0, batch_first=True)),
        lambda net, x: net(x),
        "_transformer_encoder_layer_fwd",
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_inference_stays(name):
    build, call, fused = FUSED[name]
    net, x = build(), torch.randn(2, 3, 4)
    with mock.patch.object(torch, fused, wraps=getattr(torch, fused)) as spy:
        opt = frog(net)
        call(net, x).sum().backward()
        assert spy.call_count == 0
        opt.step()
        net.eval()
        with torch.no_grad():
            expected = call(copy.deepcopy(net), x)
            assert torch.equal(call(net, x), expected)
        assert spy.call_count == 2
        with pytest.raises((RuntimeError, AssertionError)), torch.no_grad():
            call(net, x[..., :-1])
        spy.reset_mock()
        assert modes() == 0
        net.train()
        call(net, x).sum().backward()
        assert spy.call_count == 0
        assert all(opt.capture.calls(name) for name in opt._plan.layers)


@pytest.mark.parametrize("name", INSIDE)
def test_a_forward_that_raises_leaves_no_mode(name):
    kind = INSIDE[name]
    run = Run(kind)
    first, *rest = kind.batch(0)
    tensor = isinstance(first, torch.Tensor)
    first = first[..., :-1] if tensor else torch.randn(2, 3, 5)
    for _ in range(2):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            kind.call(run.net, first, *rest)
        assert modes() == 0
    run.step(kind.batch(1))
    assert run.error() < 1e-10 and modes() == 0


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", INSIDE)
def test_copies_have_no_hooks(name, how):
    kind = INSIDE[name]
    net = kind.module()
    opt = frog(net)
    loss_of(kind.call(net, *kind.batch(0))).backward()
    other = COPIES[how](net)
    opt.step()
    for module in other.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_hooks_always_called
    assert b"frog" not in pickle.dumps(other)
    made = loss_of(kind.call(other, *kind.batch(0)))
    assert torch.equal(made, loss_of(kind.call(kind.module(), *kind.batch(0))))
    opt.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", KINDS)
def test_resuming_continues_bit_for_bit(name):
    kind = KINDS[name]
    # Fewer than there are, so that draws must be the same, too.
    options = {"sample_size": kind.steps + 2, "fallback_lr": 1e-2}

    def train(net, opt, seeds):
        for seed in seeds:
            opt.zero_grad()
            loss_of(kind.call(net, *kind.batch(seed))).backward()
            opt.step()

    net = kind.module()
    opt = frog(net, **options)
    train(net, opt, (0, 1))
    file = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict()), file)
    train(net, opt, (2, 3))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = kind.module(seed=1)
    other.load_state_dict(weights)
    resumed = frog(other, **options)
    resumed.load_state_dict(state)
    train(other, resumed, (2, 3))
    for (key, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), key
        for entry, value in opt.state[a].items():
            assert torch.equal(value, resumed.state[b][entry]), (key, entry)
