"""A full disk is one sentence, and what was saved before is as it was."""

import json
import shutil
from unittest import mock

import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.checkpoints.whole import check_whole
from dspark_megatron.training.reporter import Reporter
from support.full_disk import files_of_at_most
from support.stored_states import prepare
from support.tiny_target import tiny_config
from support.training_runs import latest, run_training


@pytest.mark.parametrize("write", ["log", "log_heldout"])
def test_metrics_that_find_no_room(tmp_path, monkeypatch, write):
    for name in ("Progress", "say"):  # the test's own output is limited, too
        monkeypatch.setattr(f"dspark_megatron.training.reporter.{name}", mock.MagicMock())
    reporter = Reporter(tmp_path, iterations=9, start=0, tensorboard=False)
    row = {"iteration": 1, "loss": 1.0, "tau": 2.0}
    reporter.log(row)
    log = reporter.log if write == "log" else lambda row: reporter.log_heldout(row, is_best=False)
    with files_of_at_most(200), pytest.raises(ConfigError, match="cannot write .*jsonl: File too"):
        for _ in range(20):
            log(row)
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["loss"] == 1.0


def run_on_a_small_disk(runtime, config, size):
    """Files of at most so many bytes."""
    with files_of_at_most(size):
        run_training(runtime, config)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_that_finds_no_room_leaves_the_older_ones(
    pool, tiny_run, unbroken, tmp_path, async_save
):
    run = shutil.copytree(unbroken, tmp_path / "run")
    train = {"iterations": 22, "save_every": 1, "async_save": async_save, "tensorboard": False}
    config = tiny_config(tiny_run, train={"output_dir": str(run), **train})
    with pytest.raises(AssertionError, match="ConfigError: .*iter_0000021 could not be saved"):
        pool.run(run_on_a_small_disk, world=1, tp=1, config=config, size=100_000)
    assert latest(run) == 20
    assert not list((run / "checkpoints").glob(".partial*"))
    check_whole(run / "checkpoints" / "iter_0000020", "full")
    pool.run(run_training, world=1, tp=1, config=config)
    assert latest(run) == 22


def prepare_on_a_small_disk(runtime, config, output, size):
    with files_of_at_most(size):
        prepare(runtime, config, output)


def test_states_that_find_no_room_are_continued_where_there_is_some(pool, tiny_run, tmp_path):
    config, output = tiny_config(tiny_run), tmp_path / "store"
    place = dict(world=1, tp=1, config=config, output=output)
    with pytest.raises(AssertionError, match="ConfigError: cannot write .*shard_00000.*File too l"):
        pool.run(prepare_on_a_small_disk, **place, size=20_000)
    assert not (output / "manifest.json").exists()
    pool.run(prepare_on_a_small_disk, **place, size=10**7)
    assert (output / "manifest.json").exists() and (output / "checksums.json").exists()
