"""Products inside of modules: never wrong.

Samples are right if ``X^T Y`` is the gradient, where all positions are sampled. What is
not seen must make no error, and no samples.
"""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from attention_net import by, reason_of
from inside_nets import (
    HIDDEN,
    Counted,
    D,
    E,
    Net,
    T,
    backward,
    batch,
    first_of,
    frog,
    modes,
    normed_hidden,
    sampled,
    steps,
)
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from frog_triton.unhooked import PATIENCE

# -- attention -------------------------------------------------------------------------

IN, OUT = "inner.in_proj", "inner.out_proj"
ATTENDED = {"first", IN, OUT, "last"}


class OtherMatrix(nn.MultiheadAttention):
    """Attends by a matrix of its own before it does as its parent."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.other = nn.Parameter(torch.randn(3 * D, D) / 2)

    def forward(self, q, k, v):
        h = attend_by(self, q, self.other)
        return super().forward(h, h, h)


class SharedRows(nn.MultiheadAttention):
    """Makes query and key by the same rows."""

    def forward(self, q, k, v):
        w = self.in_proj_weight
        return attend_by(self, q, torch.cat([w[:D], w[:D], w[2 * D :]])), None


class OtherOrder(nn.MultiheadAttention):
    """Takes its rows for key, value and query."""

    def forward(self, q, k, v):
        w = self.in_proj_weight.chunk(3)
        names = ("k_proj_weight", "v_proj_weight", "q_proj_weight")
        given = dict(zip(names, w, strict=True), use_separate_proj_weight=True)
        return attend_by(self, q, None, **given), None


def attend_by(attention, x, matrix, **given):
    x = x.transpose(0, 1)
    out = attention.out_proj
    made, _ = F.multi_head_attention_forward(
        *(x, x, x, D, 2, matrix, None, None, None, False, 0.0, out.weight, out.bias),
        **given,
    )
    return made.transpose(0, 1)


def attention(change=None, kind=nn.MultiheadAttention, last=True):
    torch.manual_seed(1)
    made = kind(D, 2, batch_first=True)
    if change is not None:
        change(made)
    return Net(made, lambda inner, h: inner(h, h, h)[0], last)


def normed(norm):
    return lambda: attention(lambda made: norm(made.out_proj))


def all_but(part):
    return lambda net: [p for name, p in net.named_parameters() if part not in name]


KINDS = {
    "plain": (attention, {}, ATTENDED),
    "out excluded": (attention, {"exclude": ["*.out_proj"]}, ATTENDED - {OUT}),
    "in excluded": (attention, {"exclude": ["*.in_proj_*"]}, ATTENDED - {IN}),
    "out frozen": (
        lambda: attention(lambda made: made.out_proj.requires_grad_(False)),
        {},
        ATTENDED - {OUT},
    ),
    "out not in params": (attention, {"params": all_but("out_proj")}, ATTENDED - {OUT}),
    "out named an output": (
        attention,
        {"output_layers": [OUT], "exclude_output_layer": True},
        ATTENDED - {OUT},
    ),
    "out normed": (normed(parametrizations.weight_norm), {}, ATTENDED - {OUT}),
    "out spectral": (normed(parametrizations.spectral_norm), {}, ATTENDED - {OUT}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_attention(name):
    build, options, expected = KINDS[name]
    net, x = build(), batch(3, 5, D)
    options = {key: v(net) if callable(v) else v for key, v in options.items()}
    opt = frog(net, **options)
    for _ in range(3):
        backward(net, opt, x)
        assert sampled(opt) == expected
        opt.step()
    assert modes() == 0


@pytest.mark.parametrize("kind", [OtherMatrix, SharedRows, OtherOrder])
def test_attention_by_other_matrices(kind):
    """What is not known to be the module's own matrix makes no samples."""
    net, x = attention(kind=kind), batch(3, 5, D)
    opt = frog(net)
    for _ in range(2):
        backward(net, opt, x)
        assert sampled(opt) | {IN} == ATTENDED
    assert modes() == 0


def test_attention_that_comes_last():
    net, x = attention(last=False), batch(3, 5, D)
    opt = frog(net, exclude_output_layer=True)
    for step in range(3):
        backward(net, opt, x)
        assert sampled(opt) == {"first", IN} | ({OUT} if step == 0 else set())
        opt.step()
    assert by(opt) == ["inner.out_proj.weight", "inner.out_proj.bias"]
    assert reason_of(opt, "inner.out_proj.weight") == "output layer"


def test_what_attention_looks_up_may_be_replaced_later(monkeypatch):
    net, x = attention(), batch(3, 5, D)
    net.call = lambda inner, h: inner(h, h, h, need_weights=False)[0]
    opt, seen = frog(net), []
    original = F.scaled_dot_product_attention

    def replaced(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", replaced)
    backward(net, opt, x)
    assert len(seen) == 1 and sampled(opt) == ATTENDED
    monkeypatch.undo()
    backward(net, opt, x)
    assert len(seen) == 1


# -- experts ---------------------------------------------------------------------------


class Experts(nn.Module):
    """As many matrices as it says, used by `call`."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(1)
        self.num_experts = E
        self.w = nn.Parameter(torch.randn(E, D, D) / 2)
        self.run = call

    def forward(self, x):
        return self.run(self.w, x)


def experts(call):
    return Net(Experts(call))


# No expert has more than twice its share, of which all tokens are sampled.
IDS, ORDER = torch.arange(T).mul(5) % 7 % E, torch.tensor([2, 0, 3, 1])
EACH = (E, T // E, D)
SEEN, UNSEEN = {"first", "inner.w", "last"}, {"first", "last"}


def token(matrices, x):
    return torch.bmm(x[:, None], matrices.mT)[:, 0]


def each(w, x):
    return torch.bmm(x.view(EACH), w).view(T, D)


# Ways to write a product, and whether FROG must know them: what it does not know makes
# no samples, and no error. All sizes are alike, so that no shape gives a mistake away.
PRODUCTS = {
    "one": (lambda w, x: F.linear(x, w[1]), True),
    "of keywords": (lambda w, x: F.linear(input=x, weight=w[1], bias=None), True),
    "negative": (lambda w, x: F.linear(x, w[-1]) + F.linear(x, w[0]), True),
    "number in a tensor": (lambda w, x: F.linear(x, w[torch.tensor(-1)]), True),
    "select": (lambda w, x: F.linear(x, w.select(0, -1)), True),
    "select by keywords": (
        lambda w, x: F.linear(x, torch.select(input=w, dim=0, index=1)),
        True,
    ),
    "select of rows": (lambda w, x: F.linear(x, w.select(1, 0)), False),
    "iteration": (lambda w, x: sum(F.linear(x, matrix) for matrix in w), True),
    "unbind": (lambda w, x: sum(F.linear(x, m) for m in w.unbind()), True),
    "unbind by keywords": (
        lambda w, x: F.linear(x, torch.unbind(input=w, dim=0)[2]),
        True,
    ),
    "unbind of columns": (lambda w, x: F.linear(x, w.unbind(2)[2]), False),
    "mm by keywords": (lambda w, x: torch.mm(x, mat2=w[1].t()), True),
    "matmul by keywords": (lambda w, x: torch.matmul(input=x, other=w[1].T), True),
    "addmm by keywords": (
        lambda w, x: torch.addmm(input=x.new_zeros(D), mat1=x, mat2=w[1].t()),
        True,
    ),
    "transpose by keywords": (lambda w, x: x @ w[1].transpose(dim0=0, dim1=1), True),
    "transpose to itself": (lambda w, x: F.linear(x, w[1].transpose(0, 0)), False),
    "transpose of experts": (lambda w, x: F.linear(x, w.transpose(0, 1)[1]), False),
    "of reversed dimensions": (lambda w, x: x @ w.T[1], False),
    "bmm by keywords": (lambda w, x: each_by_keywords(w, x), True),
    "bmm of all": (lambda w, x: each(w.mT, x), True),
    "reordered": (lambda w, x: each(w[ORDER].mT, x), False),
    "one of reordered": (lambda w, x: F.linear(x, w[ORDER][0]), False),
    "token of reordered": (lambda w, x: token(w[ORDER][IDS], x), False),
    "token": (lambda w, x: token(w[IDS], x), True),
    "token by negatives": (lambda w, x: token(w[IDS - E], x), True),
    "column": (lambda w, x: (w[IDS] @ x[..., None])[..., 0], True),
    "several tokens": (
        lambda w, x: torch.bmm(x.view(2, 6, D), w[[0, 2]].mT).view(T, D),
        False,
    ),
    "several tokens of a tensor's": (
        lambda w, x: torch.bmm(x.view(2, 6, D), w[ORDER[:2]].mT).view(T, D),
        False,
    ),
    "two dimensions of numbers": (
        lambda w, x: token(w[IDS.view(6, 2)].view(T, D, D), x),
        False,
    ),
    "mask": (lambda w, x: each(w[torch.ones(E, dtype=torch.bool)].mT, x), False),
    "half a mask": (
        lambda w, x: torch.bmm(x.view(2, 6, D), w[ORDER > 1].mT).view(T, D),
        False,
    ),
    "true": (lambda w, x: F.linear(x, w[True][0, 1]), False),
    "list": (lambda w, x: F.linear(x, w[[1]][0]), False),
    "slice": (lambda w, x: F.linear(x, w[1:][0]), False),
    "several indices": (lambda w, x: F.linear(x, w[1, :]), True),
    "several indices of rows": (lambda w, x: F.linear(x, w[:, 1]), False),
    "index_select": (lambda w, x: token(w.index_select(0, IDS), x), True),
    "index_select of rows": (
        lambda w, x: F.linear(x, w.index_select(1, ORDER)[1]),
        False,
    ),
    "rows of one": (lambda w, x: F.linear(x, w[1][ORDER]), False),
    "scaled": (lambda w, x: F.linear(x, 2 * w[1]), False),
    "unbatched": (lambda w, x: F.linear(x[0], w[1])[None], True),
    "twice": (lambda w, x: F.linear(F.linear(x, w[1]).tanh(), w[1]), True),
    "in place after": (lambda w, x: F.linear(x, w[1]).mul_(2).relu_(), True),
    "written to": (
        lambda w, x: (
            torch.mm(x.detach(), w[1].detach().t(), out=torch.empty_like(x))
            + F.linear(x, w[1])
        ),
        True,
    ),
    "by einsum": (lambda w, x: torch.einsum("td,rd->tr", x, w[0]), False),
}


def each_by_keywords(w, x):
    turned = torch.transpose(input=w, dim0=-1, dim1=1)
    return torch.bmm(x.view(EACH), mat2=turned).view(T, D)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_stacked_weights(name):
    call, known = PRODUCTS[name]
    net, x = experts(call), batch(T, D)
    opt = frog(net)
    assert "inner.w" in by(opt, "frog")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if known else "ignore")
        for _ in range(PATIENCE):
            backward(net, opt, x)
            assert sampled(opt) in ([SEEN] if known else [SEEN, UNSEEN])
            opt.step()
    assert not known or "inner.w" in by(opt, "frog")
    assert modes() == 0


# -- calls that are interrupted from outside -------------------------------------------


def stopped(inner):
    """Interrupts the next call, before its forward is done."""

    def stop(*_):
        handle.remove()
        raise KeyboardInterrupt

    handle = inner.register_forward_pre_hook(stop)


@pytest.mark.parametrize(
    "build, shape",
    [(attention, (3, 5, D)), (lambda: experts(PRODUCTS["iteration"][0]), (T, D))],
    ids=["attention", "experts"],
)
def test_a_call_that_the_keyboard_interrupts(build, shape):
    net, other, x = build(), build(), batch(*shape)
    opt = frog(net)
    backward(net, opt, x)
    everything = sampled(opt)
    assert len(everything) == len(opt._plan.layers)
    for interrupted in range(2):
        stopped(net.inner)
        with pytest.raises(KeyboardInterrupt):
            net(x)
        opt.zero_grad()
        # Another model of the same kind, and then the first again.
        made = other.double()(batch(*shape, seed=interrupted)).square().sum()
        (made + net(x).square().sum()).backward()
        assert sampled(opt) == everything
        opt.step()
        assert modes() == 0
    with torch.overrides.BaseTorchFunctionMode():  # the user's own mode stays
        stopped(net.inner)
        with pytest.raises(KeyboardInterrupt):
            net(x)
        backward(net, opt, x)
        opt.step()
        assert modes() == 1
    assert modes() == 0


# -- what FROG holds -------------------------------------------------------------------

HELD = {
    "linear": lambda: Net(nn.Linear(D, D)),
    "own forward": lambda: Net(Counted(D, D)),
    "attention": attention,
    "experts": lambda: experts(PRODUCTS["iteration"][0]),
    "lstm": lambda: Net(nn.LSTM(D, D), first_of),
    "lstm with norms": lambda: Net(normed_hidden(weight_norm)(), first_of, size=HIDDEN),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("name", HELD)
def test_modules_go_with_the_last_reference_to_them(name, closed):
    net, x = HELD[name](), batch(3, 4, D)
    opt = frog(net)
    steps(net, opt, x if name != "experts" else x.view(T, D))
    if closed:
        opt.close()
    gone = [weakref.ref(module) for module in net.modules()]
    optimizer = weakref.ref(opt)
    gc.collect()
    gc.disable()
    try:
        del opt
        assert optimizer() is None
        del net
        assert [made() for made in gone] == [None] * len(gone)
    finally:
        gc.enable()
