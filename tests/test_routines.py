"""Steps that are recorded and played are the steps that launches one by one make."""

import copy

import pytest
import torch
import torch.nn.functional as F
from adding import sum_splits
from recorded import CPU, Net, Pair, batch
from tape import Tape
from torch import nn

from frog_triton.fallback import FALLBACKS, _FusedAdamW
from frog_triton.kernels.board import Board, Refused, uploaded
from frog_triton.kernels.magnitudes import Magnitudes
from frog_triton.kernels.tables import Tables
from frog_triton.ops import orthogonal, torch_ops, triton_ops
from frog_triton.routine import record
from frog_triton.solve import together


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Nothing looks at numbers: what is recorded depends on none."""
    for module in (orthogonal, together, torch_ops):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


@pytest.mark.parametrize("formulation", ["primal", "gram"])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_played_steps_are_the_steps(orthogonalize, formulation, monkeypatch):
    monkeypatch.setattr(triton_ops, "on_host", lambda tensor: False)
    pair = Pair(orthogonalize=orthogonalize, formulation=formulation)
    pair.step(6)
    assert len(pair.tapes) == 1
    # The first step shows the output layer, two more are alike, the rest is played.
    assert pair.plays == 3, pair.opts[0]._routines.refused


def test_whole_examples():
    pair = Pair(sampling="examples")
    pair.step(5)
    assert pair.plays == 2, pair.opts[0]._routines.refused


def test_changing_circumstances_are_not_recorded_over_and_over():
    pair = Pair()
    for size in (3, 4, 5, 6) * 3:  # each with another number of samples for `up`
        pair.step(size=size)
    assert len(pair.tapes) == 2
    assert "keep changing" in pair.opts[0]._routines.refused
    pair.step(6)  # of one kind, after all
    assert len(pair.tapes) == 3


def test_an_entry_that_cannot_be_compared():
    pair = Pair()
    pair.each(lambda net, opt: opt.param_groups[0].update(note={}))
    pair.step(4)
    assert pair.plays == 0
    assert "cannot be compared" in str(pair.opts[0].routes())


def test_gradients_that_several_passes_add_to():
    pair = Pair()
    pair.step(5, micro_batches=2)
    assert pair.plays == 2, pair.opts[0]._routines.refused
    pair.step(micro_batches=1)
    assert "played from a recording" in str(pair.opts[0].routes())


def test_numbers_change_without_a_new_recording():
    pair = Pair(nesterov=True)
    pair.step(4)
    for i in range(3):

        def change(net, opt, i=i):
            for group in opt.param_groups:
                group["lr"] = 1e-2 / (i + 1)
                group["weight_decay"] = 1e-2 * i
            opt.param_groups[0]["damping"] = 0.5 + i
            opt.param_groups[0]["momentum"] = 0.9 - 0.2 * i

        pair.each(change)
        pair.step()
    assert len(pair.tapes) == 1
    assert pair.plays == 4


def test_a_step_with_a_bad_gradient_changes_nothing():
    pair = Pair()
    pair.step(4)

    def spoil(net):
        net.up.weight.grad[0, 0] = float("nan")

    before = copy.deepcopy(pair.nets[0].state_dict())
    pair.step(spoil=spoil)
    assert pair.plays == 2
    for name, value in pair.nets[0].named_parameters():
        assert torch.equal(value, before[name]), name
    assert pair.opts[0].anomalies()["model"] == {"skipped_steps": 1}
    pair.step(2)
    assert pair.plays == 4


def _other_option(name, value):
    def change(net, opt):
        opt.param_groups[0][name] = value

    return change


def _reload(net, opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def _other_data(net, opt):
    for param in net.parameters():
        param.data = param.data.clone()


def _other_layout(net, opt):
    net.to(memory_format=torch.channels_last)


def _other_momentum(net, opt):
    own = opt.state[net.up.weight]
    own["momentum_buffer"] = own["momentum_buffer"].clone()


def _freeze(net, opt):
    net.down.weight.requires_grad_(False)
    net.down.weight.grad = None


def _swap_gradients(net, opt):
    params = [net.up.weight, net.conv.weight]
    for param in params:
        param.grad = param.grad.clone() if param.grad is not None else None


CHANGES = {
    "iters": _other_option("cg_iters", 2),
    "nesterov": _other_option("nesterov", False),
    "plain": _other_option("orthogonalize", False),
    "loaded": _reload,
    "data": _other_data,
    "layout": _other_layout,
    "momentum": _other_momentum,
    "frozen": _freeze,
    "dtype": lambda net, opt: net.to(torch.bfloat16),
    "eval": lambda net, opt: net.up.eval(),
    "gradients": _swap_gradients,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_address_is_ever_stale(change):
    pair = Pair()
    pair.step(4)
    assert pair.plays == 1, pair.opts[0]._routines.refused
    pair.each(change)
    pair.step(4)
    pair.step(size=3)
    pair.step()


def test_old_memory_is_not_read():
    """What a recording read before is spoilt, so that reading it again would show."""
    pair = Pair()
    pair.step(4)
    for grad in pair.hold:
        if grad is not None:
            grad.fill_(float("nan"))
    pair.step(2)
    assert pair.plays == 3


def test_tables_on_a_board_begin_where_they_would_by_themselves():
    """At multiples of 16 bytes, else Triton makes other kernels for them."""
    x = torch.ones(8)
    board = Board([x], [], 64, 1, CPU)
    odd = board.place([5, 6, 7], [None] * 3)
    table = board.place([x.data_ptr(), 0], [x, None])
    assert (table.data_ptr() - odd.data_ptr()) % 16 == 0
    board.write([x.data_ptr() + 64], [(0.5,)])
    assert odd.tolist() == [5, 6, 7] and table.tolist() == [x.data_ptr() + 64, 0]


def test_nothing_is_copied_where_nothing_has_changed():
    x = torch.ones(8)
    board = Board([x], [], 64, 1, CPU)
    board.place([x.data_ptr()], [x])
    assert board.write([x.data_ptr()], [(0.5, 1.0)])
    assert not board.write([x.data_ptr()], [(0.5, 1.0)])
    assert board.write([x.data_ptr()], [(0.5, 2.0)])
    assert board.write([x.data_ptr() + 64], [(0.5, 2.0)])


class Taught(Net):
    """Whose last layer by order is not the last by call, so that FROG takes it back."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.tanh(self.extra(x)))


def test_layers_taken_back_from_the_fallback_move():
    pair = Pair(Taught)
    pair.step(5)
    assert pair.plays, pair.opts[0]._routines.refused
    assert pair.opts[0]._assignment.serves(pair.nets[0].extra.weight)
    plays = pair.plays

    def other_memory(net, opt):
        for param in net.extra.parameters():
            pair.hold.append(param.data)
            param.data = param.data.clone()

    pair.each(other_memory)
    pair.step(4)
    assert pair.plays > plays


class Experts(nn.Module):
    num_experts, is_transposed = 3, False

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.bmm(x, self.w1.mT)


class Mixture(Net):
    def __init__(self):
        super().__init__()
        self.experts, self.out, self.dead = Experts(), nn.Linear(5, 3), False

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).mean((2, 3)).view(3, -1, 4)
        if self.dead:
            x = torch.cat([x[:2], 0 * x[2:]])
        return self.out(torch.tanh(self.experts(x))).flatten(0, 1)


def test_experts_are_left_alone():
    pair = Pair(Mixture)
    pair.step(4)
    pair.each(lambda net, opt: setattr(net, "dead", True))
    pair.step(2)
    assert pair.plays == 0
    assert "experts" in pair.opts[0]._routines.refused


def _forget_moments(net, opt):
    for group in opt.param_groups[1::2]:
        for param in group["params"]:
            opt.state.pop(param, None)


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_state_of_the_fallback_that_is_gone(fallback):
    pair = Pair(fallback=fallback)
    pair.step(5)
    pair.each(_forget_moments)
    pair.step(2)
    state = pair.opts[0].state_dict()["state"]
    assert len(state) == len(list(pair.nets[0].parameters()))


def test_prepared_moments_must_be_those_of_the_state():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    states = [FALLBACKS["adamw"].init_state(p) for p in params]
    prepared = _FusedAdamW(params, states)
    assert prepared.fits(states)
    assert not prepared.fits([states[0], {}])
    states[1] = dict(states[1], exp_avg=states[1]["exp_avg"].clone())
    assert not prepared.fits(states)


def test_steps_without_gradients():
    pair = Pair()
    pair.step(4)
    for opt in pair.opts:
        opt.zero_grad()
        for _ in range(4):
            opt.step()
    pair.compare()
    pair.step(2)


def test_options_of_convolutions_decide_too():
    pair = Pair(sampling="examples")
    pair.step(5)

    def change(net, opt):
        net.conv.dilation = net.conv.padding = (2, 2)
        net.conv._reversed_padding_repeated_twice = [2, 2, 2, 2]

    pair.each(change)
    pair.step(4)


def test_a_parameter_that_grows():
    class Words(Net):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(8, 4)

        def forward(self, x):
            h = F.relu(self.norm(self.conv(x))).mean((2, 3))
            return self.head(h + self.words(torch.arange(len(h), device=h.device)))

    pair = Pair(Words)
    pair.step(5)

    def grow(net, opt):
        weight = net.words.weight
        weight.data = torch.cat([weight.data, torch.ones_like(weight.data)])
        weight.grad = None

    pair.each(grow)
    for net, opt in zip(pair.nets, pair.opts, strict=True):
        before = copy.deepcopy(net.state_dict())
        opt.zero_grad()
        x, y = batch(0)
        F.cross_entropy(net(x), y).backward()
        with pytest.raises(ValueError, match=r"words.weight has shape \(16, 4\)"):
            opt.step()
        for name, value in net.named_parameters():
            assert torch.equal(value, before[name])
        for key in ("exp_avg", "exp_avg_sq"):
            own = opt.state[net.words.weight]
            own[key] = torch.cat([own[key], torch.zeros_like(own[key])])

    def spoil(net):
        net.words.weight.grad[-1] = float("nan")

    pair.step(2)
    pair.step(spoil=spoil)
    assert pair.opts[0].anomalies()["model"] == {"skipped_steps": 1}


def test_another_default_device():
    pair = Pair()
    with torch.device("meta"):
        board = Board([torch.ones(8, device="cpu")], [], 64, 1, CPU)
        assert board.write([0], [(0.5,)])
        assert uploaded([1, 2], CPU).tolist() == [1, 2]
        assert Magnitudes([torch.ones(3, device="cpu")]) is not None
    pair.step()


class TestWhatIsRefused:
    def record(self, work, moving=(), still=()):
        return record(Tape(), work, moving, still, 64, 1, CPU)

    def test_an_operation_on_memory_that_moves(self):
        x = torch.ones(8)
        with pytest.raises(Refused, match="lie elsewhere"):
            self.record(lambda board: x.view(2, 4) + 1, moving=[x])

    def test_an_operation_on_memory_of_nobody(self):
        x = torch.ones(8)
        with pytest.raises(Refused, match="lie elsewhere"):
            self.record(lambda board: x + 1)
        self.record(lambda board: x + 1, still=[x])

    def test_a_table_of_memory_of_nobody(self):
        x = torch.ones(8)
        with pytest.raises(Refused, match="neither here nor there"):
            self.record(lambda board: Tables([[x]]))

    def test_a_launch_on_memory_that_moves(self):
        x = torch.ones(2, 8)

        with pytest.raises(Refused, match="lie elsewhere"):
            self.record(lambda board: sum_splits(x), moving=[x])

    def test_gradients_that_share_memory(self):
        x = torch.ones(8)
        with pytest.raises(Refused, match="share memory"):
            self.record(lambda board: None, moving=[x, x[4:]])

    def test_too_many_tables(self):
        x = torch.ones(8)
        with pytest.raises(Refused, match="more tables"):
            self.record(lambda board: Tables([[x] * 100]), still=[x])
