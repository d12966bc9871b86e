"""All kernels by name: a new one is a file of its own, and a line here."""

from types import MappingProxyType

from .draws import DRAW
from .gather import GATHER
from .gram import GRAM, GRAM_TERMS
from .gram_cg import GRAM_CG, GRAM_CG_TILED
from .kernel import Kernel
from .largest import LARGEST
from .magnitudes import LARGEST_PARTS, MAGNITUDES
from .momentum import MOMENTUM_PROJECT
from .orthogonalize import NEWTON_GRAM, NEWTON_POLYNOMIAL, NEWTON_STEP
from .primal_adjoint import PRIMAL_ADJOINT
from .primal_direction import PRIMAL_DIRECTION
from .primal_forward import PRIMAL_FORWARD
from .primal_update import PRIMAL_UPDATE
from .row_weights import ROW_NORMS, ROW_SCALE, ROW_SCALE_SUM
from .update import UPDATE

KERNELS = MappingProxyType(
    {
        kernel.name: kernel
        for kernel in (
            DRAW,
            GATHER,
            GRAM,
            GRAM_CG,
            GRAM_CG_TILED,
            GRAM_TERMS,
            LARGEST,
            LARGEST_PARTS,
            MAGNITUDES,
            MOMENTUM_PROJECT,
            NEWTON_GRAM,
            NEWTON_POLYNOMIAL,
            NEWTON_STEP,
            PRIMAL_ADJOINT,
            PRIMAL_DIRECTION,
            PRIMAL_FORWARD,
            PRIMAL_UPDATE,
            ROW_NORMS,
            ROW_SCALE,
            ROW_SCALE_SUM,
            UPDATE,
        )
    }
)


def kernel_of(key: str) -> Kernel | None:
    """The kernel that a key of a table is for, if it is known and can be tuned."""
    found = KERNELS.get(f"_{key.split()[0]}_kernel") if key.strip() else None
    return found if found is not None and found.values else None
