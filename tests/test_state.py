"""Saving, loading, and being killed in between."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import PAPER
from torch import nn

from frog_triton import FROG

OPTIONS = [
    {},
    PAPER,
    PAPER | {"fallback": "adamw"},
    {"capturable": True, "momentum_dtype": torch.bfloat16},
    PAPER | {"capturable": True, "momentum_dtype": torch.bfloat16, "nesterov": True},
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 4 * 4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(torch.tanh(self.fc(x.flatten(1))))


def batch(seed, size=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = Net().to(dtype)
    opt = FROG(net, sample_size=4, lr=0.05, **options)
    return net, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)


def train(net, opt, schedule, steps):
    for step in steps:
        x, y = batch(step)
        opt.zero_grad()
        F.cross_entropy(net(x.to(net.fc.weight.dtype)), y).backward()
        opt.step()
        schedule.step()


def tensors(net, opt):
    state = [opt.state[p] for p in net.parameters()]
    return [*net.state_dict().values(), *(t for s in state for t in s.values())]


def assert_same(one, other):
    for a, b in zip(tensors(*one[:2]), tensors(*other[:2]), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_with_the_same_bits(options, dtype, tmp_path):
    whole = make(dtype, **options)
    train(*whole, range(6))
    first = make(dtype, **options)
    train(*first, range(3))
    torch.save([part.state_dict() for part in first], tmp_path / "state")
    second = make(dtype, **options)
    saved = torch.load(tmp_path / "state", weights_only=True)
    for part, value in zip(second, saved, strict=True):
        part.load_state_dict(value)
    assert_same(first, second)
    train(*second, range(3, 6))
    assert_same(whole, second)


def test_state_is_made_at_the_first_gradient():
    net, opt, schedule = make(fallback="adamw")
    saved = opt.state_dict()
    assert saved["version"] == 2 and saved["state"] == {}
    train(net, opt, schedule, range(1))
    saved = opt.state_dict()
    kinds = {tuple(sorted(state)) for state in saved["state"].values()}
    assert kinds == {
        ("momentum_buffer", "step"),
        ("momentum_buffer",),
        ("exp_avg", "exp_avg_sq", "step"),
    }
    assert len(saved["state"]) == len(list(net.parameters()))


def test_an_old_file_without_a_version_loads():
    run = make()
    train(*run, range(2))
    saved = run[1].state_dict()
    del saved["version"], saved["misses"], saved["let_go"]
    for group in saved["param_groups"]:
        del group["capturable"], group["orthogonalize"]
    other = make()
    other[0].load_state_dict(run[0].state_dict())
    other[1].load_state_dict(saved)
    assert_same(run, other)
    train(*other, range(2))


def test_state_of_another_model_is_refused_before_anything_changes():
    run = make()
    train(*run, range(2))
    before = [t.clone() for t in tensors(*run[:2])]
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    for match in ("size of optimizer's group", r"conv\.weight has shape"):
        theirs = FROG(other)
        if "shape" in match:
            other(torch.randn(5, 3)).sum().backward()
            theirs.step()
        with pytest.raises(ValueError, match=match):
            run[1].load_state_dict(theirs.state_dict())
    wider = Net()
    wider.fc = nn.Linear(4 * 4 * 4, 7)
    wider.head = nn.Linear(7, 3)
    theirs = FROG(wider)
    F.cross_entropy(wider(batch(0)[0]), batch(0)[1]).backward()
    theirs.step()
    with pytest.raises(ValueError, match=r"fc\.weight has shape \(6, 64\).*\(7, 64\)"):
        run[1].load_state_dict(theirs.state_dict())
    for a, b in zip(before, tensors(*run[:2]), strict=True):
        assert torch.equal(a, b)


def test_loaded_state_shares_no_memory_with_what_it_came_from():
    run, other = make(), make()
    train(*run, range(1))
    saved = run[1].state_dict()
    other[1].load_state_dict(saved)
    kept = [t.clone() for s in saved["state"].values() for t in s.values()]
    train(*other, range(2))
    now = [t for s in saved["state"].values() for t in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@pytest.mark.gpu
def test_a_run_goes_on_on_another_device(tmp_path):
    run = make()
    train(*run, range(2))
    torch.save(run[1].state_dict(), tmp_path / "state")
    net, opt, _ = make(capturable=True)
    net.cuda()
    opt.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for param in net.parameters():
        assert all(value.is_cuda for value in opt.state[param].values())


LIVES = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from test_state import make, train
torch.set_num_threads(1)
path, steps = sys.argv[1], {steps}

def live():
    run = make(fallback="adamw")
    start = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        start = saved.pop()
        for part, value in zip(run, saved):
            part.load_state_dict(value)
    for step in range(start, steps):
        train(*run, [step])
        if step == start + 1 and step + 1 < steps:
            # This step is lost, and taken again from the checkpoint before it.
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save([part.state_dict() for part in run] + [step + 1], path + ".new")
        os.replace(path + ".new", path)

deaths = 0
while True:
    child = os.fork()
    if child == 0:
        live()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    deaths += 1
print(deaths)
"""


def test_killed_ten_times_and_resumed_it_ends_with_the_same_bits(tmp_path):
    steps, path = 12, tmp_path / "state"
    script = LIVES.format(tests=str(Path(__file__).parent), steps=steps)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert int(done.stdout) == 10
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = make(fallback="adamw")
    train(*whole, range(steps))
    torch.set_num_threads(threads)
    resumed = make(fallback="adamw")
    saved = torch.load(path, weights_only=True)
    for part, value in zip(resumed, saved, strict=False):
        part.load_state_dict(value)
    assert_same(whole, resumed)


def test_a_state_from_before_an_option_is_loaded_as_it_was_written():
    old = FROG(Net(), **PAPER)
    saved = old.state_dict()
    for group in saved["param_groups"]:
        del group["orthogonalize"]
    new = FROG(Net(), fallback="sgd")
    assert new.param_groups[0]["orthogonalize"]
    new.load_state_dict(saved)
    for ours, theirs in zip(new.param_groups, old.param_groups, strict=True):
        assert not ours["orthogonalize"]
        kept = ours.keys() - {"params"}
        assert all(ours[key] == theirs[key] for key in kept)


def test_names_of_parameters_follow_them():
    """Into the halves of their group, the state and back, and to the fallback."""

    def named():
        net = Net()
        return net, FROG(net, params=net.named_parameters())

    net, opt = named()
    names = {p: name for name, p in net.named_parameters()}
    for group in opt.param_groups:
        assert group["param_names"] == [names[p] for p in group["params"]]
    saved = opt.state_dict()
    _, other = named()
    other.load_state_dict(saved)
    kept = [group["param_names"] for group in opt.param_groups]
    assert [group["param_names"] for group in other.param_groups] == kept
