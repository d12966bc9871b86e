"""The house: what is imported under which name, and the direction of the arrows."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import frog_triton

ROOT = Path(__file__).parents[1]


def test_kernels_is_no_top_level_name(tmp_path):
    code = "import frog_triton.kernels, kernels"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No module named 'kernels'" in result.stderr


def test_only_public_names_show():
    public = ["FROG", "PAPER", "__version__", "cost", "linear", "precondition"]
    assert sorted(frog_triton.__all__) == public
    assert dir(frog_triton) == sorted([*public, "layers"])  # for layers.register
    everything = {}
    exec("from frog_triton import *", everything)
    assert everything.keys() - {"__builtins__"} == {*public}
    assert all(thing.__doc__ for thing in everything.values() if callable(thing))


def modules_after(code):
    """What is imported in a new process once it has run some code."""
    code += "\nimport sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_optimizer_imports_no_compiler():
    names = "FROG, PAPER, cost, layers, linear, precondition"
    ours = modules_after(f"import frog_triton; from frog_triton import {names}")
    torchs = modules_after("import torch")
    assert "frog_triton.optimizer" in ours and "torch" in torchs
    for heavy in ("torch._dynamo", "torch._inductor", "triton", "sympy"):
        assert heavy not in ours - torchs


def test_importing_the_package_and_asking_the_command_line_imports_no_torch():
    assert "torch" not in modules_after("import frog_triton")
    asked = ("--version", "--help", "bench --help", "autotune --help", "describe -h")
    for words in asked:
        call = f"from frog_triton.cli import main\ntry: main({words.split()})"
        found = modules_after(f"{call}\nexcept SystemExit as end: assert not end.code")
        assert "frog_triton.cli" in found and "torch" not in found, words


def test_public_names_are_found_however_they_are_asked_for():
    """No module of the package may hide one that is called like it."""
    for name in set(frog_triton.__all__) - {"__version__"}:
        assert not (ROOT / "frog_triton" / f"{name}.py").exists()
    homes = frog_triton._HOMES
    assert homes.keys() == set(frog_triton.__all__) - {"__version__"}
    assert frog_triton.layers.register and frog_triton.cost is frog_triton.cost
    assert pickle.loads(pickle.dumps(frog_triton.FROG)) is frog_triton.FROG
    with pytest.raises(AttributeError, match="no attribute 'frog'"):
        frog_triton.frog  # noqa: B018


FLOORS = (
    {"__version__", "linalg", "warning", "wrapping"},
    {"kernels", "scaling"},
    {"eager", "guards", "ops", "routine"},
    {"gradients", "layers"},
    {"model", "solve", "state"},
    {"recent"},
    {"anomalies", "autotune", "capture", "fallback", "step"},
    {"diagnostics", "options", "unhooked"},
    {"groups", "preconditioner"},
    {"loading", "update"},
    {"circumstances", "distributed"},
    {"routines"},
    {"counting", "partition"},
    {"assignment", "costs"},
    {"gathering", "inspection"},
    {"cli", "optimizer"},
)
"""What there is, from the ground up: a module knows only those on floors below."""

FREE = {"__init__", "__main__", "benchmarks", "presets"}
"""The door, and what anyone may look at."""


def imports(path):
    """Modules of the package that a file imports at run time: level and name."""
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        # Names for type checkers alone are of who is called back.
        if isinstance(node, ast.ImportFrom) and node.level and node not in for_types:
            names = [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                yield node.level, name.split(".")[0]


def files():
    """Files of the package, and their places in it."""
    for path in (ROOT / "frog_triton").rglob("*.py"):
        yield path, path.relative_to(ROOT / "frog_triton").parts
    for path in (ROOT / "kernels").rglob("*.py"):
        yield path, ("kernels", *path.relative_to(ROOT / "kernels").parts)


def test_arrows_point_down():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert sum(map(len, FLOORS)) == len(floor)
    met = {"__version__"}
    for path, parts in files():
        own = parts[0].removesuffix(".py")
        met.add(own)
        if own in FREE:
            continue
        assert own in floor, f"{path} has no floor"
        for level, target in imports(path):
            if level == len(parts) and target not in FREE:
                below = floor[target] < floor[own] or target == own
                assert below, f"{path} imports {target}"
    assert met - FREE == set(floor)


def test_files_of_a_room_do_not_import_each_other_in_a_circle():
    """Imports within functions, which hide one, count as well."""
    siblings = {}
    for path, parts in files():
        if len(parts) > 1 and parts[0] != "benchmarks":
            mine = siblings.setdefault(parts, set())
            for level, target in imports(path):
                if level == 1:
                    mine.add((*parts[:-1], f"{target}.py"))
    done = set()

    def visit(node, above):
        assert node not in above, f"a circle: {' -> '.join(map(str, above))}"
        if node in done or node not in siblings:
            return
        for target in siblings[node]:
            visit(target, (*above, node))
        done.add(node)

    for node in siblings:
        visit(node, ())


def test_files_are_short_or_say_why_they_are_not():
    folders = ("frog_triton", "kernels", "benchmarks", "tests", "examples")
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            reason = "More than 400 lines" in (ast.get_docstring(ast.parse(text)) or "")
            assert len(text.splitlines()) <= 400 or reason, path


def test_jitted_functions_know_only_triton():
    """A kernel stands beside its launcher, and takes nothing from it but constants."""
    for path in (ROOT / "kernels").rglob("*.py"):
        tree = ast.parse(path.read_text())
        jitted = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
        ]
        others = {
            alias.asname or alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and (isinstance(node, ast.Import) or node.level != 1)
            for alias in node.names
        } - {"triton", "tl"}
        for function in jitted:
            used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            assert not used & others, f"{path}: {function.name}"
