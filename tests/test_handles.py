"""Launches that are bound once."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from frog_triton.kernels import handles
from frog_triton.kernels.config import Config
from frog_triton.kernels.handles import Handle
from frog_triton.kernels.kernel import Kernel
from frog_triton.kernels.launch import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit(do_not_specialize=["key"])
def _add_kernel(x_ptr, y_ptr, key: tl.int64, N, place, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * place[0], mask=at < N, other=0.0)
    tl.store(y_ptr + at, x + key.to(tl.float32), mask=at < N)


@triton.jit
def _special_kernel(y_ptr, key, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.full((BLOCK,), key, tl.float32))


def kernel_of(fn):
    return Kernel(
        fn=fn, parts=lambda args, *_: [((-(-args["N"] // 8),), {})], count=lambda s: 0
    )


def adding(kernel, n=20):
    changing = ("x_ptr", "y_ptr", "key")
    return Handle.of(kernel, Config(), changing, N=n, place=(2, 1), BLOCK=8)


def test_it_adds_of_kernels():
    handle = adding(kernel_of(_add_kernel))
    x = torch.randn(41, device=DEVICE)
    for key in (0, 1, -5, 2**40, 3):  # the second goes by what the first has compiled
        for start in (0, 1, 0):  # where addresses are divisible, and where not
            y = torch.empty(20, device=DEVICE)
            handle(x[start:], y, key)
            assert torch.equal(y, x[start : start + 40 : 2] + key)
    half = torch.empty(20, dtype=torch.float16, device=DEVICE)
    handle(x, half, 3)
    assert torch.equal(half, (x[:40:2] + 3).half())


@pytest.mark.gpu
def test_it_follows_its_tensors_to_their_stream():
    handle = adding(kernel_of(_add_kernel), 4)
    x, y = torch.zeros(8, device=DEVICE), torch.zeros(4, device=DEVICE)
    handle(x, y, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        handle(x, y, 2)
    assert y.tolist() == [1] * 4
    graph.replay()
    assert y.tolist() == [2] * 4


@pytest.mark.gpu
def test_a_number_that_changes_must_not_be_specialized_on():
    kernel = Kernel(fn=_special_kernel, parts=lambda *_: [((1,), {})], count=len)
    handle = Handle.of(kernel, Config(), ("y_ptr", "key"), BLOCK=4)
    with pytest.raises(ValueError, match="annotate it as"):
        handle(torch.zeros(4, device=DEVICE), 3)


def test_recordings_see_it():
    handle = adding(kernel_of(_add_kernel))
    x, y = torch.zeros(41, device=DEVICE), torch.zeros(20, device=DEVICE)
    with recording(run=False) as launches:
        handle(x, y, 1)
        handle(x, y, 2)
    assert [launch.args["key"] for launch in launches] == [1, 2]
    assert launches[0].grid == (3,) and launches[0].args["x_ptr"] is x
    assert not y.any()


# -- without a GPU: what Triton would be given -----------------------------------------


class Compiled:
    """Stands for a kernel that Triton has compiled."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.log = log

    def run(self, *args):
        self.log.append(args)


class Function:
    """Stands for a jitted function."""

    __name__ = "_fake_kernel"
    arg_names = ("x_ptr", "key", "N", "BLOCK")

    def __init__(self):
        self.usual, self.quick = [], []
        self.pre_run_hooks = []
        self.params = [
            SimpleNamespace(name=name, do_not_specialize=True, annotation_type="i64")
            for name in self.arg_names
        ]

    def __getitem__(self, grid):
        def run(**kwargs):
            self.usual.append((grid, kwargs))
            return Compiled(self.quick)

        return run


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(handles, "interpreted", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    streams = {"_cuda_getCurrentRawStream": lambda device: 77}
    for name, found in streams.items():
        monkeypatch.setattr(torch._C, name, found, raising=False)
    fn = Function()
    kernel = Kernel(fn=fn, parts=lambda *_: [((3, 2), {})], count=len)
    return fn, Handle.of(kernel, Config(), ("x_ptr", "key"), N=5, BLOCK=8)


def test_what_stays_is_bound_and_what_changes_is_given(fake):
    fn, handle = fake
    x, other = torch.zeros(8), torch.zeros(8)
    handle(x, 3)
    assert len(fn.usual) == 1 and not fn.quick
    handle(other, 4)
    assert len(fn.usual) == 1
    (args,) = fn.quick
    assert args[:6] == (3, 2, 1, 77, "function", "metadata")
    assert args[6:] == (None, None, None, other.data_ptr(), 4, 5, 8)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(8)[1:],
        torch.zeros(8, dtype=torch.float16),
        torch.zeros(8, dtype=torch.int32),
    ],
)
def test_tensors_of_another_kind_have_another_kernel(fake, other):
    fn, handle = fake
    for _ in range(2):
        handle(torch.zeros(8), 3)
        handle(other, 3)
    assert len(fn.usual) == len(fn.quick) == 2


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_triton_see_it(fake, name):
    fn, handle = fake
    x = torch.zeros(8)
    chain = getattr(knobs.runtime, name)

    def hook(*_):
        pass

    chain.add(hook)
    try:
        handle(x, 3)
        handle(x, 3)
    finally:
        chain.remove(hook)
    assert len(fn.usual) == 2
    handle(x, 3)
    handle(x, 3)
    assert len(fn.usual) == 3 and len(fn.quick) == 1


def test_hooks_of_a_function_see_it(fake):
    fn, handle = fake
    fn.pre_run_hooks.append(print)
    for _ in range(3):
        handle(torch.zeros(8), 3)
    assert len(fn.usual) == 3


def test_nothing_that_changes_can_be_bound(fake):
    fn, _ = fake
    kernel = Kernel(fn=fn, parts=lambda *_: [((1,), {})], count=len)
    with pytest.raises(ValueError, match="key and x_ptr"):
        Handle(kernel, (1,), {"N": 5, "BLOCK": 8}, Config(), ())
    with pytest.raises(ValueError, match="x_ptr is a tensor"):
        fixed = {"N": 5, "BLOCK": 8, "x_ptr": torch.zeros(1)}
        Handle(kernel, (1,), fixed, Config(), ("key",))
