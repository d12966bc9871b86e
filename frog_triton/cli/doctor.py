"""What is installed, which backend would run, what is missing and how to get it.

    frog-triton doctor
    frog-triton doctor --json doctor.json

Exit code 0 if FROG can be used here, on a GPU or not; 1 if not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from typing import Any

import torch

from .. import __version__, ops
from ..autotune.cache import Cache, default_folder, shipped
from ..autotune.tuning import machine_of
from .output import add_outputs, print_table, write_json

# Package, what it serves, and what brings it; torch and numpy come with any install.
PACKAGES = (
    ("torch", "everything", ""),
    ("triton", "the kernels", "pip install triton (Linux)"),
    ("filelock", "keeping tuned tables", "pip install filelock"),
    ("platformdirs", "their usual folder", "pip install platformdirs"),
    ("matplotlib", "pictures", "pip install 'frog-triton[demo]'"),
    ("scikit-learn", "demo, bench stability", "pip install 'frog-triton[demo]'"),
    ("pillow", "images in files", "pip install 'frog-triton[demo]'"),
    ("pytorch_optimizer", "SOAP, Shampoo", "pip install 'frog-triton[peers]'"),
    ("singd", "SINGD", "pip install 'frog-triton[peers]'"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Print what was found."""
    found = examine()
    print_table("frog_triton", ("what ", "found "), list(found["facts"].items()))
    rows = [
        (p["package"], p["version"] or "missing", p["serves"], p["get"])
        for p in found["packages"]
    ]
    columns = ("package ", "version ", "serves ", "get it with ")
    print_table("packages", columns, rows)
    for line in found["advice"]:
        print(f"- {line}")
    write_json(args.json, found)
    return 0 if found["usable"] else 1


def examine() -> dict[str, Any]:
    """Facts, packages and advice."""
    packages = []
    for name, serves, get in PACKAGES:
        version = _version(name)
        packages.append(
            {
                "package": name,
                "version": version,
                "serves": serves,
                "get": "" if version else get,
            }
        )
    facts: dict[str, str] = {
        "frog_triton": __version__,
        "python": f"{platform.python_version()} on {platform.system()}",
        "torch built for CUDA": torch.version.cuda or "no",
        "table folder": str(default_folder()),
    }
    advice = []
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        machine = machine_of(device)
        facts["GPU"] = f"{machine.gpu}, capability {machine.capability / 10}"
        tuned = len(Cache().load(machine).configs)
        facts["tuned kernels"] = str(tuned)
        facts["shipped table"] = "yes" if shipped(machine).configs else "none"
        if machine.capability < 80:
            advice.append("the kernels are built for capability 8.0 and later")
        if not tuned:
            advice.append(
                "to tune the kernels for this GPU: frog-triton autotune MODEL"
            )
    else:
        facts["GPU"] = "none that torch can use"
        why = (
            "torch was built without CUDA"
            if torch.version.cuda is None
            else ("torch finds no GPU; check the driver with nvidia-smi")
        )
        advice.append(f"models run on the CPU with plain torch: {why}")
    backend = ops.resolve("auto", device, torch.float32)
    facts["backend"] = backend.NAME
    if sys.platform != "linux":
        advice.append("Triton is for Linux; elsewhere FROG runs in plain torch")
    return {
        "facts": facts,
        "packages": packages,
        "advice": advice,
        "usable": sys.version_info >= (3, 11),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
