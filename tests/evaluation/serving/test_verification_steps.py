"""A measurement takes real steps of a target, and leaves its contexts as they were. No time is
tested."""

import pytest
import torch

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.serving.measuring import check_decodes, steps_of, warnings_of
from dspark_megatron.evaluation.serving.settings import StepSettings
from dspark_megatron.evaluation.serving.sps_table import AdditiveSps, SampledSps
from support.tiny_target import tiny_config


def steps(runtime, config):
    """Logits of the same step of two requests, twice; of the whole sequences, at once; a table."""
    from dspark_megatron.evaluation.serving.verification_steps import Verifier, measured_steps
    from dspark_megatron.run.check import check

    plan = check(config, runtime.world_size)
    verifier = Verifier(plan, runtime, context_length=20)
    prompts = torch.cat([verifier.token_ids(1, 20) for _ in range(2)])
    new = verifier.token_ids(2, 3)
    whole = verifier.target.states(Batch(torch.cat([prompts, new], dim=1)))
    verifier.generator.manual_seed(0)
    cache = verifier.contexts(2)
    twice = [verifier.verify(cache, new) for _ in range(2)]
    settings = StepSettings(batch_tokens=(4, 1, 2), requests=(3, 1), context_length=20, rounds=1)
    return (
        twice,
        verifier.head.logits(whole.last_hidden[:, -3:]),
        measured_steps(plan, runtime, settings),
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_a_step_verifies_and_forgets(pool, tiny_run, tp):
    config = tiny_config(tiny_run, parallel={"tensor_parallel": tp})
    ranks = pool.run(steps, world=tp, tp=tp, config=config)
    for twice, whole, table in ranks:
        assert whole.shape[:2] == (2, 3)
        for logits in twice:
            torch.testing.assert_close(logits, whole)
        assert isinstance(table, AdditiveSps)
        assert (table.bs_probes, table.m_probes) == ([1, 3], [1, 2, 4])
    assert all(table == ranks[0][2] for _, _, table in ranks), "the slowest rank counts"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_tokens": (2, 4)}, r"must hold 1 and larger numbers, is \[2, 4\]"),
        ({"batch_tokens": (1,)}, r"must hold 1 and larger numbers, is \[1\]"),
        ({"requests": (65,)}, r"1 to 64, is \[65\]"),
        ({"context_length": 0}, r"--context-length \(0\) must be >= 1"),
        ({"rounds": 0}, r"--rounds \(0\)"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        StepSettings(**settings).check()


def test_positions_that_the_target_lacks_are_refused():
    settings = StepSettings(context_length=193)
    settings.check_positions(257)
    with pytest.raises(ConfigError, match=r"\(193\) and 64 tokens more .* target's 256 positions"):
        settings.check_positions(256)


@pytest.mark.parametrize(
    ("target", "world", "message"),
    [
        ({"provider": "megatron"}, 2, "'megatron' has not; set target.provider=huggingface"),
        ({}, 4, r"4 processes were started; launch parallel.tensor_parallel \(2\)"),
    ],
)
def test_ranks_that_are_no_copy_of_a_target_with_a_cache_are_refused(
    tiny_run, target, world, message
):
    config = tiny_config(tiny_run, parallel={"tensor_parallel": 2})
    for key, value in target.items():
        setattr(config.target, key, value)
    with pytest.raises(ConfigError, match=message):
        check_decodes(config, world)


def test_a_measurement_that_cannot_be_right_is_named():
    steps = steps_of(SampledSps([1, 2, 4], [10.0, 8.0, 9.0], 4), (4, 1, 2))
    assert [step["tokens"] for step in steps] == [1, 2, 4]
    assert steps[1]["tokens_per_second"] == 16 and steps[1]["ms"] == 125
    (warning,) = warnings_of(steps)
    assert "2 tokens took longer than 4" in warning
    assert not warnings_of(steps_of(SampledSps([1, 2], [10.0, 9.0], 2), (1, 2)))
