"""A target whose weights data-parallel ranks share: the same states and curve, and less memory."""

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from support.shapes import SHAPES
from support.sharded_targets import CountedStates, own_states
from support.tiny_draft import build_tiny_draft, make_samples, make_step
from support.tiny_target import make_target, tiny_config
from support.training_runs import assert_same_curve, curve, run_training

LAYOUTS = [(2, 1, 2, 2), (4, 2, 2, 2), (4, 1, 2, 2), (4, 1, 0, 4), (4, 2, 0, 2)]
"""World size, tensor-parallel size, target.shard_across_data_parallel, ranks that share."""


@pytest.mark.parametrize("with_last_hidden", [True, False])
@pytest.mark.parametrize("world, tp, shard, shards", LAYOUTS)
def test_states_and_memory(pool, tiny_run, tmp_path, world, tp, shard, shards, with_last_hidden):
    from transformers import AutoModel

    path = make_target(tmp_path / "target")
    config = tiny_config(
        tiny_run,
        target={"path": str(path), "shard_across_data_parallel": shard},
        parallel={"tensor_parallel": tp},
        model={"target_layer_ids": [0, 2]},
    )
    ranks = pool.run(
        own_states, world=world, tp=tp, config=config, with_last_hidden=with_last_hidden
    )
    model = AutoModel.from_pretrained(path)
    for ids, taps, last_hidden, before, after in ranks:
        with torch.no_grad():
            own = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(taps, torch.cat([own[1], own[3]], -1), rtol=1e-4, atol=1e-5)
        assert (last_hidden is not None) == with_last_hidden
        if with_last_hidden:
            torch.testing.assert_close(last_hidden, own[-1], rtol=1e-4, atol=1e-5)
        # The root's own group is the final norm, and that stays.
        assert after <= before + 32, "every layer gave its neighbours' parts back"
    alone = pool.run(
        own_states,
        world=tp,
        tp=tp,
        config=tiny_config(tiny_run, parallel={"tensor_parallel": tp}),
        with_last_hidden=with_last_hidden,
    )
    for rank in ranks:
        assert rank[3] == pytest.approx(alone[0][3] / shards, rel=0.02)


@pytest.mark.parametrize("world, tp, shard", [(2, 1, 2), (4, 2, 0), (4, 1, 2)])
def test_the_curve_is_the_same(pool, tiny_run, unbroken, tmp_path, world, tp, shard):
    config = tiny_config(
        tiny_run,
        target={"shard_across_data_parallel": shard},
        train={"output_dir": str(tmp_path)},
        parallel={"tensor_parallel": tp},
    )
    pool.run(run_training, world=world, tp=tp, config=config)
    assert_same_curve(curve(tmp_path), curve(unbroken))


def calls_without_blocks(runtime, lockstep):
    """How often a step asks for states when there is nothing to learn from them."""
    import dataclasses

    from dspark_megatron.training.metrics import MetricSums
    from support.tiny_draft import rank_micro_batches

    shape = SHAPES["vanilla"]
    model, samples = build_tiny_draft(runtime, shape), make_samples(shape, (9,))
    (batch,) = rank_micro_batches(runtime, samples, shape.num_draft_tokens, 1)
    batch = dataclasses.replace(batch, blocks=dataclasses.replace(batch.blocks, weight=0.0))
    step = make_step(runtime, model, samples)
    target = step.forward_step.target = CountedStates(samples)
    target.lockstep = lockstep
    step.run([batch], MetricSums.zeros(shape.num_draft_tokens, runtime.device))
    return target.calls


@pytest.mark.parametrize("lockstep, calls", [(True, 1), (False, 0)])
def test_a_rank_without_blocks_still_gives_its_weights(pool, lockstep, calls):
    assert pool.run(calls_without_blocks, world=1, tp=1, lockstep=lockstep) == [calls]


def test_sizes_that_do_not_divide_are_refused(tiny_run):
    config = tiny_config(tiny_run, target={"shard_across_data_parallel": 3})
    with pytest.raises(ConfigError) as error:
        describe_run(config, world_size=4)
    assert "shard_across_data_parallel (3) must divide the data-parallel size (4)" in str(
        error.value
    )
    assert "[1, 2, 4]" in str(error.value)


def test_the_dry_run_counts_the_shards(tiny_run):
    def target_line(shard):
        config = tiny_config(tiny_run, target={"shard_across_data_parallel": shard})
        lines = describe_run(config, world_size=4).splitlines()
        return float(next(line for line in lines if "frozen target" in line).split()[-1])

    assert target_line(1) >= target_line(2) >= target_line(0)
