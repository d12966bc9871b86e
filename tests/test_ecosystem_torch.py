"""torch's schedulers, averages and hooks around the optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from frog_triton import FROG


def make(**options):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    return net, FROG(net, sample_size=3, **options)


def step(net, opt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    opt.zero_grad()
    loss = net(torch.randn(5, 3, generator=generator)).square().mean()
    loss.backward()
    opt.step()
    return loss


SCHEDULES = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 2], 0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(
        o, 2
    ),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-3, 1e-2, 2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=10),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 1e-3, anneal_epochs=2),
}


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_moves_both_groups_as_it_moves_sgds(name, fallback):
    net, opt = make(fallback=fallback, fallback_lr=2e-2)
    sgd = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]} for _ in opt.param_groups],
        lr=2e-2,
        momentum=0.9,
    )
    ours, theirs = SCHEDULES[name](opt), SCHEDULES[name](sgd)
    for epoch in range(4):
        step(net, opt, epoch)
        sgd.step()
        plateau = (1.0,) if name == "ReduceLROnPlateau" else ()
        for schedule in (ours, theirs):
            schedule.step(*plateau)
        expected = [group["lr"] for group in sgd.param_groups]
        assert [group["lr"] for group in opt.param_groups] == expected
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_every_scheduler_of_torch_is_tried():
    offered = {
        name
        for name, kind in vars(schedules).items()
        if isinstance(kind, type)
        and issubclass(kind, schedules.LRScheduler)
        and not name.startswith("_")
    }
    assert offered - {"LRScheduler"} <= set(SCHEDULES)


def test_a_tensor_learning_rate_is_scheduled_in_place():
    net, opt = make(lr=torch.tensor(0.1), fallback_lr=torch.tensor(0.1))
    schedule = schedules.ExponentialLR(opt, 0.5)
    lr = opt.param_groups[0]["lr"]
    step(net, opt)
    schedule.step()
    assert opt.param_groups[0]["lr"] is lr
    torch.testing.assert_close(lr, torch.tensor(0.05))


@pytest.mark.parametrize(
    "average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"use_buffers": True}]
)
def test_averages_of_the_model_take_no_samples(average):
    net, opt = make()
    averaged = AveragedModel(net, **average)
    for seed in range(3):
        step(net, opt, seed)
        averaged.update_parameters(net)
    averaged.train()
    averaged(torch.randn(5, 3)).sum().backward()
    assert opt.capture.watches("0") and not opt.capture.calls("0")
    torch.optim.swa_utils.update_bn([torch.randn(5, 3)], averaged)


def test_a_deepcopy_ema_of_the_model():
    net, opt = make()
    ema = copy.deepcopy(net).requires_grad_(False)
    for seed in range(3):
        step(net, opt, seed)
        with torch.no_grad():
            for slow, fast in zip(ema.parameters(), net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
    ema(torch.randn(5, 3))
    assert opt.capture.watches("0") and not opt.capture.calls("0")


def test_hooks_before_and_after_a_step():
    net, opt = make()
    seen = []
    opt.register_step_pre_hook(lambda *args: seen.append("before"))
    opt.register_step_post_hook(lambda *args: seen.append("after"))
    opt.register_state_dict_post_hook(lambda o, state: seen.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("loads"))
    step(net, opt)
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before", "after", "saved", "loads"]


def test_a_closure_with_gradients_disabled_outside():
    net, opt = make(lr=1e-3)
    x = torch.randn(5, 3)

    def closure():
        opt.zero_grad()
        loss = F.mse_loss(net(x), torch.full((5, 2), 9.0))
        loss.backward()
        return loss

    with torch.no_grad():
        first = opt.step(closure)
        assert opt.step(closure) < first


def test_named_parameters_and_pairs():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = FROG(net, params=net.named_parameters())
    step(net, opt)
    assert opt.describe().updated_by("frog") == ["0.weight", "0.bias"]
