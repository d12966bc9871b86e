"""Refuses operations of torch on what launches that wait read and write."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frog_triton.kernels.launch import SIZES_ALONE, is_awaited


class Watch(TorchDispatchMode):
    """While jobs are done whose launches wait for each other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in SIZES_ALONE:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    assert not is_awaited(tensor), f"{func} of what is to be written"
        return func(*args, **(kwargs or {}))
