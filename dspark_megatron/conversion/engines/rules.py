"""What engines refuse or do otherwise, one rule a row: format, names, heads, layer ids, vocabulary.
Those of attention, RoPE, anchors and logits are in `variant_rules.py`. A new rule is a row; what it
asks for is a fact of `facts.py` or `variant_facts.py`.
"""

from typing import Any, NamedTuple

from dspark_megatron.conversion.engines.table import (
    ALL,
    DEEPSPEC,
    HF,
    LLAMA,
    MLX,
    MLX_VLM,
    MODELOPT,
    ONNX,
    SGLANG,
    TRT,
    VLLM,
)


class Rule(NamedTuple):
    engines: tuple[str, ...]
    fact: str
    line: str
    """What to say where the fact holds; {}: what was found."""
    read_in: str = ""
    """The version that it was read in, where that is another than the engine's."""


def rows(*given: tuple[Any, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(*row) for row in given)


UNKNOWN_CAPTURE = "may not capture target_layer_ids {}: its source was not read for that"
SERVING = tuple(name for name in ALL if name != MODELOPT)

PROBLEMS = rows(
    (ALL, "impossible ids", "needs layers that the target has, found {}"),
    (ALL, "mask token", "needs mask_token_id below vocab_size, found {}"),
    (ALL, "other width", "needs the target's hidden_size, found {}"),
    (
        ALL,
        "not quantized",
        "builds quantized layers, the file has none; delete quantization_config",
    ),
    # Architecture, format and names.
    (
        (DEEPSPEC, SGLANG),
        "architectures",
        f"needs architectures Qwen3DSparkModel, found {{}}; {HF}",
    ),
    ((LLAMA,), "architectures", f"converts no architectures {{}}; {HF}"),
    ((VLLM,), "architectures", f"needs Qwen3DSparkModel, takes {{}} for DeepSeek-V4; {HF}"),
    ((DEEPSPEC, VLLM, SGLANG, MLX), "model_type", f"needs model_type qwen3, found {{}}; {HF}"),
    ((MLX_VLM, TRT), "no model_type", f"needs a model_type; {HF}"),
    ((MLX_VLM, ONNX), "no dflash_config", f"needs dflash_config, which config.json lacks; {HF}"),
    (
        (VLLM, MLX),
        "two formats",
        "speculators_config and a top-level model_type exclude each other",
    ),
    ((MLX,), "speculators", f"reads the layer ids of speculators one layer late; {HF}"),
    (
        (VLLM, MLX, MLX_VLM, LLAMA, ONNX, MODELOPT),
        "foreign names",
        f"raises on the names {{}}; {HF}",
    ),
    (
        (DEEPSPEC, SGLANG, TRT),
        "foreign names",
        f"passes over the names {{}} without an error; {HF}",
    ),
    ((MLX_VLM,), "own lm_head", "raises on lm_head.weight; export with --no-shared-weights"),
    ((SGLANG,), "bundled keys", "prefers {}, as of a draft inside its target; delete them"),
    (
        (VLLM, SGLANG),
        "wrongly quantized",
        "needs {} unquantized, and quantization_config for other modules",
    ),
    # Heads.
    (
        (VLLM, MLX, MLX_VLM, LLAMA, TRT),
        "latent head",
        "needs a vanilla Markov head, found {}; DeepSpec and SGLang load it",
    ),
    (
        (ONNX,),
        "latent head",
        "builds a {} Markov head as a vanilla one, without an error; DeepSpec and SGLang load it",
    ),
    ((SGLANG, MODELOPT, MLX_VLM, ONNX), "rank 0", "needs markov_rank above 0"),
    ((TRT,), "rank 0 with a Markov head", "refuses a Markov head where markov_rank is 0"),
    ((LLAMA,), "rank 0", "converts markov_rank 0, and then fails to load it"),
    # Layers that are captured.
    ((SGLANG, ONNX), "embedding id", "cannot capture the embedding, target layer {}"),
    ((MLX,), "embedding id", "never captures the embedding, target layer {}"),
    ((MLX_VLM, MODELOPT), "embedding id", "needs target_layer_ids >= 0, found {}"),
    ((SGLANG, ONNX), "last id", "cannot capture the target's last layer {}"),
    ((DEEPSPEC,), "last id", "refuses the target's last layer {}"),
    ((DEEPSPEC, MLX_VLM), "unordered ids", "needs increasing target_layer_ids, found {}"),
    ((VLLM,), "unordered ids", "sorts target_layer_ids {}, which permutes the columns of fc"),
    (
        (SGLANG, MLX),
        "unordered ids",
        "captures in the order of layers, needs increasing ids, found {}",
    ),
    ((MODELOPT,), "other taps", "needs as many target_layer_ids as draft layers, found {}"),
    ((MLX_VLM,), "other depth", "needs the target's depth as num_target_layers, found {}"),
    # Vocabulary and target.
    (
        (DEEPSPEC, SGLANG, TRT, MLX_VLM, ONNX, MODELOPT),
        "reduced vocabulary",
        "needs the whole vocabulary, found {}",
    ),
    (
        (SGLANG, MLX_VLM, ONNX),
        "other vocabulary",
        "needs the target's vocab_size, unpadded, found {}",
    ),
    ((VLLM,), "no d2t", "needs lm_head and d2t for a vocabulary that is not the target's"),
)
"""Why a folder does not load, or would run wrongly without an error."""

WARNINGS = rows(
    (SERVING, "inherited keys", "config.json has {}, which belongs to other models; delete it"),
    (
        SERVING,
        "differing copies",
        "{} at the top level and in dflash_config differ; engines read either",
    ),
    (
        (VLLM,),
        "DSparkDraftModel",
        "knows DSparkDraftModel only since PR #52197 (August 2026)",
        "PR #52197",
    ),
    ((VLLM,), "method in path", "takes its method from {} in the path; give method dspark"),
    (
        (VLLM,),
        "unused confidence",
        "leaves the confidence head out: enable_confidence_head is not true",
    ),
    (
        (VLLM,),
        "rank 0",
        "crashed on markov_rank 0 with tensor parallelism in an older version",
        "PR #49646",
    ),
    (
        (SGLANG,),
        "half a confidence head",
        "runs in static mode only: no confidence head, or no bias",
    ),
    ((ONNX,), "not a Qwen3.5 target", "builds drafts for Qwen3.5 targets only, this is {}"),
    ((VLLM,), "no block_size", "needs num_speculative_tokens, as block_size is absent"),
    ((SGLANG,), "no block_size", "takes 7 for the absent block_size"),
    ((SGLANG,), "other depth", "reads num_target_layers {}"),
    ((MLX, TRT), "other vocabulary", "reads vocab_size {}"),
    ((VLLM, MLX, MLX_VLM), "last id", "captures the target's last layer {} before the final norm"),
    ((TRT, LLAMA, ONNX), "unordered ids", UNKNOWN_CAPTURE),
    ((TRT, LLAMA), "embedding id", UNKNOWN_CAPTURE),
    ((TRT, LLAMA), "last id", UNKNOWN_CAPTURE),
)
"""It loads, but the user should know."""
