"""A step needs torch, triton and numpy, and nothing else that pip installs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import builtins, importlib.metadata as metadata, re, sys, warnings

NEEDED = ("torch", "triton", "numpy")

def closure(names):
    found, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        left += [re.match(r"[\\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    return found

allowed, installed = closure(NEEDED), metadata.packages_distributions()
missing = {
    module
    for module, dists in installed.items()
    if not any(re.sub(r"[-_.]+", "-", d).lower() in allowed for d in dists)
    and module not in ("frog_triton", *NEEDED)
    and not module.startswith("_")
}
assert {"platformdirs", "rich", "pytest"} <= missing, missing

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

for module in [m for m in sys.modules if m.partition(".")[0] in missing]:
    del sys.modules[module]
sys.meta_path[:] = map(Without, sys.meta_path)
import_ = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    # What torch brings for itself, such as filelock, is not ours to count on.
    top = name.partition(".")[0]
    ours = (globals or {}).get("__name__", "").startswith("frog_triton")
    known = top in sys.stdlib_module_names or top in ("frog_triton", *NEEDED)
    if ours and level == 0 and not known:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
import torch
torch.set_num_threads(1)
"""

STEP = """
import frog_triton
net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(),
                          torch.nn.Linear(4 * 9, 5), torch.nn.Linear(5, 2))
for backend in ("torch", "triton"):
    opt = frog_triton.FROG(net, backend=backend, sample_size=6, autotune="cached")
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(4, 2, 5, 5)).square().sum().backward()
    opt.step()
    assert all(bool((p != b).any()) for p, b in zip(net.parameters(), before))
    assert opt.state_dict() and opt.describe()
    opt.close()
"""

ON_A_GPU = """
from types import SimpleNamespace
from frog_triton.autotune import cache, tuner, tuning
from frog_triton.kernels.gram import GramConfig
from frog_triton.kernels.table import Table

found = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
torch.cuda.get_device_properties = lambda device: found
folder = cache.default_folder()
assert folder.is_absolute() and folder.name == "frog_triton", folder
table = Table({"gram n64": GramConfig()})

class Tuner:
    def __init__(self, gpu, device, timer, known, top, budget, progress, keep):
        self.progress = progress
    def tune(self, buckets):
        self.progress("half", 0.5)
        return table

tuner.CudaTimer, tuner.Tuner = lambda device: None, Tuner
def make(mode):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = tuning.Tuning(mode)._make(torch.device("cuda", 0), lambda: [])
    return made, [str(w.message) for w in caught]

assert make("cached") == (Table(), [])
made, said = make("now")
assert made == table
assert len(said) == 1 and "filelock is missing" in said[0], said
"""


def bare(script, folder=None):
    """Run a script where other packages than those a step needs are missing."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("XDG_CACHE_HOME", None)
    if folder is not None:
        environment["HOME"] = str(folder)
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_step(tmp_path):
    bare(STEP, tmp_path)


def test_tables_of_tuned_configurations(tmp_path):
    bare(ON_A_GPU, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_the_folder_of_tables(monkeypatch, tmp_path):
    import platformdirs

    from frog_triton.autotune.cache import default_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with_package = default_folder()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert default_folder() == tmp_path / "frog_triton"
    if sys.platform == "linux":
        assert with_package == default_folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "frog_triton"
    # No home: neither the environment nor the system knows one.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for package in (None, platformdirs):
        monkeypatch.setitem(sys.modules, "platformdirs", package)
        assert default_folder().is_absolute()
    assert Path.cwd() not in default_folder().parents


GUARDED = """
for line, name in (("import rich", "__main__"), ("import filelock", "frog_triton.x")):
    try:
        exec(line, {"__name__": name})
    except ModuleNotFoundError as error:
        assert error.name == line.split()[1]
    else:
        raise AssertionError(line)
raise LookupError("as any error")
"""


def test_the_guard_notices_what_is_missing():
    with pytest.raises(AssertionError, match="LookupError: as any error"):
        bare(GUARDED)
