"""Whole runs: the same curve for every layout, across kills and resumes, and one export."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.draft_records import DraftRecords
from support.paths import ROOT
from support.tiny_target import make_target, tiny_config
from support.training_runs import (
    assert_same_curve,
    curve,
    curve_lines,
    finish,
    kill_tree,
    latest,
    launch,
    run_training,
    run_until_stopped,
    status,
    torchrun,
    write_config,
)


def test_training_learns(unbroken):
    rows = curve(unbroken)
    assert len(rows) == 20
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["tau"] > rows[0]["tau"]


# World size, tensor-parallel size, sequence parallel, micro-batch size.
LAYOUTS = [(2, 2, False, 2), (2, 1, False, 1), (4, 2, True, 1), (4, 4, False, 4)]


@pytest.mark.parametrize("world, tp, sequence_parallel, micro_batch_size", LAYOUTS)
def test_the_curve_does_not_depend_on_the_layout(
    pool, tiny_run, unbroken, tmp_path, world, tp, sequence_parallel, micro_batch_size
):
    settings = {"output_dir": str(tmp_path), "micro_batch_size": micro_batch_size}
    parallel = {"tensor_parallel": tp, "sequence_parallel": sequence_parallel}
    config = tiny_config(tiny_run, train=settings, parallel=parallel)
    pool.run(run_training, world=world, tp=tp, config=config)
    assert_same_curve(curve(tmp_path), curve(unbroken))


def test_bfloat16_with_fp32_main_weights_follows_float32(pool, tiny_run, unbroken, tmp_path):
    """bf16 has 8 bits: losses near the fp32 ones, on one rank and with a sharded optimizer."""
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path), "dtype": "bfloat16"})
    pool.run(run_training, world=2, tp=1, config=config)
    for mine, theirs in zip(curve(tmp_path), curve(unbroken), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def wait_for(condition, process, seconds=240):
    for _ in range(seconds * 500):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)  # a tiny run takes a fraction of a second between checkpoints
    raise AssertionError("it did not happen in time")


def test_killed_stopped_and_continued_at_other_layouts(tiny_run, unbroken, tmp_path):
    """kill -9 at TP 2, then SIGTERM on one rank, which saves at once, then two data-parallel."""
    output = tmp_path / "run"
    lines = output / "metrics.jsonl"
    config_file = write_config(
        tmp_path, tiny_run, train={"output_dir": str(output)}, parallel={"tensor_parallel": 2}
    )
    process = launch(config_file, 2)
    wait_for(lambda: latest(output) >= 5, process)
    kill_tree(process)
    killed_at, of_the_killed = latest(output), lines.stat().st_ino
    assert killed_at < 15, "the run was nearly over before it could be killed"
    process = launch(config_file, 1, "parallel.tensor_parallel=1", "train.save_every=1000")
    wait_for(lambda: lines.stat().st_ino != of_the_killed, process)  # its last lines are dropped
    wait_for(lambda: len(curve_lines(output)) > killed_at, process)
    os.kill(process.pid, signal.SIGTERM)
    code, text = finish(process)
    assert f"iter_{killed_at:07d}" in text and "stopped by a signal" in text
    assert killed_at < latest(output) < 20
    code, text = finish(launch(config_file, 2, "parallel.tensor_parallel=1"))
    assert code == 0, text
    assert_same_curve(curve(output), curve(unbroken))


def resave(runtime, config, checkpoints):
    """Load the newest checkpoint of the config's run at this layout and save it elsewhere."""
    from dspark_megatron.mcore.optimizer import build_optimizer, wrap_data_parallel
    from dspark_megatron.run import checkpoints as c
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    optimizer = build_optimizer(
        config.optimizer, wrap_data_parallel(draft, config.optimizer), plan.dtype
    )
    folder = c.iteration_folder(Path(config.train.output_dir, "checkpoints"), 20)
    state = c.load_checkpoint(folder, draft, optimizer)
    c.save_checkpoint(checkpoints, state, c.read_meta(folder), draft, optimizer, keep_last=3)


@pytest.mark.parametrize("world, tp", [(2, 2), (4, 4), (2, 1)])
def test_a_checkpoint_of_any_layout_exports_the_same_bytes(
    pool, tiny_run, unbroken, tmp_path, world, tp
):
    from dspark_megatron.conversion.export import export_checkpoint

    config = tiny_config(
        tiny_run, train={"output_dir": str(unbroken)}, parallel={"tensor_parallel": tp}
    )
    pool.run(resave, world=world, tp=tp, config=config, checkpoints=tmp_path / "checkpoints")
    exports = [
        export_checkpoint(run, config.target.path, tmp_path / f"export_{i}")
        for i, run in enumerate((unbroken, tmp_path))
    ]
    for file in ("model.safetensors", "config.json"):
        assert (exports[0] / file).read_bytes() == (exports[1] / file).read_bytes(), file


def test_only_the_newest_checkpoints_are_kept(unbroken):
    names = sorted(p.name for p in (unbroken / "checkpoints").iterdir())
    assert names == [
        "iter_0000010",
        "iter_0000015",
        "iter_0000020",
        "latest_checkpointed_iteration.txt",
    ]


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"block_size": 4}}, "shape.block_size: 3 there, 4 here"),
        ({"train": {"seed": 9}}, "seed: 1234 there, 9 here"),
        ({"data": {"max_length": 40}}, "data_fingerprint"),
        ({"data": {"weights": [2.0]}}, "data_fingerprint"),
    ],
)
def test_a_run_with_other_settings_is_not_continued(pool, tiny_run, unbroken, sections, message):
    settings = {**sections, "train": {**sections.get("train", {}), "output_dir": str(unbroken)}}
    with pytest.raises(AssertionError, match=message):
        pool.run(run_training, world=1, tp=1, config=tiny_config(tiny_run, **settings))


def test_a_log_interval_survives_a_stop_in_its_middle(pool, tiny_run, tmp_path):
    """Stopped after 10 steps and logged every 4: the line at 12 is the mean of 9 to 12."""
    runs = {name: tmp_path / name for name in ("whole", "halted")}
    for name, output in runs.items():
        settings = {"output_dir": str(output), "log_every": 4}
        config = tiny_config(tiny_run, train=settings, parallel={"tensor_parallel": 2})
        if name == "halted":
            pool.run(run_until_stopped, world=4, tp=2, config=config, steps=10)
            assert latest(output) == 10
        pool.run(run_training, world=2, tp=2, config=config)
    assert_same_curve(curve(runs["halted"]), curve(runs["whole"]))


def test_a_time_limit_that_one_rank_has_reached_stops_all_after_a_step(
    pool, tiny_run, unbroken, tmp_path
):
    """Each start takes one step, however long it took to get there, and saves it."""
    settings = {"output_dir": str(tmp_path), "iterations": 20, "log_every": 4}
    limited = tiny_config(tiny_run, train={**settings, "exit_duration_minutes": 90.0})
    for steps in (1, 2):
        pool.run(run_training, world=2, tp=1, config=limited, minutes_ago=(0, 91))
        assert (latest(tmp_path), status(tmp_path)) == (steps, "stopped\n")
    pool.run(run_training, world=2, tp=1, config=limited, minutes_ago=(0, 0))
    assert (latest(tmp_path), status(tmp_path)) == (20, "completed\n")
    grad_norms = {row["iteration"]: row["grad_norm"] for row in curve(unbroken)}
    assert curve(tmp_path)[-1]["grad_norm"] == pytest.approx(grad_norms[20], rel=1e-4)


def test_a_signal_before_the_first_step_stops_all_ranks_there(pool, tiny_run, tmp_path):
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path)})
    pool.run(run_training, world=2, tp=2, config=config, stopped=(1,))
    assert (latest(tmp_path), status(tmp_path)) == (0, "stopped\n")


def test_a_lengthened_run_is_no_longer_complete(pool, tiny_run, unbroken, tmp_path):
    assert status(unbroken) == "completed\n"
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    for iterations, stopped in ((40, (0,)), (20, (0,))):  # complete already: nothing to stop
        config = tiny_config(
            tiny_run, train={"output_dir": str(tmp_path), "iterations": iterations}
        )
        pool.run(run_training, world=1, tp=1, config=config, stopped=stopped)
        assert status(tmp_path) == ("stopped\n" if iterations == 40 else "completed\n")


def test_without_the_distributed_optimizer_at_another_layout(pool, tiny_run, unbroken, tmp_path):
    plain = {"use_distributed_optimizer": False}
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path)}, optimizer=plain)
    pool.run(run_until_stopped, world=1, tp=1, config=config, steps=7)
    split = tiny_config(
        tiny_run,
        train={"output_dir": str(tmp_path)},
        optimizer=plain,
        parallel={"tensor_parallel": 2},
    )
    pool.run(run_training, world=4, tp=2, config=split)
    assert_same_curve(curve(tmp_path), curve(unbroken))


def test_learning_rate_and_length_may_change_on_the_way(pool, tiny_run, tmp_path):
    before = tiny_config(tiny_run, train={"output_dir": str(tmp_path)})
    pool.run(run_until_stopped, world=1, tp=1, config=before, steps=6, number=signal.SIGINT)
    settings = {"output_dir": str(tmp_path), "iterations": 10}
    after = tiny_config(tiny_run, train=settings, optimizer={"lr": 1e-3, "min_lr_ratio": 0.5})
    pool.run(run_training, world=1, tp=1, config=after)
    rates = [row["learning_rate"] for row in curve(tmp_path)]
    assert max(rates) == rates[3] == 1e-2
    cosine = [0.5 + 0.5 * (1 + math.cos(math.pi * (i - 2) / 8)) / 2 for i in range(7, 11)]
    assert rates[6:] == pytest.approx([1e-3 * c for c in cosine])


def test_other_loss_weights_are_not_continued(pool, tiny_run, unbroken):
    config = tiny_config(tiny_run, train={"output_dir": str(unbroken)}, loss={"ce_loss_alpha": 0.5})
    with pytest.raises(AssertionError, match="loss.ce_loss_alpha: 0.1 there, 0.5 here"):
        pool.run(run_training, world=1, tp=1, config=config)


YOUNGER_KEYS = (
    "tvd_loss_alpha",
    "kl_loss_alpha",
    "ce_labels",
    "anchor_rule",
    "supervised_slots",
    "slot_mask",
)
"""Of the loss section; the first checkpoints lack them."""


@pytest.fixture
def old_run(unbroken, tmp_path):
    """The run as an older version would have left it: fewer keys and fewer kept sums."""
    output = tmp_path / "old"
    shutil.copytree(unbroken, output)
    file = output / "checkpoints" / "iter_0000020" / "dspark.json"
    meta = json.loads(file.read_text())
    for key in YOUNGER_KEYS:
        del meta["loss"][key]
    meta["open_metrics"] = meta["open_metrics"][1:]
    file.write_text(json.dumps(meta))
    return output


def test_a_checkpoint_without_younger_keys_is_continued_at_their_defaults(pool, tiny_run, old_run):
    config = tiny_config(tiny_run, train={"output_dir": str(old_run), "iterations": 21})
    pool.run(run_training, world=1, tp=1, config=config)
    assert curve(old_run)[-1]["iteration"] == 21


def test_a_checkpoint_without_younger_keys_has_no_other_values(pool, tiny_run, old_run):
    settings = {"output_dir": str(old_run), "iterations": 21}
    config = tiny_config(tiny_run, train=settings, loss={"anchor_rule": "token"})
    with pytest.raises(AssertionError, match="loss.anchor_rule: 'label' there, 'token' here"):
        pool.run(run_training, world=1, tp=1, config=config)


def test_the_same_loss_in_other_words_is_continued(pool, tiny_run, unbroken, tmp_path):
    """A preset whose every difference is taken back, and other sizes of chunks."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    config = tiny_config(
        tiny_run,
        train={"output_dir": str(tmp_path), "iterations": 21},
        loss={
            "preset": "modelopt",
            "anchor_rule": "label",
            "supervised_slots": "prefix",
            "normalization": "global_step",
            "chunk_rows": None,
            "memory_budget_mb": 64,
        },
    )
    pool.run(run_training, world=1, tp=1, config=config)
    assert curve(tmp_path)[-1]["iteration"] == 21


def layers_of_the_target(runtime, config):
    """Train; how many decoder layers the target ran."""
    from dspark_megatron.run import states as states_source

    build, targets = states_source.build_target, []

    def kept(*arguments, **options):
        targets.append(build(*arguments, **options))
        return targets[0]

    states_source.build_target = kept
    try:
        run_training(runtime, config)
    finally:
        states_source.build_target = build
    return len(targets[0].layers)


@pytest.mark.parametrize("has_head", [False, True])
def test_cross_entropy_alone_needs_no_teacher(pool, tiny_run, tmp_path, has_head):
    """At two layouts as beside a teacher of no weight worth the name."""
    alone = {"l1_loss_alpha": 0.0, "confidence_head_alpha": 0.0}
    runs = [(1, alone, 3), (2, alone, 3), (1, {**alone, "l1_loss_alpha": 1e-12}, 4)]
    curves = []
    for i, (tp, loss, layers) in enumerate(runs):
        config = tiny_config(
            tiny_run,
            model={"enable_confidence_head": has_head, "confidence_head_with_markov": has_head},
            loss=loss,
            train={"output_dir": str(tmp_path / str(i)), "iterations": 6},
            parallel={"tensor_parallel": tp},
        )
        assert pool.run(layers_of_the_target, world=tp, tp=tp, config=config) == [layers] * tp
        curves.append(curve(tmp_path / str(i)))
    assert "tau" not in curves[0][0] and "tau" in curves[2][0]
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other, strict=True):
            for name in ("loss", "ce_loss", "grad_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert curves[0][-1]["loss"] < curves[0][0]["loss"]


def save_untrained(runtime, config):
    from dspark_megatron.run import checkpoints as c
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.identity import export_settings, run_identity

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    meta = {"format": 1, **run_identity(plan), **export_settings(plan)}
    checkpoints = Path(config.train.output_dir, "checkpoints")
    c.save_checkpoint(checkpoints, c.RunState(0, 0), meta, draft, optimizer=None, keep_last=1)


def test_tp_3_exports_the_bytes_of_tp_1(pool, tiny_run, tmp_path):
    """Nine query and three key/value heads, as in SmolLM2."""
    from dspark_megatron.conversion.export import export_checkpoint

    target = make_target(tmp_path / "target", hidden_size=36, heads=9, kv_heads=3)
    exports = []
    for tp in (1, 3):
        run = tmp_path / f"tp{tp}"
        config = tiny_config(
            tiny_run,
            target={"path": str(target)},
            train={"output_dir": str(run)},
            parallel={"tensor_parallel": tp},
        )
        pool.run(save_untrained, world=tp, tp=tp, config=config)
        exports.append(export_checkpoint(run, target, tmp_path / f"export{tp}"))
    for file in ("model.safetensors", "config.json"):
        assert (exports[0] / file).read_bytes() == (exports[1] / file).read_bytes(), file


def listing_command():
    """The first of docs/checkpoints.md that lists tensors."""
    lines = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if "load_tensors_metadata as load" in line)
    return shlex.split(line)[1:]


def test_megatron_lists_a_checkpoint(unbroken, tmp_path):
    """In a process that knows nothing of this package."""
    from dspark_megatron.conversion.layouts.names import megatron_shapes
    from dspark_megatron.storage.training_checkpoint import CheckpointReader

    folder = unbroken / "checkpoints" / "iter_0000020"
    command = [sys.executable, *listing_command()[:-1], str(folder)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert not done.returncode, done.stderr
    listed = {}
    for line in done.stdout.splitlines():
        name, rest = line.split(" ", 1)
        listed[name] = rest
    draft = {name: rest for name, rest in listed.items() if not name.startswith("optimizer.")}
    shapes = megatron_shapes(CheckpointReader(folder).shape)
    assert draft == {name: f"{shape} torch.float32" for name, shape in shapes.items()}
    states = ("optimizer.state.exp_avg", "optimizer.state.exp_avg_sq")
    assert set(listed) - set(draft) >= {f"{state}.{name}" for state in states for name in shapes}


def test_megatron_reads_what_is_no_tensor(unbroken):
    from megatron.core import dist_checkpointing

    folder = str(unbroken / "checkpoints" / "iter_0000020")
    assert dist_checkpointing.check_is_distributed_checkpoint(folder)
    assert "optimizer" in dist_checkpointing.load_common_state_dict(folder)
    metadata = dist_checkpointing.load_content_metadata(folder)
    assert metadata["distrib_optim_sharding_type"] == "fully_reshardable"


def test_megatron_finds_the_newest_checkpoint(unbroken):
    found = pytest.importorskip("megatron.training.checkpointing", reason="0.19's wheel has it")
    checkpoints = str(unbroken / "checkpoints")
    tracker = found.get_checkpoint_tracker_filename(checkpoints)
    assert found.read_metadata(tracker) == (20, False)
    folder = found.get_checkpoint_name(checkpoints, 20, return_base_dir=True)
    assert found._get_checkpoint_format(folder, None) == "torch_dist"


def test_another_target_is_not_continued(pool, tiny_run, unbroken, tmp_path):
    other = make_target(tmp_path / "other", seed=1)
    config = tiny_config(tiny_run, target={"path": str(other)}, train={"output_dir": str(unbroken)})
    with pytest.raises(AssertionError, match="target_fingerprint"):
        pool.run(run_training, world=1, tp=1, config=config)


def test_an_output_directory_that_cannot_be_made(tiny_run, tmp_path):
    from dspark_megatron.run.output import claim_output

    (tmp_path / "file").write_text("in the way")
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match="must be writable"):
        claim_output(Path(config.train.output_dir), config)


def test_checkpoints_are_not_overwritten_when_resuming_is_off(tiny_run, unbroken):
    from dspark_megatron.run.output import claim_output

    config = tiny_config(tiny_run, train={"output_dir": str(unbroken), "resume": False})
    with pytest.raises(ConfigError, match="train.resume"):
        claim_output(unbroken, config)


@pytest.mark.commands
def test_bad_settings_end_all_ranks_with_one_message(tiny_run, tmp_path):
    settings = {name: dict(values) for name, values in tiny_run.items()}
    settings["parallel"] = {"tensor_parallel": 2}
    settings["model"]["num_attention_heads"] = 9
    settings["model"]["num_key_value_heads"] = 3
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    code, text = finish(launch(path, 2))
    assert code != 0
    assert text.count("must be divisible by parallel.tensor_parallel (2)") == 1
    assert "query heads (9), key/value heads (3)" in text and "that work here: [1]" in text


FAILING_JOB = """
import sys, torch
from dspark_megatron.run.runtime import launch, start
def main():
    with launch() as job:
        runtime = start(job, 1)
        if job.rank == 1:
            raise RuntimeError("disk on fire")
        torch.distributed.barrier()
if __name__ == "__main__":
    main()
"""


@pytest.mark.commands
def test_a_failure_on_one_rank_ends_all_with_its_message(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(FAILING_JOB)
    done = subprocess.run(
        torchrun(2, str(script)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "rank 1 failed" in text and "disk on fire" in text
    assert "rank 0 failed" not in text, "only the first failure is shown"


def test_tensorboard_has_the_scalars(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(unbroken / "tensorboard"))
    board.Reload()
    losses = [event.value for event in board.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in curve(unbroken)], rel=1e-6)
    assert "accept_rate/2" in board.Tags()["scalars"]


def megatron_logits(runtime, config):
    """Whole draft logits and confidence of the run's last checkpoint on a fixed sample."""
    import torch

    from dspark_megatron.ops.vocab_parallel import gather_vocab
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints import load_checkpoint
    from dspark_megatron.storage.training_checkpoint import find_checkpoint
    from support.tiny_draft import make_samples, sample_logits

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    load_checkpoint(find_checkpoint(config.train.output_dir), draft, optimizer=None)
    samples = make_samples(plan.shape, lengths=(20,))
    ids, anchors = samples.input_ids[0], torch.tensor([2, 7, 16])
    _, logits, confidence = sample_logits(draft, samples.taps[0], ids, anchors)
    logits = gather_vocab(logits, plan.shape.vocab_size, tp_group=runtime.tp_group)
    return plan.shape, samples.taps[0], ids, anchors, logits, confidence


def test_the_export_gives_the_same_logits(pool, tiny_run, unbroken, tmp_path):
    import torch
    from safetensors.torch import load_file

    from dspark_megatron.conversion.export import export_checkpoint
    from dspark_megatron.conversion.folder_writer import WriteOptions
    from support.reference import PlainDraft

    config = tiny_config(
        tiny_run, train={"output_dir": str(unbroken)}, parallel={"tensor_parallel": 2}
    )
    shape, taps, ids, anchors, logits, confidence = pool.run(
        megatron_logits, world=2, tp=2, config=config
    )[0]
    options = WriteOptions(dtype=torch.float32)
    export = export_checkpoint(unbroken, config.target.path, tmp_path / "export", options)
    plain = PlainDraft(shape)
    plain.load_state_dict(load_file(export / "model.safetensors"), strict=True)
    with torch.no_grad():
        own = plain(taps, ids, anchors)
    torch.testing.assert_close(logits, own.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(confidence, own.confidence_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.commands
def test_the_evaluate_command(tiny_run, unbroken, tmp_path):
    """Two replicas of two ranks share out three prompts; the checkpoint was trained on one."""
    files = []
    for name, prompts in {"a": ["hello", "the hill"], "b": ["inn well"]}.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    settings = {
        "prompt_files": [str(f) for f in files],
        "max_new_tokens": 10,
        "output": str(tmp_path / "out.json"),
        "records": str(tmp_path / "drafts.safetensors"),
        "batch_size": 2,
    }
    config_file = write_config(
        tmp_path,
        tiny_run,
        train={"output_dir": str(unbroken)},
        evaluate=settings,
        parallel={"tensor_parallel": 2},
    )
    code, text = finish(launch(config_file, 4, module="evaluate"))
    assert code == 0, text
    assert "speed-up" in text
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["iteration"] == 20
    assert result["files"]["all"]["prompts"] == 3
    assert result["files"][str(files[0])]["identical_to_plain"] == 2
    assert 1 <= result["files"]["all"]["tau"] <= 4
    records = DraftRecords.load(tmp_path / "drafts.safetensors")
    assert records.facts["iteration"] == 20 and records.prompt.unique().tolist() == [0, 1, 2]
    assert len(records) == result["files"]["all"]["rounds"]
    kept = records.accepted.sum().item() / len(records)
    assert kept <= result["files"]["all"]["tau"] <= kept + 1
    greedy = records.accept_rate[records.judged()]
    assert set(greedy.tolist()) <= {0, 1}, "at temperature 0 a token is kept for sure or never"
    assert records.confidence_logits.isfinite().all()
