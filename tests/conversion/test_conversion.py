"""Checkpoints to Hugging Face folders: names, layouts, strictness, config.json, the command."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import convert_checkpoint as tool
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.layouts import names
from dspark_megatron.conversion.layouts.hf_config import (
    DraftDescription,
    description_of_config,
    hugging_face_config,
)
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.rope import RotaryTable
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import shared_weights
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from support.draft_folders import (
    FINGERPRINT,
    PADDED_VOCAB,
    ROPES,
    trained_tensors,
    write_checkpoint,
    write_target,
)
from support.reference import PlainDraft
from support.shapes import FOLDER_SHAPES, VANILLA

FILES = ["README.md", "config.json", "model.safetensors"]
"""Of an export."""


def export(run: Path, target: Path, out: Path, **options) -> Path:
    return export_checkpoint(run, target, out, WriteOptions(**options))


@pytest.fixture(params=FOLDER_SHAPES)
def shape(request) -> DraftShape:
    return FOLDER_SHAPES[request.param]


@pytest.fixture
def target(tmp_path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def run(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "run", VANILLA)


def test_round_trip_is_bit_exact(shape):
    ours = trained_tensors(shape)
    megatron = dict(names.to_megatron(shape, ours.__getitem__, PADDED_VOCAB))
    names.check_megatron_tensors(shape, {n: tuple(t.shape) for n, t in megatron.items()}, "it")
    back = dict(names.to_hugging_face(shape, megatron.__getitem__))
    assert list(back) == list(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_table_uses_every_plain_parameter_once(shape):
    plain = {name: tuple(p.shape) for name, p in PlainDraft(shape).named_parameters()}
    assert names.hugging_face_shapes(shape) == plain
    asked = []
    padded = names.megatron_shapes(shape, PADDED_VOCAB)
    for _ in names.to_hugging_face(shape, lambda n: asked.append(n) or torch.zeros(padded[n])):
        pass
    assert sorted(asked) == sorted(padded) and len(set(asked)) == len(asked)


def test_fused_tensors_by_hand():
    ours = trained_tensors(VANILLA)
    megatron = dict(names.to_megatron(VANILLA, ours.__getitem__, PADDED_VOCAB))
    kv = megatron["layers.1.self_attention.linear_kv.weight"]
    key, value = (ours[f"layers.1.self_attn.{x}_proj.weight"] for x in "kv")
    assert torch.equal(kv, torch.cat([key[:6], value[:6], key[6:], value[6:]]))
    gate, up = (ours[f"layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(megatron["layers.0.mlp.linear_fc1.weight"], torch.cat([gate, up]))


def test_vocabulary_padding_is_added_and_stripped():
    ours = trained_tensors(VANILLA)
    megatron = dict(names.to_megatron(VANILLA, ours.__getitem__, PADDED_VOCAB))
    for name in ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight"):
        assert megatron[name].shape == (PADDED_VOCAB, 5) and not megatron[name][33:].any()
        megatron[name][33:] = torch.nan
    back = dict(names.to_hugging_face(VANILLA, megatron.__getitem__))
    assert all(tensor.isfinite().all() for tensor in back.values())


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


LAYOUT_KEYS = """architectures model_type dtype torch_dtype vocab_size hidden_size intermediate_size
num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps
attention_bias attention_dropout initializer_range max_position_embeddings rope_theta
rope_parameters layer_types sliding_window use_sliding_window max_window_layers tie_word_embeddings
use_cache bos_token_id eos_token_id pad_token_id block_size sample_from_anchor mask_token_id
target_layer_ids num_target_layers num_anchors markov_rank markov_head_type enable_confidence_head
confidence_head_with_markov dflash_config""".split()


def config_of(shape: DraftShape) -> dict:
    return hugging_face_config(
        DraftDescription(shape=shape),
        target_config=Qwen3Config(bos_token_id=7, eos_token_id=8, pad_token_id=None),
        dtype=torch.bfloat16,
    )


def test_config_has_exactly_the_keys_of_the_layout(shape):
    config = config_of(shape)
    assert sorted(config) == sorted(LAYOUT_KEYS)
    assert config["architectures"] == ["Qwen3DSparkModel"] and config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (7, 8, None)
    nested = config["dflash_config"]
    assert nested["projector_type"] == "dspark" and nested["confidence_head_alpha"] == 1.0
    assert nested["attention_mode"] == ("mha" if shape is FOLDER_SHAPES["mha"] else "gqa")
    copies = nested.keys() - {"projector_type", "attention_mode", "confidence_head_alpha"}
    assert len(copies) == 6 and all(nested[key] == config[key] for key in copies)
    assert description_of_config(json.loads(json.dumps(config))).shape == shape


@pytest.mark.parametrize("kind", ROPES)
def test_transformers_reads_the_config_and_its_rope(tmp_path, kind):
    shape = dataclasses.replace(VANILLA, rope_parameters=ROPES[kind])
    config = config_of(shape)
    assert ("rope_scaling" in config) == (kind != "default")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = RotaryTable(shape.rope_parameters, shape.head_dim, shape.max_position_embeddings)
    for loaded in (AutoConfig.from_pretrained(tmp_path), Qwen3Config.from_pretrained(tmp_path)):
        rotary = Qwen3RotaryEmbedding(loaded)
        assert torch.equal(rotary.inv_freq, ours.inv_freq)
        assert rotary.attention_scaling == ours.attention_scaling
        assert loaded.rope_parameters["rope_theta"] == ROPES[kind]["rope_theta"]
        assert loaded.dtype == torch.bfloat16 and loaded.head_dim == 6
        assert loaded.target_layer_ids == [0, 2, 4] and loaded.num_anchors == 512


@pytest.mark.parametrize("spelling", ["rope_parameters", "legacy"])
@pytest.mark.parametrize("kind", ROPES)
def test_each_rope_spelling_is_complete_alone(tmp_path, kind, spelling):
    shape = dataclasses.replace(VANILLA, rope_parameters=ROPES[kind])
    drop = {"rope_parameters"} if spelling == "legacy" else {"rope_theta", "rope_scaling"}
    config = {key: value for key, value in config_of(shape).items() if key not in drop}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rotary = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    ours = RotaryTable(shape.rope_parameters, shape.head_dim, shape.max_position_embeddings)
    assert torch.equal(rotary.inv_freq, ours.inv_freq)


def rewrite(out: Path, change) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def reconfigure(out: Path, change) -> None:
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))


DAMAGE = {
    "missing confidence_head.proj.bias": (rewrite, lambda t: t.pop("confidence_head.proj.bias")),
    "unexpected mlp.fc.weight": (
        rewrite,
        lambda t: t.update({"mlp.fc.weight": torch.zeros(2)}),
    ),
    "fc.weight and model.fc.weight are both fc.weight": (
        rewrite,
        lambda t: t.update({"model.fc.weight": torch.zeros(2)}),
    ),
    "markov_head.markov_w1.weight must have shape": (
        rewrite,
        lambda t: t.update({"markov_head.markov_w1.weight": torch.zeros(36, 5).bfloat16()}),
    ),
    "fc.weight must be torch.bfloat16": (
        rewrite,
        lambda t: t.update({"fc.weight": t["fc.weight"].float()}),
    ),
    "not finite": (rewrite, lambda t: t["norm.weight"].fill_(torch.inf)),
    "hidden_norm.weight differs from its source": (
        rewrite,
        lambda t: t["hidden_norm.weight"].mul_(2),
    ),
    "embed_tokens.weight differs from its source": (
        rewrite,
        lambda t: t["embed_tokens.weight"][3].mul_(2),
    ),
    "lacks num_anchors": (reconfigure, lambda c: c.pop("num_anchors")),
    "lacks ['block_size']": (reconfigure, lambda c: c.pop("block_size")),
    "config.json and its dflash_config differ in mask_token_id (32 and 31)": (
        reconfigure,
        lambda c: c["dflash_config"].update(mask_token_id=31),
    ),
    "rope_theta is 1.0 at the top level and 10000.0 in rope_parameters": (
        reconfigure,
        lambda c: c.update(rope_theta=1.0),
    ),
    "rope_scaling {'rope_type': 'yarn', 'factor': 4.0": (
        reconfigure,
        lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    ),
    "'rope_theta': 1.0} in config.json and {": (
        reconfigure,
        lambda c: [x.update(rope_theta=1.0) for x in (c, c["rope_parameters"])],
    ),
    "in [0, 4]": (
        reconfigure,
        lambda c: [x.update(target_layer_ids=[0, 2, 5]) for x in (c, c["dflash_config"])],
    ),
    "eos_token_id must be [2, 3], is 2": (reconfigure, lambda c: c.update(eos_token_id=2)),
    "block_size is 4 in config.json and 3 in the checkpoint": (
        reconfigure,
        lambda c: c.update(block_size=4),
    ),
    "num_anchors must be 16, is 17": (reconfigure, lambda c: c.update(num_anchors=17)),
    "dtype (None)": (reconfigure, lambda c: [c.pop(key) for key in ("dtype", "torch_dtype")]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_verify_finds(tmp_path, target, run, message):
    out = export(run, target, tmp_path / "out")
    damage, change = DAMAGE[message]
    damage(out, change)
    with pytest.raises(ConfigError) as error:
        verify_folder(out, checkpoint=run, target_dir=target)
    assert message in str(error.value)


def test_verify_lists_a_bad_sidecar_with_the_rest(tmp_path, target, run):
    out = export(run, target, tmp_path / "out")
    (out / "dspark_sts.json").write_text("{}")
    reconfigure(out, lambda c: c.update(block_size=4))
    with pytest.raises(ConfigError, match="2 problem") as error:
        verify_folder(out, checkpoint=run)
    assert "dspark_sts.json must be" in str(error.value) and "block_size is 4" in str(error.value)


def test_verify_reads_each_tensor_once_and_says_what_it_compared(
    tmp_path, target, run, monkeypatch
):
    out = export(run, target, tmp_path / "out")
    read, tensor = [], DraftFolder.tensor
    monkeypatch.setattr(
        DraftFolder, "tensor", lambda self, name: read.append(name) or tensor(self, name)
    )
    rewrite(out, lambda t: t.pop("lm_head.weight"))
    lines = verify_folder(out, checkpoint=run, target_dir=target)
    assert f"embed_tokens.weight: equal to the target's ({target})" in lines
    assert len(read) == len(set(read)) == len(load_file(out / "model.safetensors"))


def test_verify_finds_stray_and_unmarked_files(tmp_path, target, run):
    out = export(run, target, tmp_path / "out")
    save_file({"x": torch.zeros(1)}, out / "old.safetensors")
    tensors = load_file(out / "model.safetensors")
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ConfigError, match="2 problem") as error:
        verify_folder(out)
    assert "old.safetensors is not in the index" in str(error.value)
    assert "model.safetensors lacks the metadata" in str(error.value)


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
    with pytest.raises(ConfigError, match="iter_0000100, iter_0000200"):
        find_checkpoint(run)
    assert find_checkpoint(run, 100).name == "iter_0000100"


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
    "is damaged or incomplete (FileNotFoundError": lambda f: (f / "__0_0.distcp").unlink(),
    "dspark.json is damaged or incomplete (KeyError: 'shape')": lambda f: change_meta(
        f, lambda m: m.pop("shape")
    ),
    "(KeyError: 'num_anchors')": lambda f: change_meta(f, lambda m: m.pop("num_anchors")),
    "missing 1 required keyword-only argument: 'head_dim'": lambda f: change_meta(
        f, lambda m: m["shape"].pop("head_dim")
    ),
    "dspark.json is damaged or incomplete (JSONDecodeError": lambda f: truncate(f / "dspark.json"),
    "(TypeError: it holds list)": lambda f: (f / "dspark.json").write_text("[]"),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_checkpoint_is_named(tmp_path, target, run, message):
    DAMAGED[message](run / "checkpoints" / "iter_0000100")
    with pytest.raises(ConfigError) as error:
        export(run, target, tmp_path / "out")
    assert message in str(error.value) and "iter_0000100" in str(error.value)
    assert str(error.value).endswith("use another iteration")
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
    monkeypatch.setattr(tool, "weights_fingerprint", lambda path, checkpoint: FINGERPRINT)
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
