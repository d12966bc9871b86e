"""Kernels compiled side by side, before a bench would compile them one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..autotune.jobs import Job, compile_jobs
from ..autotune.offline import Resources
from ..kernels.gpu import GPU, detect
from ..solve.formulation import choose
from ..solve.launches import Bucket, in_portions, steps_launches

SECONDS = 60.0
"""After which no kernel is compiled ahead: a bench compiles what is missing."""


def warm(buckets: Sequence[Bucket], formulation: str = "auto") -> None:
    """Fill Triton's cache on disk with what steps of these layers will launch.

    Launches take their configurations from the table that is in use. Without a GPU
    nothing is compiled.

    Args:
        buckets: the layers.
        formulation: that the steps are asked for.
    """
    gpu = detect(torch.device("cuda")) if torch.cuda.is_available() else None
    if gpu is None:
        return
    begun = time.monotonic()
    try:
        found = jobs(buckets, formulation, gpu)
        made = compile_jobs(found, timeout=SECONDS)
    except Exception as error:  # it only saves time
        print(f"nothing was compiled beforehand: {error!r}", flush=True)
        return
    good = sum(isinstance(usage, Resources) for usage in made)
    print(
        f"{good} of {len(found)} kinds of launches compiled in "
        f"{time.monotonic() - begun:.0f} s",
        flush=True,
    )


def jobs(buckets: Sequence[Bucket], formulation: str, gpu: GPU) -> list[Job]:
    """What there is to compile: launches of layers that are solved at once, together.

    Args:
        buckets: the layers.
        formulation: that the steps are asked for.
        gpu: to compile for.
    """
    found: list[Job] = []
    for portion in in_portions(buckets, lambda bucket: bucket.weights):
        alike: dict[str, list[Bucket]] = {}
        for bucket in portion:
            how = choose(bucket, gpu) if formulation == "auto" else formulation
            alike.setdefault(how, []).append(bucket)
        for how, some in alike.items():
            made = steps_launches(some, how)
            configs = {part.config.key: part.config for part in made.parts}
            found += [
                Job(tuple(some), how, key, config, gpu.capability)
                for key, config in configs.items()
                if key
            ]
    return found
