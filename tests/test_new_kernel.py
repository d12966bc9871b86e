"""A new kernel is one file and one line: all that serves kernels then knows it."""

import os
import subprocess
import sys

import pytest
import torch
import toy_kernel
from toy_kernel import TOY, ToyConfig, toy

from frog_triton.autotune import space
from frog_triton.autotune.cache import Machine, UnusableError, parse, render
from frog_triton.autotune.model import predict
from frog_triton.kernels import registry
from frog_triton.kernels.gpu import GPUS
from frog_triton.kernels.launch import recording
from frog_triton.kernels.table import Table, using
from frog_triton.kernels.work import work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = (2, 40, 300)
KEY = "toy r32 d128 float32 few"


@pytest.fixture
def registered(monkeypatch):
    """The one line."""
    known = {**registry.KERNELS, TOY.name: TOY}
    monkeypatch.setattr(registry, "KERNELS", known)


def launched(config=None):
    x, a = torch.randn(SIZE, device=DEVICE), torch.randn(SIZE[:2], device=DEVICE)
    with using(Table({KEY: config} if config else {})), recording() as launches:
        y = toy(x, a)
    assert torch.equal(y, x * a[..., None])
    (launch,) = launches
    return launch


def test_it_is_launched_recorded_and_counted():
    launch = launched()
    assert launch.grid == (3 * 5, 2) and launch.config.key == KEY
    entries, rows = 2 * 40 * 300, 2 * 40
    assert work(launch).bytes == 8 * entries + 4 * rows


def test_it_is_tuned(registered):
    launch = launched()
    default, gpu = launch.config, GPUS["h200"]
    assert registry.kernel_of(KEY) is TOY
    found = list(space.candidates(TOY, default))
    assert len(found) == 3 * 2 * 2
    for config in found:
        assert space.invalid(TOY, config, {"r": 40, "d": 300}, "", 90) is None
        assert predict(launch, gpu, config=config).floor_us > 0
        (made,) = TOY.launches(config, 2, launch.args)
        if config != default:
            assert launched(config).grid == made.grid


def test_its_configurations_are_kept(registered):
    machine = Machine("NVIDIA Test 1", 90)
    table = Table({KEY: ToyConfig(BLOCK_R=32)})
    assert parse(render(machine, table), machine) == table


def test_before_the_line_its_key_is_not_known():
    machine = Machine("NVIDIA Test 1", 90)
    text = render(machine, Table({KEY: ToyConfig()}))
    with pytest.raises(UnusableError, match="for no kernel that is known"):
        parse(text, machine)


def test_it_is_compiled_offline():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, toy_kernel.__file__],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["_toy_kernel", "True", "0"]
