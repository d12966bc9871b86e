"""FROG's step on ResNet-18 beside the public reference's.

    python -m frog_triton.benchmarks.reference PATH/TO/frog.py

PATH is the file of a checkout of the reference (`Fullfix/frog-optimizer`), which is not
part of this project. Both take a whole training step on CIFAR-sized images; `step()`
alone is timed, where there is a GPU.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import FROG, PAPER
from ..cli.arguments import Parser, positive
from ..cli.output import add_outputs
from .environment import environment
from .models import resnet
from .records import write_json
from .timing import milliseconds

SAMPLES, ITERS = 64, 4


def load(path: Path) -> Any:
    """The reference's optimizer class.

    Raises:
        ValueError: the file is not there, or has no class ``Frog``.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; pass the reference's frog.py")
    spec = importlib.util.spec_from_file_location("frog_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "Frog"):
        raise ValueError(f"{path} has no class Frog; pass the reference's frog.py")
    return module.Frog


def settings(reference: Any) -> dict[str, Callable[[nn.Module], Any]]:
    """Optimizers to compare, by name; all with 64 examples and k = 4."""
    return {
        "FROG": lambda model: FROG(
            model, **{**PAPER, "sample_size": SAMPLES, "cg_iters": ITERS}
        ),
        "reference": lambda model: reference(
            model.parameters(),
            model,
            lr=2e-2,
            momentum=0.9,
            sample_size=SAMPLES,
            num_iters=ITERS,
            tau=1e-4,
        ),
    }


def compare(
    path: Path, batch: int = 128, depth: int = 18, size: int = 32, repeats: int = 20
) -> dict[str, Any]:
    """Milliseconds of each optimizer's step; without a GPU a step each, untimed.

    The reference has float32 only; its best setting is tf32 with channels_last. FROG
    runs in the same, and under bfloat16 autocast.

    Args:
        path: of the reference's frog.py.
        batch: images.
        depth: of the network.
        size: of the images.
        repeats: steps timed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, 3, size, size, device=device, generator=generator)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device, generator=generator)
    results: dict[str, Any] = {}
    for name, build in settings(load(path)).items():
        for dtype in (torch.float32, torch.bfloat16):
            if name == "reference" and dtype != torch.float32:
                continue  # it fails under autocast
            torch.manual_seed(0)
            model = resnet(depth).to(device)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            optimizer = build(model)
            before = _passes(model, optimizer, x, y, dtype)
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            if device == "cuda":
                times = milliseconds(optimizer.step, before, repeats)
                results[label] = {
                    "median_us": 1e3 * statistics.median(times),
                    "min_us": 1e3 * min(times),
                    "max_us": 1e3 * max(times),
                }
            else:
                before()
                optimizer.step()
                results[label] = {}
    return results


def _passes(
    model: nn.Module, optimizer: Any, x: Any, y: Any, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward and backward, which both optimizers watch."""
    lower = torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def run() -> None:
        optimizer.zero_grad()
        with lower:
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("path", type=Path, help="the reference's frog.py")
    parser.add_argument("--batch", type=positive, default=128)
    add_outputs(parser)
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = True
    results = compare(args.path, args.batch)
    for name, entry in results.items():
        timed = f"{entry['median_us']:.0f} us" if entry else "ran; not timed, no GPU"
        print(f"{name:22} {timed}")
    if args.json:
        write_json(args.json, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
