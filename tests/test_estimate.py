"""What is read from machine code, and the times that are estimated from it."""

import json
import os
import subprocess
import sys

import pytest

from frog_triton.autotune import machine
from frog_triton.autotune.machine import Code, Loop, slots

# A loop within a loop, of 30 and 12 instructions, between 5 and 3.
INSTRUCTIONS = (
    *["MOV R1, R2"] * 5,
    *["FFMA R1, R2, R3, R4"] * 9,
    *["HGMMA.64x32x16.F32 R1, gdesc[UR4]"] * 4,
    *["@P0 LDG.E.128 R4, [R2.64]"] * 8,
    *["FADD R1, R2, R3"] * 8,
    "@P1 BRA `(.L_x_1)",
    *["STL [R1], R2"] * 2,
    "BAR.SYNC 0x0",
    *["IADD3 R1, R2, R3, RZ"] * 3,
)
NEST = ((5, 34), (18, 29))


def test_instructions_are_counted_as_often_as_loops_run():
    code = Code(INSTRUCTIONS, NEST)
    once = code.executed([])
    assert once == {
        "integers and control": 9,
        "float": 17,
        "tensor core": 4,
        "memory": 8,
        "spills": 2,
        "barriers": 1,
    }
    found = code.executed([Loop(10, [Loop(3)])])
    assert found["tensor core"] == 40 and found["memory"] == 10 * 3 * 8
    assert found["float"] == 10 * (9 + 4 + 3 * 4)
    assert found["spills"] == 2 and found["barriers"] == 1
    assert slots(found) == sum(found.values()) + 3 * (found["memory"] + 2)


def test_iterations_that_the_assembler_joined_are_counted_once():
    code = Code(INSTRUCTIONS, NEST)
    # Eight loads where one iteration has two: four of ten iterations are one.
    found = code.executed([Loop(1, [Loop(10, loads=2)])])
    assert found["memory"] == 3 * 8
    assert code.executed([Loop(0)])["tensor core"] == 0


def test_loops_are_jumps_back_over_work(monkeypatch):
    lines = [".L_x_0:", *(f"        /*{i:04x}*/  MOV R1, R2 ;" for i in range(9))]
    lines += ["        /*0090*/  @!P0 BRA `(.L_x_0) ;", ".L_x_1:"]
    lines += ["        /*00a0*/  BRA `(.L_x_1) ;"]
    monkeypatch.setattr(machine, "disassembly", lambda kernel: "\n".join(lines))
    code = machine.code_of(None)
    assert len(code.instructions) == 11 and code.loops == ((0, 9),)


@pytest.mark.parametrize("samples", [32, 300])
def test_a_step_is_estimated_from_its_machine_code(tmp_path, samples):
    """Every kernel of a small step; times are no less than their floors."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    path = tmp_path / "estimate.json"
    words = ["--model", "tiny", "--samples", str(samples), "--json", str(path)]
    words += ["--plot", str(tmp_path / "roof.png")]
    command = [sys.executable, "-m", "frog_triton", "bench", "estimate", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing measured" in done.stdout and "times AdamW's bytes" in done.stdout
    (result,) = json.loads(path.read_text())["results"]
    names = {kernel["kernel"] for kernel in result["kernels"]}
    cg = "_gram_cg_kernel" if samples <= 256 else "_gram_cg_tiled_kernel"
    assert names == {
        "_largest_kernel",
        "_gram_kernel",
        "_gram_terms_kernel",
        "_momentum_project_kernel",
        cg,
        "_update_kernel",
    }
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    without = ("_largest_kernel", "_gram_terms_kernel")  # products
    for kernel in result["kernels"]:
        assert kernel["time_us"] > kernel["floor_us"] > 0
        assert (kernel["operations"] > 0) == (kernel["kernel"] not in without)
        assert kernel["registers"] > 0 and kernel["executed"]["float"] > 0
    assert result["estimate_us"] > result["floor_us"]
