"""The house: what is installed under which name, and the direction of the arrows."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import frog_triton

ROOT = Path(__file__).parents[1]


def test_wheel_has_one_top_level_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"frog_triton"}
    assert "frog_triton/py.typed" in names
    for folder, prefix in (
        ("frog_triton", "frog_triton"),
        ("kernels", "frog_triton/kernels"),
        ("benchmarks", "frog_triton/benchmarks"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder)}" in names, path


def test_kernels_is_no_top_level_name(tmp_path):
    code = "import frog_triton.kernels, kernels"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No module named 'kernels'" in result.stderr


def test_version():
    assert frog_triton.__version__ == "0.1.0"


def test_only_public_names_show():
    public = ["FROG", "PAPER", "__version__", "cost", "linear", "precondition"]
    assert dir(frog_triton) == sorted(frog_triton.__all__) == public
    everything = {}
    exec("from frog_triton import *", everything)
    assert everything.keys() - {"__builtins__"} == {*public}
    assert all(thing.__doc__ for thing in everything.values() if callable(thing))


RANKS = {
    "cli": 14,
    "optimizer": 13,
    "distributed": 12,
    "loading": 10,
    "unhooked": 10,
    "cost": 9,
    "capture": 8,
    "attention": 7,
    "replays": 7,
    "step": 7,
    "evaluation": 6,
    "preconditioner": 6,
    "products": 6,
    "seeking": 6,
    "formulation": 5,
    "functional": 5,
    "hooks": 5,
    "launches": 4,
    "taps": 4,
    "pool": 3,
    "routing": 3,
    "solvers": 3,
    "layers": 2,
    "table": 2,
    "coverage": 1,
    "ops": 1,
    "outputs": 1,
    "kernels": 0,
}


def test_arrows_point_down():
    for path in (ROOT / "frog_triton").rglob("*.py"):
        relative = path.relative_to(ROOT / "frog_triton")
        own = relative.parts[0].removesuffix(".py")
        if own not in RANKS:
            continue
        tree = ast.parse(path.read_text())
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            if node in for_types:  # names alone, of who is called back
                continue
            if node.level < len(relative.parts):
                continue  # a sibling
            names = [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                target = name.split(".")[0]
                assert RANKS.get(target, 0) < RANKS[own], f"{path} imports {name}"


def test_kernels_know_no_torch():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert all(n.split(".")[0] in ("triton", "__future__") for n in names), path
