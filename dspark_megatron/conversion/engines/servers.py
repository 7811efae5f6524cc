"""Rows of `table.py`: DeepSpec, ModelOpt and the engines that serve on GPUs."""

from dspark_megatron.conversion.engines.table import (
    AUX,
    DEEPSPEC,
    FLAGS,
    FLAT,
    GEMMA,
    MODELOPT,
    SGLANG,
    TRT,
    VLLM,
    WRAPPED,
    AttentionKeys,
    Engine,
)

DENSE = ("Qwen3DSparkModel",)


def _dspark(key: str) -> tuple[str, ...]:
    """TensorRT-LLM's places of a head's key."""
    return (f"dspark_config.{key}", f"dflash_config.{key}", f"dspark_{key}", key)


SERVERS = (
    Engine(
        name=DEEPSPEC,
        version="git afdfa7c",
        source="the repository",
        architectures=DENSE,
        model_types=("qwen3",),
        defaults={},
        attention=AttentionKeys(width=("sliding_window",)),
        gemma={"architectures": (GEMMA,), "model_types": ("gemma4",)}
        | {"softcap": ("final_logit_softcapping",)},
        missing="fills {} at random, with only a warning in its log; the file lacks them",
        optional="$^",
        skips=".*rotary_emb|d2t$|t2d$",
        silent=".",
    ),
    Engine(
        name=MODELOPT,
        version="0.47.0",
        # It reads no config of a draft: the recipe names the draft, dflash_init_checkpoint weights.
        defaults={"block_size": None, "num_anchors": None, "mask_token_id": None},
        by_tensors=True,
        confidence="tensors",
        attention=AttentionKeys(
            width=("dflash_config.swa_window_size", "sliding_window"),
            use_swa=True,
            causal=("is_causal", "dflash_config.causal"),
            sink=("dflash_config.attention_sink_bias", "attention_sink_bias"),
        ),
        places={"target_layer_ids": (AUX, "dflash_config.target_layer_ids", "target_layer_ids")},
        speculators_ids=AUX,
        renames=FLAT,
        foreign=r"(model|logit_head)\.",
        skips=r"(embed_tokens|lm_head)\.|.*rotary_emb",
        missing="raises: the file lacks {}",
    ),
    Engine(
        name=VLLM,
        version="0.33.0",
        architectures=(*DENSE, "Qwen3OmniDSparkModel", "DSparkDraftModel"),
        model_types=("qwen3",),
        defaults={"block_size": None, "num_anchors": None, "markov_head_type": "vanilla"}
        | dict.fromkeys(FLAGS, False),
        places={
            "markov_head_type": (),  # never read
            "mask_token_id": ("dflash_config.mask_token_id", "mask_token_id")
            + ("dspark_noise_token_id", "pard_token", "ptd_token_id"),
            "target_layer_ids": (AUX, "dflash_config.target_layer_ids")
            + ("dspark_target_layer_ids", "target_layer_ids"),
        },
        confidence="both",
        reduced_vocabulary=True,
        attention=AttentionKeys(
            width=("dflash_config.swa_window_size", "sliding_window"),
            use_swa=True,
            causal=("is_causal", "dflash_config.causal"),
            sliding_is_causal=True,
            sink=("dflash_config.attention_sink_bias", "add_swa_attention_sink_bias"),
        ),
        logit_scale=("logit_scale",),
        speculators_ids=AUX,
        gemma={
            "architectures": (GEMMA,),
            "model_types": ("gemma4",),
            "places": {
                "markov_head_type": (),
                "target_layer_ids": ("dspark_target_layer_ids", "target_layer_ids"),
            },
            "logit_scale": (),
            "softcap": ("final_logit_softcapping",),
            "optional": "$^",
            "silent": ".",
            "reduced_vocabulary": False,
        },
        missing="leaves {} uninitialised without an error; the file lacks them",
        optional=r"(embed_tokens|lm_head)\.|d2t",
        skips=r".*rotary_emb\.inv_freq|t2d$|markov_head\.(gate|joint)_proj\.",
        silent=r".*\.bias$",
        quantized=r"layers\.|fc$|markov_head\.markov_w2$",
    ),
    Engine(
        name=SGLANG,
        version="0.5.23",
        architectures=(*DENSE, "LingDSparkModel", "DSparkDraftModel"),
        model_types=("qwen3",),
        defaults={"block_size": 7, "num_anchors": None} | dict.fromkeys(FLAGS, True),
        places={
            "mask_token_id": ("dspark_config.mask_token_id", "dflash_config.mask_token_id")
            + ("mask_token_id",),
            "block_size": ("dflash_config.block_size", "block_size"),
            "target_layer_ids": ("dflash_config.target_layer_ids", "target_layer_ids"),
        },
        confidence="tensors",
        attention=AttentionKeys(
            width=("sliding_window",),
            causal=("is_causal",),
            sliding_is_causal=True,
            sink=("dflash_config.attention_sink_bias",),
        ),
        target_divisor="logits_mup_width_multiplier",
        missing="leaves {} uninitialised without an error; the file lacks them",
        optional=r"(embed_tokens|lm_head|confidence_head)\.",
        skips=r"(embed_tokens|lm_head)\.|.*rotary_emb\.|d2t$|t2d$",
        silent=r"(?!markov_head\.)",
        quantized=r"layers\.",
    ),
    Engine(
        name=TRT,
        version="main behind #19040 (September 2026)",
        source="modeling_dflash.py and modeling_dspark.py; where its options look for layer ids "
        "was not read",
        defaults={"num_anchors": None, "head_dim": None, "block_size": None, "markov_rank": 0}
        | {"markov_head_type": "vanilla"}
        | dict.fromkeys(FLAGS, True),
        places={
            "mask_token_id": ("dflash_config.mask_token_id", "mask_token_id"),
            "target_layer_ids": ("dflash_config.target_layer_ids", "target_layer_ids"),
            "block_size": ("dflash_config.block_size", "block_size"),
            "markov_rank": _dspark("markov_rank"),
            "markov_head_type": _dspark("markov_head_type"),
            "enable_confidence_head": (
                *_dspark("use_confidence_head"),
                *_dspark("enable_confidence_head"),
            ),
        },
        confidence="tensors",
        attention=AttentionKeys(
            width=("dflash_config.swa_window_size", "sliding_window"),
            off=("use_sliding_window",),
            sliding_is_causal=True,
        ),
        renames=WRAPPED | FLAT,
        foreign=r"logit_head\.",
        skips=r"(embed_tokens|lm_head|confidence_head)\.|d2t$|t2d$",
        missing="leaves {} as they were made, without an error; the file lacks them",
        optional=r"(embed_tokens|lm_head|confidence_head)\.",
        silent=".",
    ),
)
