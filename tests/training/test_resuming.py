"""The end of a run and where it continues from: in what was asked for, and from whole files."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_megatron.config import TrainConfig
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from dspark_megatron.training.ending.run_end import RunEnd
from support.tiny_target import tiny_config
from support.training_runs import curve, latest, run_training, run_until_stopped, status


def train_config(**values):
    config = TrainConfig(output_dir="x", **values)
    config.validate()
    return config


def test_a_run_of_epochs_ends_at_the_same_sample_at_any_batch_size():
    """80 samples: 20 steps of 4, or 10 steps of 4 and 5 of 8."""
    small = RunEnd.of(train_config(epochs=4.0, global_batch_size=4), 20)
    large = RunEnd.of(train_config(epochs=4.0, global_batch_size=8), 20)
    half = RunState(10, 40)
    assert (small.last_iteration(half), large.last_iteration(half)) == (20, 15)
    assert not large.is_reached(RunState(14, 72)) and large.is_reached(RunState(15, 80))
    assert small.progress(half) / (small.steps * small.progress_of_a_step) == 0.5
    assert large.progress(half) / (large.steps * large.progress_of_a_step) == 0.5
    assert large.describe(half) == "iteration 10, 40 of 80 samples"
    filled = replace(half, consumed_samples=83)
    assert large.describe(filled) == "iteration 10, 80 of 80 samples, 3 more in the last batch"


def test_a_run_of_iterations_ends_at_the_same_iteration_at_any_batch_size():
    for size in (4, 8):
        end = RunEnd.of(train_config(iterations=20, global_batch_size=size), 20)
        assert end.last_iteration(RunState(10, 40)) == 20
        assert not end.is_reached(RunState(19, 1000)) and end.is_reached(RunState(20, 60))
    past = RunState(24, 96)
    assert end.is_reached(past) and end.last_iteration(past) == 24
    assert end.describe(past) == "iteration 24 of 20"


@pytest.fixture(scope="module")
def half_done(pool, tiny_run, tmp_path_factory):
    """One epoch of 24 samples in steps of 4, stopped after three; saved after each."""
    output = tmp_path_factory.mktemp("half_done")
    pool.run(run_until_stopped, world=1, tp=1, config=config_of(tiny_run, output), steps=3)
    assert (latest(output), status(output)) == (3, "stopped\n")
    return output


def config_of(tiny_run, output, **train):
    settings = {"iterations": None, "epochs": 1.0, "save_every": 1, "keep_last": 9}
    train = {**settings, "output_dir": str(output), **train}
    return tiny_config(tiny_run, train=train, optimizer={"warmup_ratio": 0.0})


@pytest.fixture
def run(half_done, tmp_path):
    shutil.copytree(half_done, tmp_path / "run")
    return tmp_path / "run"


def train_on(pool, config, function=run_training):
    pool.run(function, world=1, tp=1, config=config)


def test_a_larger_batch_on_the_way_leaves_the_end_where_it_was(pool, tiny_run, run):
    train_on(pool, config_of(tiny_run, run, global_batch_size=6))
    rows = curve(run)
    assert [row["consumed_samples"] for row in rows] == [4, 8, 12, 18, 24]
    assert status(run) == "completed\n"
    cosine = [0.5 + 0.5 * math.cos(math.pi * row["consumed_samples"] / 24) for row in rows]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 * c for c in cosine])


def train_without_data(runtime, config):
    """A start that may read neither data nor target."""
    from dspark_megatron.training import loop

    kept = loop.load_train_data, loop.build_run_draft

    def refused(*_, **__):
        raise AssertionError("read too early")

    loop.load_train_data = loop.build_run_draft = refused
    try:
        run_training(runtime, config)
    finally:
        loop.load_train_data, loop.build_run_draft = kept


def train_without_target(runtime, config):
    from dspark_megatron.training import loop

    kept, loop.states_source = loop.states_source, None
    try:
        run_training(runtime, config)
    finally:
        loop.states_source = kept


@pytest.mark.parametrize(
    "asked", [{"iterations": 2, "epochs": None}, {"iterations": 3, "epochs": None}, {"epochs": 0.5}]
)
def test_a_run_at_or_past_its_end_is_completed_before_data_are_read(pool, tiny_run, run, asked):
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    pool.run(train_without_data, world=2, tp=2, config=tp2(config_of(tiny_run, run, **asked)))
    assert (latest(run), status(run)) == (3, "completed\n")
    assert before == {path: path.read_bytes() for path in run.glob("*.*")}


def tp2(config):
    config.parallel.tensor_parallel = 2
    return config


def test_a_run_of_an_older_version_past_its_end_is_completed_after_the_data(pool, tiny_run, run):
    """Its checkpoint does not say how many samples it has, and has no checksums."""
    (run / "checkpoints" / "iter_0000003" / "checksums.json").unlink()
    file = run / "checkpoints" / "iter_0000003" / "dspark.json"
    meta = json.loads(file.read_text())
    del meta["num_samples"], meta["resumed_from"]
    file.write_text(json.dumps(meta))
    config = config_of(tiny_run, run, epochs=0.5)
    with pytest.raises(AssertionError, match="read too early"):
        train_on(pool, config, train_without_data)
    train_on(pool, config, train_without_target)
    assert (latest(run), status(run)) == (3, "completed\n")


def test_other_data_are_seen_even_when_the_run_is_over(pool, tiny_run, run):
    config = config_of(tiny_run, run, epochs=0.5)
    config.data.max_length = 40
    with pytest.raises(AssertionError, match="data_fingerprint"):
        train_on(pool, config)


def resumed_from(run):
    return json.loads((find_checkpoint(run) / "dspark.json").read_text())["resumed_from"]


def test_a_run_goes_on_from_a_named_iteration_and_then_from_the_newest(pool, tiny_run, run):
    """The same command, stopped twice."""
    shutil.rmtree(run / "checkpoints" / "iter_0000003")  # the tracker names it
    config = config_of(tiny_run, run, resume_from=1)
    pool.run(run_until_stopped, world=1, tp=1, config=config, steps=1)
    assert latest(run) == 2 and [row["iteration"] for row in curve(run)] == [1, 2]
    assert resumed_from(run) == 1
    pool.run(run_until_stopped, world=1, tp=1, config=config, steps=1)
    assert latest(run) == 3
    train_on(pool, config)
    assert (latest(run), status(run)) == (6, "completed\n")
    assert [row["iteration"] for row in curve(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_tracker_is_lost_goes_on_from_its_newest_checkpoint(pool, tiny_run, run):
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(b"\xff\0")
    before = curve(run)
    train_on(pool, config_of(tiny_run, run, epochs=0.5))  # over before it begins
    assert (latest(run), status(run)) == (3, "completed\n")
    tracker.unlink()
    train_on(pool, config_of(tiny_run, run))
    assert (latest(run), status(run)) == (6, "completed\n")
    assert curve(run)[:3] == before and len(curve(run)) == 6


def test_a_new_run_over_checkpoints_is_refused_or_sets_them_aside(pool, tiny_run, run):
    checkpoints = run / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(AssertionError, match="holds 3 checkpoints and train.resume is false; name"):
        train_on(pool, config_of(tiny_run, run, resume=False))
    config = config_of(tiny_run, run, resume=False, overwrite=True)
    with pytest.raises(AssertionError, match="NoneType"):
        train_on(pool, config, train_without_target)
    assert len(list(checkpoints.glob("iter_*"))) == 3, "the new run had not started"
    train_on(pool, config)
    assert len(list(checkpoints.glob("replaced_1/iter_*"))) == 3
    assert (latest(run), status(run)) == (6, "completed\n")
    assert [row["iteration"] for row in curve(run)] == [1, 2, 3, 4, 5, 6]
    assert find_checkpoint(checkpoints / "replaced_1").name == "iter_0000003"


def test_overwriting_and_continuing_exclude_each_other():
    with pytest.raises(ConfigError, match="train.overwrite=true starts anew .*resume=false to"):
        train_config(iterations=1, overwrite=True)


def test_an_iteration_that_is_not_there_cannot_be_continued(pool, tiny_run, run):
    with pytest.raises(AssertionError, match="no checkpoint of iteration 7; there: iter_0000001"):
        train_on(pool, config_of(tiny_run, run, resume_from=7))
    with pytest.raises(ConfigError, match="train.resume_from .1. must be the iteration"):
        train_config(iterations=1, resume=False, resume_from=1)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE = [
    ("__0_0.distcp", cut, "__0_0.distcp is damaged or incomplete (cut short: it has "),
    (
        "__0_0.distcp",
        Path.unlink,
        "__0_0.distcp is damaged or incomplete (it is not there, and had ",
    ),
    (
        "__0_0.distcp",
        lengthen,
        "__0_0.distcp is damaged or incomplete (of another save: it has ",
    ),
    ("common.pt", cut, "common.pt is damaged or incomplete (cut short"),
    ("common.pt", Path.unlink, "common.pt is damaged or incomplete (it is not there"),
    ("metadata.json", Path.unlink, "metadata.json is damaged or incomplete (it is not there"),
    (".metadata", cut, ".metadata is damaged or incomplete"),
    ("dspark.json", cut, "dspark.json is damaged or incomplete"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGE)
def test_a_damaged_checkpoint_names_the_file_and_the_way_out(
    pool, tiny_run, run, name, damage, message
):
    file = run / "checkpoints" / "iter_0000003" / name
    if not file.is_file():
        pytest.skip("a newer Megatron-Core keeps it among the tensors")
    damage(file)
    with pytest.raises(AssertionError) as error:
        train_on(pool, config_of(tiny_run, run), train_without_data)
    assert message in str(error.value)
    assert "whole is iter_0000002): train.resume_from=2 continues" in str(error.value)


def test_the_way_out_of_a_damaged_checkpoint_works(pool, tiny_run, run):
    cut(run / "checkpoints" / "iter_0000003" / "__0_0.distcp")
    config = config_of(tiny_run, run, resume_from=2)
    pool.run(run_until_stopped, world=1, tp=1, config=config, steps=1)
    assert (latest(run), resumed_from(run)) == (3, 2)
    cut(run / "checkpoints" / "iter_0000003" / "__0_0.distcp")  # again
    train_on(pool, config)
    assert (latest(run), status(run)) == (6, "completed\n")


def start_from(runtime, config):
    from dspark_megatron.run.check import check
    from dspark_megatron.run.initial.initial_weights import InitialWeights

    InitialWeights.open(check(config, runtime.world_size))


def evaluate(runtime, config):
    from dspark_megatron.evaluation.drafts import check_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.known_draft import evaluated_draft

    check_draft(check(config, runtime.world_size), evaluated_draft(config))


def test_all_other_readers_of_a_checkpoint_name_the_file_too(pool, tiny_run, run, tmp_path):
    shard = run / "checkpoints" / "iter_0000003" / "__0_0.distcp"
    cut(shard)
    new = config_of(tiny_run, tmp_path / "new", initial_checkpoint=str(run))
    for function, config in ((start_from, new), (evaluate, config_of(tiny_run, run))):
        with pytest.raises(AssertionError, match="__0_0.distcp is damaged or incomplete"):
            train_on(pool, config, function)
    with pytest.raises(ConfigError, match="__0_0.distcp is damaged or incomplete") as error:
        CheckpointReader(find_checkpoint(run))  # export, verify
    assert "its folder or --iteration 2 names it to other commands" in str(error.value)
