"""One of two ranks dies or stops: the other ends with torch's own error, in time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("rank_faults.py")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("deed", "causes"),
    [("SIGKILL", ("by peer", "Broken pipe", "Timed out")), ("SIGSTOP", ("Timed out",))],
)
def test_the_other_rank_ends_with_torchs_error(tmp_path, kind, deed, causes):
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), tmp_path / "store", deed, kind],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # Raises TimeoutExpired if we hang where torch's 5 seconds should end it.
        out, err = processes[0].communicate(timeout=90)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        processes[1].communicate()
    assert out == "step\n"
    assert processes[0].returncode == 1
    last = err.strip().splitlines()[-1]
    assert "RuntimeError" in last or "DistBackendError" in last
    assert any(cause in last for cause in causes), last
    assert "in step" in err  # while the optimizer steps
