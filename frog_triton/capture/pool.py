"""Samples of one layer, tied to the gradient that they belong to.

A backward pass brings the gradients of a layer's outputs first, and writes the weight's
own gradient last. What it brings *arrives*, and is *kept* as soon as that same pass has
written. A pass that writes nothing (``torch.autograd.grad`` for a penalty,
``backward(inputs=...)``) adds nothing, and where the written gradient is gone, by
whatever hand, so are its samples.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, count, pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..linalg.rows import local
from .calls import Call, Reservoir, Reservoirs
from .sampling import Counter, draw

MOST_PASSES = 16
"""That may be open at once: checkpoints and implicit layers nest them."""


class _Mark:
    """A gradient as a pass has left it.

    The tensor is known again by an attribute: a weak reference would forbid
    `torch.utils.swap_tensors`, as in some ``model.to(dtype)``, and a strong one would
    hold its memory.

    Args:
        grad: that was written.
        number: another one for each mark.
    """

    def __init__(self, grad: Tensor, number: int) -> None:
        self._version = _version(grad)
        self._number = number
        grad.__dict__["_frog_mark"] = number

    def holds(self, grad: Tensor) -> bool:
        """Whether nobody has put another in its place, or worked on it in place."""
        known = grad.__dict__.get("_frog_mark") == self._number
        return known and _version(grad) == self._version


class Pool:
    """What a layer has collected since the last step.

    Args:
        size: samples to keep at most.
        params: the layer's weight, and its bias if it has one.
        key: of a draw, from counters.
        host_key: the same, which the host knows.
        may_wait: whether the host may wait for the device.

    Attributes:
        forwards: calls since the last step.
        sharded: whether modules hold gathered tensors in place of the parameters.
    """

    def __init__(
        self,
        size: int,
        params: Sequence[nn.Parameter],
        key: Callable[..., Counter],
        host_key: Callable[..., int],
        may_wait: bool,
    ) -> None:
        self._limit = size
        self._params = tuple(params)
        self.sharded = hasattr(params[0], "to_local")
        self._key = key
        self._host_key = host_key
        self._may_wait = may_wait
        self._numbers = count()
        self._listening: dict[int, tuple[Tensor, RemovableHandle, RemovableHandle]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self.forwards = 0
        self._merges = 0
        self._joined: tuple[tuple[Tensor, ...], Call] | None = None
        self._kept: Reservoirs = {}
        self._mark: _Mark | None = None
        self._arriving: dict[int, Reservoirs] = {}
        self._writing: set[int] = set()  # passes that have written
        self._unwritten: Reservoirs = {}
        self._expected: dict[int | None, list[Callable[[], None]]] = {}

    def _drop(self) -> None:
        """Forget the samples of a gradient that is gone."""
        self.forwards = 0
        self._merges = 0
        self._kept = {}
        self._unwritten = {}
        self._mark = None

    def close(self) -> None:
        """Listen to no parameter any more."""
        for _, *handles in self._listening.values():
            for handle in handles:
                handle.remove()
        self._listening.clear()

    @property
    def calls(self) -> list[Call]:
        """Samples by call: of the passes that wrote the gradient that is there.

        Where no pass wrote one, it was set by hand: then of the last pass.
        """
        return _calls(self._found)

    def as_one(self) -> Call | None:
        """All samples as those of one call of all groups, if they can be.

        Rows of several calls are joined once: who asks again finds them where they
        were.
        """
        calls = self.calls
        if len(calls) < 2:
            return next((call for call in calls if call.part is None), None)
        parts = tuple(t for call in calls for t in (call.x, call.y))
        if self._joined is None or not _same(self._joined[0], parts):
            if len({(c.adapter, c.part, c.x.shape[1]) for c in calls}) > 1:
                return None
            if calls[0].adapter is not None or calls[0].part is not None:
                return None
            x, y = torch.cat(parts[::2]), torch.cat(parts[1::2])
            self._joined = parts, Call(calls[0].module, x, y)
        return self._joined[1]

    @property
    def seen(self) -> int:
        """How many candidates there were for `calls`."""
        return sum(reservoir.seen for reservoir in self._found.values())

    @property
    def _found(self) -> Reservoirs:
        by_hand = self._mark is None and not _calls(self._kept)
        return self._unwritten if by_hand else self._kept

    def held(self) -> list[Call]:
        """All calls of which samples are held at this moment."""
        held = (self._kept, self._unwritten, *self._arriving.values())
        return [call for reservoirs in held for call in _calls(reservoirs)]

    # -- the life of a sample ---------------------------------------------------------

    def called(self, gathered: Iterable[Tensor | None]) -> None:
        """Prepare for a call of a module: its pass will be heard when it writes.

        Args:
            gathered: what stands in the module for weight and bias, where FSDP2 gathers
                them.
        """
        self._forget_dropped()
        if len(self._arriving) > MOST_PASSES:  # most have raised, and never end
            self._arriving.clear()
        self._listen(self._owner)
        if self.sharded:
            # The pass writes to a gathered parameter, which FSDP2 then reduces.
            for tensor in gathered:
                if tensor is not None and tensor.is_leaf:
                    self._listen(tensor)

    def arrive(self, call: Call, total: int) -> None:
        """Take a call's samples, now that its output's gradient is there.

        Args:
            call: with its samples.
            total: how many candidates they were drawn from.
        """
        new, this = {call.part: Reservoir(total, [call])}, current_pass()
        if this is None:
            self._merge(self._kept, new)
            return
        if this not in self._arriving:
            self._forget_dropped(ask=True)
            self._arriving[this] = {}
        self._merge(self._arriving[this], new)

    def expect(self, before_write: Callable[[], None]) -> None:
        """Call something once, when this pass is about to write the gradient."""
        calls = self._expected.setdefault(current_pass(), [])
        if before_write not in calls:
            calls.append(before_write)

    def finish(self, this: int) -> None:
        """A pass has ended: what it brought and did not write does not count.

        A bias that is added by itself is written before its product's gradient comes.
        """
        self._expected.pop(this, None)
        arrived = self._arriving.pop(this, None)
        if arrived is None:
            return
        if this in self._writing and self._owner.grad is not None:
            self._merge(self._kept, arrived)
        else:
            self._unwritten = arrived

    def _written(self, param: Tensor) -> None:
        """Keep what this pass brought: it has added to a gradient of the layer's."""
        if not param.requires_grad or param.grad is None:
            return  # frozen since the forward, so nothing was written
        this = current_pass()
        if this is not None:
            self._writing.add(this)
            self._merge(self._kept, self._arriving.pop(this, {}))
        if param is self._owner:
            self._mark = _Mark(param.grad, next(self._numbers))

    def _about_to_write(self, _: Tensor) -> None:
        """Look before a pass without calls, say of a weight penalty, writes."""
        for bring in self._expected.pop(current_pass(), ()):
            bring()
        if self._kept and current_pass() not in self._arriving:
            self._forget_dropped(ask=True)

    @property
    def _owner(self) -> nn.Parameter:
        """Of the gradient whose fate the samples share."""
        for param in self._params:
            if param.requires_grad:
                return param
        return self._params[0]

    def _forget_dropped(self, ask: bool = False) -> None:
        """Drop samples of a gradient that has been set to None or to zero since.

        Args:
            ask: whether it is zero even if nothing shows, as after
                ``grad.data.zero_()``; if the host may ask.
        """
        if self._mark is None or not self._kept:
            return
        grad = self._owner.grad
        if grad is None:
            self._drop()
            return
        host = self._may_wait and grad.is_cpu and grad.layout == torch.strided
        changed = not self._mark.holds(grad)
        if changed:  # clipped, averaged over ranks, unscaled; or zeroed
            self._mark = _Mark(grad, next(self._numbers))
        elif not (ask and host):
            return
        # Most often the first row tells.
        if host and local(grad)[:1].any():
            return
        grads = [local(p.grad) for p in self._params if p.grad is not None]
        found = [g.any() for g in grads if g.numel() and g.layout == torch.strided]
        if found and host:
            if not any(found):
                self._drop()
        elif found:
            alive = torch.stack(found).any()
            for call in _calls(self._kept):
                call.blank(alive)

    def _listen(self, param: Tensor) -> None:
        """Hear when a pass writes a parameter's gradient."""
        if param.requires_grad and id(param) not in self._listening:
            self._listening[id(param)] = (
                param,
                param.register_hook(_Weakly(self._about_to_write)),
                param.register_post_accumulate_grad_hook(_Weakly(self._written)),
            )

    # -- every candidate is equally likely --------------------------------------------

    def _merge(self, held: Reservoirs, new: Reservoirs) -> None:
        """Pool the samples of each part in the first."""
        for part, reservoir in new.items():
            if part in held or reservoir.size > self._limit:
                self._pool(held.setdefault(part, Reservoir()), reservoir)
            else:
                self._merges += 1
                held[part] = reservoir

    def _pool(self, held: Reservoir, new: Reservoir) -> None:
        """Pool the samples of two reservoirs in the first."""
        held.seen += new.seen
        self._merges += 1
        size, more = held.size, new.size
        calls = [*held.calls, *new.calls]
        if size + more > self._limit:
            # Rounded at random, or calls with a small share would never be seen.
            offset = self._host_key(self._merges, 1) % held.seen
            share = (self._limit * new.seen + offset) // held.seen
            more = min(more, max(share, self._limit - size))
            shares = self._shares(held.calls, self._limit - more)
            self._thin(calls, shares + self._shares(new.calls, more))
        held.calls = [call for call in calls if call.size]

    def _shares(self, calls: Sequence[Call], size: int) -> list[int]:
        """How many of each call's samples to keep, `size` in all.

        In proportion, with the fractions rounded by one random offset. The host must
        know, so the step, which may be on the device, has no say in it.
        """
        sizes = [call.size for call in calls]
        total = sum(sizes)
        if size == total:
            return sizes
        offset = self._host_key(self._merges) % total
        ends = [(end * size + offset) // total for end in accumulate(sizes)]
        return [end - start for start, end in pairwise([0, *ends])]

    def _thin(self, calls: Sequence[Call], shares: Sequence[int]) -> None:
        for i, (call, share) in enumerate(zip(calls, shares, strict=True)):
            if share < call.size:
                key = self._key(self._merges, i)
                call.thin(draw(call.size, share, key, call.x.device))


def _calls(reservoirs: Reservoirs) -> list[Call]:
    return [call for reservoir in reservoirs.values() for call in reservoir.calls]


def _same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether they are the very same objects."""
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))


def current_pass() -> int | None:
    """A number for the backward pass that runs, if one runs; they may be nested.

    None under compiled autograd, which keeps passes to itself: all samples count then.
    """
    # Importing it takes a second, and who uses it has it.
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and (
        compiled.compiled_autograd_enabled or compiled.in_compiled_autograd_region
    ):
        return None
    number = torch._C._current_graph_task_id()
    return None if number < 0 else number


def _version(grad: Tensor) -> int:
    """How often it was changed in place; tensors of inference mode do not count."""
    return -1 if grad.is_inference() else grad._version


class _Weakly:
    """A method as a hook of a parameter, which keeps no pool alive."""

    def __init__(self, method: Callable[[Tensor], None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, tensor: Tensor) -> None:
        if torch.compiler.is_compiling():  # compiled autograd traces its hooks
            self._untraced(tensor)
            return
        method = self._method()
        if method is not None:
            method(tensor)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _untraced(self, tensor: Tensor) -> None:
        self(tensor)
