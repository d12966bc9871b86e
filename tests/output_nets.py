"""What the tests of output layers share."""

from contextlib import contextmanager

import torch
from torch import nn

from frog_triton.model.outputs import OutputSearch, named_outputs

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS)]


def by_name(model, kinds=LAYERS):
    names = {module: name for name, module in model.named_modules()}
    found = named_outputs(
        model, [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    )
    return None if found is None else {names[module] for module in found}


@contextmanager
def watched(model, search):
    """Tell the search of each call of a layer, by the layer's name."""

    def hook(name):
        return lambda module, args, kwargs, y: search.saw(name, (args, kwargs), y)

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in layers(model)
    ]
    yield search
    for handle in handles:
        handle.remove()


def by_passes(model, *losses):
    """What is found after a backward pass for each of `losses`."""
    with watched(model, OutputSearch()) as search:
        for loss in losses:
            loss(model).backward()
    return search.found()


def x(*shape):
    return torch.randn(*(shape or (3, 4)))


class Net(nn.Module):
    """Linear layers of width 4 by name, in the order given, and a forward function."""

    def __init__(self, names, forward):
        super().__init__()
        for name in names.split():
            setattr(self, name, nn.Linear(4, 4))
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def total(y):
    return y.square().sum()
