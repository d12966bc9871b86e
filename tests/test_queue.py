"""Launches that wait: for what, in which order they are made, and which go together."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import toy_kernel
from adding import SUM_SPLITS, SumConfig

from frog_triton.kernels import bundle, queue
from frog_triton.kernels.bundle import Bundle
from frog_triton.kernels.launch import is_awaited, launch, recording, settle
from frog_triton.kernels.queue import merged, side_by_side
from frog_triton.solve.launches import Bucket, LayerShape, step_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def summed(partial_, out):
    """A launch: out becomes the sum of the rows of `partial_`."""
    SUM_SPLITS.launch(
        SumConfig(),
        partial_ptr=partial_,
        out_ptr=out,
        numel=out.numel(),
        split_stride=partial_.stride(0),
        SPLITS=len(partial_),
    )


def near(out, exact):
    """To a few roundings of float32; the largest numbers are near 10."""
    return float((out - exact).abs().max()) < 1e-5


def rows(*shape):
    return torch.randn(*shape).to(DEVICE)


def test_torch_reads_what_was_launched():
    given = [rows(3, 40 + i) for i in range(4)]

    def job(x):
        out = torch.empty_like(x[0])
        summed(x, out)
        settle()
        return out * 2

    found = side_by_side([partial(job, x) for x in given])
    for x, out in zip(given, found, strict=True):
        assert near(out, 2 * x.double().sum(0))  # measured 7e-7


def test_torch_writes_after_what_was_launched_has_read():
    given = [rows(3, 40 + i) for i in range(4)]
    sums = [x.double().sum(0) for x in given]

    def job(x):
        out = torch.empty_like(x[0])
        summed(x, out)
        settle()
        x.zero_()
        return out

    found = side_by_side([partial(job, x) for x in given])
    for out, expected in zip(found, sums, strict=True):
        assert near(out, expected)  # measured 4e-7


def test_memory_is_not_taken_again_while_launches_wait():
    """What a job lets go of is still to be written, and read, by its launches."""
    given = [rows(3, 2**12 + i) for i in range(8)]

    def job(x):
        between, out = torch.empty(2, x.shape[1]).to(DEVICE), torch.empty_like(x[0])
        summed(x, between[0])
        summed(x, between[1])
        summed(between, out)
        return out

    found = side_by_side([partial(job, x) for x in given])
    for x, out in zip(given, found, strict=True):
        assert near(out, 2 * x.double().sum(0))  # measured 1e-6


def test_what_must_not_be_read_yet_is_known():
    """Tests refuse operations on it (see conftest), and so do recordings."""
    x, y = rows(3, 40), rows(4)

    def job():
        out = torch.empty_like(x[0])
        assert not is_awaited(out)
        summed(x, out)
        assert is_awaited(out[::2]) and is_awaited(x) and not is_awaited(y)
        with pytest.raises(AssertionError):
            out.sum()
        settle()
        assert not is_awaited(out)
        return out.sum()

    side_by_side([job, job])
    assert not is_awaited(x)


def test_views_and_sizes_wait_for_nothing():
    given = [rows(3, 40 + i) for i in range(4)]

    def job(x):
        out = torch.empty_like(x[0])
        summed(x, out)
        return torch.zeros_like(out), out.view(-1, 1)[::2], x.new_ones(out.shape)

    with recording() as made:
        side_by_side([partial(job, x) for x in given])
    assert [len(a.parts) for a in made] == [4]


def test_a_job_that_fails_leaves_nothing_launched():
    out = torch.full((4,), 7.0)

    def fails():
        raise ValueError("no")

    jobs = [partial(summed, torch.ones(2, 4), out), fails]
    with recording() as made, pytest.raises(ValueError, match="no"):
        side_by_side(jobs)
    assert not made and out.tolist() == [7.0] * 4
    summed(torch.ones(2, 4), out)  # and later launches do not wait
    assert out.tolist() == [2.0] * 4


def test_a_count_within_a_job_is_none_of_the_step():
    shape = LayerShape("", 16, 24, 8)

    def job(i):
        assert len(step_launches(Bucket(shape), "gram")) == 6
        return i

    with recording() as made:
        assert side_by_side([partial(job, i) for i in range(3)]) == [0, 1, 2]
    assert not made


def test_jobs_within_jobs_are_one_queue():
    given = [rows(3, 40 + i) for i in range(4)]
    outs = [torch.empty_like(x[0]) for x in given]
    some = [partial(summed, x, out) for x, out in zip(given, outs, strict=True)]
    with recording() as made:
        side_by_side([partial(side_by_side, some[:2]), partial(side_by_side, some[2:])])
    assert sum(len(a.parts) for a in made) == 4
    for x, out in zip(given, outs, strict=True):
        assert near(out, x.double().sum(0))  # measured 4e-7


# -- which launches are one ------------------------------------------------------------


def test_more_than_a_table_holds():
    most = int(bundle.MOST.value)
    given = [rows(2, 1 + i) for i in range(2 * most + 5)]
    outs = [torch.empty_like(x[0]) for x in given]
    with recording() as made:
        side_by_side([partial(summed, x, o) for x, o in zip(given, outs, strict=True)])
    assert max(len(a.parts) for a in made) == most
    assert sum(len(a.parts) for a in made) == len(given)
    for x, out in zip(given, outs, strict=True):
        assert near(out, x.double().sum(0))  # measured 3e-7


def test_a_kernel_that_takes_no_place_is_launched_alone():
    x, a = rows(2, 8, 40), rows(2, 8)
    with recording() as made:
        found = side_by_side([partial(toy_kernel.toy, x, a)] * 2)
    assert [len(m.parts) for m in made] == [1, 1]
    assert all(torch.equal(y, x * a[..., None]) for y in found)


def fake(what, lane):
    grid, loop = (1,), ""
    kernel = SimpleNamespace(loop=loop)
    return SimpleNamespace(what=what, lane=lane, kernel=kernel, grid=grid, args={})


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        (["abc", "abc"], "aa bb cc"),
        (["abc", "ac"], "aa b cc"),  # c waits for the lane that is behind
        (["gsm", "gm", "gsm"], "ggg ss mmm"),
        (["fxfxf", "fxfxf", "fyf"], "fff xx y fff xx ff"),
        (["ab", "ba"], "a bb a"),
        (["", "a", ""], "a"),
        ([], ""),
    ],
)
def test_order_of_launches(monkeypatch, lanes, expected):
    monkeypatch.setattr(queue, "kind", lambda launch: launch.what)
    made = list(merged([[fake(w, i) for w in lane] for i, lane in enumerate(lanes)]))
    assert " ".join("".join(a.what for a in parts) for parts in made) == expected
    for i, lane in enumerate(lanes):  # each lane's order is kept
        assert "".join(a.what for p in made for a in p if a.lane == i) == lane


def test_a_bundle_shows_its_parts():
    given = [rows(2, 5 + i) for i in range(2)]
    with recording(run=False) as made:
        side_by_side([partial(summed, x, torch.empty_like(x[0])) for x in given])
    (found,) = made
    assert isinstance(found, Bundle) and found.name == "_sum_splits_kernel"
    assert found.grid == (2,) and found.kernel is SUM_SPLITS
    assert len(list(found.tensors())) == 4
    with recording() as again:
        for part in made.parts:
            launch(part)
    assert [*again] == [*found.parts]
