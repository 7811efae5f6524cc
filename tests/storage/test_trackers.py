"""A run's checkpoints are found, whatever became of the files that name the newest and the best."""

import json
import os
import shutil
from pathlib import Path

import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage import notices
from dspark_megatron.storage.checkpoints.tracker import BEST, latest_iteration
from dspark_megatron.storage.training_checkpoint import find_checkpoint
from support.damage import cut
from support.draft_folders import write_checkpoint
from support.shapes import VANILLA

NEWEST, BEST_FILE = "latest_checkpointed_iteration.txt", "best_checkpointed_iteration.txt"


@pytest.fixture
def run(tmp_path) -> Path:
    for iteration in (100, 200):
        write_checkpoint(tmp_path / "run", VANILLA, iteration=iteration)
    notices._said.clear()
    return tmp_path / "run"


def folder(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"iter_{iteration:07d}"


LOST = {
    "is not there": Path.unlink,
    "holds ''": lambda file: file.write_text(""),
    "holds 'abc'": lambda file: file.write_text("abc\n"),
    "holds '-1'": lambda file: file.write_text("-1"),
    "holds '99999999999999999999": lambda file: file.write_text("9" * 5000),
    "cannot be read (UnicodeDecodeError)": lambda file: file.write_bytes(b"\xff\xfe\0"),
    "names iteration 300, which is not there": lambda file: file.write_text("300"),
    "is no file": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("said", LOST)
def test_a_lost_tracker_gives_the_newest_whole_checkpoint_and_that_is_said(run, capsys, said):
    LOST[said](run / "checkpoints" / NEWEST)
    assert find_checkpoint(run) == folder(run, 200)
    assert latest_iteration(run / "checkpoints") == 200
    text = capsys.readouterr().err
    assert (
        text.count(said) == 1 and "the newest whole checkpoint there is used: iter_0000200" in text
    )


def test_a_damaged_one_is_passed_over_where_the_tracker_is_lost(run):
    (run / "checkpoints" / NEWEST).unlink()
    cut(folder(run, 200) / ".metadata")
    assert find_checkpoint(run) == folder(run, 100)
    cut(folder(run, 100) / "dspark.json")
    with pytest.raises(ConfigError, match="no checkpoint there is whole .iter_0000100, iter_00002"):
        find_checkpoint(run)


def test_a_tracker_without_checkpoints_is_no_new_run(run):
    for iteration in (100, 200):
        shutil.rmtree(folder(run, iteration))
    with pytest.raises(ConfigError, match="names iteration 200, and .* has no checkpoint; put the"):
        latest_iteration(run / "checkpoints")
    (run / "checkpoints" / NEWEST).unlink()
    assert latest_iteration(run / "checkpoints") is None
    with pytest.raises(ConfigError, match="has no checkpoint; name another folder"):
        find_checkpoint(run)


def test_only_folders_with_the_names_of_saves_count(run):
    os.rename(folder(run, 200), run / "checkpoints" / "iter_200")
    (run / "checkpoints" / "iter_0000300").write_text("a file")
    (run / "checkpoints" / ".partial_iter_0000400").mkdir()
    assert find_checkpoint(run) == folder(run, 100)


def test_the_best_is_what_the_newest_checkpoint_says_where_its_tracker_is_lost(run, capsys):
    with pytest.raises(ConfigError, match="is not there, so the best checkpoint is unknown; iter"):
        find_checkpoint(run, BEST)
    file = folder(run, 200) / "dspark.json"
    best = {"iteration": 100, "tau": 1.5, "conditions": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best": best}))
    for content in (b"", b"\xff", b"700"):
        (run / "checkpoints" / BEST_FILE).write_bytes(content)
        assert find_checkpoint(run, BEST) == folder(run, 100)
    assert "by iter_0000200 the best is 100" in capsys.readouterr().err
    shutil.rmtree(folder(run, 100))
    with pytest.raises(ConfigError, match="the best checkpoint is unknown"):
        find_checkpoint(run, BEST)
