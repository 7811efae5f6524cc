"""Drafts of every layout: to it, from it, between two, and into Megatron at every size."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.export import convert_folder
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from support.draft_folders import (
    FINGERPRINT,
    export_fp32,
    import_,
    trained_tensors,
    write_checkpoint,
)
from support.shapes import FOLDER_SHAPES, VANILLA, meta_of

FP32 = torch.float32
NOT_MODELOPT = ("no Markov head", "confidence without Markov")
"""Drafts that ModelOpt's layout cannot express."""
CASES = [
    (name, layout)
    for name in FOLDER_SHAPES
    for layout in LAYOUTS
    if layout != "modelopt" or name not in NOT_MODELOPT
]


@pytest.mark.parametrize("name, layout", CASES)
def test_a_checkpoint_comes_back_as_it_was(tmp_path, target, name, layout):
    shape = FOLDER_SHAPES[name]
    run = write_checkpoint(tmp_path / "run", shape)
    folder = export_fp32(run, target, tmp_path / "draft", layout)
    facts = TargetFacts.of(load_target_config(target), "target")
    assert DraftFolder(folder, target=facts).layout.name == layout
    checkpoint = import_(folder, target, tmp_path / "back", tensor_parallel=2)
    before, after = CheckpointReader(find_checkpoint(run)), CheckpointReader(checkpoint)
    assert after.shape == before.shape
    assert after.names().keys() == before.names().keys()
    for tensor in after.names():
        a, b = before.tensor(tensor), after.tensor(tensor)
        if "markov_w" in tensor:
            assert b.shape[0] == 34 and not b[33:].any(), "padded for two ranks"
            a, b = a[:33], b[:33]
        assert torch.equal(a, b), tensor
    again = export_fp32(tmp_path / "back", target, tmp_path / "again", layout)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    keeps_facts = layout in ("hf", "specforge")
    assert after.meta["num_anchors"] == (before.meta["num_anchors"] if keeps_facts else 512)


def without_facts(path):
    """A config without what some layouts have no key for."""
    config = json.loads(path.read_text())
    config.pop("num_anchors", None)
    return config


@pytest.mark.parametrize("theirs", ["speculators", "modelopt", "specforge"])
@pytest.mark.parametrize("name", ["vanilla", "gated", "rnn", "no confidence head"])
def test_between_two_layouts_and_back(tmp_path, target, name, theirs):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES[name])
    ours = export_fp32(run, target, tmp_path / "ours")
    foreign = convert_folder(ours, target, tmp_path / "foreign", WriteOptions(layout=theirs))
    direct = export_fp32(run, target, tmp_path / "direct", theirs, dtype=torch.bfloat16)
    for file in ("config.json", "model.safetensors"):
        assert (foreign / file).read_bytes() == (direct / file).read_bytes()
    options = WriteOptions(dtype=None)
    exact = convert_folder(ours, target, tmp_path / "exact", WriteOptions(theirs, dtype=None))
    back = convert_folder(exact, target, tmp_path / "back", options)
    assert (back / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert without_facts(back / "config.json") == without_facts(ours / "config.json")


def test_names_and_keys_of_modelopt(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES["gated"])
    folder = export_fp32(run, target, tmp_path / "draft", "modelopt")
    found = load_file(folder / "model.safetensors")
    ours = trained_tensors(FOLDER_SHAPES["gated"])
    assert found.keys() == {
        name.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj")
        for name in ours
    }
    assert torch.equal(found["markov_w2.weight"], ours["markov_head.markov_w2.weight"])
    assert torch.equal(found["gate_proj.bias"], ours["markov_head.gate_proj.bias"])
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and "markov_rank" not in config
    assert config["dflash_config"]["use_confidence_head"] is True
    assert "enable_confidence_head" not in config["dflash_config"]


def test_keys_of_speculators(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", VANILLA)
    folder = export_fp32(run, target, tmp_path / "draft", "speculators", target_name="org/target")
    config = json.loads((folder / "config.json").read_text())
    assert "model_type" not in config, "with it vLLM would not take it for a speculators draft"
    assert config["aux_hidden_state_layer_ids"] == [1, 3, 5], "one more than [0, 2, 4]"
    assert config["sample_from_anchor"] is True
    assert config["transformer_layer_config"]["model_type"] == "qwen3"
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert (
        not {"embed_tokens.weight", "lm_head.weight"}
        & load_file(folder / "model.safetensors").keys()
    )


def test_a_layout_that_cannot_express_the_draft(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES["confidence without Markov"])
    with pytest.raises(ConfigError, match="ModelOpt's confidence head always sees"):
        export_fp32(run, target, tmp_path / "draft", "modelopt")
    assert not (tmp_path / "draft").exists()


def write_at(runtime, shape, folder, run):
    """A draft filled from a folder at this size, and saved as training saves it."""
    from dspark_megatron.conversion.draft_tensors import fill_draft
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.run.checkpoints.state import RunState
    from support.tiny_draft import build_tiny_draft

    draft = build_tiny_draft(runtime, shape)
    fill_draft(draft, DraftFolder(folder).tensor, tp_group=runtime.tp_group)
    meta = meta_of(shape) | {"target_fingerprint": FINGERPRINT}
    state = RunState(100, 800)
    save_checkpoint(Path(run, "checkpoints"), state, meta, draft, None, keep_last=1)


def read_at(runtime, shape, checkpoint):
    """The trained parameters of this rank from a checkpoint, and those filled from a folder."""
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from support.tiny_draft import build_tiny_draft

    draft = build_tiny_draft(runtime, shape)
    load_checkpoint(checkpoint, draft, None)
    return {n: p.detach().clone() for n, p in draft.named_parameters() if p.requires_grad}


FOUR = dataclasses.replace(VANILLA, num_key_value_heads=4)
"""Splits over four ranks."""


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_megatron_reads_and_writes_the_same_at_every_size(pool, tmp_path, target, head):
    """Folder -> model at TP -> checkpoint -> folder gives the same bytes, and an import loads."""
    shape = dataclasses.replace(FOUR, markov_head_type=head)
    run = write_checkpoint(tmp_path / "run", shape)
    first = {layout: export_fp32(run, target, tmp_path / layout, layout) for layout in LAYOUTS}
    imported = {x: import_(first[x], target, tmp_path / f"import {x}") for x in LAYOUTS}
    for tp in (1, 2, 4):
        trained = tmp_path / f"trained {tp}"
        options = dict(shape=shape, folder=first["hf"], run=trained)
        pool.run(write_at, world=tp, tp=tp, **options)
        for layout, folder in first.items():
            again = export_fp32(trained, target, tmp_path / f"{layout} {tp}", layout)
            for file in ("config.json", "model.safetensors"):
                assert (again / file).read_bytes() == (folder / file).read_bytes(), (layout, tp)
        wanted = pool.run(
            read_at, world=tp, tp=tp, shape=shape, checkpoint=find_checkpoint(trained)
        )
        for layout, checkpoint in imported.items():
            got = pool.run(read_at, world=tp, tp=tp, shape=shape, checkpoint=checkpoint)
            for mine, theirs in zip(got, wanted, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[n], theirs[n]) for n in mine), (layout, tp)


def test_a_checkpoint_of_the_same_iteration_is_replaced(pool, tmp_path, target):
    folder = export_fp32(write_checkpoint(tmp_path / "run", VANILLA), target, tmp_path / "draft")
    trained = tmp_path / "trained"
    for _ in range(2):
        pool.run(write_at, world=1, tp=1, shape=VANILLA, folder=folder, run=trained)
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    again = export_fp32(trained, target, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
