"""Compare kernels, optimizer steps or whole trainings with what one would else use.

    frog-triton bench kernels --model resnet18 --json kernels.json --plot kernels.png
    frog-triton bench step --model gpt2-small --samples 64
    frog-triton bench host
    frog-triton bench estimate --model gpt2-small --samples 128
    frog-triton bench train cifar10-small --data DIR
    frog-triton bench stability
    frog-triton bench stability --case overfit-mlp gan
    frog-triton bench coverage

Without a GPU, kernels and step print counts and floors, and time nothing; what
estimate prints is never measured.
"""

from __future__ import annotations

from . import Command

_BENCHMARKS = "frog_triton.benchmarks"

COMMANDS = {
    "kernels": Command(
        "the convolution kernels beside cuDNN", f"{_BENCHMARKS}.bench_kernels"
    ),
    "step": Command(
        "FROG's step beside other optimizers'", f"{_BENCHMARKS}.bench_step"
    ),
    "estimate": Command(
        "what kernels would take on an H200, from their machine code",
        f"{_BENCHMARKS}.estimate",
    ),
    "host": Command(
        "what a training step costs the host, beside AdamW's",
        f"{_BENCHMARKS}.bench_host",
    ),
    "train": Command(
        "optimizers on a workload",
        f"{_BENCHMARKS}.train.bench",
        ("matplotlib",),
        "demo",
    ),
    "coverage": Command(
        "how much of real models FROG preconditions", f"{_BENCHMARKS}.coverage"
    ),
    "stability": Command(
        "which optimizers survive",
        f"{_BENCHMARKS}.train.stability",
        ("sklearn",),
        "demo",
    ),
}
