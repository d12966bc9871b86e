"""Warnings point at the line that the user wrote, through whatever wrappers."""

import contextlib
import inspect
import warnings

import pytest
import torch
from torch import nn

from frog_triton import FROG
from frog_triton.warning import warn


def plainly(run):
    run()


@torch.no_grad()
def behind_a_decorator(run):
    run()


def in_a_context(run):
    @contextlib.contextmanager
    def context():
        run()
        yield

    with context():
        pass


@pytest.mark.parametrize("around", [plainly, behind_a_decorator, in_a_context])
def test_the_innermost_frame_that_is_the_users(around):
    with pytest.warns(UserWarning, match="look here") as caught:
        around(lambda: warn("look here"))
    assert caught[0].filename == __file__
    line = inspect.getsource(test_the_innermost_frame_that_is_the_users).splitlines()
    first = test_the_innermost_frame_that_is_the_users.__code__.co_firstlineno
    assert "warn(" in line[caught[0].lineno - first]


def stepped_plainly(opt):
    opt.step()


def stepped_by_a_closure(opt):
    opt.step(lambda: torch.zeros(()))


def stepped_under_a_scheduler(opt):
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    opt.step()


def stepped_by_a_scaler(opt):
    torch.amp.GradScaler("cpu", enabled=False).step(opt)


@pytest.mark.parametrize(
    "step",
    [
        stepped_plainly,
        stepped_by_a_closure,
        stepped_under_a_scheduler,
        stepped_by_a_scaler,
    ],
)
def test_the_line_that_steps(step):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = FROG(net)
    for factor in (1.0, 1.0, 1e6):
        opt.zero_grad()
        (factor * net(torch.ones(5, 3)).square().sum()).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(opt)
    (warning,) = (w for w in caught if "running away" in str(w.message))
    lines, first = inspect.getsourcelines(step)
    assert warning.filename == __file__
    assert "step(" in lines[warning.lineno - first]
    assert warning.lineno > first


def test_the_line_that_builds_it():
    with pytest.warns(UserWarning, match="preconditions no parameter") as caught:
        FROG(nn.LayerNorm(3))
    assert caught[0].filename == __file__
