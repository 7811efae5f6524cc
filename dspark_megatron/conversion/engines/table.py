"""What is known of each engine, as tables: ENGINES, what one reads and where; PROBLEMS and
WARNINGS, one rule a row. A new rule is a row; what it asks for is a fact of `facts.py`.

Written from the sources of the versions that ENGINES names. No engine was started for them: other
versions may differ, and only Qwen3-style drafts are known here.
"""

from dataclasses import dataclass, field
from typing import Any

DEEPSPEC, VLLM, SGLANG, MLX, TRT = "DeepSpec", "vLLM", "SGLang", "mlx-dspark", "TensorRT-LLM"
ALL = (DEEPSPEC, VLLM, SGLANG, MLX, TRT)
FLAGS = ("enable_confidence_head", "confidence_head_with_markov")
AUX = "eagle_aux_hidden_state_layer_ids"
"""vLLM's first place for layer ids; it counts the embedding as 0."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    name: str
    version: str
    """Whose sources were read."""
    architectures: tuple[str, ...] = ("Qwen3DSparkModel",)
    defaults: dict[str, Any]
    """For the keys (`reading.KEYS`) it can do without; it requires the others."""
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where it looks for a key, first found wins; a key that is not here: at the top level."""
    speculators_ids: str | None = None
    """The key that aux_hidden_state_layer_ids becomes; None: it does not read that format."""
    missing: str = "needs {}, which the file lacks"
    # Regular expressions of tensor names; those it skips are left alone, or a rule speaks of them.
    optional: str = r"(embed_tokens|lm_head)\."
    skips: str = r"(embed_tokens|lm_head)\.|d2t$|t2d$"
    silent: str = "$^"  # unknown to it and passed over; it raises on the others
    quantized: str = "$^"


ENGINES = (
    Engine(
        name=DEEPSPEC,
        version="git afdfa7c",
        defaults={},
        missing="fills {} at random, with only a warning in its log; the file lacks them",
        optional="$^",
        skips=".*rotary_emb|d2t$|t2d$",
        silent=".",
    ),
    Engine(
        name=VLLM,
        version="0.33.0",
        architectures=("Qwen3DSparkModel", "Qwen3OmniDSparkModel", "DSparkDraftModel"),
        defaults={"block_size": None, "num_anchors": None, "markov_head_type": "vanilla"}
        | dict.fromkeys(FLAGS, False),
        places={
            "markov_head_type": (),  # never read
            "mask_token_id": ("dflash_config.mask_token_id", "mask_token_id")
            + ("dspark_noise_token_id", "pard_token", "ptd_token_id"),
            "target_layer_ids": (AUX, "dflash_config.target_layer_ids")
            + ("dspark_target_layer_ids", "target_layer_ids"),
        },
        speculators_ids=AUX,
        missing="leaves {} uninitialised without an error; the file lacks them",
        optional=r"(embed_tokens|lm_head)\.|d2t",
        skips=r".*rotary_emb\.inv_freq|t2d$|markov_head\.(gate|joint)_proj\.",
        silent=r".*\.bias$",
        quantized=r"layers\.|fc$|markov_head\.markov_w2$",
    ),
    Engine(
        name=SGLANG,
        version="0.5.23",
        architectures=("Qwen3DSparkModel", "LingDSparkModel", "DSparkDraftModel"),
        defaults={"block_size": 7, "num_anchors": None} | dict.fromkeys(FLAGS, True),
        places={
            "mask_token_id": ("dspark_config.mask_token_id", "dflash_config.mask_token_id")
            + ("mask_token_id",),
            "block_size": ("dflash_config.block_size", "block_size"),
            "target_layer_ids": ("dflash_config.target_layer_ids", "target_layer_ids"),
        },
        missing="leaves {} uninitialised without an error; the file lacks them",
        optional=r"(embed_tokens|lm_head|confidence_head)\.",
        skips=r"(embed_tokens|lm_head)\.|.*rotary_emb\.|d2t$|t2d$",
        silent=r"(?!markov_head\.)",
        quantized=r"layers\.",
    ),
    Engine(
        name=MLX,
        version="0.20.3",
        architectures=(),  # not looked at
        defaults={"num_key_value_heads": 8, "head_dim": None, "num_anchors": None}
        | {"markov_rank": 256, "markov_head_type": "vanilla", **dict.fromkeys(FLAGS, True)},
        places={"markov_head_type": ()},  # read, not acted on
        speculators_ids="target_layer_ids",
        skips=r"t2d$|markov_head\.(gate|joint)_proj\.",
        quantized=".",
    ),
    Engine(name=TRT, version="one unreleased file", defaults={"num_anchors": None}),
)

HF = "export with --layout hf"
ONE_TOO_MANY = "sample_from_anchor is false: drafts block_size tokens, one more than mlx-dspark"
UNKNOWN_CAPTURE = "may not capture target_layer_ids {}: its source was not read for that"

# A row: the engines, the fact that they meet, and what to say of it ({}: what was found).
Rules = tuple[tuple[tuple[str, ...], str, str], ...]

PROBLEMS: Rules = (
    (ALL, "impossible ids", "needs layers that the target has, found {}"),
    (ALL, "mask token", "needs mask_token_id below vocab_size, found {}"),
    (ALL, "other width", "needs the target's hidden_size, found {}"),
    (ALL, "differing ropes", "may read the other one of two RoPEs: {}; correct one"),
    (
        ALL,
        "not quantized",
        "builds quantized layers, the file has none; delete quantization_config",
    ),
    # Architecture, format and names.
    (
        (DEEPSPEC, SGLANG, TRT),
        "architectures",
        f"needs architectures Qwen3DSparkModel, found {{}}; {HF}",
    ),
    ((VLLM,), "architectures", f"needs Qwen3DSparkModel, takes {{}} for DeepSeek-V4; {HF}"),
    ((DEEPSPEC, VLLM, SGLANG, MLX), "model_type", f"needs model_type qwen3, found {{}}; {HF}"),
    (
        (VLLM, MLX),
        "two formats",
        "speculators_config and a top-level model_type exclude each other",
    ),
    ((MLX,), "speculators", f"reads the layer ids of speculators one layer late; {HF}"),
    ((VLLM, MLX, TRT), "foreign names", f"raises on the names {{}}; {HF}"),
    ((DEEPSPEC, SGLANG), "foreign names", f"passes over the names {{}} without an error; {HF}"),
    ((SGLANG,), "bundled keys", "prefers {}, as of a draft inside its target; delete them"),
    # Heads.
    (
        (VLLM, MLX),
        "latent head",
        "needs a vanilla Markov head, found {}; DeepSpec and SGLang load it",
    ),
    ((SGLANG,), "rank 0", "needs markov_rank above 0"),
    # Layers that are captured.
    ((SGLANG,), "embedding id", "cannot capture the embedding, target layer {}"),
    ((MLX,), "embedding id", "never captures the embedding, target layer {}"),
    ((SGLANG,), "last id", "cannot capture the target's last layer {}"),
    ((DEEPSPEC,), "unordered ids", "needs increasing target_layer_ids, found {}"),
    ((VLLM,), "unordered ids", "sorts target_layer_ids {}, which permutes the columns of fc"),
    (
        (SGLANG, MLX),
        "unordered ids",
        "captures in the order of layers, needs increasing ids, found {}",
    ),
    ((DEEPSPEC,), "last id", "refuses the target's last layer {}"),
    # Block and vocabulary.
    ((DEEPSPEC, TRT), "no anchor", "always drafts from the anchor, sample_from_anchor is false"),
    ((DEEPSPEC, SGLANG, TRT), "reduced vocabulary", "needs the whole vocabulary, found {}"),
    ((SGLANG,), "other vocabulary", "needs the target's vocab_size, unpadded, found {}"),
    ((VLLM,), "no d2t", "needs lm_head and d2t for a vocabulary that is not the target's"),
    # RoPE and attention.
    ((VLLM,), "partial rotary", "applies {}, drafts are trained without; delete it"),
    (
        (VLLM,),
        "speculators without sample_from_anchor",
        "takes an absent sample_from_anchor for false, speculators for true; write it",
    ),
    ((VLLM,), "non-causal for speculators only", "reads is_causal, no sliding_window_non_causal"),
    ((SGLANG,), "window by use_swa only", "reads layer_types, no dflash_config.use_swa: no window"),
    ((SGLANG,), "non-causal in dflash_config only", "reads is_causal, no dflash_config.causal"),
    ((MLX,), "window in mlx only", "windows all layers; make sliding_window null"),
    ((MLX,), "window not in mlx", "has no window without sliding_window and dflash_config"),
    ((MLX,), "causality unsaid for mlx", "takes sliding layers for non-causal; say causal"),
    ((MLX,), "yarn without projector_type", "has no YaRN without dflash_config.projector_type"),
    ((TRT,), "scaled rope", "has no RoPE scaling, found {}"),
    ((TRT,), "window", "has no sliding window"),
    ((TRT,), "attention bias", "has no attention bias"),
    (
        (VLLM, SGLANG),
        "wrongly quantized",
        "needs {} unquantized, and quantization_config for other modules",
    ),
)
"""Why a folder does not load, or would run wrongly without an error."""

WARNINGS: Rules = (
    (ALL, "inherited keys", "config.json has {}, which belongs to other models; delete it"),
    (
        ALL,
        "differing copies",
        "{} at the top level and in dflash_config differ; engines read either",
    ),
    ((DEEPSPEC,), "window", "has no window in its training mask"),
    ((SGLANG, TRT), "partial rotary", "{} in rope_parameters comes from the target; delete it"),
    ((VLLM,), "DSparkDraftModel", "knows DSparkDraftModel only since PR #52197 (August 2026)"),
    ((VLLM,), "method in path", "takes its method from {} in the path; give method dspark"),
    (
        (VLLM,),
        "unused confidence",
        "leaves the confidence head out: enable_confidence_head is not true",
    ),
    ((VLLM,), "rank 0", "crashed on markov_rank 0 with tensor parallelism in an older version"),
    (
        (SGLANG,),
        "half a confidence head",
        "runs in static mode only: no confidence head, or no bias",
    ),
    ((VLLM,), "no anchor, not speculators", f"{ONE_TOO_MANY}; give num_speculative_tokens"),
    ((SGLANG,), "no anchor", ONE_TOO_MANY),
    ((VLLM,), "no block_size", "needs num_speculative_tokens, as block_size is absent"),
    ((SGLANG,), "no block_size", "takes 7 for the absent block_size"),
    ((SGLANG,), "other depth", "reads num_target_layers {}"),
    ((MLX, TRT), "other vocabulary", "reads vocab_size {}"),
    ((VLLM, MLX), "last id", "captures the target's last layer {} before the final norm"),
    ((TRT,), "unordered ids", UNKNOWN_CAPTURE),
    ((TRT,), "embedding id", UNKNOWN_CAPTURE),
    ((TRT,), "last id", UNKNOWN_CAPTURE),
)
"""It loads, but the user should know."""
