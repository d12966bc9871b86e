"""Commands that get so much time and no more, and leave what they printed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 8.0
"""Seconds between asking a command to end and ending it."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: its own; negative for the signal that ended it.
        stopped: whether its time ran out.
        seconds: that it took.
    """

    exit_code: int
    stopped: bool
    seconds: float


def run_within(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str],
    grace: float = GRACE,
) -> Ended:
    """Run a command with all it starts; interrupt it when its time is over, then kill.

    Args:
        command: program and arguments.
        log: gets what it prints, standard error as well, while it prints.
        seconds: that it may take.
        environment: in addition to this process's.
        grace: seconds from the interruption to the kill.
    """
    begun = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        stopped = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            _stop(process, grace)
        except BaseException:  # this process is asked to end, too
            _stop(process, grace / 2)
            raise
        if stopped:
            file.write(f"\nstopped after {seconds:.0f} s\n".encode())
    return Ended(process.returncode, stopped, time.monotonic() - begun)


def _stop(process: subprocess.Popen[bytes], grace: float) -> None:
    """Interrupt the process group, and kill what is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
