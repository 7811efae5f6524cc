"""The order of samples is a pure function of the seed and of how many were consumed."""

import pytest
import torch

from dspark_megatron.data.sampler import (
    SampleRef,
    StepSampler,
    epoch_order,
    global_batch,
    sample_at,
)


@pytest.mark.parametrize("num_samples", [1, 5, 64])
def test_an_epoch_is_a_permutation(num_samples: int) -> None:
    for epoch in range(3):
        refs = [sample_at(epoch * num_samples + i, num_samples, 7) for i in range(num_samples)]
        assert {ref.epoch for ref in refs} == {epoch}
        assert sorted(ref.sample_index for ref in refs) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(64, s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9 and tuple(range(64)) not in orders


def test_the_order_depends_on_nothing_else() -> None:
    torch.manual_seed(1)
    before = global_batch(30, 8, 64, 7)
    epoch_order.cache_clear()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert global_batch(30, 8, 64, 7) == before
    assert torch.equal(torch.get_rng_state(), state)  # and disturbs nothing


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_layout_trains_the_same_step(dp_size: int, micro_batch_size: int) -> None:
    num_samples, seed, size = 11, 3, 8  # a step crosses the end of an epoch
    for consumed in range(0, 5 * size, size):
        step = [None] * size
        for rank in range(dp_size):
            sampler = StepSampler(num_samples, seed, size, micro_batch_size, rank, dp_size)
            batches = sampler.micro_batches(consumed)
            assert len(batches) == size // (micro_batch_size * dp_size)
            for j, batch in enumerate(batches):
                place = (j * dp_size + rank) * micro_batch_size  # Megatron's split
                step[place : place + micro_batch_size] = batch
        assert step == global_batch(consumed, size, num_samples, seed)


def test_resuming_inside_an_epoch_and_with_another_batch_size() -> None:
    whole = global_batch(0, 40, 11, 3)
    resumed = StepSampler(11, 3, 4, 4, 0, 1)
    assert [resumed.micro_batches(consumed)[0] for consumed in (12, 16)] == [
        whole[12:16],
        whole[16:20],
    ]
    assert all(isinstance(ref, SampleRef) for ref in whole)
    assert [ref.epoch for ref in whole] == [position // 11 for position in range(40)]


def test_a_step_that_does_not_divide_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"size \(6\) must be divisible .* = 4"):
        StepSampler(11, 3, 6, 2, 0, 2).micro_batches(0)
