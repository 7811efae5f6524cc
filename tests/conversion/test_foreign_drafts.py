"""Drafts that are no DSpark drafts are known by name and layout, whatever would fit of them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.export import convert_folder
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.import_draft import import_folder
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError
from support.draft_folders import FINGERPRINT, trained_tensors, write_target
from support.shapes import VANILLA

PLAIN = replace(
    VANILLA, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False
)
"""A backbone alone, as DFlash has it."""
DFLASH = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": PLAIN.hidden_size,
    "intermediate_size": PLAIN.ffn_hidden_size,
    "num_hidden_layers": PLAIN.num_layers,
    "num_attention_heads": PLAIN.num_attention_heads,
    "num_key_value_heads": PLAIN.num_key_value_heads,
    "head_dim": PLAIN.head_dim,
    "vocab_size": PLAIN.vocab_size,
    "rms_norm_eps": PLAIN.rms_norm_eps,
    "rope_theta": PLAIN.rope_parameters["rope_theta"],
    "max_position_embeddings": PLAIN.max_position_embeddings,
    "block_size": PLAIN.block_size,
    "num_target_layers": PLAIN.num_target_layers,
    "dflash_config": {
        "mask_token_id": PLAIN.mask_token_id,
        "target_layer_ids": list(PLAIN.target_layer_ids),
    },
}
"""The keys of a published DFlash folder."""
ADDED = {
    "markov_rank": 0,
    "markov_head_type": "vanilla",
    "enable_confidence_head": False,
    "confidence_head_with_markov": False,
}
"""With these it would read as a draft of ours."""


def draft_of(path, config, **tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    found = {**trained_tensors(PLAIN), **tensors}
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("added", [{}, ADDED])
@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_a_dflash_draft_is_refused_with_the_reason(tmp_path, layout, added):
    draft = draft_of(tmp_path / "draft", DFLASH | added)
    with pytest.raises(ConfigError, match="this is a DFlash draft.*one token earlier") as error:
        DraftFolder(draft, layout)
    assert "put them in" not in str(error.value)


def test_every_command_says_so(tmp_path):
    draft, target = draft_of(tmp_path / "draft", DFLASH), write_target(tmp_path / "target")
    output, reason = tmp_path / "output", "this is a DFlash draft"
    with pytest.raises(ConfigError, match=reason):
        verify_folder(draft)
    with pytest.raises(ConfigError, match=reason):
        import_folder(draft, target, output, fingerprint=lambda path: FINGERPRINT)
    with pytest.raises(ConfigError, match=reason):
        convert_folder(draft, target, output, WriteOptions(layout="specforge"))
    assert not output.exists()


def test_the_same_backbone_under_a_dspark_name_is_one(tmp_path):
    ours = {**DFLASH, **ADDED, "architectures": ["Qwen3DSparkModel"]}
    assert DraftFolder(draft_of(tmp_path / "draft", ours)).shape == PLAIN


def test_a_marked_draft_of_modelopt_is_one(tmp_path):
    nested = {**DFLASH["dflash_config"], **ADDED, "projector_type": "dspark"}
    ours = {**DFLASH, "dflash_config": nested}
    assert DraftFolder(draft_of(tmp_path / "draft", ours)).layout.name == "modelopt"


OTHERS = {
    "speculators_model_type 'eagle3'": {"speculators_model_type": "eagle3"},
    "speculators_config.algorithm 'dflash'": {"speculators_config": {"algorithm": "dflash"}},
    "dflash_config.projector_type 'domino'": {"dflash_config": {"projector_type": "domino"}},
    "architecture is LlamaForCausalLMEagle3": {"architectures": ["LlamaForCausalLMEagle3"]},
    "architecture is MedusaModel": {"architectures": ["MedusaModel"]},
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_kinds_are_named(tmp_path, message):
    draft = draft_of(tmp_path / "draft", {**DFLASH, **ADDED, **OTHERS[message]})
    with pytest.raises(ConfigError, match="this is no DSpark draft") as error:
        DraftFolder(draft)
    assert message in str(error.value)


def test_tensors_of_another_kind_are_named(tmp_path):
    config = {**DFLASH, **ADDED, "architectures": ["Qwen3DSparkModel"]}
    parts = {"candidate_selector.hidden_projection.weight": torch.zeros(2, 2)}
    with pytest.raises(ConfigError, match="no DSpark draft: it has tensors candidate_selector"):
        DraftFolder(draft_of(tmp_path / "draft", config, **parts))
