"""Transposed convolutions and bilinear layers, against loops and dense Jacobians."""

import itertools
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call

from frog_triton.kernels.gather import GATHER
from frog_triton.kernels.launch import recording
from frog_triton.layers.base import MatrixMap, pool_samples
from frog_triton.layers.bilinear import BilinearAdapter
from frog_triton.layers.transposed import TransposedConvAdapter
from frog_triton.linalg.numbers import Numbers
from frog_triton.linalg.rows import Rows
from frog_triton.ops import torch_ops, triton_ops
from frog_triton.preconditioner import solve
from frog_triton.solve import Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"torch": torch_ops, "triton": triton_ops}
TRANSPOSED, BILINEAR = TransposedConvAdapter(), BilinearAdapter()

# Each with the shapes of its inputs.
CASES = {
    "1d": (lambda: nn.ConvTranspose1d(3, 4, 3, 2, 1, 1), (3, 3, 5)),
    "1d-stride-1": (lambda: nn.ConvTranspose1d(2, 3, 3, padding=2), (2, 2, 6)),
    "1d-dilated": (lambda: nn.ConvTranspose1d(2, 3, 3, 2, dilation=3), (2, 2, 4)),
    "1d-stride-beyond-kernel": (
        lambda: nn.ConvTranspose1d(2, 2, 2, 3, output_padding=2),
        (2, 2, 4),
    ),
    "1d-groups": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2), (2, 4, 4)),
    "2d": (lambda: nn.ConvTranspose2d(3, 4, 4, 2, 1), (2, 3, 3, 4)),
    "2d-doubling": (lambda: nn.ConvTranspose2d(3, 4, 2, 2, bias=False), (2, 3, 3, 2)),
    "2d-oblong": (
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), (3, 1), (2, 0), (2, 1), 1, True, 2),
        (2, 2, 4, 3),
    ),
    "2d-groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, (1, 2), 1, groups=2),
        (2, 4, 3, 3),
    ),
    "2d-depthwise": (
        lambda: nn.ConvTranspose2d(3, 6, (2, 3), 2, (0, 1), groups=3, bias=False),
        (2, 3, 3, 3),
    ),
    "2d-1x1": (lambda: nn.ConvTranspose2d(4, 3, 1), (2, 4, 3, 2)),
    "2d-1x1-stride": (lambda: nn.ConvTranspose2d(4, 3, 1, 2), (2, 4, 2, 3)),
    "2d-fewer-samples-than-weights": (
        lambda: nn.ConvTranspose2d(16, 2, 3, 2),
        (1, 16, 2, 2),
    ),
    "2d-unbatched": (lambda: nn.ConvTranspose2d(2, 3, 3, 2), (2, 3, 4)),
    "3d": (
        lambda: nn.ConvTranspose3d(2, 3, (2, 3, 1), (3, 1, 2), (0, 1, 0), (1, 0, 1)),
        (2, 2, 2, 3, 2),
    ),
    "3d-groups": (lambda: nn.ConvTranspose3d(4, 2, 2, 2, groups=2), (1, 4, 2, 1, 2)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), (6, 3), (6, 4)),
    "bilinear-nobias": (lambda: nn.Bilinear(2, 5, 3, bias=False), (4, 2), (4, 5)),
    "bilinear-sequence": (lambda: nn.Bilinear(3, 2, 4), (2, 3, 3), (2, 3, 2)),
}
CONVOLUTIONS = [name for name in CASES if "bilinear" not in name]
OUTPUT_SIZES = {"1d": (9,), "1d-dilated": (14,), "2d": (7, 8), "3d": (7, 3, 3)}
"""Other than the module's own."""


def problem(name, dtype=torch.float64, **options):
    """A layer, what it was called with, and all that is made of it."""
    build, *shapes = CASES[name]
    module = build().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    args = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    output = module(*args, **options).detach()
    y = torch.randn(output.shape, dtype=torch.float64)
    exact = SimpleNamespace(module=module, args=args, options=options)
    adapter = BILINEAR if isinstance(module, nn.Bilinear) else TRANSPOSED
    (weight,) = adapter.weights(module)
    p = SimpleNamespace(name=name, adapter=adapter, axes=weight.axes, exact=exact)
    p.module, p.bias = module.to(DEVICE, dtype), module.bias is not None
    p.geometry = adapter.geometry(p.module)
    held = [x.to(DEVICE, dtype) for x in args]
    p.x = adapter.batched(module, adapter.input(module, held, {}))
    p.output, p.y = (adapter.batched(module, t.to(DEVICE, dtype)) for t in (output, y))
    p.map = adapter.linear_map(p.module, p.x, p.bias)
    p.rows = Rows(p.axes.matrix(p.module.weight.detach()), p.module.bias)
    return p


def defined_rows(p):
    """X by its definition, one entry at a time: ``(positions, groups, D)``."""
    if p.adapter is BILINEAR:
        x1, x2 = (oracles.as_numpy(x) for x in p.exact.args)
        x1, x2 = (x.reshape(-1, x.shape[-1]) for x in (x1, x2))
        return np.stack([np.outer(*x).reshape(1, -1) for x in zip(x1, x2, strict=True)])
    module, x = p.module, oracles.as_numpy(p.x)
    taps = list(itertools.product(*map(range, module.kernel_size)))
    rows = []
    for n, *where in itertools.product(range(len(x)), *map(range, p.y.shape[2:])):
        row = np.zeros((x.shape[1], len(taps)))
        for k, tap in enumerate(taps):
            at = np.add(where, module.padding) - np.multiply(tap, module.dilation)
            at, between = np.divmod(at, module.stride)
            if not between.any() and (at >= 0).all() and (at < x.shape[2:]).all():
                row[:, k] = x[(n, slice(None), *at)]
        rows.append(row.reshape(module.groups, -1))
    return np.stack(rows)


def derivatives(p):
    """Of every output by every row: ``(positions, R of outputs, R, D)``."""
    module, args, options = p.exact.module, p.exact.args, p.exact.options

    def outputs(weight):
        y = functional_call(module, {"weight": weight}, tuple(args), options)
        y = p.adapter.canonical(p.adapter.batched(module, y))
        return y.transpose(1, 2).flatten(0, 1)

    dense = jacobian(outputs, module.weight.detach())
    return torch.stack([torch.stack([p.axes.matrix(j) for j in js]) for js in dense])


# Measured: 2e-15 at most.
EXACT = {"rtol": 1e-13, "atol": 1e-13}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_definition(name):
    p = problem(name)
    expected = defined_rows(p)
    matrix = p.map.matrix()
    actual = matrix.grouped().transpose(0, 1)
    np.testing.assert_array_equal(oracles.as_numpy(actual), expected)
    assert (p.map.samples * p.map.positions, p.map.groups, p.map.dim) == expected.shape
    g = p.geometry
    assert (g.rows, g.dim) == tuple(p.rows.weight.shape)
    assert (g.groups, g.bias) == (p.map.groups, p.bias)


@pytest.mark.parametrize("name", CASES)
def test_an_output_depends_on_its_own_row_alone_and_by_x(name):
    p = problem(name)
    dense, x = derivatives(p), defined_rows(p)
    rows = dense.shape[1]
    for j in range(rows):
        own = oracles.as_numpy(dense[:, j, j])
        np.testing.assert_allclose(own, x[:, j * x.shape[1] // rows])
        others = [i for i in range(rows) if i != j]
        assert not dense[:, j, others].any()


@pytest.mark.parametrize("name", CASES)
def test_the_map_is_the_layer(name):
    p = problem(name)
    expected = p.adapter.canonical(p.output)
    torch.testing.assert_close(p.map.apply(p.rows), expected, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_the_adjoint_is_the_gradient(name):
    p = problem(name)
    p.exact.module(*(x.to(DEVICE) for x in p.exact.args)).view(p.y.shape).backward(p.y)
    actual = p.map.apply_adjoint(p.adapter.canonical(p.y).contiguous())
    expected = p.axes.matrix(p.module.weight.grad)
    torch.testing.assert_close(actual.weight, expected, **EXACT)
    if p.bias:
        torch.testing.assert_close(actual.bias, p.module.bias.grad, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_norms_are_those_of_the_rows(name):
    p = problem(name)
    expected = (defined_rows(p) ** 2).sum(-1) + p.bias
    actual = p.map.row_norms().transpose(1, 2).flatten(0, 1)
    np.testing.assert_allclose(oracles.as_numpy(actual), expected, rtol=1e-13)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_drawn_positions(name, backend):
    p = problem(name, torch.float32)
    total = p.y.shape[0] * p.adapter.positions(p.y)
    index = torch.randperm(total)[: max(1, total // 2)].to(DEVICE)
    with recording() as launches:
        x = p.adapter.take_input_positions(
            p.module, p.x, p.y.shape, index, BACKENDS[backend]
        )
    in_kernel = backend == "triton" and p.adapter is TRANSPOSED and p.x.ndim < 5
    assert [a.kernel for a in launches] == [GATHER] * in_kernel
    assert torch.equal(x, p.map.matrix().x[index])
    y = p.adapter.take_output_positions(p.y, index)
    every = oracles.as_numpy(p.adapter.canonical(p.y).transpose(1, 2).flatten(0, 1))
    np.testing.assert_array_equal(oracles.as_numpy(y), every[index.cpu().numpy()])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_positions_of_channels_last_images(backend):
    p, index = problem("2d", torch.bfloat16), torch.tensor([5, 0, 31], device=DEVICE)
    rest = (p.y.shape, index, BACKENDS[backend])
    expected = p.adapter.take_input_positions(p.module, p.x, *rest)
    x = p.x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(p.adapter.take_input_positions(p.module, x, *rest), expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_drawn_positions_of_any_window(data):
    def two(least, most):
        entry = st.integers(least, most)
        return data.draw(st.tuples(entry, entry))

    kernel, stride, dilation, size = two(1, 3), two(1, 3), two(1, 2), two(1, 3)
    least = [
        (n - 1) * s + d * (k - 1)
        for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)
    ]
    padding = [data.draw(st.integers(0, most // 2)) for most in least]
    added = [
        data.draw(st.integers(0, max(*sd) - 1))
        for sd in zip(stride, dilation, strict=True)
    ]
    module = nn.ConvTranspose2d(
        2, 3, kernel, stride, padding, added, dilation=dilation, bias=False
    ).to(DEVICE)
    x = torch.randn(2, 2, *size, device=DEVICE)
    expected = module(x).movedim(1, -1).reshape(-1, 3)
    index = torch.arange(len(expected), device=DEVICE)
    shape = module(x).shape
    rows = TRANSPOSED.weights(module)[0].axes.matrix(module.weight)
    taken = [
        TRANSPOSED.take_input_positions(module, x, shape, index, backend)
        for backend in BACKENDS.values()
    ]
    assert torch.equal(*taken)
    # Measured: 1e-7.
    torch.testing.assert_close(taken[0] @ rows.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OUTPUT_SIZES)
def test_a_size_asked_for(name):
    size = OUTPUT_SIZES[name]
    p = problem(name, output_size=size)
    assert p.map.output_shape != size
    p.map = p.adapter.linear_map(p.module, p.x, p.bias, output_shape=size)
    actual = p.map.matrix().grouped().transpose(0, 1)
    np.testing.assert_array_equal(oracles.as_numpy(actual), defined_rows(p))
    expected = p.adapter.canonical(p.output)
    torch.testing.assert_close(p.map.apply(p.rows), expected, **EXACT)
    index = torch.arange(len(actual), device=DEVICE)
    x = p.adapter.take_input_positions(p.module, p.x, p.y.shape, index, torch_ops)
    assert torch.equal(x, p.map.matrix().x)


def test_samples_of_other_sizes_are_written_out():
    p = problem("2d")
    other = p.adapter.linear_map(p.module, p.x, p.bias, output_shape=(7, 8))
    for maps, implicit in (([p.map, p.map], True), ([p.map, other], False)):
        joint, y = pool_samples(maps, [m.apply(p.rows) for m in maps])
        assert isinstance(joint, MatrixMap) is not implicit
        assert joint.samples * joint.positions == sum(
            m.samples * m.positions for m in maps
        )
        torch.testing.assert_close(joint.apply(p.rows), y, **EXACT)


@pytest.mark.parametrize("name", ["1d-groups", "2d-groups", "2d-depthwise"])
def test_groups_of_a_map_and_their_scales(name):
    p = problem(name)
    groups, per = p.map.groups, p.geometry.rows // p.map.groups
    scale = 2.0 ** torch.arange(groups, device=DEVICE, dtype=torch.float64)
    scaled = p.map.scaled(scale)
    whole = p.map.apply(p.rows) * scale.repeat_interleave(per)[:, None]
    torch.testing.assert_close(scaled.apply(p.rows), whole, **EXACT)
    torch.testing.assert_close(
        scaled.matrix().row_norms().flatten(),
        (scaled.row_norms().transpose(1, 2).flatten()),
        **EXACT,
    )
    bias = None if p.rows.bias is None else p.rows.bias[per:]
    rest = Rows(p.rows.weight[per:], bias)
    narrow = scaled.to(torch.float64).narrow_groups(1, groups)
    torch.testing.assert_close(narrow.apply(rest), whole[:, per:], **EXACT)
    t = p.adapter.canonical(p.y).contiguous()
    expected = scaled.apply_adjoint(t).weight[per:]
    actual = narrow.apply_adjoint(t[:, per:].contiguous()).weight
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("formulation", ["primal", "gram", "auto"])
@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    # Measured: 1.4e-15, 4e-7 and 1.3e-6.
    [
        ("torch", torch.float64, 1e-13),
        ("torch", torch.float32, 5e-6),
        ("triton", torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_directions(name, backend, dtype, limit, formulation):
    p = problem(name, dtype)
    m, m_bias = torch.randn(p.rows.weight.shape, device=DEVICE, dtype=dtype), None
    if p.bias:
        m_bias = torch.randn_like(m[:, 0])
    x, y = defined_rows(p), p.adapter.canonical(p.y)
    y_rows = oracles.as_numpy(y.transpose(1, 2).flatten(0, 1))
    systems = []
    for j in range(len(m)):
        xj, mj = x[:, j * x.shape[1] // len(m)], oracles.as_numpy(m[j])
        if p.bias:
            xj = np.concatenate([xj, np.ones((len(xj), 1))], 1)
            mj = np.append(mj, oracles.as_numpy(m_bias[j]))
        systems.append((oracles.fisher(xj, y_rows[:, j], 0.1), mj))
    expected = oracles.solve_rows(systems, 3)
    rows, numbers = [Rows(m, m_bias)], Numbers(damping=0.1)
    batch = Batch([p.map], [y.contiguous()], rows, numbers=numbers)
    options = {"cg_iters": 3, "formulation": formulation}
    z = solve(BACKENDS[backend], batch, **options).rows()
    actual = (
        z.weight[0]
        if z.bias is None
        else torch.cat([z.weight[0], z.bias[0, :, None]], 1)
    )
    assert oracles.relative_error(actual, expected) < limit


def test_rows_of_a_normalized_weight():
    norm = torch.nn.utils.parametrizations.weight_norm
    module = norm(nn.ConvTranspose1d(3, 4, 5), dim=1)
    (weight,) = TRANSPOSED.weights(module)
    assert weight.name == "parametrizations.weight.original1"
    assert TRANSPOSED.geometry(module, weight).rows == 4
    x = torch.randn(2, 3, 6)
    assert TRANSPOSED.linear_map(module, x, True).output_shape == (10,)


@pytest.mark.parametrize("names", [(), ("input2",), ("input1", "input2")])
def test_bilinear_inputs_by_position_and_by_name(names):
    module = nn.Bilinear(3, 2, 4)
    pair = [torch.randn(5, 3), torch.randn(5, 2, requires_grad=True)]
    args = pair[: 2 - len(names)]
    kwargs = dict(zip(names, pair[len(args) :], strict=True))
    module(*args, **kwargs)
    packed = BILINEAR.input(module, args, kwargs)
    assert torch.equal(packed, torch.cat(pair, 1)) and not packed.requires_grad
