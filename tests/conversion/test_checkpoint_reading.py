"""Checkpoints are found, read without Megatron, and named where they are damaged."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from support.draft_folders import PADDED_VOCAB, export, trained_tensors, write_checkpoint
from support.shapes import VANILLA


def test_find_checkpoint(tmp_path, run):
    write_checkpoint(run, VANILLA, iteration=200)
    folder = run / "checkpoints"
    newest = folder / "iter_0000200"
    assert find_checkpoint(run) == find_checkpoint(folder) == find_checkpoint(newest) == newest
    assert find_checkpoint(run, 100).name == "iter_0000100"
    with pytest.raises(ConfigError, match="there: iter_0000100, iter_0000200"):
        find_checkpoint(run, 300)
    with pytest.raises(ConfigError, match="is iteration 200, and 100 is asked for"):
        find_checkpoint(newest, 100)
    with pytest.raises(ConfigError, match="is not a folder"):
        find_checkpoint(tmp_path / "nothing")
    (folder / "latest_checkpointed_iteration.txt").unlink()
    assert find_checkpoint(run) == newest


def test_reader(run):
    reader = CheckpointReader(find_checkpoint(run))
    assert reader.shape == VANILLA and reader.meta["consumed_samples"] == 800
    assert not any(name.startswith("optimizer.") for name in reader.names())
    assert reader.names()["markov_head.markov_w1.weight"] == (PADDED_VOCAB, 5)
    assert torch.equal(reader.tensor("fc.weight"), trained_tensors(VANILLA)["fc.weight"])
    meta = reader.path / "dspark.json"
    meta.write_text(json.dumps({**reader.meta, "format": 2}))
    with pytest.raises(ConfigError, match="format 2"):
        CheckpointReader(reader.path)
    meta.unlink()
    with pytest.raises(ConfigError, match="no dspark.json"):
        CheckpointReader(reader.path)


def test_a_checkpoint_is_found_from_where_one_stands(tmp_path, target, run, monkeypatch):
    temperatures = {"temperatures": [1.0, 2.0, 0.5]}
    (run / "dspark_sts.json").write_text(json.dumps(temperatures))
    for place in (".", "checkpoints", "checkpoints/iter_0000100"):
        monkeypatch.chdir(run / place)
        out = export(Path("."), target, tmp_path / place.replace("/", "_").replace(".", "here"))
        assert json.loads((out / "dspark_sts.json").read_text()) == temperatures


def change_meta(folder: Path, change) -> None:
    meta = json.loads((folder / "dspark.json").read_text())
    change(meta)
    (folder / "dspark.json").write_text(json.dumps(meta))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGED = {
    ".metadata is damaged": lambda f: truncate(f / ".metadata"),
    ".metadata is damaged or incomplete": lambda f: (f / ".metadata").write_bytes(b"hello"),
    ".metadata is damaged or incomplete (TypeError: it holds dict)": lambda f: (
        f / ".metadata"
    ).write_bytes(pickle.dumps({})),
    "has no .metadata": lambda f: (f / ".metadata").unlink(),
    "is damaged or incomplete (": lambda f: truncate(f / "__0_0.distcp"),
    "is damaged or incomplete (it is not there": lambda f: (f / "__0_0.distcp").unlink(),
    "dspark.json is damaged or incomplete (it lacks shape)": lambda f: change_meta(
        f, lambda m: m.pop("shape")
    ),
    "(it lacks num_anchors)": lambda f: change_meta(f, lambda m: m.pop("num_anchors")),
    "(it lacks shape.head_dim)": lambda f: change_meta(f, lambda m: m["shape"].pop("head_dim")),
    "dspark.json is damaged or incomplete (JSONDecodeError": lambda f: truncate(f / "dspark.json"),
    "(it holds list": lambda f: (f / "dspark.json").write_text("[]"),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_checkpoint_is_named(tmp_path, target, run, message):
    DAMAGED[message](run / "checkpoints" / "iter_0000100")
    with pytest.raises(ConfigError) as error:
        export(run, target, tmp_path / "out")
    assert message in str(error.value) and "iter_0000100" in str(error.value)
    assert str(error.value).endswith("copy it again: no other checkpoint there is whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "target"]


class Foreign:
    def __init__(self, call, argument):
        self.parts = call, (argument,)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("call", [os.mkdir, eval, torch.load])
def test_foreign_code_in_a_checkpoint_is_not_run(tmp_path, run, call):
    folder, made = run / "checkpoints" / "iter_0000100", tmp_path / "made"
    argument = str(made) if call is os.mkdir else f"__import__('os').mkdir({str(made)!r})"
    (folder / ".metadata").write_bytes(pickle.dumps(Foreign(call, argument)))
    with pytest.raises(ConfigError, match="could run foreign code; nothing of it was run"):
        CheckpointReader(folder)
    assert not made.exists()
