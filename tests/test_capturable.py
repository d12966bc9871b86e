"""With capturable=True nothing waits for the device, so a CUDA graph can capture it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import PAPER
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frog_triton import FROG
from frog_triton.fallback import FALLBACKS
from frog_triton.linalg import products
from frog_triton.linalg.numbers import Numbers
from frog_triton.ops import orthogonal, torch_ops
from frog_triton.solve import together
from frog_triton.solve.formulation import predict

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAITING = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
)
# A tensor made from numbers of the host: on a GPU a copy from pageable memory.
FROM_HOST = ("aten::lift", "aten::lift_fresh", "aten::lift_fresh_copy")


class NoWaiting(TorchDispatchMode):
    """Fails on an operation that waits for the device, or copies to or from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in WAITING + FROM_HOST, name
        if name.startswith("aten::index"):
            for index in args[1] if isinstance(args[1], list | tuple) else ():
                assert index is None or index.dtype != torch.bool, "a boolean index"
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.conv1(x), inplace=True).unflatten(2, (4, 4))
        x = F.relu(self.norm(self.conv2(x)), inplace=True)
        x = torch.tanh(self.fc(x.flatten(2).mT))
        return self.head(x).mean(1)


def batch(seed, size=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 16, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
@pytest.mark.parametrize("sampling", ["examples", "positions"])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_nothing_waits_for_the_device(
    orthogonalize, sampling, formulation, fallback, monkeypatch
):
    # The CPU stands for a device whose numbers the host may not read.
    for module in (orthogonal, products, together, torch_ops):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)
    net = Net()
    opt = FROG(
        net,
        lr=torch.tensor(1e-2),
        fallback_lr=torch.tensor(1e-3),
        sampling=sampling,
        sample_size=5,
        formulation=formulation,
        fallback=fallback,
        nesterov=True,
        orthogonalize=orthogonalize,
        capturable=True,
    )
    opt.found_inf, opt.grad_scale = torch.zeros(()), torch.ones(())
    for step in range(2):
        opt.zero_grad()
        for micro in range(3):  # more samples than fit
            x, y = batch(10 * step + micro)
            with NoWaiting():
                F.cross_entropy(net(x), y).backward()
        with NoWaiting():
            opt.step()
    assert opt.state[net.fc.weight]["step"] == 2


def test_the_watch_sees_an_optimizer_that_waits():
    net = Net()
    opt = FROG(net, sample_size=5)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    opt.step()  # makes the counter that it waits for
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        F.cross_entropy(net(x), y).backward()
    opt.close()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("sampling", ["examples", "positions"])
def test_the_same_steps_as_without(sampling, fallback, micro_batches):
    nets = [Net().double()]
    nets.append(copy.deepcopy(nets[0]))
    for net, capturable in zip(nets, (False, True), strict=True):
        opt = FROG(
            net,
            sampling=sampling,
            sample_size=5,
            fallback=fallback,
            capturable=capturable,
        )
        for step in range(4):
            opt.zero_grad()
            for micro in range(micro_batches):
                x, y = batch(10 * step + micro)
                F.cross_entropy(net(x.double()), y).backward()
            opt.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        # The same draws and solves; the fallback rounds in another order: measured
        # 8e-16 of the largest entry.
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_learning_rate_elsewhere_than_its_parameters_is_refused():
    net = Net()
    with pytest.raises(ValueError, match=r"lr is a tensor on meta.*move it there"):
        FROG(net, lr=torch.tensor(0.1, device="meta"), capturable=True)
    assert not any(m._forward_hooks for m in net.modules())


def test_state_moves_between_capturable_and_not():
    net = Net()
    opt = FROG(net, fallback="adamw")
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    opt.step()
    other = FROG(copy.deepcopy(net), fallback="adamw", capturable=True)
    other.load_state_dict(opt.state_dict())
    assert all(group["capturable"] for group in other.param_groups)
    opt.load_state_dict(other.state_dict())
    assert not any(group["capturable"] for group in opt.param_groups)
    assert opt.state[net.fc.weight]["step"] == 1


def test_tables_hold_addresses():
    pytest.importorskip("triton")
    from frog_triton.kernels.tables import Tables

    tensors = [[torch.zeros(3 + i + j) for i in range(5)] for j in range(4)]
    tables = Tables(tensors)
    for kind in range(4):
        assert tables[kind][:5].tolist() == [t.data_ptr() for t in tensors[kind]]


def test_numbers_travel_once_and_not_where_they_are():
    pytest.importorskip("triton")
    from frog_triton.kernels.tables import numbers_on

    device, found_inf = torch.device("cpu"), torch.tensor(1.0)
    numbers = Numbers(0.9, -2.0, torch.tensor(0.25), 0.1, found_inf)
    assert numbers_on(numbers, device).tolist() == [0.9, -2.0, 0.25, 0.1, 1.0]
    assert numbers_on(numbers, device) is numbers_on(numbers, device)
    given = torch.zeros(5, dtype=torch.float64)
    there = Numbers(0.9, vectors={device: given})
    assert numbers_on(there, device) is given


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, PAPER, {"sample_steps": 2}])
def test_a_captured_step_copies_once_from_the_host(options):
    """In a graph of its own, beside what it computes with."""
    net = Net().cuda()
    opt = FROG(net, capturable=True, sample_size=3, **options)
    x, y = (t.cuda() for t in batch(0, 4))
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        graph.replay()
        torch.cuda.synchronize()
    copies = [e for e in seen.events() if "HtoD" in e.name]
    assert len(copies) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", ["examples", "positions"])
@pytest.mark.parametrize("formulation", ["primal", "gram"])
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_a_whole_training_step_as_one_cuda_graph(
    orthogonalize, sampling, formulation, fallback, monkeypatch
):
    # Two runs of cuDNN's other kernels differ, and bfloat16 makes more of that.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    nets = [Net().cuda()]
    nets.append(copy.deepcopy(nets[0]))
    lrs = [torch.tensor(1e-2, device="cuda") for _ in nets]
    opts = [
        FROG(
            net,
            lr=lr,
            fallback_lr=torch.tensor(1e-3, device="cuda"),
            sampling=sampling,
            sample_size=5,
            orthogonalize=orthogonalize,
            formulation=formulation,
            fallback=fallback,
            capturable=True,
        )
        for net, lr in zip(nets, lrs, strict=True)
    ]
    x, y = (t.cuda() for t in batch(0))

    def step(net, opt):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for seed in range(3):  # compiles the kernels
            for new, old in zip(batch(seed), (x, y), strict=True):
                old.copy_(new)
            for net, opt in zip(nets, opts, strict=True):
                step(net, opt)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    opts[0].zero_grad()
    with torch.cuda.graph(graph):
        step(nets[0], opts[0])
    for seed in range(3, 8):
        for new, old in zip(batch(seed), (x, y), strict=True):
            old.copy_(new)
        for lr in lrs:
            lr.fill_(1e-2 / seed)
        graph.replay()
        step(nets[1], opts[1])
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for net, opt in zip(nets, opts, strict=True):
        assert opt.state[net.fc.weight]["step"] == 8


@pytest.mark.gpu
def test_an_optimizer_that_is_not_capturable_says_so_under_capture():
    net = Net().cuda()
    opt = FROG(net)
    x, y = (t.cuda() for t in batch(0))
    F.cross_entropy(net(x), y).backward()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(graph):
        opt.step()


def test_the_formulation_is_counted_without_the_tables():
    """Counting what a formulation costs launches nothing, so no table is written."""
    chosen = []
    for capturable in (False, True):
        net = nn.Sequential(nn.Linear(37, 23), nn.Linear(23, 2)).to(DEVICE)
        options = {"backend": "triton", "capturable": capturable, "sample_size": 7}
        opt = FROG(net, lr=torch.tensor(0.02, device=DEVICE), **options)
        net(torch.randn(7, 37, device=DEVICE)).square().sum().backward()
        predict.cache_clear()
        opt.step()
        chosen.append(opt.describe()[0].reason)
    assert chosen == ["Linear; gram, N = 7"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_of_the_rest_in_every_dtype(dtype, nesterov):
    """Against SGD in float64; torch's own fused SGD fails this in 16 bits on a CPU."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(4, 70, generator=generator).to(dtype)
    param, buffer = start.clone(), torch.zeros_like(start)
    group = {"lr": torch.tensor(0.1), "momentum": 0.9, "nesterov": nesterov}
    group |= {"capturable": True, "weight_decay": 0.0}
    p, m = start.double(), torch.zeros(70, dtype=torch.float64)
    for found_inf, grad in zip((0.0, 1.0, 0.0), grads, strict=True):
        param.grad = grad.clone()
        if found_inf:
            param.grad[3] = float("inf")
        before = param.clone(), buffer.clone()
        state = [{"momentum_buffer": buffer}]
        FALLBACKS["sgd"].step([param], state, group, torch.tensor(found_inf))
        if found_inf:
            assert torch.equal(param, before[0]) and torch.equal(buffer, before[1])
            continue
        m = 0.9 * m + grad.double()
        p = p - 0.1 * (grad.double() + 0.9 * m if nesterov else m)
    # Measured: 0.44 of this unit, in all cases.
    limit = 2 * torch.finfo(dtype).eps * float(p.abs().max())
    assert float((param.double() - p).abs().max()) < limit
