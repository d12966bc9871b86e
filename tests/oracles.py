"""FROG in float64 numpy, dense and slow, straight from the paper's equations.

Nothing here uses the package: patches are extracted one window at a time, every row's
Fisher matrix is formed, and conjugate gradients are the textbook's.
"""

from __future__ import annotations

import itertools

import numpy as np
from torch import nn

NUMPY_PAD = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}


def as_numpy(tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def conv_pads(conv) -> list[tuple[int, int]]:
    pads = []
    for i, kernel in enumerate(conv.kernel_size):
        if conv.padding == "valid":
            pads.append((0, 0))
        elif conv.padding == "same":
            total = conv.dilation[i] * (kernel - 1)
            pads.append((total // 2, total - total // 2))
        else:
            pads.append((conv.padding[i], conv.padding[i]))
    return pads


def patches(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """Rows of X: ``(samples * positions, groups, D)``."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    pads = [(0, 0), (0, 0), *conv_pads(module)]
    padded = np.pad(x, pads, mode=NUMPY_PAD[module.padding_mode])
    extents = [
        d * (k - 1) + 1
        for d, k in zip(module.dilation, module.kernel_size, strict=True)
    ]
    outputs = [
        (size - extent) // stride + 1
        for size, extent, stride in zip(
            padded.shape[2:], extents, module.stride, strict=True
        )
    ]
    rows = []
    for n in range(x.shape[0]):
        for where in itertools.product(*map(range, outputs)):
            window = tuple(
                slice(w * s, w * s + e, d)
                for w, s, e, d in zip(
                    where, module.stride, extents, module.dilation, strict=True
                )
            )
            rows.append(padded[(n, slice(None), *window)].reshape(module.groups, -1))
    return np.stack(rows)


def gradient_rows(module: nn.Module, y: np.ndarray) -> np.ndarray:
    """Y as ``(samples * positions, R)``."""
    if isinstance(module, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    return np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])


def fisher(x: np.ndarray, y: np.ndarray, damping: float) -> np.ndarray:
    """The damped normalized Fisher matrix of one row, equations (3) and (4)."""
    squares = y**2
    trace = np.sum(squares * np.sum(x**2, axis=1))
    if trace == 0 or not np.isfinite(trace):
        return np.eye(x.shape[1])
    weights = squares / (trace / x.shape[1])
    return x.T @ (weights[:, None] * x) + damping * np.eye(x.shape[1])


def conjugate_gradients(a: np.ndarray, b: np.ndarray, iters: int) -> np.ndarray:
    z, r = np.zeros_like(b), b.copy()
    p, rho = r.copy(), r @ r
    first = rho
    for _ in range(iters):
        if rho <= 1e-31 * first:  # the residual is rounding
            break
        ap = a @ p
        alpha = rho / (p @ ap)
        z += alpha * p
        r -= alpha * ap
        rho, previous = r @ r, rho
        p = r + rho / previous * p
    return z


def row_systems(module, x, y, m, m_bias, damping):
    """``(F_j, m_j)`` of every row, the bias as last coordinate."""
    x_rows = patches(module, x)
    y_rows = gradient_rows(module, y)
    per_group = m.shape[0] // x_rows.shape[1]
    systems = []
    for j in range(m.shape[0]):
        xj, mj = x_rows[:, j // per_group], m[j].reshape(-1)
        if m_bias is not None:
            xj = np.concatenate([xj, np.ones((len(xj), 1))], axis=1)
            mj = np.append(mj, m_bias[j])
        systems.append((fisher(xj, y_rows[:, j], damping), mj))
    return systems


def solve_rows(systems, iters: int) -> np.ndarray:
    """Directions ``z / sqrt(<z, m>)``, equation (2), a row each."""
    rows = []
    for a, m in systems:
        if not m.any():
            rows.append(np.zeros_like(m))
            continue
        z = conjugate_gradients(a, m, iters)
        rows.append(z / np.sqrt(z @ m))
    return np.stack(rows)


def precondition(module, x, y, m, m_bias, damping, iters):
    """What `frog_triton.precondition` returns, from tensors of any dtype."""
    x, y, m = as_numpy(x), as_numpy(y), as_numpy(m)
    m_bias = None if m_bias is None else as_numpy(m_bias)
    rows = solve_rows(row_systems(module, x, y, m, m_bias, damping), iters)
    if m_bias is None:
        return rows.reshape(m.shape), None
    return rows[:, :-1].reshape(m.shape), rows[:, -1]


def relative_error(actual, expected: np.ndarray) -> float:
    difference = as_numpy(actual) - expected
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-300))


def residual(systems, rows: np.ndarray) -> np.ndarray:
    """Error of CG's minimand: ``|z - F^-1 m|_F / |F^-1 m|_F`` for each row.

    The scale of z is lost in the normalized direction, so the best multiple is taken.
    """
    errors = []
    for (a, m), z in zip(systems, rows, strict=True):
        exact = np.linalg.solve(a, m)
        best = (z @ m) / (z @ a @ z) * z
        e = best - exact
        errors.append(np.sqrt(max(e @ a @ e, 0) / (exact @ a @ exact)))
    return np.array(errors)


def orthogonalized(rows, groups):
    """Muon's five Newton-Schulz iterations as a polynomial of the singular values."""
    blocks = []
    for block in np.split(rows, groups):
        u, s, vt = np.linalg.svd(block, full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        blocks.append((u * s) @ vt * max(1, block.shape[0] / block.shape[1]) ** 0.5)
    return np.concatenate(blocks)
