"""Layer kinds and their registry.

A new kind is one `LayerAdapter` subclass and one `register` line; a module with one
matrix for a weight is the line alone:

    frog_triton.layers.register(MyLinear, LinearAdapter())                # (out, in)
    frog_triton.layers.register(Conv1D, LinearAdapter(Weight(axes=ROWS_SECOND)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .base import (
    Geometry,
    LayerAdapter,
    LinearMap,
    MatrixMap,
    pool_samples,
)
from .bilinear import BilinearAdapter
from .computed import computed_by
from .conv import ConvAdapter, ConvMap
from .linear import LinearAdapter
from .products import (
    AttentionAdapter,
    BareLinearAdapter,
    ExpertsAdapter,
    is_bare_linear,
    is_experts,
)
from .recurrent import RecurrentAdapter
from .rows import (
    EXPERTS,
    EXPERTS_SECOND,
    ROWS_FIRST,
    ROWS_SECOND,
    RowAxes,
    Seen,
    Weight,
)
from .transposed import TransposedConvAdapter

__all__ = [
    "EXPERTS",
    "EXPERTS_SECOND",
    "ROWS_FIRST",
    "ROWS_SECOND",
    "ConvAdapter",
    "ConvMap",
    "ExpertsAdapter",
    "Geometry",
    "LayerAdapter",
    "LinearAdapter",
    "LinearMap",
    "MatrixMap",
    "RowAxes",
    "Seen",
    "Weight",
    "adapter_for",
    "computed_in",
    "is_bare",
    "is_proven",
    "is_trusted",
    "left_out",
    "pool_samples",
    "register",
]

Kind = type[nn.Module] | str
_REGISTRY: dict[Kind, LayerAdapter] = {}


def register(kind: Kind, adapter: LayerAdapter) -> None:
    """Let `adapter` serve modules of type `kind`.

    Args:
        kind: a module type, or its full name (``"package.module.Class"``), so that the
            package need not be imported.
        adapter: says what the weights are, where their rows lie, and where their
            samples are seen. Where that is the module's call, the first calls are
            checked against it.

    Raises:
        TypeError: it is no adapter.
    """
    if not isinstance(adapter, LayerAdapter):
        raise TypeError(
            f"register takes an adapter, such as LinearAdapter(), got {adapter!r}"
        )
    _REGISTRY[kind] = adapter


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """The adapter of a module's kind, or None.

    A subclass is served by its parent's adapter. Where it, or the instance, has a
    forward of its own, that may still compute what its parent's does: see `is_proven`.
    """
    found = _registered(module)
    if found is not None:
        kind, adapter = found
        return adapter if adapter.any_forward or _inherits(module, kind) else None
    return next((adapter for is_one, adapter in _ALIKE if is_one(module)), None)


def is_proven(module: nn.Module) -> bool:
    """Whether a module's forward is known to be what its adapter says.

    Torch's own are, and those that are not seen at the module's call need not be. All
    others are checked at calls that make samples.
    """
    found = _registered(module)
    if found is None:
        return True
    kind, adapter = found
    if {weight.seen for weight in adapter.weights(module)} != {Seen.CALL}:
        return True
    return kind.__module__.partition(".")[0] == "torch" and _inherits(module, kind)


def is_trusted(module: nn.Module) -> bool:
    """Whether a call that proves nothing is sampled: the module's kind is registered.

    Not so for a forward that is not inherited from that kind.
    """
    found = _registered(module)
    return found is None or _inherits(module, found[0])


def _inherits(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's forward is that of a kind."""
    return "forward" not in vars(module) and type(module).forward is kind.forward


def computed_in(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Modules whose weight is computed, and those inside of them: by which, by what."""
    found = {}
    for parent in model.modules():
        why = computed_by(parent)
        if why:
            found.update(dict.fromkeys(parent.modules(), (parent, why)))
    return found


def left_out(
    computed: Mapping[nn.Module, tuple[nn.Module, str]], module: nn.Module, name: str
) -> str:
    """Why no adapter names a parameter.

    Args:
        computed: of the whole model, from `computed_in`.
        module: that holds the parameter.
        name: of the parameter there.
    """
    if module in computed:
        parent, why = computed[module]
        kind = type(parent).__name__.removeprefix("Parametrized")
        if name in ("original0", "weight_g"):
            return f"the scale of a {kind}'s rows, {why}'s g"
        return f"{kind} whose weight is computed by {why}"
    found = _registered(module)
    if found is not None and not found[1].any_forward:
        return f"{type(module).__name__} has a forward of its own"
    if is_bare(module, name):
        return f"a bare parameter of {type(module).__name__}: see frog_triton.linear"
    return f"no adapter for {type(module).__name__}"


def is_bare(module: nn.Module, name: str) -> bool:
    """Whether a parameter may be a matrix that a module uses by itself."""
    param = module._parameters.get(name)
    return (
        param is not None
        and param.ndim == 2
        and param.is_floating_point()
        and min(param.shape) > 1
        and adapter_for(module) is None
        and not hasattr(module, "num_embeddings")
    )


def _registered(module: nn.Module) -> tuple[type, LayerAdapter] | None:
    for kind in type(module).__mro__:
        for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
            if key in _REGISTRY:
                return kind, _REGISTRY[key]
    return None


_ALIKE: tuple[tuple[Callable[[nn.Module], bool], LayerAdapter], ...] = (
    (is_experts, ExpertsAdapter()),
    (is_bare_linear, BareLinearAdapter()),
)
"""Modules of types that nobody has registered, known by what they hold."""

_KINDS: dict[LayerAdapter, tuple[Kind, ...]] = {
    LinearAdapter(): (nn.Linear,),
    LinearAdapter(Weight(axes=ROWS_SECOND)): ("transformers.pytorch_utils.Conv1D",),
    ConvAdapter(): (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    TransposedConvAdapter(): (
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ),
    BilinearAdapter(): (nn.Bilinear,),
    AttentionAdapter(): (nn.MultiheadAttention,),
    RecurrentAdapter(): (
        *(nn.LSTM, nn.GRU, nn.RNN),
        *(nn.LSTMCell, nn.GRUCell, nn.RNNCell),
    ),
}
for _adapter, _kinds in _KINDS.items():
    for _kind in _kinds:
        register(_kind, _adapter)
