"""Every key that a draft's `config.json` may have: used, harmless, or refused with what it means.

Reading is closed-world: a key in none of the tables may change what the draft computes, so it is
refused by its name. The Gemma-4 layout has its own list (`gemma4_config.py`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dspark_megatron.conversion.layouts.attention_config import lookup
from dspark_megatron.errors import require

Config = dict[str, Any]

USED = set(
    """
    architectures model_type dtype torch_dtype vocab_size hidden_size intermediate_size
    num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps
    attention_bias initializer_range max_position_embeddings layer_types sliding_window
    use_sliding_window rope_theta rope_parameters rope_scaling partial_rotary_factor rope_dim
    block_size sample_from_anchor dspark_bonus_anchor num_speculative_tokens speculative_tokens
    num_target_layers num_anchors mask_token_id target_layer_ids markov_rank markov_head_type
    enable_confidence_head confidence_head_with_markov confidence_head_alpha is_causal
    dflash_query_causal attention_sink_bias add_swa_attention_sink_bias sliding_window_non_causal
    logit_scale draft_vocab_size eagle_aux_hidden_state_layer_ids aux_hidden_state_layer_ids
    dspark_block_size dspark_markov_rank dspark_markov_head_type dspark_noise_token_id
    dspark_target_layer_ids pard_token ptd_token_id speculators_model_type dflash_config
    dspark_config eagle_config speculators_config transformer_layer_config
    """.split()
)
"""At the top level, and in speculators' `transformer_layer_config`."""
NESTED = {
    "dflash_config": set(
        """
        projector_type shift_label mask_token_id target_layer_ids block_size num_target_layers
        num_anchors markov_rank markov_head_type enable_confidence_head use_confidence_head
        confidence_head_with_markov confidence_head_alpha sample_from_anchor dspark_bonus_anchor
        use_swa swa_window_size causal attention_sink_bias add_swa_attention_sink_bias logit_scale
        """.split()
    ),
    "speculators_config": {
        *("algorithm", "default_proposal_method", "proposal_methods", "verifier"),
    },
    "eagle_config": {"eagle_aux_hidden_state_layer_ids"},
    "dspark_config": {"mask_token_id"},
}
"""In objects at the top level."""
SPECULATORS_ONLY = (
    *("speculators_config", "transformer_layer_config", "aux_hidden_state_layer_ids"),
    *("speculators_model_type", "sliding_window_non_causal"),
)
ALIASES = {
    "dspark_block_size": "block_size",
    "dspark_markov_rank": "markov_rank",
    "dspark_markov_head_type": "markov_head_type",
    "dspark_noise_token_id": "mask_token_id",
    "dspark_target_layer_ids": "target_layer_ids",
    "pard_token": "mask_token_id",
    "ptd_token_id": "mask_token_id",
    "dspark_config.mask_token_id": "mask_token_id",
}
"""Other names that some engine reads first; they must say the same."""

_HARMLESS = {
    "of Transformers, for other models and for generation": """
        _name_or_path _commit_hash _attn_implementation _attn_implementation_internal
        _attn_implementation_autoset attn_implementation transformers_version return_dict
        output_hidden_states output_attentions torchscript use_bfloat16 pruned_heads
        chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size
        add_cross_attention tie_encoder_decoder max_length min_length do_sample early_stopping
        num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences output_scores return_dict_in_generate
        forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
        exponential_decay_length_penalty begin_suppress_tokens finetuning_task id2label label2id
        tokenizer_class prefix task_specific_params problem_type use_cache pretraining_tp
        auto_map base_model_tp_plan base_model_pp_plan tf_legacy_loss""",
    "token ids, which are the target's": """
        bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id image_token_id
        video_token_id audio_token_id vision_start_token_id vision_end_token_id vision_token_id""",
    "of training": """
        attention_dropout hidden_dropout gradient_checkpointing num_draft_layers loss_decay_gamma
        confidence_head_stop_gradient router_aux_loss_coef router_z_loss_coef
        output_router_logits""",
    "about the target, or where the draft comes from": """
        target_hidden_size target_model_type target_text_model_type target_model
        target_model_name_or_path speculators_version specforge_version modelopt_version
        producer quantization license language_model_only""",
    "told by the tensors: a draft that has such parts has other ones": """
        tie_word_embeddings has_embed_tokens has_lm_head num_experts num_local_experts
        num_experts_per_tok moe_intermediate_size decoder_sparse_step norm_topk_prob
        mlp_only_layers n_routed_experts n_shared_experts shared_expert_intermediate_size
        routed_scaling_factor scoring_func topk_method topk_group n_group first_k_dense_replace
        moe_layer_freq num_nextn_predict_layers mtp_num_hidden_layers
        mtp_use_dedicated_embeddings linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads full_attention_interval
        attn_output_gate mamba_ssm_dtype vision_config audio_config use_qk_norm qk_layernorm
        mlp_bias""",
    "of windows, where layer_types says which layers have one": "max_window_layers",
}
HARMLESS = {key: why for why, keys in _HARMLESS.items() for key in keys.split()}
"""What makes a key harmless, by key, at the top level."""
HARMLESS_NESTED = {
    "dflash_config": {
        "attention_mode": "told by the heads",
        **dict.fromkeys(
            ("loss_decay_gamma", "gamma", "l1_loss_weight", "ce_loss_weight", "loss_type"),
            "of training",
        ),
    },
}


class Refused(NamedTuple):
    meaning: str
    neutral: tuple[Any, ...] = (False, "", 0)
    """Values, beside null and empty ones, with which the key means nothing."""


_SCALE = (1,)
_OTHER_HEAD = "a head of another kind"
REFUSED = {
    "quantization_config": Refused("a quantized draft", ()),
    "compression_config": Refused("a quantized draft", ()),
    "final_logit_softcapping": Refused("base logits pass c tanh(x / c)"),
    "attn_logit_softcapping": Refused("attention scores pass c tanh(x / c)"),
    "output_multiplier": Refused("the logits are multiplied by it", _SCALE),
    "logits_scaling": Refused("the logits are divided by it", _SCALE),
    "logits_mup_width_multiplier": Refused("the logits are divided by it", _SCALE),
    "input_embedding_scale": Refused("the embedding is multiplied by it", _SCALE),
    "embedding_multiplier": Refused("the embedding is multiplied by it", _SCALE),
    "scale_emb": Refused("the embedding is multiplied by it", _SCALE),
    "residual_multiplier": Refused("each layer's part is multiplied by it", _SCALE),
    "scale_depth": Refused("each layer's part is scaled by it", ()),
    "attention_multiplier": Refused("attention scores are multiplied by it", ()),
    "query_pre_attn_scalar": Refused("attention scores are divided by its root", ()),
    "attention_value_scale": Refused("values of attention are multiplied by it", _SCALE),
    "use_gemma_norm": Refused("norms multiply by 1 + weight"),
    "swiglu_alpha": Refused("another gate of the MLP", ()),
    "swiglu_limit": Refused("the MLP's gate is clamped"),
    "hidden_activation": Refused("another activation", ("silu",)),
    "dspark_fixup_head_type": Refused("a head that corrects the logits", (False, "", "none")),
    "dspark_draft_topk": Refused("the Markov head changes only the first tokens' logits"),
    "log_snr_conditioning": Refused("slots get an embedding of their noise"),
    "enable_qwen35_gated_q_proj": Refused("the output of attention has a gate"),
    "add_full_attention_sink_bias": Refused("attention sinks in full layers only"),
    "is_neox_style": Refused("interleaved RoPE", (True,)),
    "rope_is_neox_style": Refused("interleaved RoPE", (True,)),
    "rope_interleave": Refused("interleaved RoPE"),
    "rope_interleaved": Refused("interleaved RoPE"),
    "mask_embedding": Refused("an embedding of its own for the mask token"),
    "use_mask_embedding": Refused("an embedding of its own for the mask token"),
    "use_aux_hidden_state": Refused("no hidden states of the target", (True,)),
    "text_config": Refused("another config within this one, which is not read", ()),
    "moe_preset": Refused("layers with experts"),
    "moe_router_bias": Refused("layers with experts"),
    "kv_lora_rank": Refused("latent attention (MLA)"),
    "q_lora_rank": Refused("latent attention (MLA)"),
    "conv_kernel_size": Refused(_OTHER_HEAD + " (DFlash2)"),
    "conv_group_size": Refused(_OTHER_HEAD + " (DFlash2)"),
    "selector_rank": Refused(_OTHER_HEAD + " (DFlash2)"),
    "selector_top_k": Refused(_OTHER_HEAD + " (DFlash2)"),
    "gru_hidden_dim": Refused(_OTHER_HEAD + " (Domino)"),
    "emb_dim": Refused(_OTHER_HEAD + " (Domino)"),
    "pure_draft_prefix_len": Refused(_OTHER_HEAD + " (Domino)"),
}
"""Keys that change what a draft computes, and ours does not have, in whatever object."""


_LISTS = {
    *("architectures", "layer_types", "target_layer_ids", "aux_hidden_state_layer_ids"),
    *("eagle_aux_hidden_state_layer_ids", "dspark_target_layer_ids"),
}
_INTEGERS = {key for key in _LISTS if key.endswith("_ids")}


def kind_problems(config: Config, where: str = "") -> list[str]:
    """A line for each object or list that is of another kind, at any level."""
    problems = []
    for key, value in config.items():
        place = where + key
        if key in {*NESTED, "transformer_layer_config"} and value is not None:
            if isinstance(value, dict):
                problems += kind_problems(value, f"{place}.")
            else:
                problems.append(f"{place} ({_short(value)}) must be an object")
        elif key in _LISTS and value is not None:
            kind, words = (int, "integers") if key in _INTEGERS else (str, "texts")
            if not (isinstance(value, list) and all(type(x) is kind for x in value)):
                problems.append(f"{place} ({_short(value)}) must be a list of {words}")
    return problems


def key_problems(config: Config, layout: str) -> list[str]:
    """A line for each key that is not known or must not be passed over."""
    return [line for _, line in _problems(config, layout)]


def without_unknown(config: Config, layout: str, allowed: tuple[str, ...]) -> Config:
    """The config without those of its unknown keys that the user allows, by `KEY` or
    `OBJECT.KEY`."""
    unknown = {place for place, line in _problems(config, layout) if "not known" in line}
    missing = [place for place in allowed if lookup(config, place) is None]
    require(not missing, f"--allow-unknown {' '.join(missing)}: config.json has no such key")
    dropped = unknown & set(allowed)
    top = {key: value for key, value in config.items() if key not in dropped}
    for name, value in top.items():
        if isinstance(value, dict):
            top[name] = {key: x for key, x in value.items() if f"{name}.{key}" not in dropped}
    return top


def _problems(config: Config, layout: str) -> Iterator[tuple[str, str]]:
    """Place and line."""
    known = USED if layout == "speculators" else USED - set(SPECULATORS_ONLY)
    yield from _of_object(config, "", known, HARMLESS)
    nested = {**NESTED, "transformer_layer_config": USED}
    for name, keys in nested.items():
        if isinstance(config.get(name), dict) and name in known:
            harmless = HARMLESS_NESTED.get(name, {})
            if name == "transformer_layer_config":
                harmless = HARMLESS
                for key in NESTED.keys() & config[name].keys():
                    yield from _of_object(
                        config[name][key] or {},
                        f"{name}.{key}.",
                        NESTED[key],
                        HARMLESS_NESTED.get(key, {}),
                    )
            yield from _of_object(config[name], f"{name}.", keys, harmless)


def _of_object(
    config: Config, where: str, used: set[str], harmless: dict[str, str]
) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        place = where + key
        if key in used or key in harmless or value is None:
            continue
        if key not in REFUSED:
            yield (
                place,
                f"{place} ({_short(value)}) is not known and may change what the draft computes; "
                f"if it means nothing, delete it or give --allow-unknown {place}",
            )
        elif not _is_neutral(value, REFUSED[key].neutral):
            yield (
                place,
                f"{REFUSED[key].meaning} ({place} {_short(value)}): not supported, and not to be "
                "left out",
            )


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, dict | list) and not value:
        return True
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in neutral)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."
