"""Rows that a kernel draws by itself, and what sampling a layer costs."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton import FROG
from frog_triton.capture.sampling import counter_key, draw, take
from frog_triton.kernels.draws import DRAW, drawing, drawn
from frog_triton.kernels.launch import recording
from frog_triton.kernels.work import work
from frog_triton.layers import LinearAdapter, adapter_for, register
from frog_triton.linalg.rows import Reading, Window
from frog_triton.ops import torch_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANGES = [
    *((1, 1), (5, 9), (7, 7), (10, 3), (17, 1), (33, 32), (64, 32)),
    *((999, 100), (1000, 256), (4096, 7), (2**31, 16), (2**40, 100), (2**40 + 1, 7)),
]
KEYS = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, *(counter_key(k) for k in range(8))]


@triton.jit(do_not_specialize=["key", "N", "TOTAL"])
def _positions_kernel(out_ptr, key: tl.int64, N, TOTAL):
    i = tl.program_id(0).to(tl.int64)
    bits = key.to(tl.int64).to(tl.uint64, bitcast=True)
    tl.store(out_ptr + i, drawn(i, bits, N, TOTAL))


def signed(key):
    return key - 2**64 if key >= 2**63 else key


@pytest.mark.parametrize(("total", "size"), RANGES)
def test_the_same_integers_as_the_host_draws_of_kernels(total, size):
    for key in KEYS:
        expected = draw(total, size, key)
        on_device = torch.tensor(signed(key), device=DEVICE)
        assert torch.equal(draw(total, size, on_device, DEVICE).cpu(), expected)
        out = torch.empty_like(expected, device=DEVICE)
        _positions_kernel[(len(out),)](out, signed(key), len(out), total)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("total", "size"), [(5, 9), (10, 3), (250, 64)])
def test_keys_from_the_host_and_from_the_device_of_kernels(total, size, dtype):
    x = torch.randn(total, 21, device=DEVICE).to(dtype)
    rows = drawing(x, Reading(-1), total, size)
    for step in (0, 1, 1000):
        prefix, key = counter_key(7, 9), counter_key(7, 9, step, 3)
        expected = x[draw(total, size, key).to(DEVICE)]
        assert torch.equal(rows.given(x, key), expected)
        for counter in (torch.tensor(step), torch.tensor(float(step))):
            actual, written = rows.counted(x, prefix, counter.to(DEVICE), 3)
            assert int(written) % 2**64 == key
            assert torch.equal(actual, expected)
            assert torch.equal(rows.written(x, written), expected)


FORMS = {
    "matrix": lambda: torch.randn(30, 7),
    "columns": lambda: torch.randn(7, 30).t(),
    "every second": lambda: torch.randn(60, 14)[::2, ::2],
    "sequences": lambda: torch.randn(5, 6, 7),
    "padded sequences": lambda: torch.randn(5, 9, 7)[:, :6],
    "time first": lambda: torch.randn(6, 5, 7).transpose(0, 1),
    "images": lambda: torch.randn(2, 3, 5, 7),
    "turned images": lambda: torch.randn(5, 3, 2, 7).permute(2, 1, 0, 3),
    "one for all": lambda: torch.randn(1, 7).expand(30, 7),
    "five": lambda: torch.randn(2, 3, 1, 5, 7),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_strides_of_kernels(form):
    x = FORMS[form]().to(DEVICE)
    total = x.shape[:-1].numel()
    rows = drawing(x, Reading(-1), total, 11)
    index = draw(total, 11, 5).to(DEVICE)
    expected = adapter_for(nn.Linear(7, 1)).take_output_positions(x, index)
    assert torch.equal(rows.given(x, 5), expected)


def test_more_strides_than_the_kernel_has_are_left_to_torch():
    x = torch.randn(2, 3, 4, 5, 7)[:, ::2, ::2, ::2]
    assert drawing(x, Reading(-1), x.shape[:-1].numel(), 11) is None
    assert drawing(x.double(), Reading(-1), 24, 11) is None
    assert drawing(x[:0], Reading(-1), 0, 11) is None


CONVOLUTIONS = {
    "signal": (nn.Conv1d(4, 6, 3, 2, 1, 2), (3, 4, 17)),
    "image": (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0)), (3, 4, 7, 9)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 7, 9)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (3, 4, 7, 9)),
    "pointwise": (nn.Conv2d(4, 6, 1, stride=2), (3, 4, 7, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (3, 4, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_windows_and_output_gradients_of_kernels(name, last):
    module, shape = CONVOLUTIONS[name]
    adapter = adapter_for(module)
    x = torch.randn(shape).to(DEVICE)
    y = torch.randn(module(x.cpu()).shape).to(DEVICE)
    if last and x.ndim == 4:
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    total = y.shape[0] * adapter.positions(y)
    index = draw(total, 20, 5).to(DEVICE)
    expected = adapter.take_input_positions(module, x, y.shape, index, torch_ops)
    reading = adapter.input_reading(module, x.shape, y.shape)
    assert torch.equal(drawing(x, reading, total, 20).given(x, 5), expected)
    expected = adapter.take_output_positions(y, index)
    rows = drawing(y, adapter.output_reading(), total, 20)
    assert torch.equal(rows.given(y, 5), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whole_examples_of_kernels(layout):
    x = torch.randn(9, 3, 4, 5, device=DEVICE).contiguous(memory_format=layout)
    actual = drawing(x, None, 9, 4).given(x, 5)
    assert torch.equal(actual, take(x, draw(9, 4, 5).to(DEVICE)))
    assert actual.is_contiguous(memory_format=layout)
    assert drawing(x[:, :, ::2], None, 9, 4) is None


# -- a layer's calls -------------------------------------------------------------------


class Net(nn.Module):
    """Linear layers on matrices and on sequences, convolutions, one with a mirror."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.mirror = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(4, 3, 2, 2, groups=1)
        self.tokens = nn.Linear(3, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.up(torch.tanh(self.mirror(torch.tanh(self.conv(x)))))
        return self.head(torch.tanh(self.tokens(x.flatten(2).mT)).mean(1))


def samples(passes=1, **options):
    """Of all layers of a net, at its third step."""
    torch.manual_seed(0)
    net = Net()
    opt = FROG(net, exclude_output_layer=False, autotune="off", **options)
    for step in range(3):
        opt.zero_grad()
        for _ in range(passes if step == 2 else 1):
            net(torch.randn(6, 2, 5, 4)).square().sum().backward()
        if step < 2:
            saved = [p.detach().clone() for p in net.parameters()]
            opt.step()
            with torch.no_grad():  # so that all see the same activations
                for p, before in zip(net.parameters(), saved, strict=True):
                    p.copy_(before)
    found = {
        n: opt.capture.calls(n) for n in ("conv", "mirror", "up", "tokens", "head")
    }
    assert all(found.values())
    return [t for calls in found.values() for c in calls for t in (c.x, c.y)]


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("sampling", ["positions", "examples"])
def test_both_backends_take_the_same_samples(sampling, capturable, passes):
    options = {"sampling": sampling, "sample_size": 4}
    theirs = samples(passes, backend="torch", **options)
    ours = samples(passes, backend="triton", capturable=capturable, **options)
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a, b)


class Count(TorchDispatchMode):
    """Counts what torch does."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += 1
        return func(*args, **(kwargs or {}))


LAYERS = {
    "matrix": (lambda: nn.Linear(8, 8), (600, 8)),
    "sequences": (lambda: nn.Linear(8, 8), (6, 100, 8)),
    "images": (lambda: nn.Conv2d(8, 8, 3, padding=1), (6, 8, 10, 10)),
}


def operations(layer, x, **options):
    """Of a forward and a backward of two layers, and launches, at the second step."""
    net = nn.Sequential(layer(), layer())
    opt = None
    if options:
        opt = FROG(net, exclude_output_layer=False, autotune="off", **options)
        for p in net.parameters():
            opt.state[p]["step"] = torch.tensor(1.0)
    for _ in range(2):
        with recording(run=False) as launches, Count() as count:
            net(x).backward(torch.ones_like(x))
        net.zero_grad()
        if opt is not None:
            opt.capture.next_step()
    return count.found, launches


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_costs_two_launches_and_four_operations(name, capturable):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    bare, _ = operations(layer, x)
    found, launches = operations(layer, x, backend="triton", capturable=capturable)
    assert [launch.kernel for launch in launches] == [DRAW] * 4
    # Measured: what rows go to, in both; the key, or reading the counter.
    assert found - bare <= 2 * 4
    forward, backward = launches[0], launches[-1]
    assert work(forward).bytes == 2 * 4 * 128 * forward.args["ROW"]
    assert backward.args["ROW"] == 8 and backward.args["N"] == 128


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_costs_ten_operations_on_the_host(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    bare, _ = operations(layer, x)
    found, _ = operations(layer, x, backend="torch")
    # Measured: 3, 3 and 8.
    assert found - bare <= 2 * 10


class Doubled(nn.Linear):
    """Stands for a layer of its own kind."""


class DoubledAdapter(LinearAdapter):
    """Takes rows in a way that its parent's kernel does not know."""

    def take_input_positions(self, *args):
        return 2 * super().take_input_positions(*args)


def test_a_subclass_that_takes_rows_its_own_way_is_asked():
    register(Doubled, DoubledAdapter())
    try:
        net = nn.Sequential(Doubled(3, 2))
        opt = FROG(net, exclude_output_layer=False, backend="triton", sample_size=9)
        x = torch.randn(5, 3)
        net(x).sum().backward()
        (call,) = opt.capture.calls("0")
        assert torch.equal(call.x, 2 * x)
    finally:
        from frog_triton import layers

        del layers._REGISTRY[Doubled]


def test_the_layer_is_asked_again_when_it_has_changed():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="zeros"))
    opt = FROG(net, exclude_output_layer=False, backend="triton", sample_size=99)
    x = torch.randn(1, 1, 4, 4)
    for mode in ("zeros", "circular"):
        net[0].padding_mode = mode
        net[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
        opt.capture.next_step()
        opt.zero_grad()
        net(x).sum().backward()
        (call,) = opt.capture.calls("0")
        corner = call.x[0].view(3, 3)[0, 0]
        assert corner == (0 if mode == "zeros" else x[0, 0, -1, -1])


def test_a_rank_that_draws_no_position():
    x, index = torch.randn(2, 3, 5, 5), torch.arange(0)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), "zeros")
    assert torch_ops.gather_patches(x, index, (5, 5), window).shape == (0, 27)
    assert adapter_for(nn.Conv2d(3, 4, 3)).take_output_positions(x, index).numel() == 0


def test_host_draws_share_nothing():
    """What draws have in common is kept, and never written to."""
    first = draw(1000, 16, 5)
    kept = first.clone()
    first.zero_()
    assert torch.equal(draw(1000, 16, 5), kept)
    assert np.all(np.diff(np.sort(kept.numpy())) > 0)
