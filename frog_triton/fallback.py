"""The optimizer of everything FROG does not precondition, in torch's implementation.

Weight decay is decoupled and left off biases and norms (parameters of fewer than two
dimensions), so both kinds are torch's functions called without a decay of their own.
Where no step may wait for the device (on a GPU, or ``capturable``), AdamW is torch's
fused one, and an SGD whose step may have to be skipped is a few lines here.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .linalg.numbers import moved_to
from .scaling import multiply_, steps_taken
from .state import complete, step_counter


class Prepared(Protocol):
    """A group's step, looked at once, for gradients of the same strides and dtypes."""

    def fits(self, states: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether the parameters' states are those that were looked at."""

    def step(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """As `Fallback.step`."""


class Fallback(ABC):
    """One of torch's optimizers behind two calls.

    Attributes:
        defaults: of its group entries.
        keys: what its state holds.
    """

    defaults: dict[str, Any]
    keys: frozenset[str]

    @abstractmethod
    def init_state(self, param: nn.Parameter) -> dict[str, Tensor]:
        """Fresh state of one parameter, all of it on the parameter's device."""

    def complete(self, state: dict[str, Any], param: nn.Parameter, name: str) -> None:
        """Make what is missing of a parameter's state; see `state.complete`."""
        complete(state, self.keys, partial(self.init_state, param), name)

    def prepare(
        self, params: Sequence[nn.Parameter], states: Sequence[dict[str, Tensor]]
    ) -> Prepared | None:
        """What repeats `step` with less of the host, for parameters of a GPU.

        Args:
            params: all of one group, with gradients.
            states: theirs.

        Returns:
            None if there is nothing of the kind for them.
        """
        return None

    @abstractmethod
    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: dict[str, Any],
        found_inf: Tensor | None,
    ) -> None:
        """Step without weight decay; all lies on one device."""

    def step(
        self,
        params: Sequence[nn.Parameter],
        states: Sequence[dict[str, Tensor]],
        group: dict[str, Any],
        found_inf: Tensor | None = None,
    ) -> None:
        """Decay, then step, the parameters that have a gradient.

        Args:
            params: all of one group.
            states: theirs.
            group: hyperparameters.
            found_inf: where it is not 0, nothing changes. None takes the step.
        """
        alike: dict[tuple[torch.device, type], list[int]] = {}
        for i, param in enumerate(params):  # shards and plain tensors go apart
            alike.setdefault((param.device, type(param.data)), []).append(i)
        for (device, _), places in alike.items():
            here = None if found_inf is None else moved_to(found_inf, device)
            chosen = [params[i] for i in places]
            if group["weight_decay"] != 0:
                rate = group["lr"] * group["weight_decay"]
                if here is not None:
                    rate = rate * steps_taken(here, device)
                multiply_([p for p in chosen if p.ndim >= 2], 1 - rate)
            grads = [p.grad for p in chosen if p.grad is not None]
            self.update([*chosen], grads, [states[i] for i in places], group, here)


class SGD(Fallback):
    """SGD with momentum, and Nesterov's where the group says so."""

    defaults: dict[str, Any] = {}  # noqa: RUF012
    keys = frozenset({"momentum_buffer"})

    def init_state(self, param: nn.Parameter) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(param)}

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: dict[str, Any],
        found_inf: Tensor | None,
    ) -> None:
        buffers = [state["momentum_buffer"] for state in states]
        if group["capturable"] or found_inf is not None:
            _sgd_on_device(params, grads, buffers, group, found_inf)
            return
        sgd(
            params,
            grads,
            [*buffers],
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            foreach=None,
        )


def _sgd_on_device(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    """SGD that waits for no number: tensor lr, steps skipped by factors of 0 and 1.

    torch's fused SGD would do, but its momentum advances in steps that a scaler skips,
    and on a CPU its 16-bit momentum is wrong up to torch 2.13 (pytorch/pytorch#191763).
    """
    lr, momentum = group["lr"], group["momentum"]
    if found_inf is not None:
        taken = (found_inf == 0).double()
        grads = [torch.where(taken.to(g.device) > 0, g, 0) for g in grads]
        lr = lr * taken
        momentum = momentum * taken + (1 - taken)
    multiply_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    steps = [buffer.clone() for buffer in buffers]
    if group["nesterov"]:
        multiply_(steps, momentum)
        torch._foreach_add_(steps, grads)
    multiply_(steps, -lr)
    torch._foreach_add_(params, steps)


class AdamW(Fallback):
    """AdamW with torch's defaults."""

    defaults: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}  # noqa: RUF012
    keys = frozenset({"step", "exp_avg", "exp_avg_sq"})

    def init_state(self, param: nn.Parameter) -> dict[str, Tensor]:
        return {
            "step": step_counter(param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }

    def prepare(
        self, params: Sequence[nn.Parameter], states: Sequence[dict[str, Tensor]]
    ) -> Prepared | None:
        first = params[0]
        fits = all(
            p.is_cuda
            and p.is_floating_point()
            and p.dtype == first.dtype
            and p.device == first.device
            and _dense(p) is p
            and p.grad is not None
            and p.grad.stride() == p.stride()
            and p.grad.dtype == p.dtype
            for p in params
        )
        return _FusedAdamW(params, states) if fits else None

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: dict[str, Any],
        found_inf: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        on_device = group["capturable"] or found_inf is not None or params[0].is_cuda
        given, dense = params, params
        if on_device:
            dense = [_dense(p) for p in params]
            grads = [_laid_out_as(p, g) for p, g in zip(dense, grads, strict=True)]
            for p, state in zip(dense, states, strict=True):
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = _laid_out_as(p, state[key])
        adamw(
            _real(dense),
            _real(grads),
            _real(state["exp_avg"] for state in states),
            _real(state["exp_avg_sq"] for state in states),
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
            fused=on_device or None,
            capturable=group["capturable"],
            found_inf=found_inf,
        )
        for param, copy in zip(given, dense, strict=True):
            if copy is not param:
                param.copy_(copy)


class _FusedAdamW:
    """torch's fused step of parameters alike, without its look at each of them."""

    def __init__(
        self, params: Sequence[nn.Parameter], states: Sequence[dict[str, Tensor]]
    ) -> None:
        self._params: list[Tensor] = list(params)
        self._decayed = [p for p in params if p.ndim >= 2]
        self._kept = _moments(states)

    def fits(self, states: Sequence[Mapping[str, Tensor]]) -> bool:
        """See `Prepared`."""
        return all(map(operator.is_, self._kept, _moments(states)))

    def step(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """See `Prepared`."""
        params, count = self._params, len(self._params)
        grads = [p.grad for p in params if p.grad is not None]
        if group["weight_decay"] != 0:
            rate = group["lr"] * group["weight_decay"]
            if found_inf is not None:
                rate = rate * steps_taken(found_inf, params[0].device)
            multiply_(self._decayed, 1 - rate)
        averages, squares, steps = (
            self._kept[i * count : (i + 1) * count] for i in range(3)
        )
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params,
            grads,
            averages,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=found_inf,
        )
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * count)


def _moments(states: Sequence[Mapping[str, Tensor]]) -> list[Any]:
    keys = ("exp_avg", "exp_avg_sq", "step")
    return [state.get(key) for key in keys for state in states]


def _dense(param: Tensor) -> Tensor:
    """The parameter, or a dense copy of one that is a view with gaps.

    torch's fused step wants parameter, gradient and moments dense and laid out alike.
    """
    if param.is_contiguous():
        return param
    like = torch.empty_like(param)
    return param if like.stride() == param.stride() else like.copy_(param)


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy with the parameter's strides."""
    if tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def _real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Complex numbers as pairs, as torch's unfused step takes them."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


FALLBACKS: dict[str, Fallback] = {"sgd": SGD(), "adamw": AdamW()}


def check_updated_by(groups: Iterable[Mapping[str, Any]], saved: str = "") -> None:
    """Raise ValueError unless FROG and a fallback update the groups in turn.

    Args:
        groups: of an optimizer.
        saved: what comes before their name in the message.
    """
    for i, group in enumerate(groups):
        known = tuple(FALLBACKS) if i % 2 else ("frog",)
        if group.get("updated_by", known[0]) not in known:
            raise ValueError(
                f"{saved}param_groups[{i}]: updated_by must be one of {known}, got "
                f"{group['updated_by']!r}"
            )
