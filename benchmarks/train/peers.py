"""The optimizers that are compared, each with its grid of settings.

All grids have the same number of entries: learning rates spaced by about a factor of
three around what is usual for the optimizer, and two weight decays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import FROG, PAPER
from ..reference import load
from .joint import Handover, Joint, MatrixView, layers_and_rest
from .muon import HostMuon


@dataclass(frozen=True)
class Peer:
    """One optimizer of a comparison.

    Attributes:
        name: in tables.
        build: makes the optimizer from the model, ``lr``, ``weight_decay`` and
            `options`.
        lrs: learning rates to try.
        weight_decays: to try; a short search takes the first alone.
        options: more keyword arguments.
        needs: packages that must be installed.
        batch_size: if other than the workload's.
        prepare: what must be done to a model before.
        adjust: called before each step with the fraction of the steps that is done.
        base: the name of the entry of `PEERS` that it is a variant of.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    lrs: tuple[float, ...]
    weight_decays: tuple[float, float] = (1e-2, 1e-1)
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    batch_size: int | None = None
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    adjust: Callable[[Any, float], None] = lambda optimizer, done: None
    base: str = ""

    def optimizer(
        self, model: nn.Module, lr: float, weight_decay: float | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer for a fresh model."""
        decay = self.weight_decays[0] if weight_decay is None else weight_decay
        return self.build(model, lr=lr, weight_decay=decay, **self.options)

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def with_options(self, name: str, **options: Any) -> Peer:
        """A variant with more or other options."""
        return replace(self, name=name, options={**self.options, **options})

    @staticmethod
    def state_bytes(optimizer: torch.optim.Optimizer) -> int:
        """Bytes of all tensors in its `state_dict`."""
        seen: dict[int, int] = {}
        for tensor in _tensors(optimizer.state_dict()):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)
    elif hasattr(content, "__dict__"):  # SINGD's structured matrices
        yield from _tensors(vars(content))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """What is not frozen."""
    return [param for param in model.parameters() if param.requires_grad]


def _hidden_and_rest(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices and convolutions before the output layer, and all else: as Muon's."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.RNNBase)
    ][:-1]  # the last is the output layer
    hidden = [
        param
        for module in layers
        for param in module.parameters(recurse=False)
        if param.ndim > 1 and param.requires_grad
    ]
    chosen = {id(param) for param in hidden}
    return hidden, [p for p in _trained(model) if id(p) not in chosen]


def _sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(_trained(model), momentum=0.9, **options)


def _adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    params = _trained(model)
    return torch.optim.AdamW(params, fused=params[0].is_cuda, **options)


def _scaled_adamw(
    model: nn.Module, lr: float, weight_decay: float, adamw_lr: float = 1e-3
) -> torch.optim.Optimizer:
    """AdamW whose steps have the size of Muon's, layer by layer.

    Entries of its steps are about one, those of an orthogonal matrix times Muon's
    ``sqrt(max(1, R / D))`` about ``1 / sqrt(D)``: so much smaller is the rate.
    """
    hidden, rest = _hidden_and_rest(model)
    groups: list[dict[str, Any]] = [
        {"params": [p], "lr": lr * p[0].numel() ** -0.5} for p in hidden
    ]
    if rest:
        groups.append({"params": rest, "lr": adamw_lr})
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=hidden[0].is_cuda)


def _muon(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    adamw_lr: float = 1e-3,
    momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """Hidden matrices and flattened convolutions by Muon, all else by AdamW."""
    hidden, rest = _hidden_and_rest(model)
    views = [MatrixView(p) for p in hidden]
    kind = torch.optim.Muon if hidden[0].is_cuda else HostMuon
    muon: torch.optim.Optimizer = kind(
        [v.matrix for v in views], lr=lr, weight_decay=weight_decay, momentum=momentum
    )
    if not rest:
        return Joint(model, [muon], views)
    adamw = torch.optim.AdamW(
        rest, lr=adamw_lr, weight_decay=weight_decay, fused=rest[0].is_cuda
    )
    return Joint(model, [muon, adamw], views)


def _lion(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion

    return Lion(_trained(model), weight_decouple=True, **options)


def _soap(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(_trained(model), precondition_frequency=10, **options)


def _shampoo(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        _trained(model),
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
        decoupled_weight_decay=True,
        **options,
    )


def _singd(
    model: nn.Module, lr: float, weight_decay: float, loss_average: str = "batch"
) -> torch.optim.Optimizer:
    """Linear layers and convolutions by SINGD, norms and embeddings by SGD."""
    from singd.optim.optimizer import SINGD

    layers, rest = layers_and_rest(model, (nn.Linear, nn.Conv2d))
    singd: torch.optim.Optimizer = SINGD(
        model,
        params=layers,
        lr=lr,
        weight_decay=weight_decay,
        loss_average=loss_average,
        normalize_lr_cov=True,
        T=10,
    )
    if not rest:
        return singd
    return Joint(model, [singd, torch.optim.SGD(rest, lr=lr, momentum=0.9)])


def frog_then_sgd(
    model: nn.Module, lr: float, weight_decay: float, sgd_lr: float = 0.1
) -> torch.optim.Optimizer:
    """FROG until its turn is over, then SGD with a momentum of its own."""
    frog = FROG(model, lr, **{**PAPER, **_POSITIONS, "weight_decay": weight_decay})
    sgd = torch.optim.SGD(
        model.parameters(), lr=sgd_lr, momentum=0.9, weight_decay=5e-4
    )
    return Handover(model, [frog, sgd])


def reference(path: Path) -> Peer:
    """The public reference implementation of FROG, from a checkout of it.

    Args:
        path: the checkout, or its ``frog.py``.

    Raises:
        ValueError: there is no such file, or it lacks the optimizer.
    """
    frog = load(path / "frog.py" if path.is_dir() else path)

    def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = frog(
            model.parameters(), model, momentum=0.9, **options
        )
        return made

    like = PEERS["FROG paper"]
    return Peer(
        "FROG (reference)",
        build,
        like.lrs,
        like.weight_decays,
        prepare=_without_inplace,
    )


def _without_inplace(model: nn.Module) -> nn.Module:
    """The reference's module hooks fail where an activation works in place."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model


def _by_name(*peers: Peer) -> dict[str, Peer]:
    return {peer.name: replace(peer, base=peer.name) for peer in peers}


_FROG_LRS = (2e-3, 6e-3, 2e-2, 6e-2, 2e-1)
_POSITIONS = {"sampling": "positions"}

PEERS = _by_name(
    Peer("FROG", FROG, _FROG_LRS),
    Peer("FROG plain", FROG, _FROG_LRS, options={"orthogonalize": False}),
    Peer(
        "FROG paper",
        FROG,
        _FROG_LRS,
        (1e-5, 5e-5),
        {name: value for name, value in PAPER.items() if name != "weight_decay"},
    ),
    # So much damping drowns the Fisher: what is left is momentum, rows normalized, then
    # orthogonalized. What FROG gains over it is the Fisher's.
    Peer("FROG, no Fisher", FROG, _FROG_LRS, options={"damping": 1e6}),
    Peer("SGD", _sgd, (1e-2, 3e-2, 1e-1, 3e-1, 1.0), (5e-4, 5e-3)),
    Peer("AdamW", _adamw, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    Peer("AdamW, Muon's scale", _scaled_adamw, _FROG_LRS, options={"adamw_lr": 3e-3}),
    Peer("Lion", _lion, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), needs=("pytorch_optimizer",)),
    Peer("Muon", _muon, _FROG_LRS, options={"adamw_lr": 3e-3}),
    Peer("SOAP", _soap, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), needs=("pytorch_optimizer",)),
    Peer(
        "Shampoo",
        _shampoo,
        (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        (5e-4, 5e-3),
        needs=("pytorch_optimizer",),
    ),
    Peer(
        "SINGD", _singd, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (5e-4, 5e-3), needs=("singd",)
    ),
)
"""All peers by name; `reference` makes one more."""
