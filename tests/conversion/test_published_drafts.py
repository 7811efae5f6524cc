"""Drafts that others have published, as small folders with random weights: each is read as what it
is, or refused for the stated reason."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.errors import ConfigError
from dspark_megatron.shape.attention import DraftAttention
from support.draft_folders import ROPES, trained_tensors
from support.shapes import VANILLA

FACTS = TargetFacts("target", (), VANILLA.num_target_layers, VANILLA.max_position_embeddings)
BACKBONE = {
    "model_type": "qwen3",
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
}
IDS = {"mask_token_id": 32, "target_layer_ids": [0, 2, 4]}
HEADS = {
    "markov_rank": 5,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
DEEPSPEC = {
    "architectures": ["Qwen3DSparkModel"],
    **BACKBONE,
    **IDS,
    **HEADS,
    "block_size": 3,
    "num_target_layers": 6,
}
SPECFORGE = {
    "architectures": ["DSparkDraftModel"],
    **BACKBONE,
    "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
    "block_size": 3,
    "num_target_layers": 6,
    "dflash_config": {"projector_type": "dspark", "attention_mode": "gqa", **IDS, **HEADS},
}


def speculators(tokens, layers=None, **own):
    backbone = BACKBONE | (layers or {})
    return {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "aux_hidden_state_layer_ids": [1, 3, 5],
        "mask_token_id": 32,
        **HEADS,
        "block_size": 3,
        "transformer_layer_config": backbone,
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": {"name_or_path": "org/target"},
        },
        **own,
    }


WINDOW = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": True}
EVERYWHERE = {"window": 8, "sliding_layers": (0, 1)}
NEMOTRON = {
    **DEEPSPEC,
    **WINDOW,
    "rope_parameters": None,
    "is_causal": True,
    "attention_sink_bias": True,
    "sample_from_anchor": False,
    "dspark_bonus_anchor": True,
    "has_embed_tokens": True,
    "has_lm_head": False,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
}
READ = {
    "deepseek-ai dspark_qwen3": (DEEPSPEC, VANILLA),
    "nvidia Nemotron-3.5": (
        NEMOTRON,
        replace(
            VANILLA,
            sample_from_anchor=False,
            attention=DraftAttention(**EVERYWHERE, causal_layers=(0, 1), sink=True),
        ),
    ),
    "nvidia MiniMax-M3": (
        {
            **DEEPSPEC,
            **WINDOW,
            "dflash_config": {"use_swa": True, "swa_window_size": 8, "causal": False},
        },
        replace(VANILLA, attention=DraftAttention(**EVERYWHERE)),
    ),
    "RadixArk Kimi-K3": (
        {**SPECFORGE, "rope_scaling": ROPES["yarn"], "rope_theta": 1000000.0},
        replace(VANILLA, rope_parameters=ROPES["yarn"]),
    ),
    "RadixArk Inkling, and SpecForge's GLM-5.2": (
        {**SPECFORGE, "rope_theta": 8000000.0},
        replace(VANILLA, rope_parameters={"rope_type": "default", "rope_theta": 8000000.0}),
    ),
    "Nanbeige4.2": ({**SPECFORGE, "layer_types": ["full_attention"] * 2}, VANILLA),
    "RedHatAI Qwen3.8, GLM-5.3 if it has the library's defaults": (
        speculators(3, WINDOW),
        replace(
            VANILLA,
            attention=DraftAttention(**EVERYWHERE, window_origin="anchor", causal_layers=(0, 1)),
        ),
    ),
    "full vocabulary behind the anchor": (
        speculators(2),
        replace(VANILLA, sample_from_anchor=False),
    ),
    "openbmb MiniCPM5": ({**DEEPSPEC, "draft_vocab_size": 33}, VANILLA),
    "satgeze Qwen3.6, leftover partial keys": (
        {**DEEPSPEC, "partial_rotary_factor": 0.25, "attn_output_gate": True},
        VANILLA,
    ),
}


def folder_of(path, config, shape, **tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({**trained_tensors(shape), **tensors}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", READ)
def test_a_published_draft_is_read_as_what_it_is(tmp_path, name):
    config, shape = READ[name]
    assert DraftFolder(folder_of(tmp_path / "draft", config, shape), target=FACTS).shape == shape


LFM = {**DEEPSPEC, "architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False}
REFUSED = {
    "makora gemma4-26b: its vocabulary": (
        speculators(2, draft_vocab_size=20),
        "a draft vocabulary of its own",
    ),
    "mgoin Qwen3-8B: its vocabulary": (speculators(3, draft_vocab_size=20), "draft_vocab_size"),
    "LiquidAI LFM2.5: interleaved": (LFM, "interleaved RoPE"),
    "nvidia Nemotron-3.5 in NVFP4": (
        {**NEMOTRON, "quantization_config": {"quant_algo": "W4A16_NVFP4"}},
        "a quantized draft",
    ),
    "RadixArk's with experts": (
        {**DEEPSPEC, "architectures": ["Qwen3MoeDSparkModel"], "moe_preset": "qwen3_5_moe"},
        "layers with experts",
    ),
    "DaoCloud Muse-Glimmer: its cap": (
        speculators(3, WINDOW, output_multiplier=0.196, final_logit_softcapping=20.0),
        "the logits are multiplied by it",
    ),
    "deepseek-ai V4, inside its target": (
        {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "dspark_block_size": 5,
            "dspark_markov_rank": 256,
            "num_nextn_predict_layers": 3,
        },
        "this is no DSpark draft",
    ),
    "Ornith: its family": (
        {**DEEPSPEC, "model_type": "qwen3_5", "enable_qwen35_gated_q_proj": True},
        "model_type 'qwen3_5' instead of 'qwen3'",
    ),
    "Bonsai: its noise": ({**DEEPSPEC, "log_snr_conditioning": True}, "log_snr_conditioning True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_draft_is_refused_for_its_reason(tmp_path, name):
    config, reason = REFUSED[name]
    draft = (
        folder_of(tmp_path / "draft", config, VANILLA, d2t=torch.zeros(20))
        if ("vocabulary" in name)
        else folder_of(tmp_path / "draft", config, VANILLA)
    )
    with pytest.raises(ConfigError) as error:
        DraftFolder(draft, target=FACTS)
    assert reason in str(error.value)
