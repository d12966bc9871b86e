"""What a backend can do: the products and updates that solvers are written in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..linalg.numbers import Numbers
from ..linalg.rows import Reading, Rows, SampleMap, Window

T = TypeVar("T")


class Drawing(Protocol):
    """Draws rows of tensors of one form by itself; `kernels.draws` has it."""

    def given(self, x: Tensor, key: int) -> Tensor:
        """Rows, drawn by a key of the host's."""

    def counted(
        self, x: Tensor, prefix: int, step: Tensor, forward: int
    ) -> tuple[Tensor, Tensor]:
        """Rows, drawn by a key that is hashed on the device, and that key."""

    def written(self, x: Tensor, key: Tensor) -> Tensor:
        """Rows, drawn by a key that lies on the device."""


class Backend(Protocol):
    """A module of functions; `torch_ops` says what each computes.

    Attributes:
        NAME: of the module.
        GROUPS_LAYERS: whether layers of one geometry are solved together.
    """

    NAME: str
    GROUPS_LAYERS: bool

    def side_by_side(self, jobs: Iterable[Callable[[], T]]) -> list[T]:
        """Do jobs that share no memory that any of them writes, all at once or not."""

    def magnitudes(
        self, tensors: Sequence[Tensor], kept: dict[Hashable, Any]
    ) -> Tensor:
        """Largest magnitude of each tensor."""

    # -- what is given ---------------------------------------------------------------

    def prepare(
        self, xs: Sequence[SampleMap], ys: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[list[SampleMap], list[Tensor]]:
        """Samples as the backend reads them."""

    def on_rows(self, xs: Sequence[SampleMap]) -> Backend:
        """The backend that solves on the rows with such samples."""

    def write_out(
        self, xs: Sequence[SampleMap], ys: Sequence[Tensor]
    ) -> tuple[list[SampleMap], list[Tensor]]:
        """Samples as matrices."""

    def gather_patches(
        self, x: Tensor, index: Tensor, output_shape: Sequence[int], window: Window
    ) -> Tensor:
        """Rows of X at drawn positions."""

    def drawing(
        self, x: Tensor, reading: Reading | None, total: int, size: int
    ) -> Drawing | None:
        """What draws rows of tensors like x by itself, if something does."""

    # -- momentum, and Lambda: equations (3) and (4) ---------------------------------

    def momentum_(
        self,
        momenta: Sequence[Rows],
        grads: Sequence[Rows] | None,
        numbers: Numbers,
        nesterov: bool,
    ) -> tuple[Sequence[Rows], Tensor, Tensor]:
        """``M <- beta M + G``; what to precondition, scales, finite rows."""

    def momentum_project_(
        self,
        xs: Sequence[SampleMap],
        momenta: Sequence[Rows],
        grads: Sequence[Rows] | None,
        numbers: Numbers,
        nesterov: bool,
    ) -> tuple[Sequence[Rows], Tensor, Tensor, Tensor, Tensor]:
        """The same, with ``X M^T`` and ``|m|^2``."""

    def row_weights(
        self, xs: Sequence[SampleMap], ys: Sequence[Tensor], row_length: int
    ) -> tuple[Any, Tensor]:
        """Lambda as `cg_forward_` takes it, and the rows' status."""

    # -- conjugate gradients on the rows ---------------------------------------------

    def cg_start(
        self,
        xs: Sequence[SampleMap],
        ms: Sequence[Rows],
        scales: Tensor,
        status: Tensor,
        iters: int,
    ) -> Any:
        """The state before the first iteration."""

    def cg_forward_(
        self,
        xs: Sequence[SampleMap],
        weights: Any,
        state: Any,
        numbers: Numbers,
        last: bool,
    ) -> None:
        """``p = r + beta p`` and ``T = Lambda * (X p)``."""

    def cg_adjoint_(
        self, xs: Sequence[SampleMap], state: Any, numbers: Numbers
    ) -> None:
        """``z += alpha p`` and ``r -= alpha A p``."""

    def cg_rows(
        self, state: Any, numbers: Numbers, moving: Tensor | None = None
    ) -> Rows:
        """Directions written out."""

    def cg_update_(
        self,
        params: Sequence[Rows],
        state: Any,
        finite: Tensor,
        counts: Sequence[Tensor],
        numbers: Numbers,
    ) -> None:
        """Equation (5)."""

    # -- conjugate gradients in Gram space -------------------------------------------

    def gram(self, xs: Sequence[SampleMap]) -> Any:
        """``K = X X^T`` as `gram_cg` takes it."""

    def gram_cg(
        self,
        k: Any,
        c: Tensor,
        ys: Sequence[Tensor],
        m_squared: Tensor,
        row_length: int,
        numbers: Numbers,
        iters: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates s and u of ``z = s m + X^T u``, and the rows' status."""

    def gram_rows(
        self,
        xs: Sequence[SampleMap],
        ms: Sequence[Rows],
        scales: Tensor,
        s: Tensor,
        u: Tensor,
        moving: Tensor | None = None,
    ) -> Rows:
        """Directions written out."""

    def gram_update_(
        self,
        params: Sequence[Rows],
        xs: Sequence[SampleMap],
        ms: Sequence[Rows],
        scales: Tensor,
        s: Tensor,
        u: Tensor,
        status: Tensor,
        finite: Tensor,
        counts: Sequence[Tensor],
        numbers: Numbers,
    ) -> None:
        """Equation (5)."""

    # -- directions that are written out, and steps along them -----------------------

    def orthogonalize(self, rows: Rows, finite: Tensor, groups: int) -> Rows:
        """Rows with singular values near one."""

    def step_along_(
        self,
        params: Sequence[Rows],
        direction: Rows,
        finite: Tensor,
        numbers: Numbers,
    ) -> None:
        """Equation (5), nothing counted."""

    def direction_update_(
        self,
        params: Sequence[Rows],
        direction: Rows,
        status: Tensor,
        finite: Tensor,
        counts: Sequence[Tensor],
        numbers: Numbers,
    ) -> None:
        """Equation (5), rows that stay and rows without samples counted."""

    def count_(
        self,
        counts: Sequence[Tensor],
        status: Tensor,
        finite: Tensor,
        numbers: Numbers,
    ) -> None:
        """Count such rows alone."""
