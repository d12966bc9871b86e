"""Counter-based drawing."""

import pytest
import torch

from frog_triton.capture.sampling import counter_key, draw, take


@pytest.mark.parametrize(
    ("total", "size"), [(1, 1), (5, 9), (7, 7), (10, 3), (1000, 256)]
)
def test_distinct_and_in_range(total, size):
    for key in range(50):
        index = draw(total, size, counter_key(key))
        assert len(index.unique()) == len(index) == min(total, size)
        assert index.min() >= 0 and index.max() < total


def test_all_are_taken_in_order_when_there_are_few():
    assert draw(4, 9, 1).tolist() == [0, 1, 2, 3]


def test_every_index_is_equally_likely():
    counts = torch.zeros(11)
    for key in range(4000):
        counts[draw(11, 4, counter_key(key))] += 1
    # Expected 4000 * 4 / 11 = 1455 with a deviation of 30; measured within 55.
    assert (counts - 4000 * 4 / 11).abs().max() < 150


def test_function_of_the_counters_only():
    torch.manual_seed(1)
    first = draw(1000, 16, counter_key(1, 2, 3))
    torch.manual_seed(2)
    assert torch.equal(first, draw(1000, 16, counter_key(1, 2, 3)))
    assert not torch.equal(first, draw(1000, 16, counter_key(1, 2, 4)))
    assert counter_key(1, 2) != counter_key(2, 1)


@pytest.mark.parametrize(("total", "size"), [(1, 1), (5, 9), (10, 3), (2**40, 100)])
def test_a_counter_on_the_device_draws_what_one_on_the_host_does(total, size):
    for step in range(50):
        on_device = torch.tensor(step)
        key = counter_key(7, 2**63 + 1, on_device, 3)
        expected = draw(total, size, counter_key(7, 2**63 + 1, step, 3))
        assert torch.equal(draw(total, size, key), expected)


def test_large_ranges_stay_exact():
    index = draw(2**40, 1000, counter_key(5))
    assert len(index.unique()) == 1000
    assert index.max() > 2**39 and index.min() >= 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_examples_keep_the_layout_of_their_batch(layout):
    x = torch.randn(7, 3, 4, 5).to(memory_format=layout)
    taken = take(x, torch.tensor([5, 0, 2]))
    assert torch.equal(taken, x[torch.tensor([5, 0, 2])])
    assert taken.is_contiguous(memory_format=layout)
