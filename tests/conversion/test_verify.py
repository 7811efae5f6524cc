"""What `verify` finds in a damaged folder, all at once."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError
from support.draft_folders import export, reconfigure, rewrite

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
    "eos_token_id must be the target's [2, 3], is 2": (
        reconfigure,
        lambda c: c.update(eos_token_id=2),
    ),
    "block_size is 4 in config.json and 3 in the checkpoint": (
        reconfigure,
        lambda c: c.update(block_size=4),
    ),
    "num_anchors is 17 in config.json and 16 in the checkpoint": (
        reconfigure,
        lambda c: c.update(num_anchors=17),
    ),
    "dtype (bfloat16, float32) must be one of": (
        reconfigure,
        lambda c: c.update(torch_dtype="float32"),
    ),
    "dtype (float64) must be one of": (
        reconfigure,
        lambda c: c.update(dtype="float64", torch_dtype=None),
    ),
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


def test_verify_finds_stray_files(tmp_path, target, run):
    out = export(run, target, tmp_path / "out")
    save_file({"x": torch.zeros(1)}, out / "old.safetensors")
    torch.save({}, out / "mask_embedding.pt")
    torch.save({}, out / "training_args.bin")
    with pytest.raises(ConfigError, match="2 problem") as error:
        verify_folder(out)
    assert "old.safetensors is not in the index" in str(error.value)
    assert "mask_embedding.pt holds an embedding of its own" in str(error.value)


def other_spelling(config):
    """As Transformers 5 saves it, by a program that knows less of training."""
    del config["rope_theta"], config["torch_dtype"], config["num_anchors"], config["use_cache"]


@pytest.mark.parametrize("layout", ["hf", "speculators"])
def test_verify_judges_folders_of_others_by_meaning(tmp_path, target, run, layout):
    out = export(run, target, tmp_path / "out", layout=layout, target_name="org/name")
    spelled = (lambda c: c.pop("dtype")) if layout == "speculators" else other_spelling
    reconfigure(out, spelled)
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors")
    notes = [
        line for line in verify_folder(out, checkpoint=run, target_dir=target) if "note: " in line
    ]
    assert notes[0].startswith('note: model.safetensors lacks the metadata {"format": "pt"}')


def test_a_folder_of_two_types_is_a_note_where_no_checkpoint_says_more(tmp_path, target, run):
    out = export(run, target, tmp_path / "out")
    rewrite(out, lambda t: t.update({"fc.weight": t["fc.weight"].float()}))
    assert "note: 1 tensors are of another type than torch.bfloat16 (such as fc.weight)" in (
        verify_folder(out, target_dir=target)
    )


@pytest.mark.parametrize(("name", "warns"), [(None, True), ("a b/c", True), ("org/name", False)])
def test_the_name_of_a_verifier_that_nobody_finds_is_a_note(tmp_path, target, run, name, warns):
    out = export(run, target, tmp_path / "out", layout="speculators", target_name=name)
    lines = verify_folder(out, target_dir=target)
    assert any("--target-name org/name" in line for line in lines) == warns


def test_a_run_that_moved_still_exports(tmp_path, target, run):
    moved = run.rename(tmp_path / "moved")
    assert verify_folder(export(moved, target, tmp_path / "out"), checkpoint=moved)
