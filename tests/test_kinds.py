"""Steps of every served kind of layer, against products written out by hand.

`sample_size` is at least the number of positions, unless a test says otherwise, so that
nothing is random: parameters must be those of Algorithm 1 in float64, fed with the rows
of X and Y of the net by hand.
"""

import oracles
import pytest
import torch
from kinds import Model
from kinds_attention import ATTENTION, BLOCKS
from kinds_calls import CALLS, EVERYTHING, frog
from kinds_inside import EXPERTS, RECURRENT
from kinds_run import Run, backward

from frog_triton.linalg.rows import written_out
from frog_triton.presets import SAMPLINGS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSIDE = {**ATTENTION, **BLOCKS, **EXPERTS, **RECURRENT}
KINDS = {**CALLS, **INSIDE}
# Every pair of choices is among them.
HOW = {
    "primal-positions-orthogonal": ("primal", "positions", True),
    "gram-examples-orthogonal": ("gram", "examples", True),
    "primal-examples-plain": ("primal", "examples", False),
    "gram-positions-plain": ("gram", "positions", False),
}
# One for each way in which rows lie, samples are taken, and groups meet inputs.
IN_KERNELS = (
    *("transformers-conv1d", "same-padding", "weight-norm", "transposed-1d"),
    *("transposed-2d-groups", "transposed-3d", "bilinear", "self", "cross"),
    *("other-sizes", "loop-matmul", "mixtral-grouped_mm", "gpt-oss-batched_mm"),
    *("lstm-projected", "gru-packed"),
)


@pytest.fixture(autouse=True)
def _transformers(request):
    name = request.node.name
    if any(its in name for its in ("transformers", "mixtral", "gpt-oss")):
        pytest.importorskip("transformers")


def options(how, **more):
    formulation, sampling, orthogonalize = HOW[how]
    return {
        "formulation": formulation,
        "sampling": sampling,
        "orthogonalize": orthogonalize,
        **more,
    }


# -- Algorithm 1 -----------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", KINDS)
def test_three_steps(name, how):
    kind = KINDS[name]
    run = Run(kind, **options(how, backend="torch"))
    rows = {n for pair in kind.matrices.items() for n in (pair[0], pair[1][0]) if n}
    assert {r.name for r in run.opt.routes() if r.updated_by == "frog"} == rows
    for seed in range(3):
        run.step(kind.batch(seed))
        # Measured: 1.2e-12 (small singular values grow 500 times), most below 1e-13.
        assert run.error() < 1e-10


# Measured: 1.5e-4, where experts have fewer samples than iterations, 4.5e-6 and 3.7e-5,
# in the interpreter.
LIMITS = {
    "gram-positions-plain": 3e-3,
    "primal-examples-plain": 1e-4,
    "primal-positions-orthogonal": 1e-3,
}


@pytest.mark.parametrize("how", LIMITS)
@pytest.mark.parametrize("name", IN_KERNELS)
def test_two_steps_of_kernels(name, how):
    if DEVICE == "cuda" and HOW[how][2]:
        pytest.skip("orthogonalized in bfloat16")
    kind = KINDS[name]
    run = Run(kind, torch.float32, DEVICE, **options(how, backend="triton"))
    for seed in range(2):
        run.step(kind.batch(seed))
    assert run.error() < LIMITS[how]


@pytest.mark.parametrize("sampling", ["positions", "examples"])
@pytest.mark.parametrize("name", KINDS)
def test_two_backward_passes_before_a_step(name, sampling):
    kind = KINDS[name]
    run = Run(kind, sampling=sampling, sample_size=2 * EVERYTHING)
    for seed in range(2):
        run.step(kind.batch(seed), kind.batch(10 + seed))
    # Measured: 1.3e-13.
    assert run.error() < 1e-10


@pytest.mark.parametrize("sampling", ["positions", "examples"])
@pytest.mark.parametrize(
    "name", [n for n, k in KINDS.items() if any(b for b, _ in k.matrices.values())]
)
def test_frozen_weights_with_biases_that_are_not(name, sampling):
    kind = KINDS[name]
    # Orthogonalized, a column of biases would be the same without samples.
    run = Run(kind, frozen=True, sampling=sampling, orthogonalize=False)

    def with_inputs_that_take_gradients(kind, net, batch):
        first, *rest = batch
        backward(kind, net, [_that_takes_a_gradient(first), *rest])

    for seed in range(2):
        run.step(kind.batch(seed), run=with_inputs_that_take_gradients)
    # Measured: 6e-16.
    assert run.error() < 1e-10


def _that_takes_a_gradient(x):
    return x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x


# -- fewer samples ---------------------------------------------------------------------


def samples(opt, kind, name, net):
    """Rows of X and Y of each group that the optimizer has, zeros left out."""
    layer = opt._partition.layer_of[net.get_parameter(name)]
    x, y = opt.capture.samples(layer, False)
    x, y = x.matrix().x, written_out(y).squeeze(-1)
    view = kind.matrices[name][1]
    groups = len(view(oracles.as_numpy(layer.weight)))
    y = y.unflatten(1, (groups, -1))
    x = x.view(len(x), -1, layer.geometry.dim).expand(-1, groups, -1)
    for group in range(groups):
        there = torch.cat([x[:, group], y[:, group]], 1).any(-1)
        yield group, x[there, group], y[there, group]


@pytest.mark.parametrize("sampling", ["positions", "examples"])
@pytest.mark.parametrize("name", KINDS)
def test_fewer_samples_are_true_rows_of_x_and_y(name, sampling):
    kind = KINDS[name]
    net, inputs = kind.module(), kind.batch(0)
    count = kind.steps + 2 if sampling == "positions" else 1
    opt = frog(net, sample_size=count, sampling=sampling)
    backward(kind, net, inputs)
    record = Model(kind).record(inputs)
    for weight in kind.matrices:
        for group, x, y in samples(opt, kind, weight, net):
            x_true, y_true = record.rows(weight, group)
            inside = SAMPLINGS["positions"] // SAMPLINGS["examples"]
            expected = count if sampling == "positions" else count * inside
            if sampling == "examples" and (name in CALLS or "linear" in weight):
                expected = len(x_true) // len(inputs[0])
            elif kind.steps > 1:  # whole sequences
                expected = expected // kind.steps * kind.steps or expected
            if name == "gru-packed":
                assert 0 < len(x) <= expected
            else:
                assert len(x) == min(expected, len(x_true)), (weight, group)
            both = torch.cat([x, y], 1), torch.cat([x_true, y_true], 1)
            distances = torch.cdist(*both, compute_mode="donot_use_mm_for_euclid_dist")
            # Measured: 2e-15.
            assert distances.min(1).values.max() < 1e-12
            assert len(distances.argmin(1).unique()) == len(x)


# -- experts without tokens ------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["primal-positions-orthogonal", "gram-examples-orthogonal"]
)
@pytest.mark.parametrize("name", [n for n in EXPERTS if "bmm" not in n])
def test_an_expert_without_tokens_stays_as_it_is(name, how):
    kind = KINDS[name]
    run = Run(kind, **options(how))
    run.step(kind.batch(0))
    for seed in (1, 2):
        x, ids, weights = kind.batch(seed)
        ids = torch.where(ids == 2, 0, ids)
        before = [t.clone() for t in held(run)]
        run.step((x, ids, weights))
        for old, new in zip(before, held(run), strict=True):
            assert torch.equal(old[2], new[2])
            assert not any(torch.equal(old[e], new[e]) for e in (0, 1, 3))
    run.step(kind.batch(3))
    # Measured: 1.7e-13.
    assert run.error() < 1e-10


def held(run):
    """Parameters and momenta, an expert after the other."""
    params = [*run.net.parameters()]
    return [*params, *(run.opt.state[p]["momentum_buffer"] for p in params)]
