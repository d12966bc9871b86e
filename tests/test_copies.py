"""Copies and pickles of a hooked model are without hooks, and anybody's."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from call_net import batch, hooks, make
from torch import nn

from frog_triton import FROG


def pickled(net):
    return pickle.loads(pickle.dumps(net))


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "copy of a copy": lambda net: pickled(copy.deepcopy(net)),
    "each layer": lambda net: nn.Sequential(*map(copy.deepcopy, net)),
    "averaged": lambda net: torch.optim.swa_utils.AveragedModel(net).module,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_no_hooks(how):
    net = make()
    net[3].register_forward_hook(_of_the_users)
    opt = FROG(net)
    assert hooks(net) == 7  # until the first step shows which is the output layer
    other = COPIES[how](net)
    assert hooks(other) == 1
    assert b"frog" not in pickle.dumps(other)
    opt.close()
    assert hooks(net) == hooks(other) == 1
    second = FROG(other)
    other(batch(0)).sum().backward()
    second.step()
    assert second.anomalies() == {} and hooks(other) == 3


def _of_the_users(module, args, output):
    return None


def test_a_shallow_copy_and_a_layer_of_two_optimizers():
    net = make()
    first, second = FROG(net), FROG(net)
    other = copy.copy(net[3])
    assert not other._forward_hooks and other.weight is net[3].weight
    first.close()
    assert b"frog" not in pickle.dumps(net)
    net(batch(0)).sum().backward()
    assert second.capture.calls("3")
    second.close()
    assert hooks(net) == 0


class WithState(nn.Linear):
    """A layer that says itself what is pickled of it."""

    def __getstate__(self):
        return {**self.__dict__, "note": 1}


def test_a_layer_with_a_state_of_its_own():
    net = nn.Sequential(WithState(3, 4), nn.Linear(4, 2))
    FROG(net)
    for other in (copy.deepcopy(net), pickled(net)):
        assert other[0].note == 1 and hooks(other) == 0
        assert torch.equal(other[0].weight, net[0].weight)


class OwnCopy(nn.Linear):
    """Copies itself, as many classes do."""

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


@pytest.mark.parametrize("closed", [False, True])
def test_a_copy_of_a_class_that_copies_itself_is_its_own(closed):
    net = nn.Sequential(OwnCopy(3, 4), nn.Linear(4, 2))
    opt = FROG(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.fill_(7)
    if closed:
        opt.close()
    for again in (pickled(other), copy.deepcopy(other)):
        assert (again[0].weight == 7).all()
    assert b"frog" not in pickle.dumps(other)
    other(torch.randn(5, 3)).sum().backward()
    assert closed or not opt.capture.called


def test_a_layer_made_from_the_dictionary_of_another():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    FROG(net)
    new = OwnCopy.__new__(OwnCopy)
    new.__dict__ = net[0].__dict__.copy()
    del net
    assert type(copy.deepcopy(new)) is OwnCopy
    new(torch.randn(5, 3)).sum().backward()


def test_a_parametrized_copy_outlives_its_original():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    FROG(net)
    torch.nn.utils.parametrizations.spectral_norm(net[0])
    other = copy.deepcopy(net)
    torch.nn.utils.parametrize.remove_parametrizations(other[0], "weight")
    assert torch.equal(copy.deepcopy(other)[0].weight, other[0].weight)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_model_loads_where_frog_is_not(how, tmp_path):
    net = make()
    opt = FROG(net)
    net(batch(0)).sum().backward()
    opt.step()
    expected = net(batch(1))
    path = tmp_path / "model"
    if how == "pickle":
        path.write_bytes(pickle.dumps((net, batch(1), expected.detach())))
    else:
        torch.save((net, batch(1), expected.detach()), path)
    script = f"""
import pickle, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "frog_triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import torch
if {how == "pickle"}:
    net, x, y = pickle.load(open({str(path)!r}, "rb"))
else:
    net, x, y = torch.load({str(path)!r}, weights_only=False)
assert torch.equal(net(x), y)
net(x).sum().backward()
assert "frog_triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
