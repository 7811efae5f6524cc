"""tools/measure_sps.py takes real steps of a target, and leaves its contexts as they were. No time
is tested."""

import measure_sps
import pytest
import torch
import verification_steps

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.serving.sps_table import AdditiveSps, SampledSps, read_sps_table
from support.tiny_target import tiny_config
from support.tool_runs import run_tool


def arguments(*more, output="sps.json"):
    given = ["--config", "run.yaml", "--output", str(output), "--context-length", "20"]
    return measure_sps.parse_arguments([*given, "--rounds", "1", *more])


def plan_of(runtime, config):
    from dspark_megatron.run.check import check

    return check(config, runtime.world_size)


def steps(runtime, config):
    """Logits of the same step of two requests, twice; of the whole sequences, at once; a table."""
    plan = plan_of(runtime, config)
    verifier = verification_steps.Verifier(plan, runtime, context_length=20)
    prompts = torch.cat([verifier.token_ids(1, 20) for _ in range(2)])
    new = verifier.token_ids(2, 3)
    whole = verifier.target.states(Batch(torch.cat([prompts, new], dim=1)))
    verifier.generator.manual_seed(0)
    cache = verifier.contexts(2)
    twice = [verifier.verify(cache, new) for _ in range(2)]
    command = "--batch-tokens", "4", "1", "2", "--requests", "3", "1"
    return (
        twice,
        verifier.head.logits(whole.last_hidden[:, -3:]),
        verification_steps.measure(plan, runtime, arguments(*command)),
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


def refusals(runtime, config, folder):
    plan, messages = plan_of(runtime, config), []
    for more in (
        ["--batch-tokens", "2", "4"],
        ["--batch-tokens", "1"],
        ["--requests", "65"],
        ["--context-length", "200"],
        ["--rounds", "0"],
    ):
        with pytest.raises(ConfigError) as caught:
            verification_steps.check_arguments(arguments(*more, output=f"{folder}/sps.json"), plan)
        messages.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        verification_steps.check_arguments(arguments(output=str(folder)), plan)
    return [*messages, str(caught.value)]


def test_what_cannot_be_measured_is_refused(pool, tiny_run, tmp_path):
    (found,) = pool.run(refusals, world=1, tp=1, config=tiny_config(tiny_run), folder=tmp_path)
    wanted = [
        "must hold 1 and larger numbers, is [2, 4]",
        "must hold 1 and larger numbers, is [1]",
        "1 to 64, is [65]",
        "--context-length (200) must be >= 1, and with 64 tokens more at most the target's 256",
        "--rounds (0)",
        "is a folder; name a file",
    ]
    for message, part in zip(found, wanted, strict=True):
        assert part in message


def test_a_measurement_that_cannot_be_right_is_named():
    table = SampledSps([1, 2, 4], [10.0, 8.0, 9.0], 4)
    assert "2 tokens took longer than 4" in verification_steps.show(table, [1, 2, 4])
    assert "warning" not in verification_steps.show(SampledSps([1, 2], [10.0, 9.0], 2), [1, 2])


@pytest.mark.slow
def test_the_command_writes_a_table(tiny_run, tmp_path):
    config, output = tmp_path / "run.yaml", tmp_path / "sps.json"
    config.write_text(tiny_config(tiny_run).to_yaml())
    command = ["tools/measure_sps.py", "--config", config, "target.dtype=bfloat16"]
    command += ["--output", output, "--context-length=20", "--rounds=1", "--batch-tokens", "1", "3"]
    text = run_tool(*command)
    table = read_sps_table(output)
    assert isinstance(table, SampledSps) and table.sample_batch_tokens == [1, 3]
    assert "steps / s" in text
