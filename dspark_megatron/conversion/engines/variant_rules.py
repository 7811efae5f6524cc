"""Rules of `rules.py`, of what engines do with windows, causal blocks, sinks, RoPE, anchors and
scaled or capped logits."""

from dspark_megatron.conversion.engines.rules import Rule, rows
from dspark_megatron.conversion.engines.table import (
    ALL,
    DEEPSPEC,
    LLAMA,
    MLX,
    MLX_VLM,
    MODELOPT,
    ONNX,
    SGLANG,
    TRT,
    VLLM,
)

ENGINES = tuple(name for name in ALL if name not in (DEEPSPEC, MODELOPT))
ONE_TOO_MANY = "sample_from_anchor is false: drafts block_size tokens, one more than mlx-dspark"
BIASED_ONCE = "{} the Markov bias, too, which training does not"

VARIANT_PROBLEMS: tuple[Rule, ...] = rows(
    # Attention.
    (ENGINES, "sliding layers without a width", "needs sliding_window for its sliding layers"),
    (ENGINES, "two widths", "may read either of two widths of the window, {}"),
    (ENGINES, "other windows", "reads {}"),
    ((DEEPSPEC, *ENGINES), "other causality", "reads {}"),
    ((ONNX,), "mixed windows", "needs the same window in all layers"),
    ((TRT,), "causal said", "refuses dflash_config.causal true"),
    ((DEEPSPEC, *ENGINES), "unread sink", "reads no attention sink"),
    ((MLX_VLM, LLAMA), "unread biases", "has no attention bias"),
    ((ONNX,), "unread biases", "leaves the attention biases out, without an error"),
    (
        (DEEPSPEC, TRT, MLX, LLAMA, ONNX, MLX_VLM),
        "value scale",
        "leaves out dflash_config.attention_value_scale {}",
    ),
    # RoPE.
    (ALL, "differing ropes", "may read the other one of two RoPEs: {}; correct one"),
    (
        (VLLM,),
        "leftover rotary",
        "applies {}, without a rope_dim left over from the target; delete it, or give the rope_dim "
        "that the draft was trained with",
    ),
    ((DEEPSPEC, MODELOPT, MLX, MLX_VLM), "partial rotary", "turns whole heads, trained with {}"),
    ((MLX,), "yarn without projector_type", "has no YaRN without dflash_config.projector_type"),
    ((MLX,), "neither plain nor yarn", "has plain RoPE and YaRN only, leaves {} out"),
    ((ONNX,), "neither plain nor yarn", "has plain RoPE and YaRN only, refuses {}"),
    ((ONNX,), "no rope_parameters", "needs rope_parameters in config.json"),
    ((MLX, ONNX), "mscale", "computes YaRN's attention factor without {}"),
    ((MLX,), "attention_factor", "computes YaRN's attention factor itself, instead of {}"),
    # Anchors.
    (
        (DEEPSPEC, TRT, ONNX, MODELOPT),
        "no anchor",
        "always drafts from the anchor, sample_from_anchor is false",
    ),
    (
        ALL,
        "contradicting anchors",
        "dspark_bonus_anchor and sample_from_anchor contradict each other; engines read either",
    ),
    (
        (VLLM,),
        "speculators without sample_from_anchor",
        "takes an absent sample_from_anchor for false, speculators for true; write it",
    ),
    # Logits.
    ((DEEPSPEC, *ENGINES), "other scale", "{}"),
    ((DEEPSPEC, *ENGINES), "unread cap", "does not cap logits, final_logit_softcapping is {}"),
)

GEMMA_PROBLEMS: tuple[Rule, ...] = rows(
    ((VLLM, MLX_VLM), "no own matrices", "takes no matrices from the target, the file lacks {}"),
    ((VLLM,), "own values", "needs attention_k_eq_v"),
    ((MLX_VLM,), "gemma", "leaves out the norm of values, without an error"),
    ((MLX,), "no anchor", "reads no sample_from_anchor of a Gemma-4 draft: drafts from the anchor"),
    ((VLLM,), "reduced vocabulary", "needs the whole vocabulary, found {}"),
)
"""Only for Gemma-4 drafts."""

VARIANT_WARNINGS: tuple[Rule, ...] = rows(
    ((DEEPSPEC,), "window", "has no window in its training mask"),
    (
        ENGINES,
        "window from the anchor",
        "moves the window with the slot: slot j sees j + 1 positions less than in training",
    ),
    (
        (MLX_VLM,),
        "window without causality",
        "does not move a window that is not causal: slot j sees j positions more",
    ),
    ((LLAMA,), "causal", "its source was not read for causal blocks"),
    ((SGLANG,), "sink", "needs an attention backend with sinks"),
    ((TRT,), "biases", "its source was not read for the bias of o_proj"),
    (
        (SGLANG, TRT, LLAMA),
        "leftover rotary",
        "{}, without a rope_dim left over from the target, may be applied; delete it",
    ),
    ((TRT, LLAMA, ONNX), "partial rotary", "its source was not read for {}"),
    (
        (VLLM,),
        "block_size counts slots, not speculators",
        f"{ONE_TOO_MANY}; give num_speculative_tokens",
    ),
    ((SGLANG,), "block_size counts slots", ONE_TOO_MANY),
    ((MLX,), "block_size counts drafts", "counts the anchor in block_size: drafts one token less"),
    (
        (LLAMA,),
        "block_size counts drafts",
        "leaves the Markov bias out of blocks of block_size tokens, as it counts the anchor: give "
        "--spec-draft-n-max one less",
    ),
    (
        (MLX_VLM,),
        "block_size counts slots, unsaid",
        "takes block_size for the drafts of a block without dspark_bonus_anchor: one too many",
    ),
    ((VLLM,), "scale", BIASED_ONCE.format("scales")),
)

GEMMA_WARNINGS: tuple[Rule, ...] = rows(((VLLM,), "cap", BIASED_ONCE.format("caps")))
