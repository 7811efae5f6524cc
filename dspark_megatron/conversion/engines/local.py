"""Rows of `table.py`: the engines that run drafts on other machines, or convert them for it."""

from dspark_megatron.conversion.engines.table import (
    FLAGS,
    LLAMA,
    MLX,
    MLX_VLM,
    ONNX,
    WRAPPED,
    AttentionKeys,
    Engine,
)

_HEADS = ("markov_rank", "markov_head_type", *FLAGS)
_NESTED = ("mask_token_id", "target_layer_ids", "block_size", *_HEADS)


def _nested_first(*keys: str) -> dict[str, tuple[str, ...]]:
    return {key: (f"dflash_config.{key}", key) for key in keys}


LOCAL = (
    Engine(
        name=MLX,
        version="0.20.3",
        model_types=("qwen3",),
        defaults={"num_key_value_heads": 8, "head_dim": None, "num_anchors": None}
        | {"markov_rank": 256, "markov_head_type": "vanilla", **dict.fromkeys(FLAGS, True)},
        places={"markov_head_type": ()},  # read, not acted on
        lifts=("target_layer_ids", "mask_token_id"),
        reduced_vocabulary=True,
        attention=AttentionKeys(
            width=("sliding_window", "dflash_config.swa_window_size"),
            per_layer=False,
            switches=("dflash_config", "dflash_query_causal", "attention_sink_bias"),
            causal=("dflash_query_causal", "dflash_config.causal"),
            any_causal=True,
            sink=("attention_sink_bias",),
        ),
        softcap=("final_logit_softcapping",),
        speculators_ids="target_layer_ids",
        gemma={"model_types": ("gemma4",), "attention": AttentionKeys()},
        skips=r"t2d$|markov_head\.(gate|joint)_proj\.",
        quantized=".",
    ),
    Engine(
        name=MLX_VLM,
        version="0.7.10",
        defaults={"block_size": None, "num_anchors": None}
        | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 5}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
        | {"vocab_size": 128000, "markov_rank": 256, "markov_head_type": "vanilla"}
        | {"enable_confidence_head": False, "confidence_head_with_markov": True},
        places=_nested_first(*_NESTED),
        biases=False,
        attention=AttentionKeys(
            width=("dflash_config.swa_window_size", "sliding_window"),
            causal=("dflash_config.causal", "dflash_query_causal", "is_causal"),
            sink=("dflash_config.attention_sink_bias", "attention_sink_bias"),
        ),
        softcap=("final_logit_softcapping",),
        gemma={"optional": "$^", "skips": "$^"},
        optional=r"(embed_tokens|lm_head)\.",
        skips=r"lm_head\.",  # a rule speaks of it
        renames=WRAPPED,
        foreign=r"(logit_head|markov_w[12]|gate_proj|joint_proj|confidence_proj)\.",
    ),
    Engine(
        name=LLAMA,
        version="September 2026",
        source="src/models/dflash.cpp and the issues #25173, #27730 and #27804; of the converter "
        "for drafts only what they say",
        architectures=("Qwen3DSparkModel", "DSparkDraftModel"),
        defaults={"block_size": None, "num_anchors": None, "mask_token_id": None},
        places=_nested_first("mask_token_id", "target_layer_ids"),
        by_tensors=True,
        confidence="tensors",
        biases=False,
        reduced_vocabulary=True,
        attention=AttentionKeys(
            width=("sliding_window",),
            causal=("is_causal", "dflash_config.causal", "dflash_query_causal"),
            sliding_is_causal=True,
            sink=("dflash_config.attention_sink_bias", "attention_sink_bias"),
        ),
        logit_scale=("logit_scale",),
        softcap=("final_logit_softcapping",),
        renames=WRAPPED,
        foreign=r"(logit_head|markov_w[12]|gate_proj|joint_proj|confidence_proj)\.",
    ),
    Engine(
        name=ONNX,
        version="0.18.0",
        defaults={"num_anchors": None, "markov_head_type": "vanilla"} | dict.fromkeys(FLAGS, False),
        places={
            "mask_token_id": ("dflash_config.mask_token_id",),
            "target_layer_ids": ("dflash_config.target_layer_ids",),
            "markov_rank": ("markov_rank", "dflash_config.markov_rank"),
            "markov_head_type": (),
            **dict.fromkeys(FLAGS, ()),
        },
        biases=False,
        attention=AttentionKeys(
            width=("sliding_window",),
            per_layer=False,
            switches=("use_sliding_window",),
            causal=("is_causal",),
        ),
        skips=r"(embed_tokens|lm_head|confidence_head)\.|markov_head\.(gate|joint)_proj\.|t2d$|d2t$",
        silent=".",
    ),
)
