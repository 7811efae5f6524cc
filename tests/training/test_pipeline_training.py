"""Training with a target in pipeline stages, through the real loop: the run of the whole target."""

import json
import shutil

import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from support.tiny_target import make_chats, tiny_config
from support.training_runs import assert_same_curve, curve, run_training


@pytest.fixture(scope="module")
def run(pool, tiny_run, tmp_path_factory):
    """Trains twenty steps, or goes on with an output folder; returns that."""
    heldout = make_chats(tmp_path_factory.mktemp("heldout") / "chats.jsonl", 30)

    def run(world, tp, stages, *, output=None, provider="megatron", train=None, parallel=None):
        output = output or tmp_path_factory.mktemp("run")
        config = tiny_config(
            tiny_run,
            target={"provider": provider},
            train={"output_dir": str(output), **(train or {})},
            parallel={"tensor_parallel": tp, "pipeline_parallel": stages, **(parallel or {})},
            evaluate={"every": 10, "heldout_files": [str(heldout)], "heldout_samples": 3},
        )
        pool.run(run_training, world=world, tp=tp, config=config)
        return output

    return run


@pytest.fixture(scope="module")
def whole(run):
    return run(1, 1, 1, provider="huggingface", train={"micro_batch_size": 4})


@pytest.fixture(scope="module")
def staged(run):
    """Two runs of the stages in a step."""
    return run(2, 1, 2, parallel={"pipeline_micro_batches": 1})


def estimates(output):
    lines = (output / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(output, expected):
    assert_same_curve(curve(output), curve(expected))
    found, wanted = estimates(output), estimates(expected)
    assert [row["iteration"] for row in found] == [10, 20]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["samples"] == 3
        for name in ("rounds", "tau", "block_tau"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)


def test_the_run_is_that_of_the_whole_target(staged, whole):
    """Held-out answers, too, of which one rank has one less."""
    assert_same_run(staged, whole)


@pytest.mark.parametrize("tp, size", [(2, 2), (1, 1)])
def test_the_run_does_not_depend_on_the_layout(run, whole, tp, size):
    """With tensor and sequence parallelism; with two pipelines side by side."""
    train = {"micro_batch_size": size}
    output = run(4, tp, 2, train=train, parallel={"sequence_parallel": tp > 1})
    assert_same_run(output, whole)


@pytest.mark.parametrize("start, stages", [("staged", 1), ("whole", 2)])
def test_runs_go_on_with_other_stages(run, request, whole, tmp_path, start, stages):
    """A checkpoint is of the draft alone."""
    output = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(start), output)
    checkpoints = output / "checkpoints"
    for iteration in (15, 20):
        shutil.rmtree(checkpoints / f"iter_{iteration:07d}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("10")
    before = curve(output)[:10]
    run(2, 1, stages, output=output)
    assert curve(output)[:10] == before, "it began anew"
    assert_same_curve(curve(output), curve(whole))


REFUSED = [
    ({"target": {"provider": "huggingface"}}, "pipeline_parallel .2. needs target.provider=meg"),
    ({"target": {"max_tokens_per_forward": 64}}, "max_tokens_per_forward .64. must be null"),
    ({"parallel": {"pipeline_parallel": 0}}, "pipeline_parallel .0. must be > 0"),
    ({"parallel": {"pipeline_micro_batches": 0}}, "pipeline_micro_batches .0. must be > 0"),
    ({"parallel": {"virtual_pipeline_parallel": 2}}, "virtual_pipeline_parallel .2. must be 1"),
    ({"parallel": {"context_parallel": 2}}, "context_parallel .2. must be 1"),
    ({"parallel": {"pipeline_parallel": 3}}, r"leaves the last stage without.*\[1, 2, 4\]"),
    ({"parallel": {"pipeline_parallel": 4}}, "world size .2. must be divisible by .*of 4 proc"),
    ({"parallel": {"expert_parallel": 2}}, "expert_parallel .2. needs a mixture-of-experts"),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_layouts_that_cannot_work(tiny_run, settings, message):
    target = {"provider": "megatron", **settings.get("target", {})}
    parallel = {"pipeline_parallel": 2, **settings.get("parallel", {})}
    with pytest.raises(ConfigError, match=message):
        describe_run(tiny_config(tiny_run, target=target, parallel=parallel), world_size=2)


def test_decoding_is_refused(tiny_run):
    from dspark_megatron.run.check import check

    target, parallel = {"provider": "megatron"}, {"pipeline_parallel": 2}
    config = tiny_config(tiny_run, target=target, parallel=parallel)
    with pytest.raises(ConfigError, match="pipeline_parallel .2. must be 1 to decode"):
        check(config, 2, use="evaluate")


def test_the_dry_run_counts_what_stages_hold_and_send(tiny_run):
    from dspark_megatron.planning.memory import pipeline_state_bytes, rank_memory, state_bytes
    from dspark_megatron.planning.work import step_work
    from dspark_megatron.run.check import check

    def plan(stages, per_run=None):
        parallel = {"pipeline_parallel": stages, "pipeline_micro_batches": per_run}
        train = {"global_batch_size": 32}
        target = {"provider": "megatron"}
        config = tiny_config(tiny_run, target=target, train=train, parallel=parallel)
        return check(config, world_size=4)

    whole, halves, one = plan(1), plan(2), plan(2, 1)
    states = state_bytes(halves)  # of 2 taps and the last, 8 micro-batches a rank
    assert rank_memory(halves).held["target states of a pipeline run"] == 8 * 3 * states
    assert rank_memory(one).held["target states of a pipeline run"] == 3 * states
    forward = rank_memory(one).moments["the target's forward pass"]
    assert forward["states kept for other pipeline ranks"] == 2 * 2 * states  # the last stage
    sent = {one.group: one.sent for one in step_work(halves).sent}
    assert sent["target's outputs, to the next stage"] == 2 * 8 * states
    assert sent["target's states, to their pipeline ranks"] == 8 * 2 * states
    weights = [rank_memory(one).held["frozen target"] for one in (whole, halves)]
    embedding = 301 * 32 * 4
    layers = weights[0] - embedding - 32 * 4  # and the final norm
    assert weights[1] == layers / 2 + embedding
    split = {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2}
    config = tiny_config(tiny_run, target={"provider": "megatron"}, parallel=split)
    assert pipeline_state_bytes(check(config, world_size=4)) == states / 2
    text = describe_run(halves.config, world_size=4)
    assert "2 pipeline stages x 2 data-parallel; runs of 2 x 8 micro-batches" in text
    assert "waits for 6% of the time" in text  # 1 / (2 * 8 + 1)
