"""Newton-Schulz iterations against a polynomial of the singular values."""

import oracles
import pytest
import torch

from frog_triton.ops.types import Rows
from frog_triton.orthogonal import newton_schulz, orthogonalize


def randn(*shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    # Measured: 3e-15 and 2e-6.
    [(torch.float64, 1e-13), (torch.float32, 2e-5)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "dim", "groups"),
    [(5, 9, 1), (9, 5, 1), (7, 7, 1), (6, 4, 2), (6, 2, 3), (6, 3, 6), (4, 0, 1)],
)
def test_against_singular_values(rows, dim, groups, bias, dtype, limit):
    if dim + bias == 0:
        pytest.skip("nothing to orthogonalize")
    weight, b = randn(2, rows, dim, dtype=dtype), randn(2, rows, dtype=dtype)
    found = orthogonalize(Rows(weight, b if bias else None), groups)
    assert found.weight.dtype == dtype and (found.bias is not None) == bias
    for i in range(2):
        whole = torch.cat([weight[i], b[i, :, None]], 1) if bias else weight[i]
        expected = oracles.orthogonalized(oracles.as_numpy(whole), groups)
        parts = [found.weight[i]] + ([found.bias[i, :, None]] if bias else [])
        assert oracles.relative_error(torch.cat(parts, 1), expected) < limit


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_scale_does_not_matter(scale):
    m = randn(4, 6)
    error = oracles.relative_error(
        newton_schulz(m * scale), oracles.as_numpy(newton_schulz(m))
    )
    assert error < 1e-13  # measured 1e-15


def test_zeros_stay_zeros():
    assert not newton_schulz(torch.zeros(2, 3, 4)).any()


def test_singular_values_are_near_one():
    values = torch.linalg.svdvals(newton_schulz(randn(40, 100)))
    assert values.min() > 0.6 and values.max() < 1.3  # measured 0.68 to 1.13


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "dim"), [(64, 576), (768, 3072), (3072, 768)])
def test_in_bfloat16_on_the_device(rows, dim):
    m = randn(rows, dim, dtype=torch.float32, device="cuda")
    found = newton_schulz(m)
    assert found.dtype == torch.bfloat16
    expected = oracles.orthogonalized(oracles.as_numpy(m), 1)
    assert oracles.relative_error(found, expected) < 5e-2  # not measured yet
