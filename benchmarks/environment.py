"""Where a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

from .. import __version__


def environment() -> dict[str, Any]:
    """Versions, machine, commit, and the GPU with its driver if there is one."""
    result: dict[str, Any] = {
        "frog_triton": __version__,
        "commit": _run("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
        result["cuda"] = torch.version.cuda
        result["driver"] = _run(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return result


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
