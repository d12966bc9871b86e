"""Keeps a small sample of each layer's activations and output gradients.

A forward hook (`hooks.ForwardHook`) copies ``X[index]`` and puts a hook on the *output
tensor*, which brings ``Y[index]`` when its gradient arrives (a module's backward hook
would break on in-place activations). Until then the copied sample lives in that tensor
hook alone: if no backward comes, it dies with the graph. `pool.Pool` ties it to the
weight's gradient.

More than 400 lines: one class, which ties the taps of all layers to a step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers import LinearMap, Seen
from ..layers.products import AttentionAdapter
from ..model.plan import Layer, Use
from ..warning import warn
from . import hooks
from .attention import AttentionWatch
from .calls import Call, joined
from .functional import mark
from .pool import Pool, current_pass
from .products import ProductWatch
from .replays import ReplayWatch
from .sampling import SAMPLINGS as SAMPLINGS
from .sampling import Counted, Counter, Drawn, counter_key, draw, draw_groups, hash_on
from .taps import IN_EVAL_MODE, Tap

_WATCHES: dict[type, type[ProductWatch]] = {AttentionAdapter: AttentionWatch}
"""By the type of a module's adapter, where it wants one of its own."""

Watching = hooks.Installed | RemovableHandle | ProductWatch


class SampleCapture:
    """Samples of all layers between two steps.

    Args:
        sample_size: examples or positions kept for a layer, over all its calls.
        sampling: ``"examples"`` or ``"positions"``.
        seed: enters every draw.
        backend: one of `ops.BACKENDS`.
        may_wait: whether the host may wait for the device.

    Attributes:
        size_inside: positions kept of a product inside of a module, which are drawn
            whatever the sampling: in proportion to the defaults.
        called: names of layers that were called since the last step, in a way that
            makes samples or might have, in training mode.
        unsampled: why a call made none, by layer.
        stilled: hooks that do nothing any more, but are part of graphs of
            torch.compile; `close` takes them off.
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
        ratio = SAMPLINGS["positions"] // SAMPLINGS[sampling]
        self.size_inside = sample_size * ratio
        self._may_wait = may_wait
        self._passes: dict[int, list[Pool]] = {}
        self._pools: dict[str, Pool] = {}
        self._steps: dict[str, Callable[[], Counter]] = {}
        self._prefixes: dict[tuple[int, str], int] = {}
        self._layers: dict[str, Layer] = {}
        self.stilled: list[hooks.Installed] = []
        self._watching: dict[str, list[Watching]] = {}
        self._watches: dict[nn.Module, ProductWatch] = {}

    @property
    def counts_on_device(self) -> bool:
        """Whether step counters, and so keys, may lie on the device."""
        return not self._may_wait

    def watch(self, layer: Layer, step: Callable[[], Counter]) -> None:
        """Put hooks on the modules that share a layer's weight.

        Args:
            layer: whose name enters every draw.
            step: its step counter, read at each forward; a tensor, of any dtype, where
                nothing may wait for the device.
        """
        name = layer.name
        inside = layer.uses[0].weight.seen is not Seen.CALL
        self._layers[name] = layer
        self._steps[name] = step
        self._pools[name] = Pool(
            self.size_inside if inside else self.sample_size,
            layer.params,
            partial(self._key, name),
            partial(self._host_key, name),
            self._may_wait,
        )
        self._watching[name] = [self._watch(layer, use) for use in layer.uses]

    def _watch(self, layer: Layer, use: Use) -> Watching:
        if use.weight.seen is Seen.CALL_SITE:
            return mark(Tap(self, layer, use))
        if use.weight.seen is Seen.CALL:
            return hooks.Installed(hooks.ForwardHook(self, layer, use), use.module)
        make: type[ProductWatch] = ReplayWatch
        if use.weight.seen is Seen.PRODUCT:
            make = _WATCHES.get(type(use.adapter), ProductWatch)
        if use.module not in self._watches:
            self._watches[use.module] = make(self, use.module)
        watch = self._watches[use.module]
        watch.add(layer, use)
        return watch

    def unwatch(self, name: str) -> None:
        """Remove a layer's hooks and samples."""
        for watching in self._watching.pop(name):
            if isinstance(watching, RemovableHandle):
                watching.remove()
            elif isinstance(watching, hooks.Installed):
                if not watching.remove():
                    self.stilled.append(watching)
            elif watching.discard(name):
                self._watches = {
                    m: w for m, w in self._watches.items() if w is not watching
                }
        self._pools.pop(name).close()
        del self._steps[name], self._layers[name]
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
        for name in list(self._watching):
            self.unwatch(name)
        for hook in self.stilled:
            hook.remove_for_good()
        self.stilled.clear()

    def clear(self) -> None:
        """Drop all samples."""
        self._passes.clear()
        for pool in self._pools.values():
            pool.clear()

    def next_step(self) -> None:
        """Drop all samples, and what is known of calls."""
        for watch in self._watches.values():
            watch.sweep()
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
            warn(f"{name}: {hooks.REPLICA}")
        self.missed(name, hooks.REPLICA)

    def unsampled_reasons(self) -> dict[str, str]:
        """Why layers were called without being sampled, by name."""
        return self.unsampled_graphs | self.unsampled

    def may_be_called(self) -> set[str]:
        """Names of layers that were called since the last step, as far as is known."""
        evaluating = {
            name
            for name, reason in self.unsampled_graphs.items()
            if reason == IN_EVAL_MODE
            and not all(m.training for m in self._layers[name].modules)
        }
        return self.called | evaluating

    def calls(self, name: str) -> list[Call]:
        """The layer's samples as they were taken, a call of a module each."""
        pool = self._pools.get(name)
        return [] if pool is None else pool.calls

    def as_calls(self) -> Iterator[tuple[str, Call | None]]:
        """Samples of all layers that have some, by name, as if of one call each.

        None where they cannot be joined: whole examples, or rows of some groups alone.
        """
        for name, pool in self._pools.items():
            calls = pool.calls
            if len(calls) == 1 and calls[0].part is None:
                yield name, calls[0]
            elif calls:
                yield name, pool.as_one()

    def samples(self, layer: Layer, bias: bool) -> tuple[LinearMap, Tensor] | None:
        """The layer's samples as a map and gradients ``(n, R, P)``, or None."""
        pool = self._pools.get(layer.name)
        if pool is None or not pool.calls:
            return None
        together = pool.as_one()
        calls = pool.calls if together is None else [together]
        return joined(layer.geometry, calls, bias)

    def draw(
        self,
        tap: Tap,
        module: nn.Module,
        x: Tensor,
        y_shape: torch.Size,
    ) -> tuple[Tensor, Drawn]:
        """Copy a sample of a call's input.

        Args:
            tap: that saw the call.
            module: that was called.
            x: its input, batched.
            y_shape: shape of its output, batched.

        Returns:
            Sampled examples, or rows of X, and where they were taken.

        Raises:
            torch.OutOfMemoryError: naming the layer.
        """
        key = self._next_key(tap, module)
        try:
            return tap.taker.inputs(tap.adapter, module, x, y_shape, key)
        except torch.OutOfMemoryError as error:
            raise self._no_memory(tap, error) from error

    def draw_tokens(
        self,
        tap: Tap,
        module: nn.Module,
        x: Tensor,
        ends: Tensor,
        order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Copy a sample of each group's tokens.

        Args:
            tap: that saw the product.
            module: that made it.
            x: tokens ``(T, D)``.
            ends: where each group's tokens end ``(groups,)``, in order.
            order: of the tokens by their group; None where they lie so.

        Returns:
            Rows ``(N, groups * D)``, zeros where a group has fewer tokens; the index
            that they were taken at ``(N * groups,)``; and which of them there are.
        """
        counted = self._next_key(tap, module)
        key = counted if isinstance(counted, int) else counted.hashed()
        try:
            index, there = draw_groups(ends, x.shape[0], tap.size, key)
            index = index if order is None else order[index]
            rows = torch.where(there[:, None], x.index_select(0, index), 0)
            return rows.view(-1, len(ends) * x.shape[1]), index, there
        except torch.OutOfMemoryError as error:
            raise self._no_memory(tap, error) from error

    def draw_sequences(
        self, tap: Tap, module: nn.Module, total: int, count: int
    ) -> Tensor:
        """Which of a recurrent call's sequences to run again, an index on the host."""
        pool = self._pools[tap.name]
        pool.called(tap.gathered(module) if pool.sharded else ())
        key = self._host_key(tap.name, pool.forwards, 2)
        pool.forwards += 1
        return draw(total, count, key)

    def expect(self, name: str, before_write: Callable[[], None]) -> None:
        """Call something once, when this pass is about to write a layer's gradient."""
        pool = self._pools.get(name)
        if pool is not None:
            pool.expect(before_write)
            self._expect_end(pool)

    def _next_key(self, tap: Tap, module: nn.Module) -> int | Counted:
        pool = self._pools[tap.name]
        pool.called(tap.gathered(module) if pool.sharded else ())
        forward = pool.forwards
        pool.forwards += 1
        step = self._steps[tap.name]()
        if isinstance(step, Tensor):
            return Counted(self._host_key(tap.name), step, forward)
        return self._host_key(tap.name, step, forward)

    def keep(
        self,
        tap: Tap,
        module: nn.Module,
        x: Tensor,
        drawn: Drawn,
        grad: Tensor,
        shape: torch.Size,
    ) -> None:
        """Pool a call's sample, now that its output's gradient is there.

        Args:
            tap: that saw the call.
            module: that was called.
            x: from `draw`.
            drawn: from `draw`.
            grad: the output's gradient, maybe with leading dimensions as one.
            shape: of the output.

        Raises:
            torch.OutOfMemoryError: naming the layer.
        """
        self.called.add(tap.name)
        adapter = tap.adapter
        try:
            y = tap.taker.outputs(adapter, module, grad, shape, drawn)
            whole = None if tap.by_position else adapter
            self.pool(tap.name, Call(module, x, y, whole, tap.part), drawn.total)
        except torch.OutOfMemoryError as error:
            raise self._no_memory(tap, error) from error

    def keep_tokens(
        self,
        tap: Tap,
        module: nn.Module,
        x: Tensor,
        index: Tensor,
        there: Tensor,
        grad: Tensor,
        shape: torch.Size,
    ) -> None:
        """Pool what `draw_tokens` has drawn; as `keep`."""
        if tap.name not in self._layers:
            return
        self.called.add(tap.name)
        try:
            rows = self._layers[tap.name].geometry
            y = grad.detach().reshape(-1, rows.rows // rows.groups)
            total = y.shape[0]
            y = torch.where(there[:, None], y.index_select(0, index), 0)
            call = Call(module, x, y.view(len(x), -1), None, tap.part)
            self.pool(tap.name, call, total)
        except torch.OutOfMemoryError as error:
            raise self._no_memory(tap, error) from error

    def _no_memory(
        self, tap: Tap, error: torch.OutOfMemoryError
    ) -> torch.OutOfMemoryError:
        positions = "" if self.sampling == "positions" else "sampling='positions', "
        what = "positions" if tap.by_position else "examples"
        return torch.OutOfMemoryError(
            f"{tap.name}: no memory for its {tap.size} sampled {what}; take a smaller "
            f"sample_size, {positions}or smaller batches ({error})"
        )

    def _key(self, name: str, *counters: Counter) -> Counter:
        step = self._steps[name]()
        step = step.to(torch.int64) if isinstance(step, Tensor) else step
        return hash_on(self._host_key(name), step, *counters)

    def _host_key(self, name: str, *counters: int) -> int:
        known = self._prefixes.get((self.seed, name))
        if known is None:
            known = counter_key(self.seed, zlib.crc32(name.encode()))
            self._prefixes[self.seed, name] = known
        return hash_on(known, *counters)

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
        layer = self._layers.get(name)
        adapter = None
        if layer is not None and self.sampling != "positions":
            use = layer.uses[layer.modules.index(module)]
            adapter = use.adapter if use.weight.seen is Seen.CALL else None
        self.pool(name, Call(module, x, y, adapter), total)

    def pool(self, name: str, call: Call, total: int) -> None:
        """Pool a call's samples, drawn from `total` candidates."""
        pool = self._pools.get(name)
        # The layer may be let go between forward and backward; an empty batch says
        # nothing.
        if pool is not None and call.size:
            pool.arrive(call, total)
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
