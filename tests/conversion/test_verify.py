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
