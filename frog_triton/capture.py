"""Keeps a small sample of each layer's activations and output gradients.

A forward hook copies ``X[index]`` and puts a hook on the *output tensor*, which brings
``Y[index]`` when its gradient arrives (a module's backward hook would break on in-place
activations). Until then the copied sample lives in that tensor hook alone: if no
backward comes, it dies with the graph.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import ops, traced
from .layers import LayerAdapter, LinearMap, MatrixMap, pool_samples
from .sampling import Counter, counter_key, draw, take

SAMPLINGS = {"examples": 32, "positions": 256}
"""Ways to sample, each with its default size."""


@dataclass
class _Call:
    """Samples of one forward-backward pass through one module."""

    module: nn.Module
    x: Tensor
    y: Tensor

    def thin(self, index: Tensor) -> None:
        self.x, self.y = self.x[index], self.y[index]


@dataclass
class _Pool:
    """What a layer has collected since the last step."""

    seen: int = 0
    forwards: int = 0
    added: int = 0
    calls: list[_Call] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(call.x.shape[0] for call in self.calls)


class SampleCapture:
    """Samples of all layers between two steps.

    Args:
        sample_size: examples or positions kept for a layer, over all its calls.
        sampling: ``"examples"`` or ``"positions"``.
        seed: enters every draw.
        backend: one of `ops.BACKENDS`.
    """

    def __init__(
        self, sample_size: int, sampling: str, seed: int, backend: str = "auto"
    ) -> None:
        self.backend = backend
        self.sample_size = sample_size
        self.sampling = sampling
        self.seed = seed
        self.fired: set[str] = set()
        self.closed = False
        self._pools: dict[str, _Pool] = {}
        self._steps: dict[str, Callable[[], Counter]] = {}
        self._handles: dict[str, list[RemovableHandle]] = {}

    def watch(
        self,
        name: str,
        modules: Iterable[nn.Module],
        adapter: LayerAdapter,
        step: Callable[[], Counter],
    ) -> None:
        """Put hooks on the modules that share a layer's weight.

        Args:
            name: of the layer; enters every draw.
            modules: usually one.
            adapter: of the layer's kind.
            step: the layer's step counter, read at each forward; a tensor where
                nothing may wait for the device.
        """
        self._pools[name] = _Pool()
        self._steps[name] = step
        self._handles[name] = [
            module.register_forward_hook(
                _ForwardHook(self, name, module, adapter), with_kwargs=True
            )
            for module in modules
        ]

    def unwatch(self, name: str) -> None:
        """Remove a layer's hooks and samples."""
        for handle in self._handles.pop(name):
            handle.remove()
        del self._pools[name], self._steps[name]
        self.fired.discard(name)

    def tensors(self) -> Iterator[Tensor]:
        """All samples held at this moment."""
        for pool in self._pools.values():
            for call in pool.calls:
                yield call.x
                yield call.y

    def watches(self, name: str) -> bool:
        """Whether a layer's samples are wanted (still)."""
        return name in self._pools

    def close(self) -> None:
        """Remove all hooks and samples, for good."""
        self.closed = True
        for name in list(self._handles):
            self.unwatch(name)

    def clear(self) -> None:
        """Drop all samples."""
        for name in self._pools:
            self._pools[name] = _Pool()

    def calls(self, name: str) -> list[_Call]:
        """The layer's samples as they were taken, a call of a module each."""
        return self._pools[name].calls

    def samples(
        self, name: str, adapter: LayerAdapter, bias: bool
    ) -> tuple[LinearMap, Tensor] | None:
        """The layer's samples as a map and gradients ``(n, R, P)``, or None."""
        calls = self._pools[name].calls
        if not calls:
            return None
        if self.sampling == "positions":
            groups = adapter.geometry(calls[0].module).groups
            maps: list[LinearMap] = [MatrixMap(c.x, groups, bias) for c in calls]
            ys = [c.y.unsqueeze(-1) for c in calls]
        else:
            maps = [adapter.linear_map(c.module, c.x, bias) for c in calls]
            ys = [adapter.canonical(c.y) for c in calls]
        return pool_samples(maps, ys)

    def draw(
        self,
        name: str,
        module: nn.Module,
        adapter: LayerAdapter,
        x: Tensor,
        y_shape: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Copy a sample of a call's input.

        Args:
            name: of the layer.
            module: that was called.
            adapter: of its kind.
            x: its input, batched.
            y_shape: shape of its output, batched.

        Returns:
            Sampled examples, or rows of X, and the index that they were taken at.

        Raises:
            torch.OutOfMemoryError: naming the layer.
        """
        pool = self._pools[name]
        y_shape = torch.Size(y_shape)
        total = y_shape[0] * self._per_example(adapter, x, y_shape)
        key = self._key(name, self._steps[name](), pool.forwards)
        pool.forwards += 1
        with self._naming(name):
            index = draw(total, self.sample_size, key, x.device)
            if self.sampling == "positions":
                backend = ops.resolve(self.backend, x.device, x.dtype)
                return adapter.take_input_positions(
                    module, x, y_shape, index, backend
                ), index
            return take(x, index), index

    def keep(
        self,
        name: str,
        module: nn.Module,
        adapter: LayerAdapter,
        x: Tensor,
        index: Tensor,
        grad: Tensor,
    ) -> None:
        """Pool a call's sample, now that its output's gradient is there.

        Args:
            name: of the layer.
            module: that was called.
            adapter: of its kind.
            x: from `draw`.
            index: from `draw`.
            grad: the output's gradient.

        Raises:
            torch.OutOfMemoryError: naming the layer.
        """
        y = adapter.batched(module, grad.detach())
        total = y.shape[0] * self._per_example(adapter, y, y.shape)
        with self._naming(name):
            if self.sampling == "positions":
                y = adapter.take_output_positions(y, index)
            else:
                y = take(y, index)
            self.add(name, module, x, y, total)

    def _per_example(self, adapter: LayerAdapter, like: Tensor, y_shape: Any) -> int:
        """Candidates in one example of an output."""
        if self.sampling != "positions":
            return 1
        return adapter.positions(like.new_empty(()).expand(y_shape))

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            positions = "" if self.sampling == "positions" else "sampling='positions', "
            raise torch.OutOfMemoryError(
                f"{name}: no memory for its {self.sample_size} sampled "
                f"{self.sampling}; take a smaller sample_size, {positions}or smaller "
                f"batches ({error})"
            ) from error

    def _key(self, name: str, *counters: Counter) -> Counter:
        return counter_key(self.seed, zlib.crc32(name.encode()), *counters)

    def add(
        self,
        name: str,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        total: int,
    ) -> None:
        """Pool a call's samples so that every candidate so far is equally likely.

        Args:
            name: of the layer.
            module: that was called.
            x: drawn examples of its input, or drawn rows of X.
            y: the output gradients that belong to them.
            total: how many candidates they were drawn from.
        """
        if x.shape[0] == 0:  # an empty batch says nothing
            return
        call = _Call(module, x, y)
        pool = self._pools.get(name)
        if pool is None:  # the layer was let go between forward and backward
            return
        size, new = pool.size, call.x.shape[0]
        pool.seen += total
        pool.added += 1
        pool.calls.append(call)
        if size + new > self.sample_size:
            share = round(self.sample_size * total / pool.seen)
            kept_new = min(new, max(share, self.sample_size - size))
            old = self._shares(name, pool, self.sample_size - kept_new)
            self._thin(name, pool, [*old, kept_new])

    def _shares(self, name: str, pool: _Pool, size: int) -> list[int]:
        """How many of each earlier call's samples to keep, `size` in all.

        In proportion, with the fractions rounded by one random offset. The host must
        know, so the step, which may be on the device, has no say in it.
        """
        sizes = [call.x.shape[0] for call in pool.calls[:-1]]
        total = sum(sizes)
        offset = counter_key(self.seed, zlib.crc32(name.encode()), pool.added) % total
        ends = [(end * size + offset) // total for end in accumulate(sizes)]
        return [end - start for start, end in pairwise([0, *ends])]

    def _thin(self, name: str, pool: _Pool, shares: list[int]) -> None:
        for i, (call, share) in enumerate(zip(pool.calls, shares, strict=True)):
            size = call.x.shape[0]
            if share < size:
                key = self._key(name, self._steps[name](), pool.added, i)
                call.thin(draw(size, share, key, call.x.device))
        pool.calls = [call for call in pool.calls if call.x.shape[0]]


class _ForwardHook:
    """Holds weak references, so that neither module nor optimizer is kept alive.

    A copied or unpickled model gets an inert hook: no optimizer comes along with it.
    """

    def __init__(
        self,
        capture: SampleCapture,
        name: str,
        module: nn.Module,
        adapter: LayerAdapter,
    ) -> None:
        self._capture = weakref.ref(capture)
        self._module = weakref.ref(module)
        self._name = name
        self._adapter = adapter
        self._number = traced.enrol(self)
        self._anchor = traced.make_anchor()
        self._sample_size = capture.sample_size
        geometry = adapter.geometry(module)
        by_position = capture.sampling == "positions"
        self._row = geometry.groups * geometry.dim if by_position else 0

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if torch.compiler.is_compiling():
            return self._trace(module, args[0] if args else kwargs["input"], output)
        capture = self._capture()
        if capture is None or module is not self._module():
            return None
        self.mark()
        if not _wanted(module, output):
            return None
        x = args[0] if args else kwargs["input"]
        x = self._adapter.batched(module, x.detach())
        y_shape = self._adapter.batched(module, output).shape
        sample, index = capture.draw(self._name, module, self._adapter, x, y_shape)

        hooked, shape = _written_tensor(output), output.shape

        def on_grad(grad: Tensor) -> None:
            grad = grad.view(shape)
            capture.keep(self._name, module, self._adapter, sample, index, grad)

        hooked.register_hook(on_grad)
        return None

    def _trace(self, module: nn.Module, x: Tensor, output: Any) -> Any:
        """The same by operators that torch.compile can put into its graphs."""
        if torch.compiler.is_exporting():
            return None
        traced.mark(self._number)
        if not _wanted(module, output):
            return None
        y = self._adapter.batched(module, output)
        positions = self._adapter.positions(y) if self._row else 1
        count = torch.sym_min(self._sample_size, y.shape[0] * positions)
        x = self._adapter.batched(module, x.detach())
        return traced.tap(
            output, self._anchor, x, y.shape, count, self._row, self._number
        )

    def mark(self) -> None:
        """See `traced.Receiver`."""
        capture = self._capture()
        if capture is not None:
            capture.fired.add(self._name)

    def sample(self, x: Tensor, y_shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """See `traced.Receiver`."""
        capture, module = self._capture(), self._module()
        if capture is None or module is None or not capture.watches(self._name):
            return None
        return capture.draw(self._name, module, self._adapter, x, y_shape)

    def keep(self, x: Tensor, index: Tensor, grad: Tensor) -> None:
        """See `traced.Receiver`."""
        capture, module = self._capture(), self._module()
        if capture is not None and module is not None:
            capture.keep(self._name, module, self._adapter, x, index, grad)

    def __reduce__(self) -> tuple[type[_InertHook], tuple[()]]:
        return _InertHook, ()


def _wanted(module: nn.Module, output: Any) -> bool:
    """Whether a call's samples may serve a step."""
    return (
        module.training
        and torch.is_grad_enabled()
        and isinstance(output, Tensor)
        and output.requires_grad
    )


def _written_tensor(output: Tensor) -> Tensor:
    """The output, or the tensor that it is another shape of.

    A Linear layer's output for a sequence is a view. An in-place activation on it
    takes the view's old node out of the graph, and its hooks with that; those of the
    viewed tensor stay.
    """
    base = output._base
    if base is None or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base if base.numel() == output.numel() else output


class _InertHook:
    def __call__(self, *args: Any) -> None:
        pass
