"""Torch's switches for the precision of float32 convolutions, old and new.

Each in a process of its own: torch cannot bring all of them back to where they were.
The processes are forks of one that has imported everything.
"""

import json
import os
import subprocess
import sys

SWITCHES = {
    "by operator": ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", False),
    "for cuDNN": ("torch.backends.cudnn.fp32_precision = 'ieee'", False),
    "for all": ("torch.backends.fp32_precision = 'ieee'", False),
    "as before": ("torch.backends.cudnn.allow_tf32 = False", False),
    "tf32 for all": ("torch.backends.fp32_precision = 'tf32'", True),
    "untouched": ("", True),
}

# A fork and a GPU do not go together.
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

SCRIPT = """
import json, os, sys, traceback, types, torch
from torch import nn
from frog_triton import FROG
from frog_triton.layers import ConvMap
from frog_triton.layers.conv import ConvSpec
from frog_triton.kernels import products
from frog_triton.linalg.precision import exact_convolutions, tf32_convolutions

def check(switch, rounded):
    exec(switch)
    assert tf32_convolutions() == rounded

    # A step, in both backends.
    for backend in ("torch", "triton"):
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 2))
        opt = FROG(net, backend=backend, sampling="examples")
        before = net[0].weight.detach().clone()
        net(torch.randn(4, 2, 5, 5)).square().sum().backward()
        opt.step()
        assert not torch.equal(before, net[0].weight)

    # The precision of products with images.
    spec = ConvSpec((3, 3), (1, 1), (1, 1), (1, 1), 1)
    images = ConvMap(torch.randn(2, 4, 5, 5), spec, False)
    expected = "tf32" if rounded else products.PRECISION
    assert products.product_precision(images, torch.float32) == expected

    # Convolutions on CUDA are exact, and the switches afterwards where they were.
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    try:
        with exact_convolutions(types.SimpleNamespace(is_cuda=True)):
            assert not tf32_convolutions() and cudnn.deterministic
            raise RuntimeError("inside")
    except RuntimeError:
        pass
    assert (cudnn.conv.fp32_precision, cudnn.deterministic) == before
    assert tf32_convolutions() == rounded

for name, (switch, rounded) in json.loads(sys.argv[1]).items():
    process = os.fork()
    if process == 0:
        try:
            check(switch, rounded)
            print(name, "holds", flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(process, 0)
"""


def test_every_switch_is_understood():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(SWITCHES)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **ON_THE_CPU},
    )
    held = done.stdout.splitlines()
    assert held == [f"{name} holds" for name in SWITCHES], done.stderr[-2000:]
