"""`precondition` against the dense float64 oracle."""

import numpy as np
import oracles
import pytest
import torch
from cases import CASES, precondition, problem
from torch import nn

FORMULATIONS = ("primal", "gram")


def batched(module, x, y):
    from frog_triton.layers import adapter_for

    adapter = adapter_for(module)
    return adapter.batched(module, x), adapter.batched(module, y)


def flat(direction, direction_bias):
    rows = oracles.as_numpy(direction.flatten(1))
    if direction_bias is None:
        return rows
    return np.concatenate([rows, oracles.as_numpy(direction_bias)[:, None]], axis=1)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", CASES)
def test_float64_matches_the_oracle(name, formulation):
    module, x, y, m, mb = problem(name)
    expected = oracles.precondition(module, *batched(module, x, y), m, mb, 1e-2, 4)
    actual = precondition(
        module, x, y, m, mb, damping=1e-2, cg_iters=4, formulation=formulation
    )
    assert actual[0].shape == m.shape
    # Measured: at most 7e-13 over all cases.
    assert oracles.relative_error(actual[0], expected[0]) < 1e-11
    if mb is None:
        assert actual[1] is None
    else:
        assert oracles.relative_error(actual[1], expected[1]) < 1e-11


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("iters", range(1, 9))
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-groups"])
def test_iterations_and_damping(name, iters, damping, formulation):
    module, x, y, m, mb = problem(name)
    systems = oracles.row_systems(
        module,
        *map(oracles.as_numpy, (x, y, m)),
        None if mb is None else oracles.as_numpy(mb),
        damping,
    )
    actual = flat(
        *precondition(
            module, x, y, m, mb,
            damping=damping, cg_iters=iters, formulation=formulation,
        )
    )  # fmt: skip
    expected = oracles.solve_rows(systems, iters)
    if iters <= 4:
        # Measured: at most 8e-15.
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < 1e-12
    # Any CG amplifies rounding later on: what it promises is the error in the A-norm.
    # Measured: 6e-4 apart (7 iterations on rank 6, tau 1e-6); about 0.5 at k = 1.
    ours, theirs = (oracles.residual(systems, z) for z in (actual, expected))
    assert (ours <= 1.01 * theirs + 2e-3).all()


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-depthwise"])
def test_as_many_iterations_as_weights_solve_exactly(name, formulation):
    module, x, y, m, mb = problem(name)
    damping = 0.1
    systems = oracles.row_systems(
        module,
        *map(oracles.as_numpy, (x, y, m)),
        None if mb is None else oracles.as_numpy(mb),
        damping,
    )
    exact = np.stack([np.linalg.solve(a, b) for a, b in systems])
    exact /= np.sqrt([z @ b for z, (_, b) in zip(exact, systems, strict=True)])[:, None]
    iters = exact.shape[1]
    actual = flat(
        *precondition(
            module, x, y, m, mb,
            damping=damping, cg_iters=iters, formulation=formulation,
        )
    )  # fmt: skip
    # Measured: 2e-8 (28 weights), 2e-13 and less for the others.
    assert np.linalg.norm(actual - exact) / np.linalg.norm(exact) < 1e-6


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-groups", "conv1d"])
@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_gram_is_as_exact_as_primal_in_float32(name, damping):
    errors = {"primal": [], "gram": []}
    for seed in range(5):
        module, x, y, m, mb = problem(name, seed, torch.float32)
        expected, _ = oracles.precondition(
            module, *batched(module, x, y), m, mb, damping, 4
        )
        for formulation, values in errors.items():
            actual, _ = precondition(
                module, x, y, m, mb, damping=damping, formulation=formulation
            )
            assert actual.dtype == torch.float32
            values.append(oracles.relative_error(actual, expected))
    primal, gram = np.median(errors["primal"]), np.median(errors["gram"])
    # Medians: single cases scatter by their rounding. Measured ratio: 0.3 to 1.6.
    assert gram < 2 * primal + 1e-6


def test_gram_is_as_exact_as_primal_at_real_sizes():
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(512, 24)
    x = torch.randn(48, 512, generator=generator).cumsum(1) / 10  # ill-conditioned
    y = torch.randn(48, 24, generator=generator)
    m = torch.randn(24, 512, generator=generator)
    expected, _ = oracles.precondition(module, x, y, m, None, 1e-4, 4)
    errors = [
        oracles.relative_error(
            precondition(module, x, y, m, formulation=f)[0], expected
        )
        for f in FORMULATIONS
    ]
    # Measured: primal 2.8e-6, gram 1.1e-6.
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_scale_of_output_gradients_cancels(scale, formulation):
    module, x, y, m, mb = problem("conv2d", dtype=torch.float32)
    expected = precondition(module, x, y, m, mb, formulation=formulation)
    actual = precondition(module, x, y * scale, m, mb, formulation=formulation)
    # Measured: 4e-7; only the rounding of y * scale is different.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_scale_of_momentum_cancels(scale, formulation):
    module, x, y, m, mb = problem("linear", dtype=torch.float32)
    expected = precondition(module, x, y, m, mb, formulation=formulation)
    actual = precondition(module, x, y, m * scale, mb * scale, formulation=formulation)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_rows_without_sampled_gradient_take_the_identity(formulation):
    module, x, y, m, mb = problem("linear")
    y[:, 1] = 0
    z, zb = precondition(module, x, y, m, mb, formulation=formulation)
    length = (m[1].square().sum() + mb[1].square()).sqrt()
    torch.testing.assert_close(z[1], m[1] / length)
    torch.testing.assert_close(zb[1], mb[1] / length)
    expected, _ = oracles.precondition(module, x, y, m, mb, 1e-4, 4)
    assert oracles.relative_error(z, expected) < 1e-8


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_rows_without_momentum_stay(formulation):
    module, x, y, m, mb = problem("linear")
    m[2], mb[2] = 0, 0
    z, zb = precondition(module, x, y, m, mb, formulation=formulation)
    assert (z[2] == 0).all() and zb[2] == 0
    assert torch.isfinite(z).all() and (z[1] != 0).all()


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_touch_their_rows_only(bad, formulation):
    module, x, y, m, mb = problem("conv2d-groups")
    expected = precondition(module, x, y, m, mb, formulation=formulation)
    lengths = (m.flatten(1).square().sum(1) + mb.square()).sqrt()
    identity = m.flatten(1) / lengths[:, None]

    wrong = y.clone()
    wrong[0, 2, 1, 1] = bad
    z, _ = precondition(module, x, wrong, m, mb, formulation=formulation)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(z[2].flatten(), identity[2])
    torch.testing.assert_close(z[others], expected[0][others])

    wrong = x.clone()
    wrong[0, 3, 1, 1] = bad  # a channel of the second group: rows 3 to 5
    z, _ = precondition(module, wrong, y, m, mb, formulation=formulation)
    torch.testing.assert_close(z[3:].flatten(1), identity[3:])
    torch.testing.assert_close(z[:3], expected[0][:3])


def test_positive_along_the_momentum():
    for name in CASES:
        module, x, y, m, mb = problem(name, dtype=torch.float32)
        for formulation in FORMULATIONS:
            z, zb = precondition(module, x, y, m, mb, formulation=formulation)
            along = (z * m).flatten(1).sum(1)
            if mb is not None:
                along = along + zb * mb
            assert (along > 0).all()


def test_bias_can_be_left_out():
    module, x, y, m, _ = problem("conv2d")
    z, zb = precondition(module, x, y, m, damping=1e-2)
    expected, _ = oracles.precondition(module, x, y, m, None, 1e-2, 4)
    assert zb is None
    assert oracles.relative_error(z, expected) < 1e-10


def test_half_precision_samples_are_solved_in_float32():
    module, x, y, m, mb = problem("conv2d", dtype=torch.float32)
    half = precondition(module, x.bfloat16(), y.bfloat16(), m, mb)
    wide = precondition(module, x.bfloat16().float(), y.bfloat16().float(), m, mb)
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half, wide)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"cg_iters": 0}, "cg_iters must be a positive integer"),
        ({"cg_iters": 2.5}, "cg_iters must be a positive integer"),
        ({"formulation": "dual"}, "formulation must be one of"),
        ({"backend": "jax"}, "backend must be one of"),
    ],
)
def test_unknown_options(change, message):
    module, x, y, m, mb = problem("linear")
    with pytest.raises(ValueError, match=message):
        precondition(module, x, y, m, mb, **change)


def test_shapes_that_do_not_fit():
    module, x, y, m, mb = problem("conv2d")
    with pytest.raises(ValueError, match=r"Conv2d: momentum has shape \(4, 27\)"):
        precondition(module, x, y, m.flatten(1), mb)
    with pytest.raises(ValueError, match="Conv2d: momentum_bias has shape"):
        precondition(module, x, y, m, mb[:2])
    with pytest.raises(ValueError, match="Conv2d: output_grads of shape"):
        precondition(module, x, y[:1], m, mb)
    bare, x, y, m, _ = problem("linear-nobias")
    with pytest.raises(ValueError, match="Linear has no bias"):
        precondition(bare, x, y, m, torch.zeros(5))
    with pytest.raises(TypeError, match="Embedding has no adapter"):
        precondition(nn.Embedding(2, 2), x, y, m)
