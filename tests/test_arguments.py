"""What the command line refuses, before anything is run, and how it says so."""

import argparse
import importlib
import os
import subprocess
import sys

import pytest

from frog_triton import cli
from frog_triton.benchmarks import gpu_report
from frog_triton.cli import arguments
from frog_triton.cli.bench import COMMANDS as BENCHES

PARSERS = {
    ("autotune",): ["resnet18"],
    ("describe",): ["resnet18"],
    ("cache",): ["show"],
    ("doctor",): [],
    ("demo",): [],
    ("bench", "kernels"): [],
    ("bench", "step"): [],
    ("bench", "estimate"): [],
    ("bench", "host"): [],
    ("bench", "train"): ["chars-gpt"],
    ("bench", "coverage"): [],
    ("bench", "stability"): [],
}
"""Every command, with what it cannot be called without."""

SCRIPTS = {
    "compile_defaults": [],
    "gpu_report": ["--rehearse"],
    "profile_step": [],
    "reference": ["frog.py"],
    "smoke": [],
    "tune": [],
}
"""Benchmarks that are no commands, with what they cannot be called without."""


def parser_of(words, monkeypatch):
    """The parser of a command, which is not run."""
    found = []
    monkeypatch.setattr(
        arguments.Parser, "parse_args", lambda self, given: found.append(self) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        cli.main([*words, "--help"])
    monkeypatch.undo()
    (parser,) = found
    for word in words:
        (commands,) = (
            a for a in parser._actions if isinstance(a, argparse._SubParsersAction)
        )
        parser = commands.choices[word]
    return parser


def refused(capsys, call, words):
    """The line that says what is wrong; nothing else was printed."""
    with pytest.raises(SystemExit) as stopped:
        call(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_every_command_is_walked_over():
    named = {words[0] for words in PARSERS}
    assert named == set(cli.COMMANDS)
    assert {words[1] for words in PARSERS if words[0] == "bench"} == set(BENCHES)


NUMBERS = ("x", "-3", "0", "nan", "1e999", "")
"""None of which is a size, a count, a rate or a time."""


@pytest.mark.parametrize("words", PARSERS, ids=" ".join)
def test_numbers_that_make_no_sense_are_refused_in_a_line(words, capsys, monkeypatch):
    parser = parser_of(words, monkeypatch)
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.dest} takes any number"
        if action.type in (arguments.positive, arguments.above_zero):
            option = action.option_strings[-1]
            for text in NUMBERS:
                given = [*words, *PARSERS[words], f"{option}={text}"]
                line = refused(capsys, cli.main, given)
                assert f"argument {option}" in line and "--help" in line, text


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_of_scripts(name, capsys, monkeypatch):
    script = importlib.import_module(f"frog_triton.benchmarks.{name}")
    made = []
    init = arguments.Parser.__init__

    def remember(self, **options):
        made.append(self)
        init(self, **options)

    monkeypatch.setattr(arguments.Parser, "__init__", remember)
    refused(capsys, script.main, ["--no-such-option"])
    (parser,) = made
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.dest} takes any number"
        if action.type in (arguments.positive, arguments.above_zero):
            option = action.option_strings[-1]
            for text in NUMBERS:
                given = [*SCRIPTS[name], f"{option}={text}"]
                line = refused(capsys, script.main, given)
                assert f"argument {option}" in line, text


@pytest.mark.parametrize("words", PARSERS, ids=" ".join)
def test_files_are_checked_before_anything_is_run(words, capsys, monkeypatch, tmp_path):
    parser = parser_of(words, monkeypatch)
    (tmp_path / "file").write_text("")
    checked = {
        arguments.output_file: ["none/a.json", "file/a.json", "."],
        arguments.picture: ["none/a.png", "file/a.png", ".", "a.exe"],
        arguments.output_folder: ["file", "file/deep"],
    }
    for action in parser._actions:
        option = (action.option_strings or [""])[-1]
        if option in ("--json", "--plot", "--write", "--markdown"):
            assert action.type in (arguments.output_file, arguments.picture), option
        for path in checked.get(action.type, ()):
            named = tmp_path / path
            given = [*words, *PARSERS[words], *([option] if option else []), str(named)]
            line = refused(capsys, cli.main, given)
            if path.startswith("none"):
                assert f"there is no folder {named.parent}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    for kind in (arguments.output_file, arguments.output_folder):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
            kind(str(tmp_path / "new"))


def test_what_may_be_written_may_be_named(tmp_path):
    assert arguments.output_file(str(tmp_path / "a")) == tmp_path / "a"
    assert arguments.output_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    for ending in arguments.PICTURES:
        arguments.picture(str(tmp_path / f"a{ending}"))


def test_numbers():
    assert arguments.positive("3") == 3 and arguments.above_zero("1e-3") == 1e-3
    for text in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.above_zero(text)
    for text in ("2.5", str(2**31)):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.positive(text)


EXTRAS = ("PIL", "matplotlib", "sklearn", "pytorch_optimizer", "singd", "timm")
EXTRAS = (*EXTRAS, "transformers", "torchvision", "diffusers", "peft")
"""What a plain install does not have."""

WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
from frog_triton import cli
"""


def test_help_of_every_command_in_a_plain_install():
    """In one process, which cannot import what the extras bring."""
    code = f"""{WITHOUT}
from frog_triton.benchmarks import gpu_report
for words in {[[], ["bench"], *map(list, PARSERS)]!r}:
    print("::", *words)
    try:
        cli.main([*words, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split(":: ")
    assert len(shown) == len(PARSERS) + 2 and done.stderr == ""
    assert all("usage: frog-triton" in text for text in shown)


def test_what_a_command_needs_is_told_with_its_extra_before_it_runs(tmp_path):
    extra = "pip install 'frog-triton[demo]'"
    commands = {
        ("demo",): "demo needs ",
        ("bench", "train", "chars-gpt"): "bench train needs matplotlib",
        ("bench", "stability"): "bench stability needs sklearn",
        ("bench", "kernels", "--plot", "a.png"): "--plot: a picture needs matplotlib",
        ("bench", "step", "--plot", "a.png"): "--plot: a picture needs matplotlib",
        ("describe", "resnet18", "--plot", "a.png"): "a picture needs matplotlib",
    }
    code = f"""{WITHOUT}
for words in {[list(words) for words in commands]!r}:
    try:
        code = cli.main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2, words
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    lines = done.stderr.splitlines()
    for line, told in zip(lines, commands.values(), strict=True):
        assert line.startswith("error: ") and told in line and extra in line
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_report_are_left_out_where_they_cannot_be_drawn(monkeypatch):
    stages = importlib.import_module("frog_triton.benchmarks.stages")
    wanted = stages.Wanted()
    monkeypatch.setattr(stages, "missing_packages", lambda modules: ["matplotlib"])
    words = [stage.command for stage in stages.stages(gpu_report.ROOT, wanted)]
    assert not any("--plot" in command for command in words)
