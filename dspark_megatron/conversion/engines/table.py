"""What a row says of one engine: where it looks for a key, what it takes for an absent one, which
tensors it builds, skips or passes over. The rows are in `servers.py`, of engines that serve on
GPUs, and `local.py`, of the others; what an engine refuses is a rule of `rules.py` or
`variant_rules.py`.

Written from the sources that `version` and `source` name; another version may differ.
"""

from dataclasses import dataclass, field
from typing import Any

DEEPSPEC, VLLM, SGLANG, TRT = "DeepSpec", "vLLM", "SGLang", "TensorRT-LLM"
MLX, MLX_VLM, LLAMA, ONNX = "mlx-dspark", "mlx-vlm", "llama.cpp", "onnxruntime-genai"
MODELOPT = "ModelOpt"
ALL = (DEEPSPEC, MODELOPT, VLLM, SGLANG, TRT, MLX, MLX_VLM, LLAMA, ONNX)
FLAGS = ("enable_confidence_head", "confidence_head_with_markov")
AUX = "eagle_aux_hidden_state_layer_ids"
"""vLLM's first place for layer ids; it counts the embedding as 0."""
GEMMA = "Gemma4DSparkModel"
HF = "export with --layout hf"
WRAPPED = {r"^model\.": ""}
FLAT = {
    r"^markov_w": "markov_head.markov_w",
    r"^(gate|joint)_proj\.": r"markov_head.\1_proj.",
    r"^confidence_proj\.": "confidence_head.proj.",
}
"""ModelOpt's names of the heads."""


@dataclass(frozen=True, kw_only=True)
class AttentionKeys:
    """Where an engine looks for windows, causality and sinks; the first place that has a value
    wins."""

    width: tuple[str, ...] = ()
    """Of the window; empty: it has none."""
    per_layer: bool = True
    """Whether only `sliding_attention` in `layer_types` has the window; if not, all layers."""
    use_swa: bool = False
    """Whether `dflash_config.use_swa` gives all layers the window where no layer slides."""
    switches: tuple[str, ...] = ()
    """Keys of which one must be set for a window."""
    off: tuple[str, ...] = ()
    """Keys that, when false, hide a width at the top level."""
    causal: tuple[str, ...] = ()
    any_causal: bool = False
    """Whether one true place is enough."""
    sliding_is_causal: bool = False
    """Of a sliding layer, where no place says."""
    sink: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Engine:
    name: str
    version: str
    source: str = "the wheel of that version"
    """What was read."""
    architectures: tuple[str, ...] = ()
    """Empty: not looked at."""
    model_types: tuple[str, ...] = ()
    """Parts of a name of which `model_type` must have one; empty: not looked at."""
    defaults: dict[str, Any]
    """For the keys (`reading.KEYS`) it can do without; it requires the others."""
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where it looks for a key, first found wins; a key that is not here: at the top level."""
    lifts: tuple[str, ...] = ()
    """Keys of `dflash_config` that it takes where the top level lacks them, if the folder says it
    is DSpark's."""
    by_tensors: bool = False
    """Whether heads and rank are as their tensors say, not the config."""
    confidence: str = "flag"
    """What decides on a confidence head: `flag`, `tensors`, or `both`."""
    biases: bool = True
    """Whether it knows `attention_bias`."""
    reduced_vocabulary: bool = False
    """Whether it knows `d2t`."""
    attention: AttentionKeys = AttentionKeys()
    logit_scale: tuple[str, ...] = ()
    softcap: tuple[str, ...] = ()
    """Where it looks for the scale and the cap of base logits; empty: it has none."""
    target_divisor: str = ""
    """Key of the target's config by which it divides the draft's base logits, where it is there."""
    speculators_ids: str | None = None
    """The key that aux_hidden_state_layer_ids becomes; None: it does not read that format."""
    gemma: dict[str, Any] | None = None
    """What is otherwise for Gemma-4 drafts; None: it has none."""
    missing: str = "needs {}, which the file lacks"
    # Regular expressions of tensor names; those it skips are left alone, or a rule speaks of them.
    optional: str = r"(embed_tokens|lm_head)\."
    skips: str = r"(embed_tokens|lm_head)\.|d2t$|t2d$"
    renames: dict[str, str] = field(default_factory=dict)
    """Other names of tensors that it knows: expressions, and what stands for them."""
    foreign: str = r"(model|logit_head|markov_w[12]|gate_proj|joint_proj|confidence_proj)\."
    """Names of a wrapped model, of older SpecForge and of ModelOpt that it does not know."""
    silent: str = "$^"  # unknown to it and passed over; it raises on the others
    quantized: str = "$^"
