"""Keeps a small sample of each layer's activations and output gradients.

A forward hook (`hooks.ForwardHook`) copies ``X[index]`` and puts a hook on the *output
tensor*, which brings ``Y[index]`` when its gradient arrives (a module's backward hook
would break on in-place activations). Until then the copied sample lives in that tensor
hook alone: if no backward comes, it dies with the graph. `pool.Pool` ties it to the
weight's gradient.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import hooks, ops
from .layers import LayerAdapter, LinearMap, MatrixMap, pool_samples
from .pool import Call, Pool, current_pass
from .routing import Layer
from .sampling import Counter, counter_key, draw, take

SAMPLINGS = {"examples": 32, "positions": 256}
"""Ways to sample, each with its default size."""


class SampleCapture:
    """Samples of all layers between two steps.

    Args:
        sample_size: examples or positions kept for a layer, over all its calls.
        sampling: ``"examples"`` or ``"positions"``.
        seed: enters every draw.
        backend: one of `ops.BACKENDS`.
        may_wait: whether the host may wait for the device.

    Attributes:
        called: names of layers that were called since the last step, in a way that
            makes samples or might have, in training mode.
        unsampled: why a call made none, by layer.
        unsampled_graphs: the same of calls in graphs that torch.compile has made; when
            such a graph runs is not known.
    """

    def __init__(
        self,
        sample_size: int,
        sampling: str,
        seed: int,
        backend: str = "auto",
        may_wait: bool = True,
    ) -> None:
        self.backend = backend
        self.sample_size = sample_size
        self.sampling = sampling
        self.seed = seed
        self.called: set[str] = set()
        self.unsampled: dict[str, str] = {}
        self.unsampled_graphs: dict[str, str] = {}
        self.closed = False
        self._told_of_replicas = False
        self._may_wait = may_wait
        self._passes: dict[int, list[Pool]] = {}
        self._pools: dict[str, Pool] = {}
        self._steps: dict[str, Callable[[], Counter]] = {}
        self._handles: dict[str, list[tuple[RemovableHandle, nn.Module]]] = {}

    def watch(self, layer: Layer, step: Callable[[], Counter]) -> None:
        """Put hooks on the modules that share a layer's weight.

        Args:
            layer: whose name enters every draw.
            step: its step counter, read at each forward; a tensor where nothing may
                wait for the device.
        """
        name = layer.name
        self._steps[name] = step
        self._pools[name] = Pool(
            self.sample_size,
            layer.params,
            partial(self._key, name),
            partial(self._host_key, name),
            self._may_wait,
        )
        self._handles[name] = []
        for module in layer.modules:
            hook = hooks.ForwardHook(self, layer, module)
            self._handles[name].append((hooks.install(hook, module), module))

    def unwatch(self, name: str) -> None:
        """Remove a layer's hooks and samples."""
        for handle, _ in self._handles.pop(name):
            handle.remove()
        self._pools.pop(name).close()
        del self._steps[name]
        self.called.discard(name)

    def tensors(self) -> Iterator[Tensor]:
        """All samples held at this moment."""
        for pool in self._pools.values():
            for call in pool.held():
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
        self._passes.clear()
        for pool in self._pools.values():
            pool.clear()

    def next_step(self) -> None:
        """Drop all samples, and what is known of calls."""
        self.clear()
        self.called.clear()
        self.unsampled.clear()

    def missed(self, name: str, reason: str) -> None:
        """Remember why a call of a layer is not sampled."""
        self.unsampled[name] = reason

    def missed_replica(self, name: str) -> None:
        """Remember, and say at once, that a copy of a layer was called."""
        if not self._told_of_replicas:
            self._told_of_replicas = True
            warnings.warn(f"{name}: {hooks.REPLICA}", stacklevel=2)
        self.missed(name, hooks.REPLICA)

    def unsampled_reasons(self) -> dict[str, str]:
        """Why layers were called without being sampled, by name."""
        return self.unsampled_graphs | self.unsampled

    def may_be_called(self) -> set[str]:
        """Names of layers that were called since the last step, as far as is known."""
        evaluating = {
            name
            for name, reason in self.unsampled_graphs.items()
            if reason == hooks.IN_EVAL_MODE
            and not all(module.training for _, module in self._handles[name])
        }
        return self.called | evaluating

    def calls(self, name: str) -> list[Call]:
        """The layer's samples as they were taken, a call of a module each."""
        return self._pools[name].calls

    def samples(
        self, name: str, adapter: LayerAdapter, bias: bool
    ) -> tuple[LinearMap, Tensor] | None:
        """The layer's samples as a map and gradients ``(n, R, P)``, or None."""
        calls = self.calls(name)
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
        y_shape: torch.Size,
        candidates: int,
    ) -> tuple[Tensor, Tensor]:
        """Copy a sample of a call's input.

        Args:
            name: of the layer.
            module: that was called.
            adapter: of its kind.
            x: its input, batched.
            y_shape: shape of its output, batched.
            candidates: in one example of it.

        Returns:
            Sampled examples, or rows of X, and the index that they were taken at.

        Raises:
            torch.OutOfMemoryError: naming the layer.
        """
        pool = self._pools[name]
        pool.called(module)
        key = self._key(name, pool.forwards)
        pool.forwards += 1
        with self._naming(name):
            total = y_shape[0] * candidates
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
        self.called.add(name)
        y = adapter.batched(module, grad.detach())
        with self._naming(name):
            if self.sampling == "positions":
                total = y.shape[0] * adapter.positions(y)
                y = adapter.take_output_positions(y, index)
            else:
                total = y.shape[0]
                y = take(y, index)
            self.add(name, module, x, y, total)

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
        return counter_key(
            self.seed, zlib.crc32(name.encode()), self._steps[name](), *counters
        )

    def _host_key(self, name: str, *counters: int) -> int:
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
        pool = self._pools.get(name)
        # The layer may be let go between forward and backward; an empty batch says
        # nothing.
        if pool is not None and x.shape[0]:
            pool.arrive(Call(module, x, y), total)
            self._expect_end(pool)

    def _expect_end(self, pool: Pool) -> None:
        """Tell a pool when the backward pass that runs has ended."""
        this = current_pass()
        if this is None:
            return
        if this not in self._passes:
            self._passes[this] = []
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._finish, this))
        self._passes[this].append(pool)

    def _finish(self, this: int) -> None:
        for pool in self._passes.pop(this, ()):
            pool.finish(this)
