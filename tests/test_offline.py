"""What the default configurations compile to, for GPUs that are not here."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from contextlib import closing
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from frog_triton import kernels
from frog_triton.autotune.jobs import Job, compile_jobs
from frog_triton.autotune.offline import inexact
from frog_triton.autotune.shortlist import keys
from frog_triton.kernels.gpu import shared_limit
from frog_triton.kernels.gram import GramConfig
from frog_triton.solve.launches import Bucket, LayerShape

ROOT = Path(__file__).parents[1]
OLDEST_TRITON = ROOT / ".venv" / "triton-3.6"
SMALL_CHIPS = ("86", "89", "120")
"""With 99 KiB of shared memory a block."""
SET_ASIDE = 32
"""Bytes a thread: some registers, which the assembler stores outside the innermost
loops to fit another block on chips other than sm_90. Measured: 32."""
FILLED = {"_gram_cg_kernel": 1024, "_gram_cg_tiled_kernel": 256}
"""The same of kernels whose vectors fill the registers: on an H200 those that spill
were the fastest (benchmarks/results/nvidia-h200, "Kernels"). Measured: 904 and 208."""


FIRST_IS_R = ("_update_kernel", "_gram_cg_kernel")
"""Kernels whose products have a row of the result for a row of the weight."""


def environment(path=None):
    """Of a process whose kernels are not interpreted; `path` has another Triton."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if path is not None:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), before]))
    return environment


def run(*arguments):
    """Standard output of a process whose kernels are not interpreted."""
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT.parent,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


COMMANDS = """
import json, sys
from frog_triton.benchmarks.compile_defaults import Compiler, main

compiler = Compiler()
for line in sys.stdin:
    main(json.loads(line), compiler)
    print(flush=True)
"""


class Compilations:
    """A process that answers the commands of `compile_defaults`, one import for all."""

    def __init__(self, path=None):
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(path),
            cwd=ROOT.parent,
        )

    def __call__(self, *arguments):
        """Resource usage of default configurations."""
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        lines = [*iter(self._process.stdout.readline, "\n")]
        assert "" not in lines and self._process.poll() is None
        return [json.loads(line) for line in lines]

    def close(self):
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def compiled():
    compilations = Compilations()
    yield compilations
    compilations.close()


def check(results):
    assert results
    for r in results:
        what = f"{r['kernel']} on sm_{r['capability']}, {r['samples']} {r['dtype']}"
        most = 0 if r["capability"] == 90 else SET_ASIDE
        assert r["spilled"] <= FILLED.get(r["kernel"], most), what
        assert r["shared"] <= shared_limit(r["capability"]), what
        assert r["tensor_core"] > 0 or not r["multiplies"], what
        assert not r["inexact"], what
        # Warp-group instructions take 64 rows at a time, of the result's first side.
        side = "BLOCK_R" if r["kernel"] in FIRST_IS_R else "BLOCK_N"
        tiles = r["config"].get(side, 0) >= 64
        if r["capability"] == 90 and r["multiplies"] and tiles:
            assert r["wgmma"] > 0, what


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gram_kernels(compiled, dtype):
    check(compiled("--samples", "16", "128", "256", "--dtype", dtype))


def test_convolution_kernels(compiled):
    shapes = ("conv", "stem", "grouped-conv", "depthwise", "pointwise")
    check(compiled("--samples", "16", "--formulation", "primal", "--shape", *shapes))


def test_ragged_and_grouped_layers(compiled):
    arguments = ("--samples", "32", "--formulation", "gram", "primal")
    arguments += ("--shape", "ragged", "grouped", "--dtype", "float16")
    check(compiled(*arguments, "--capability", "90"))


def test_layers_of_two_sizes_in_one_launch(compiled):
    """A program that looks its arguments up spills no more than another does."""
    arguments = ("--shape", "together", "--formulation", "gram", "primal")
    check(compiled(*arguments, "--samples", "64", "256", "--capability", "90"))
    arguments += ("--dtype", "float32", "--samples", "256", "--capability")
    check(compiled(*arguments, "80", "100", "120"))


def test_primal_kernels(compiled):
    check(compiled("--samples", "64", "4096", "--formulation", "primal"))


def test_chips_with_little_shared_memory(compiled):
    """The default number of samples, in the largest type."""
    arguments = ("--samples", "256", "--formulation", "gram", "primal")
    check(compiled(*arguments, "--dtype", "float32", "--capability", *SMALL_CHIPS))
    arguments = ("--samples", "16", "--formulation", "primal", "--dtype", "bfloat16")
    check(compiled(*arguments, "--shape", "conv", "--capability", *SMALL_CHIPS))


STRIDED = """
import sys
import torch
from dataclasses import replace
from frog_triton.autotune.offline import compiled, inexact, resources
from frog_triton.solve.launches import Bucket, LayerShape, trial_step
from frog_triton.ops import triton_ops
from frog_triton.kernels.launch import recording
from frog_triton.linalg.rows import Rows, Window

def meta(size, dtype):
    return torch.empty(size, dtype=dtype, device="meta")

launches = []
with recording(run=False) as found:
    for formulation in ("gram", "primal"):
        trial = trial_step(Bucket(LayerShape("", 768, 768, 256)), formulation, meta)
        params = [Rows(rows.weight.t(), rows.bias) for rows in trial.params]
        replace(trial, params=params).step(triton_ops)
        # Channels_last: 256 channels of three taps.
        batch, last = trial.batch, lambda rows: Rows(
            rows.weight.view(768, 3, 256).mT, rows.bias
        )
        batch = replace(
            batch, ms=[*map(last, batch.ms)], grads=[*map(last, batch.grads)]
        )
        params = [last(rows) for rows in trial.params]
        replace(trial, batch=batch, params=params).step(triton_ops)
    window = Window((4, 4), (1, 1), (-1, -1), (-1, -1), "zeros", (2, 2))
    x, index = meta((8, 64, 16, 16), torch.float32), meta((256,), torch.int64)
    triton_ops.gather_patches(x, index, (32, 32), window)
for launch in found:
    if any(name in launch.name for name in ("update", "momentum", "gather")):
        for chip in map(int, sys.argv[1:]):
            kernel = compiled(launch, chip)
            spilled, approximations = resources(kernel).spilled, inexact(kernel)
            print(launch.name, chip, spilled, len(approximations))
"""


def test_rows_of_other_layouts_and_transposed_windows():
    chips = ("80", "90")
    lines = [line.split() for line in run("-c", STRIDED, *chips).splitlines()]
    kernels = ("_momentum_project_kernel", "_update_kernel", "_primal_update_kernel")
    kernels += ("_gather_kernel",)
    assert {(n, chip) for n, chip, *_ in lines} == {*product(kernels, chips)}
    for name, _, spilled, approximations in lines:
        assert int(approximations) == 0, name
        # Measured: 8 bytes in _update_kernel on sm_80, 86 and 89, 0 on sm_90 and 100.
        assert int(spilled) <= SET_ASIDE, name


def test_oldest_triton():
    if not OLDEST_TRITON.is_dir():
        pytest.skip("make test installs Triton 3.6 beside the pinned one for this")
    chips = ("80", "90", "100", "120")
    arguments = ("--formulation", "gram", "primal", "--dtype", "bfloat16")
    with closing(Compilations(OLDEST_TRITON)) as compiled:
        results = [
            *compiled("--samples", "64", *arguments, "--capability", "90"),
            *compiled("--samples", "256", *arguments, "--capability", *chips),
        ]
    assert {r["triton"] for r in results} == {"3.6.0"}
    assert {str(r["capability"]) for r in results} == set(chips)
    check(results)


def test_no_kernel_approximates(compiled):
    """Every branch of every kernel: square roots, quotients, subnormal numbers."""
    arguments = ("--every-branch", "--capability", "90", "--dtype", "bfloat16")
    linear = ("--shape", "linear", "--samples", "64", "256", "300")
    images = ("--shape", "conv", "depthwise", "--samples", "16")
    results = [
        *compiled(*arguments, *linear, "--formulation", "gram", "primal"),
        *compiled(*arguments, *images, "--formulation", "primal"),
    ]
    found = {(r["kernel"], name) for r in results for name in r["inexact"]}
    assert not found
    modules = pkgutil.iter_modules(kernels.__path__)
    named = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in modules]
    every = {name for module in named for name in dir(module) if name[0] == "_"}
    every = {name for name in every if name.endswith("_kernel")}
    assert {r["kernel"] for r in results} == every


def test_instructions_that_approximate_are_told_from_others():
    bad = ["sqrt.approx.f32", "sqrt.approx.ftz.f32", "rsqrt.approx.f32"]
    bad += ["rcp.approx.ftz.f32", "div.full.f32", "div.approx.f32", "ex2.approx.f32"]
    bad += ["lg2.approx.ftz.f32", "add.ftz.f32", "fma.rn.ftz.f32"]
    good = ["sqrt.rn.f32", "div.rn.f32", "fma.rn.f32", "add.f32", "// ftz approx"]
    lines = [f"\t{name} \t%r1, %r2;\n" for name in (*bad, *good)]
    found = [inexact(SimpleNamespace(asm={"ptx": line})) for line in lines]
    assert found == [*[[name] for name in bad], *[[] for _ in good]]


MULTIPLYING = """
import re, sys
from frog_triton.autotune.offline import compiled, disassembly, resources
from frog_triton.benchmarks.compile_defaults import launches

for chip, mnemonic in ((80, "HMMA"), (90, "HGMMA"), (100, r"UTC\\w*MMA")):
    for launch in launches(chip, 128, "bfloat16", "gram", "linear"):
        if launch.name in sys.argv[1:]:
            kernel = compiled(launch, chip)
            found = resources(kernel)
            counted = len(re.findall(rf"\\b{mnemonic}\\b", disassembly(kernel)))
            print(launch.name, chip, counted, found.tensor_core, found.wgmma)
"""


def test_tensor_core_instructions_are_those_of_the_machine_code():
    names = ("_gram_kernel", "_newton_gram_kernel", "_gram_terms_kernel")
    lines = [line.split() for line in run("-c", MULTIPLYING, *names).splitlines()]
    assert len(lines) == 3 * len(names)
    for name, chip, counted, tensor_core, wgmma in lines:
        assert tensor_core == counted, (name, chip)
        assert wgmma == (counted if chip == "90" else "0")
        assert (int(counted) > 0) == (name != "_gram_terms_kernel")


KEYS = """
import json, sys, torch
from triton import knobs
from frog_triton.autotune.offline import compiling_for
from frog_triton.solve.launches import LayerShape, Bucket, step_launches, trial_step
from frog_triton.layers.conv import ConvSpec
from frog_triton.ops import triton_ops
from frog_triton.kernels.launch import recording

seen = []

def hook(**what):  # in place of the compiler
    seen.append(what["key"])
    return True

knobs.runtime.jit_cache_hook = hook

def keys(launches):
    seen.clear()
    with compiling_for(90):
        for launch in launches:
            launch.compile()
    assert len(seen) == len(launches)
    return [(a.config.key, key) for a, key in zip(launches, seen)]

def conv(rows, channels, groups, kernel, stride, size, bias):
    spec = ConvSpec((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
    n = 3 * ((size + 2 * (kernel // 2) - kernel) // stride + 1) ** 2
    dim = kernel**2 * channels // groups
    return LayerShape("", rows, dim, n, groups, bias, (channels, size, size), spec)

F, B, H = torch.float32, torch.bfloat16, torch.float16
shapes = [
    LayerShape("", 97, 33, 20),
    LayerShape("", 768, 768, 64),
    LayerShape("", 100, 147, 256, bias=False),
    LayerShape("", 10, 768, 1000),
    LayerShape("", 66, 9, 300, groups=22),
    conv(128, 128, 1, 3, 1, 8, False),
    conv(64, 3, 1, 7, 2, 13, True),
    conv(6, 6, 6, 3, 1, 9, True),
    conv(10, 20, 1, 1, 1, 5, True),
]
counted, misaligned = 0, 0
for shape in shapes:
    for count, nesterov, dtypes in (
        (1, False, (F, F, F)), (3, False, (B, F, F)), (3, True, (H, B, B))
    ):
        bucket = Bucket(shape, count, 4, nesterov, dtypes)
        for formulation in ("gram", "primal"):
            expected = keys(step_launches(bucket, formulation))
            trial = trial_step(
                bucket, formulation, lambda size, dtype: torch.zeros(size, dtype=dtype)
            )
            with recording(run=False) as made:
                trial.step(triton_ops)
            assert keys(made.parts) == expected, (bucket, formulation)
            counted += len(expected)
            pointers = [
                part
                for a in made.parts
                for v in a.args.values()
                for part in (v if isinstance(v, tuple) else (v,))
                if isinstance(part, torch.Tensor)
            ]
            misaligned += any(p.data_ptr() % 16 for p in pointers)
print(json.dumps([counted, misaligned]))
"""


def test_a_launch_compiles_to_the_same_whether_its_tensors_have_memory():
    """Else the tuner would compile everything twice."""
    counted, misaligned = json.loads(run("-c", KEYS))
    assert counted > 400
    assert misaligned  # or alignment would not have been looked at


LAUNCH = """
import json, sys, torch
from triton import knobs
from frog_triton.kernels.gram import GramConfig
from frog_triton.autotune.offline import compiling_for
from frog_triton.kernels.table import Table, using
from frog_triton.solve.launches import Bucket, trial_step
from frog_triton.ops import triton_ops
from frog_triton.kernels.launch import recording
from triton.runtime import driver

bucket, key, values = json.loads(sys.argv[1])
trial = trial_step(
    Bucket.from_json(bucket), "gram", lambda size, dtype: torch.zeros(size, dtype=dtype)
)
with using(Table({key: GramConfig(**values)})), recording(run=False) as made:
    trial.step(triton_ops)
hits = []
knobs.compilation.listener = lambda **what: hits.append(what["cache_hit"])
before = driver._active
for capability in (86, 120):
    with compiling_for(capability):
        for launch in made:
            if launch.config.key == key:
                kernel = launch.compile()
                assert kernel.metadata.target.arch == capability
assert driver._active is before
print(json.dumps(hits))
"""


def test_what_the_tuner_compiled_serves_the_launch(tmp_path, monkeypatch):
    """By way of Triton's cache on disk, in another process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bucket = Bucket(LayerShape("", 24, 96, 32), 3)
    key = next(a.key for a in keys([bucket]) if a.key.startswith("gram n"))
    config = GramConfig(BLOCK_N=32, BLOCK_D=16)
    jobs = [Job((bucket,), "gram", key, config, capability) for capability in (86, 120)]
    found = compile_jobs(jobs, workers=1)
    assert all(usage.registers > 0 for usage in found)
    asked = json.dumps([bucket.to_json(), key, config.values()])
    hits = json.loads(run("-c", LAUNCH, asked))
    assert hits == [True, True]
