"""The smoke run covers every kernel, and says so when one is wrong."""

import ast
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton.benchmarks import sanitize, smoke, smoke_cases
from frog_triton.kernels import launch

KERNELS = Path(smoke.__file__).parents[1] / "kernels"


def jitted_kernels():
    """Functions under ``@triton.jit`` that no other calls: those that are launched.

    But for what stands for several of one kernel, which it is given.
    """
    jitted, called = set(), set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                jitted.add(node.name)
    return jitted - called - {"_bundle"}


def test_every_kernel_is_in_the_list_and_launched_by_a_case():
    expected = jitted_kernels()
    assert len(expected) > 10
    assert set(smoke.all_kernels()) == expected
    launched = {name for case in smoke.CASES.values() for name in smoke.launched(case)}
    assert launched == expected


class Leftovers(TorchDispatchMode):
    """New memory is full of NaN, as a test before may have left it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if (
            func.__name__.startswith(("empty", "new_empty"))
            and made.is_floating_point()
        ):
            made.fill_(math.nan)
        return made


def test_launches_do_not_depend_on_what_lay_in_memory():
    """A step would be skipped: the kernel that looks at its gradients is not run."""
    with Leftovers():
        assert "_gather_kernel" in smoke.launched(smoke.CASES["gram-images"])


def test_one_kernel_by_name(capsys):
    assert smoke.main(["--kernel", "_draw_kernel", "--case", "positions", "gram"]) == 0
    out = capsys.readouterr().out
    assert "_draw_kernel" in out and "1 of 1 kernels are right" in out
    assert "_gram_kernel" not in out  # neither is the case without it listed
    with pytest.raises(SystemExit):
        smoke.main(["--kernel", "_no_kernel"])
    assert "there are: " in capsys.readouterr().err


def test_a_wrong_result_is_no_right_kernel(monkeypatch):
    monkeypatch.setattr(smoke_cases, "LIMITS", {torch.float32: 0.0})
    *_, outcome = smoke.judge("gram")
    assert outcome.verdict.startswith("off by")
    found = smoke.verdicts([outcome])
    assert all("FAILED in gram" in verdict for _, verdict in found.values())


def test_a_kernel_that_raises_is_named_and_the_others_are_not_judged(monkeypatch):
    run = launch.Launch.run

    def fails(self):
        if self.name == "_gram_kernel":
            raise RuntimeError("no such instruction")
        run(self)

    monkeypatch.setattr(launch.Launch, "run", fails)
    *_, outcome = smoke.judge("gram")
    assert outcome.failed == "_gram_kernel" and outcome.error is None
    assert "no such instruction" in outcome.verdict
    found = smoke.verdicts([outcome, smoke.Outcome("other", ["_update_kernel"], 1e-7)])
    assert found["_gram_kernel"][1].endswith("RuntimeError: no such instruction")
    assert "not judged: _gram_kernel failed" in found["_update_kernel"][1]
    assert found["_update_kernel"][0] == 1e-7


def test_a_process_that_dies_leaves_the_other_cases(tmp_path, monkeypatch):
    """The first start dies at once; its case is named, the next one runs."""
    monkeypatch.setattr(smoke.os, "cpu_count", lambda: 1)
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(
        f'#!/bin/sh\nmkdir {tmp_path}/once 2>/dev/null && {{ echo "no driver" >&2; '
        'exit 7; }\nexec "$@"\n'
    )
    wrapper.chmod(0o755)
    names = ["gram", "positions"]
    outcomes = {o.case: o for o in smoke.run_cases(names, [str(wrapper)])}
    assert outcomes["gram"].verdict == "exit code 7: no driver"
    assert outcomes["positions"].verdict == "ok"


def test_a_case_that_dies_before_it_begins_is_not_taken_for_the_one_before(tmp_path):
    """A process whose second case brings it down; the third runs in another."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *"gram positions"*)\n'
        """echo '{"case": "gram", "kernels": ["a"]}'\n"""
        """echo '{"case": "gram", "kernels": ["a"], "error": 1e-7}'\n"""
        'echo "no such table" >&2; exit 3;; esac\nexec "$@"\n'
    )
    wrapper.chmod(0o755)
    names = ["gram", "positions", "primal"]
    first, second = smoke._run_process(names, [str(wrapper)], None, None)
    assert (first.case, first.verdict) == ("gram", "ok")
    assert (second.case, second.verdict) == ("positions", "exit code 3: no such table")


def test_the_sanitizer_is_skipped_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert sanitize.main([]) == 0
    assert capsys.readouterr().out.startswith("skipped: ")


def test_the_sanitizer_wraps_every_case_with_each_tool(monkeypatch, tmp_path, capsys):
    """A stand-in that finds an error in what it runs under racecheck."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *racecheck*)\n'
        'echo "========= Error: Race reported"; exit 99;; esac\n'
        'while [ "$1" != -- ]; do shift; done; shift; exec "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sanitize, "find", lambda: str(fake))
    monkeypatch.setattr(sanitize, "CASES", {"positions": smoke.CASES["positions"]})
    assert sanitize.main([]) == 1
    out = capsys.readouterr().out
    assert "memcheck   positions" in out and "Race reported" in out
    calls = (tmp_path / "calls").read_text()
    assert "--tool memcheck" in calls and "--tool racecheck" in calls
