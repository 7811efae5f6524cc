"""A thread makes the micro-batches of coming steps, in the order of the run."""

import dataclasses
import threading
import time
import traceback

import pytest
import torch

from dspark_megatron.data.ahead import StepsAhead
from dspark_megatron.data.batch import MicroBatch
from dspark_megatron.data.blocks import draft_blocks
from support.tiny_target import tiny_config
from support.training_runs import run_training, run_until_stopped

CPU = torch.device("cpu")
STEP = 8


class Steps:
    """Steps of one sample, whose tokens say which step it is of."""

    def __init__(self, fails_at=None):
        self.made, self.threads, self.fails_at = [], set(), fails_at

    def of_step(self, consumed_samples):
        if consumed_samples == self.fails_at:
            raise ValueError(f"no sample {consumed_samples}")
        self.made.append(consumed_samples)
        self.threads.add(threading.current_thread())
        ids = torch.arange(6) + consumed_samples
        mask = torch.ones(6, dtype=torch.bool)
        blocks = draft_blocks([ids], [mask], [torch.tensor([1, 3])], 3)
        return [MicroBatch.of([ids], blocks, (consumed_samples,))]


def ahead_of(steps, **options):
    return StepsAhead(steps, step_samples=STEP, device=CPU, **options)


def wait_for(reached):
    for _ in range(1000):
        if reached():
            return True
        time.sleep(0.01)
    return False


def own_threads():
    return [one for one in threading.enumerate() if one.name.startswith("micro-batches")]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_steps_come_in_their_order_and_so_many_are_made_ahead(ahead):
    steps = Steps()
    with ahead_of(steps, ahead=ahead) as coming:
        for consumed in range(16, 80, STEP):
            (batch,) = coming.of_step(consumed)
            assert batch.sample_indices == (consumed,)
            most = list(range(16, consumed + STEP * (ahead + 1), STEP))
            assert wait_for(lambda most=most: steps.made == most)
        time.sleep(0.05)
        assert steps.made == most, "no more than that"
    assert threading.current_thread() not in steps.threads
    assert not own_threads()


def test_another_step_than_the_next_is_made_anew():
    with ahead_of(Steps()) as coming:
        coming.of_step(0)
        (batch,) = coming.of_step(64)
        assert batch.sample_indices == (64,)
        (batch,) = coming.of_step(64 + STEP)
        assert batch.sample_indices == (64 + STEP,)


def test_what_goes_wrong_is_raised_where_the_step_is_asked_for():
    with pytest.raises(ValueError, match="no sample 16") as error, ahead_of(Steps(16)) as coming:
        coming.of_step(0)
        coming.of_step(8)
        coming.of_step(16)
    assert "in of_step" in "".join(traceback.format_tb(error.tb)), "the thread's own place"
    assert not own_threads()


def test_the_time_that_is_waited_is_counted_once():
    class Slow(Steps):
        def of_step(self, consumed_samples):
            time.sleep(0.05)
            return super().of_step(consumed_samples)

    with ahead_of(Slow()) as coming:
        coming.of_step(0)
        assert coming.seconds_waited() >= 0.05
        assert coming.seconds_waited() == 0


def same(one, other):
    return {name: torch.equal(tensor, other[name]) for name, tensor in one.items()}


def test_a_micro_batch_that_was_made_ready_is_the_same_on_the_device():
    (batch,) = Steps().of_step(0)
    ready = batch.ready_for(CPU)
    assert ready.packed is not None
    moved, expected = ready.to(CPU), batch.to(CPU)
    assert all(same(moved.blocks.tensors, expected.blocks.tensors).values())
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert moved.input_ids.untyped_storage().data_ptr() == ready.packed.memory.data_ptr()
    part = dataclasses.replace(ready, blocks=ready.blocks.part(slice(1)))
    assert len(part.to(CPU).blocks.eval_mask) == 1, "what was changed since is sent anew"


def threads_after(runtime, config, stopped):
    if stopped:
        run_until_stopped(runtime, config, 3)
    else:
        run_training(runtime, config)
    return len(own_threads())


@pytest.mark.parametrize("stopped", [False, True])
def test_no_thread_outlives_a_run(pool, tiny_run, tmp_path, stopped):
    train = {"output_dir": str(tmp_path), "iterations": 5}
    config = tiny_config(tiny_run, train=train)
    assert pool.run(threads_after, world=1, tp=1, config=config, stopped=stopped) == [0]


def failed_run(runtime, config):
    """What a run raises whose third step cannot be made, and the threads it leaves."""
    from unittest import mock

    from dspark_megatron.data.batch import MicroBatches

    make = MicroBatches.of_step

    def failing(self, consumed_samples):
        if consumed_samples == 8:
            raise OSError("the disk is gone")
        return make(self, consumed_samples)

    with mock.patch.object(MicroBatches, "of_step", failing), pytest.raises(OSError) as error:
        run_training(runtime, config)
    return str(error.value), len(own_threads())


def test_a_run_ends_with_the_error_of_its_thread(pool, tiny_run, tmp_path):
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path), "iterations": 5})
    found = pool.run(failed_run, world=1, tp=1, config=config)
    assert found == [("the disk is gone", 0)]
