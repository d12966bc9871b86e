"""A CUDA graph's double on a CPU: it records operations and launches, and repeats them.

As with a graph, nothing runs while it records that anyone would see: memory is put back
to what it was. What is repeated writes to the very memory that recording has used.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from frog_triton.kernels.bundle import Bundle
from frog_triton.kernels.launch import Launch


class Tape(TorchDispatchMode):
    """See above; a `frog_triton.routine.Graph`."""

    def __init__(self):
        super().__init__()
        self.entries = []
        self.held = 0
        self._before = {}
        self._born = set()

    @contextmanager
    def recording(self):
        kinds = (Launch, Bundle)
        before = [kind.run for kind in kinds]

        def taped(run):
            def keep(launch):
                getattr(launch, "bound", None)  # its table is made now
                for tensor in launch.tensors():
                    self._keep(tensor)
                self.entries.append(lambda: run(launch))

            return keep

        for kind, run in zip(kinds, before, strict=True):
            kind.run = taped(run)
        try:
            with self:
                yield
        finally:
            for kind, run in zip(kinds, before, strict=True):
                kind.run = run
            for storage, old in self._before.values():
                torch.tensor([], dtype=torch.uint8).set_(storage).copy_(old)

    def replay(self):
        for entry in self.entries:
            entry()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not func.is_view:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
        made = func(*args, **kwargs)
        if func.is_view:
            return made
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        new = [
            t
            for t in tree_leaves(made)
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given
        ]
        for tensor in new:
            self._born.add(tensor.untyped_storage()._cdata)
        kept = tree_map_only(Tensor, lambda t: t.detach(), (args, kwargs))
        outs = [t.detach() for t in new]

        def again(func=func, kept=kept, outs=outs):
            again = func(*kept[0], **kept[1])
            if not outs:
                return
            fresh = [t for t in tree_leaves(again) if isinstance(t, Tensor)]
            for out, value in zip(outs, fresh, strict=True):
                out.copy_(value)

        empties = ("empty", "new_empty", "empty_like", "empty_strided")
        if func._schema.name.removeprefix("aten::") not in empties:
            self.entries.append(again)
        else:
            self.entries.append(lambda outs=outs: None)  # keeps the memory
        return made

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._born or key in self._before:
            return
        flat = torch.tensor([], dtype=torch.uint8).set_(storage)
        self._before[key] = (storage, flat.clone())
