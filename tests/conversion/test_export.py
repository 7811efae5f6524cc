"""Checkpoints to Hugging Face folders: their tensors, what is replaced and refused, the command."""

import dataclasses
import json
from pathlib import Path

import convert_checkpoint as tool
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.layouts import names
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage import target_weights
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import shared_weights
from dspark_megatron.storage.training_checkpoint import CheckpointReader
from support.draft_folders import (
    FINGERPRINT,
    PADDED_VOCAB,
    export,
    trained_tensors,
    write_checkpoint,
    write_target,
)
from support.reference import PlainDraft
from support.shapes import VANILLA

FILES = ["README.md", "config.json", "model.safetensors"]
"""Of an export."""


def test_every_bad_tensor_is_listed_at_once(tmp_path, target):
    run = write_checkpoint(
        tmp_path / "run",
        VANILLA,
        **{
            "hidden_norm.weight": None,
            "layers.0.mlp.linear_fc2.weight": torch.zeros(3, 3),
            "markov_head.markov_w2.weight": torch.zeros(PADDED_VOCAB + 1, 5),
            "extra.weight": torch.zeros(1),
        },
    )
    with pytest.raises(ConfigError) as error:
        export(run, target, tmp_path / "out")
    for part in (
        "4 problem(s)",
        "missing hidden_norm.weight [16]",
        "unexpected extra.weight [1]",
        "layers.0.mlp.linear_fc2.weight must have shape [16, 24], has [3, 3]",
        "markov_head.markov_w2.weight must have shape [36, 5], has [37, 5]",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_export_loads_strictly_and_verifies(tmp_path, target, shape):
    run = write_checkpoint(tmp_path / "run", shape)
    out = export(run, target, tmp_path / "out", dtype=torch.float32)
    found = load_file(out / "model.safetensors")
    draft = PlainDraft(shape)
    draft.load_state_dict(found, strict=True)
    ours = trained_tensors(shape)
    assert all(torch.equal(found[name], ours[name]) for name in ours)
    assert torch.equal(found["lm_head.weight"], SafetensorsFolder(target).tensor("lm_head.weight"))
    summary = verify_folder(out, checkpoint=run, target_dir=target)
    assert f"{len(found)} tensors" in summary[0] and "DeepSpec: loads" in summary
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "target"]


def test_export_in_bfloat16_is_a_cast(tmp_path, target, run):
    out = export(run, target, tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert all(
        torch.equal(found[name], tensor.bfloat16())
        for name, tensor in trained_tensors(VANILLA).items()
    )
    verify_folder(out, checkpoint=run, target_dir=target)


def test_shards_hold_the_same_tensors_and_bytes_repeat(tmp_path, target, run):
    whole = load_file(export(run, target, tmp_path / "one") / "model.safetensors")
    out = export(run, target, tmp_path / "many", max_shard_size="2KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    shards = [load_file(out / file) for file in files]
    assert all(sum(t.nbytes for t in s.values()) <= 2000 or len(s) == 1 for s in shards)
    together = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    verify_folder(out, checkpoint=run, target_dir=target)
    again = export(run, target, tmp_path / "again", max_shard_size="2KB")
    for path in out.iterdir():  # the card names its folder
        if path.name != "README.md":
            assert path.read_bytes() == (again / path.name).read_bytes()


def test_without_shared_weights(tmp_path, target, run):
    out = export(run, target, tmp_path / "out", shared_weights=False)
    found = load_file(out / "model.safetensors")
    assert found.keys() == names.hugging_face_shapes(VANILLA, shared_weights=False).keys()
    assert "DeepSpec: does not load" in verify_folder(out, checkpoint=run, target_dir=target)


def test_tied_target_gives_its_embedding_twice(tmp_path, run):
    target = write_target(tmp_path / "tied", tied=True)
    found = load_file(export(run, target, tmp_path / "out") / "model.safetensors")
    assert torch.equal(found["embed_tokens.weight"], found["lm_head.weight"])


def test_an_earlier_export_is_replaced_by_force_and_nothing_else_is(tmp_path, target, run):
    out = export(run, target, tmp_path / "out", max_shard_size="2KB")
    with pytest.raises(ConfigError, match="give --force to replace it"):
        export(run, target, out)
    export(run, target, out, force=True)
    assert sorted(p.name for p in out.iterdir()) == FILES
    noted = export(run, target, tmp_path / "noted")
    (noted / "notes.txt").write_text("mine")
    for taken in (target, run, noted):
        before = sorted(taken.rglob("*"))
        with pytest.raises(ConfigError, match="choose another folder"):
            export(run, target, taken, force=True)
        assert sorted(taken.rglob("*")) == before


def test_a_failed_export_leaves_the_earlier_one(tmp_path, target, run, monkeypatch):
    out = export(run, target, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    write_checkpoint(run, VANILLA, iteration=200, seed=5)

    def fail(self, name):
        raise OSError("disk")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(CheckpointReader, "tensor", fail)
        export(run, target, out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "target"]
    export(run, target, out, force=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "target"]


def test_what_lies_beside_an_export_is_left_alone(tmp_path, target, run):
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / "out.probe").touch()
    before = sorted(tmp_path.iterdir())
    out = export(run, target, tmp_path / "out")
    export(run, target, out, force=True)
    assert sorted(tmp_path.iterdir()) == sorted([out, *before])
    assert (tmp_path / "out.partial/mine").exists() and (tmp_path / "out.replaced/mine").exists()
    assert out.stat().st_mode == (tmp_path / "out.partial").stat().st_mode


def test_a_mount_point_is_refused_at_once(tmp_path, target, run, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(out))
    monkeypatch.setattr(CheckpointReader, "tensor", None)
    with pytest.raises(ConfigError, match="out is a mount point.* choose one in it"):
        export(run, target, out)
    assert not list(out.iterdir())


def test_a_rename_that_fails_at_the_end_brings_the_earlier_export_back(
    tmp_path, target, run, monkeypatch
):
    out = export(run, target, tmp_path / "out")
    before = (out / "config.json").read_bytes()
    rename = Path.rename

    def fail(self, to):
        if self.name == "new":
            raise OSError(16, "Device or resource busy")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(ConfigError, match="cannot put .*out in place: Device or resource busy"):
            export(run, target, out, force=True, dtype=torch.float32)
    assert (out / "config.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "target"]


def test_a_type_too_small_for_the_values(tmp_path, target):
    big = torch.full((16, 48), 1e5)
    run = write_checkpoint(tmp_path / "run", VANILLA, **{"fc.weight": big})
    with pytest.raises(ConfigError, match="768 values that are not finite as float16; the source"):
        export(run, target, tmp_path / "out", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "target"]
    export(run, target, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_layer_ids": (0, 4, 2)}, "strictly increasing"),
        ({"target_layer_ids": (0, 2, 5)}, r"in \[0, 4\]"),
        ({"target_layer_ids": (-1, 0, 2)}, r"in \[0, 4\]"),
        ({"mask_token_id": 33}, r"mask_token_id \(33\)"),
        ({"vocab_size": 34}, r"vocab_size \(34\) must be the target's \(33\)"),
        ({"hidden_size": 8}, r"hidden_size \(8\)"),
        ({"num_target_layers": 9}, r"num_target_layers \(9\)"),
    ],
)
def test_unusable_drafts_are_refused(tmp_path, target, change, message):
    run = write_checkpoint(tmp_path / "run", dataclasses.replace(VANILLA, **change))
    with pytest.raises(ConfigError, match=message):
        export(run, target, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_another_target_is_refused(tmp_path, target, run):
    export_checkpoint(run, target, tmp_path / "a", fingerprint=lambda path: FINGERPRINT)
    with pytest.raises(ConfigError, match="trained for 0123456789ab"):
        export_checkpoint(run, target, tmp_path / "b", fingerprint=lambda path: "f" * 64)
    assert not (tmp_path / "b").exists()


def test_shared_weights_are_found_or_refused(tmp_path, target):
    assert shared_weights(target) == ("model.embed_tokens.weight", "lm_head.weight")
    rows = SafetensorsFolder(target).rows("lm_head.weight", 3, 7)
    assert torch.equal(rows, SafetensorsFolder(target).tensor("lm_head.weight")[3:7])
    weights = load_file(target / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]

    def found(**tensors: Tensor) -> tuple[str, str]:
        save_file(tensors, target / "model.safetensors")
        return shared_weights(target)

    head = {"lm_head.weight": weights["lm_head.weight"]}
    gpt2 = {"transformer.wte.weight": embedding}
    assert found(**gpt2, **head)[0] == "transformer.wte.weight"
    part = {"model.layers.6.embed_tokens.weight": embedding + 1}
    assert found(**{"model.embed_tokens.weight": embedding}, **part, **head) == (
        "model.embed_tokens.weight",
        "lm_head.weight",
    )
    with pytest.raises(ConfigError, match="no lm_head.weight"):
        found(**gpt2)
    with pytest.raises(ConfigError, match="found none"):
        found(**head)
    with pytest.raises(ConfigError, match="exactly one token embedding"):
        found(**{f"{x}.embed_tokens.weight": embedding + i for i, x in enumerate("ab")}, **head)


def test_command(tmp_path, target, run, capsys, monkeypatch):
    monkeypatch.setattr(target_weights, "weights_fingerprint", lambda path, checkpoint: FINGERPRINT)
    out = tmp_path / "out"
    command = ["export", "--checkpoint", str(run), "--target", str(target), "--output", str(out)]
    assert tool.main([*command, "--dtype", "fp16", "--max-shard-size", "3KB", "--skip-logits"]) == 0
    assert "every trained tensor equals" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    assert tool.main(["verify", "--input", str(out)]) == 0
    assert "float16" in capsys.readouterr().out
    assert tool.main([*command, "--iteration", "5"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "there: iter_0000100" in captured.err
