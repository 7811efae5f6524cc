"""A run of a draft whose slot 0 only carries the anchor, from training to temperatures."""

import json
import shutil

import calibrate_confidence
import pytest

from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE
from dspark_megatron.config.loading import load_config
from dspark_megatron.conversion.sidecar import read_temperatures
from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.pages.report_inputs import read_calibration, read_evaluation
from dspark_megatron.planning.on_paper.micro_batch import full_micro_batch
from dspark_megatron.run.check import check
from support.chat_lines import write_jsonl
from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, latest, run_training

MODEL = {"block_size": 4, "sample_from_anchor": False, "markov_head_type": "rnn"}
TEXTS = ("hello", "the hill", "inn well", "then all bells")


def config_of(tiny_run, output, **sections):
    train = {"output_dir": str(output), "iterations": 20, "save_every": 10, "keep_last": 9}
    return tiny_config(tiny_run, model=MODEL, train=train, **sections)


@pytest.fixture(scope="module")
def run(pool, tiny_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("anchor") / "run"
    heldout = {"every": 10, "heldout_files": tiny_run["data"]["train_files"], "heldout_samples": 3}
    write_jsonl(output.with_name("prompts.jsonl"), [{"prompt": text} for text in TEXTS])
    heldout["heldout_files"] = [str(output.with_name("heldout.jsonl"))]
    shutil.copyfile(tiny_run["data"]["train_files"][0], heldout["heldout_files"][0])
    config = config_of(tiny_run, output, evaluate=heldout)
    pool.run(run_training, world=1, tp=1, config=config)
    return output


def test_it_learns_three_slots_and_goes_on_where_it_stood(pool, tiny_run, run, tmp_path):
    """At another layout, too."""
    rows = curve(run)
    assert rows[-1]["loss"] < rows[0]["loss"] and len(rows[0]["accept_rate"]) == 3
    assert 1 < rows[0]["sampler/supervised_slots_per_block"] <= 3
    line = json.loads((run / "heldout.jsonl").read_text().splitlines()[-1])
    assert len(line["accept_rate"]) == 3 and 1 <= line["tau"] <= 4
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / "iter_0000020")
    (again / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    config = config_of(tiny_run, again, parallel={"tensor_parallel": 2})
    pool.run(run_training, world=2, tp=2, config=config)
    assert latest(again) == 20
    assert_same_curve(curve(again)[10:], rows[10:])


def test_the_plan_is_for_all_slots_of_the_draft_and_those_that_draft(tiny_run, tmp_path):
    plan = check(config_of(tiny_run, tmp_path), 1)
    blocks = full_micro_batch(plan).blocks
    assert blocks.eval_mask.shape == (6, 3) and blocks.eval_mask.all()


def evaluate(runtime, config):
    from dspark_megatron.evaluation import command
    from dspark_megatron.run.ranks.runtime import Launch

    start = command.start
    command.start = lambda *_, **__: runtime
    try:
        command.evaluate(Launch.alone(), config)
    finally:
        command.start = start


@pytest.fixture(scope="module")
def evaluated(pool, tiny_run, run):
    """By the checkpoint alone, which says what the draft is; greedy, with its records."""
    keys = {
        "target.path": tiny_run["target"]["path"],
        "evaluate.checkpoint": run,
        "evaluate.prompt_files": f"[{run.with_name('prompts.jsonl')}]",
        "evaluate.temperature": 0,
        "evaluate.max_new_tokens": 40,
        "evaluate.output": run.with_name("evaluation.json"),
        "evaluate.records": run.with_name("drafts.safetensors"),
    }
    config = load_config(None, [f"{key}={value}" for key, value in keys.items()], trains=False)
    pool.run(evaluate, world=1, tp=1, config=config)
    return run.with_name("evaluation.json")


def test_decoding_counts_the_tokens_that_are_drafted(evaluated):
    """And the estimate, which reads the answers in one pass, foresees every round of it."""
    found = read_evaluation(evaluated)
    assert (found["block_size"], found["num_draft_tokens"]) == (4, 3)
    (figures,) = found["files"].values()
    assert figures["identical_to_plain"] == figures["prompts"] == 4
    assert len(figures["accept_rate"]) == len(figures["prefix_survival"]) == 3
    assert figures["tau"] > 1.05, "the draft should be right now and then"
    assert figures["estimate"]["rounds"] == figures["rounds"]
    # Later slots of a last round may lie past the end, where only decoding looks.
    assert figures["estimate"]["accept_rate"][0] == pytest.approx(figures["accept_rate"][0])


def test_a_temperature_for_each_draft_token(evaluated, tmp_path, capsys):
    """As SGLang counts them: its gamma is the number of draft tokens."""
    records = evaluated.with_name("drafts.safetensors")
    assert DraftRecords.load(records).num_draft_tokens == 3
    calibrate_confidence.main(["--records", str(records), "--output", str(tmp_path / "out")])
    assert len(read_temperatures(tmp_path / "out", 3)) == 3
    with pytest.raises(ConfigError, match="for each of the 4 draft tokens"):
        read_temperatures(tmp_path / "out", 4)
    evaluation = read_evaluation(evaluated)
    assert read_calibration(tmp_path / "out" / "calibration.json", evaluation)
    counted = ((3, 3, True), (4, 3, True), (4, 4, False), (5, 4, False))
    for size, tokens, fits in counted:  # layouts count the anchor, or do not
        config = {"sample_from_anchor": False, "block_size": size, "num_speculative_tokens": tokens}
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        arguments = ["--records", str(records), "--output", str(tmp_path / "out")]
        assert calibrate_confidence.main(arguments) == (DONE if fits else BAD_INPUT)
        assert ("choose the folder of the draft" in capsys.readouterr().err) == (not fits)
