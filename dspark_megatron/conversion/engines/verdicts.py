"""Which engines load a folder with a DSpark draft, each as it would read the folder, and why not.

The rules were written from the sources of DeepSpec git afdfa7c, vLLM 0.33.0, SGLang 0.5.23,
mlx-dspark 0.20.3 and one unreleased file of TensorRT-LLM. No engine was started for them: a verdict
is a reading of loaders, other versions may differ, and only Qwen3-style drafts are known here.

ENGINES, at the end, is the table: where an engine looks, what it needs, what it does in silence.
"""

from dataclasses import dataclass
from typing import Any

from dspark_megatron.conversion.engines.reading import (
    AUX,
    DEEPSPEC,
    FLAGS,
    HF,
    MLX,
    SGLANG,
    TRT,
    VLLM,
    Engine,
    Reading,
    Rules,
    facts,
    resolve,
    tensor_problems,
    unfolded,
)


@dataclass(frozen=True)
class Verdict:
    engine: str
    problems: tuple[str, ...]
    """Why it does not load, or would run wrongly without saying so; empty: it loads."""
    warnings: tuple[str, ...]
    """It loads, but the user should know."""

    @property
    def loads(self) -> bool:
        return not self.problems


def engine_verdicts(
    config: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    *,
    folder_name: str = "",
    target_config: Any = None,
) -> list[Verdict]:
    """A verdict for each engine on a raw `config.json` and the raw names and shapes of tensors.

    target_config: the target's Transformers `PretrainedConfig`; without it, rules that compare the
    draft with its target say nothing. A bad folder gives problems, never an exception.
    """
    target = target_config.get_text_config() if target_config is not None else None
    return [_verdict(engine, config, tensors, folder_name, target) for engine in ENGINES]


def _verdict(
    engine: Engine, raw: dict[str, Any], tensors: Any, folder_name: str, target: Any
) -> Verdict:
    speculators = "speculators_config" in raw and "model_type" not in raw
    if speculators and not engine.speculators_ids:
        return Verdict(engine.name, (f"does not read the speculators format; {HF}",), ())
    config = unfolded(engine, raw, speculators)
    values, lines = resolve(engine, config)
    reading = Reading(engine, config, values, tensors, folder_name, target, speculators)
    found = facts(reading)
    problems, warnings = (
        [line.format(found[fact]) for fact, line in rules if found[fact]]
        for rules in (engine.problems, engine.warnings)
    )
    return Verdict(engine.name, (*lines, *problems, *tensor_problems(reading)), tuple(warnings))


COMMON_PROBLEMS: Rules = (
    ("impossible ids", "needs layers that the target has, found {}"),
    ("mask token", "needs mask_token_id below vocab_size, found {}"),
    ("other width", "needs the target's hidden_size, found {}"),
    ("differing ropes", "may read the other one of two RoPEs: {}; correct one"),
    ("not quantized", "builds quantized layers, the file has none; delete quantization_config"),
)
COMMON_WARNINGS: Rules = (
    ("inherited keys", "config.json has {}, which belongs to other models; delete it"),
    ("differing copies", "{} at the top level and in dflash_config differ; engines read either"),
)
ARCHITECTURE = ("architectures", f"needs architectures Qwen3DSparkModel, found {{}}; {HF}")
MODEL_TYPE = ("model_type", f"needs model_type qwen3, found {{}}; {HF}")
NAMES_RAISE = ("foreign names", f"raises on the names {{}}; {HF}")
NAMES_SILENT = ("foreign names", f"passes over the names {{}} without an error; {HF}")
ONE_FORMAT = ("two formats", "speculators_config and a top-level model_type exclude each other")
VANILLA = ("latent head", "needs a vanilla Markov head, found {}; DeepSpec and SGLang load it")
IN_ORDER = ("unordered ids", "captures in the order of layers, needs increasing ids, found {}")
FROM_ANCHOR = ("no anchor", "always drafts from the anchor, sample_from_anchor is false")
WHOLE_VOCABULARY = ("reduced vocabulary", "needs the whole vocabulary, found {}")
DENSE = ("wrongly quantized", "needs {} unquantized, and quantization_config for other modules")
INHERITED_ROPE = ("partial rotary", "{} in rope_parameters comes from the target; delete it")
BEFORE_NORM = ("last id", "captures the target's last layer {} before the final norm")
UNKNOWN_CAPTURE = "may not capture target_layer_ids {}: its source was not read for that"
ONE_TOO_MANY = "sample_from_anchor is false: drafts block_size tokens, one more than mlx-dspark"

ENGINES = (
    Engine(
        name=DEEPSPEC,
        defaults={},
        missing="fills {} at random, with only a warning in its log; the file lacks them",
        optional="$^",
        skips=".*rotary_emb|d2t$|t2d$",
        silent=".",
        problems=(
            *COMMON_PROBLEMS,
            ARCHITECTURE,
            MODEL_TYPE,
            NAMES_SILENT,
            ("unordered ids", "needs increasing target_layer_ids, found {}"),
            ("last id", "refuses the target's last layer {}"),
            FROM_ANCHOR,
            WHOLE_VOCABULARY,
        ),
        warnings=(*COMMON_WARNINGS, ("window", "has no window in its training mask")),
    ),
    Engine(
        name=VLLM,
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
        problems=(
            *COMMON_PROBLEMS,
            ("architectures", f"needs Qwen3DSparkModel, takes {{}} for DeepSeek-V4; {HF}"),
            MODEL_TYPE,
            ONE_FORMAT,
            NAMES_RAISE,
            VANILLA,
            ("unordered ids", "sorts target_layer_ids {}, which permutes the columns of fc"),
            ("no d2t", "needs lm_head and d2t for a vocabulary that is not the target's"),
            ("partial rotary", "applies {}, drafts are trained without; delete it"),
            (
                "speculators without sample_from_anchor",
                "takes an absent sample_from_anchor for false, speculators for true; write it",
            ),
            ("non-causal for speculators only", "reads is_causal, no sliding_window_non_causal"),
            DENSE,
        ),
        warnings=(
            *COMMON_WARNINGS,
            ("DSparkDraftModel", "knows DSparkDraftModel only since PR #52197 (August 2026)"),
            ("method in path", "takes its method from {} in the path; give method dspark"),
            (
                "unused confidence",
                "leaves the confidence head out: enable_confidence_head is not true",
            ),
            ("rank 0", "crashed on markov_rank 0 with tensor parallelism in an older version"),
            ("no anchor, not speculators", f"{ONE_TOO_MANY}; give num_speculative_tokens"),
            ("no block_size", "needs num_speculative_tokens, as block_size is absent"),
            BEFORE_NORM,
        ),
    ),
    Engine(
        name=SGLANG,
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
        problems=(
            *COMMON_PROBLEMS,
            ARCHITECTURE,
            MODEL_TYPE,
            NAMES_SILENT,
            ("bundled keys", "prefers {}, as of a draft inside its target; delete them"),
            ("rank 0", "needs markov_rank above 0"),
            ("embedding id", "cannot capture the embedding, target layer {}"),
            ("last id", "cannot capture the target's last layer {}"),
            IN_ORDER,
            WHOLE_VOCABULARY,
            ("other vocabulary", "needs the target's vocab_size, unpadded, found {}"),
            ("window by use_swa only", "reads layer_types, no dflash_config.use_swa: no window"),
            ("non-causal in dflash_config only", "reads is_causal, no dflash_config.causal"),
            DENSE,
        ),
        warnings=(
            *COMMON_WARNINGS,
            INHERITED_ROPE,
            ("half a confidence head", "runs in static mode only: no confidence head, or no bias"),
            ("no anchor", ONE_TOO_MANY),
            ("no block_size", "takes 7 for the absent block_size"),
            ("other depth", "reads num_target_layers {}"),
        ),
    ),
    Engine(
        name=MLX,
        defaults={"num_key_value_heads": 8, "head_dim": None, "num_anchors": None}
        | {"markov_rank": 256, "markov_head_type": "vanilla", **dict.fromkeys(FLAGS, True)},
        places={"markov_head_type": ()},  # read, not acted on
        architectures=(),
        speculators_ids="target_layer_ids",
        skips=r"t2d$|markov_head\.(gate|joint)_proj\.",
        quantized=".",
        problems=(
            *COMMON_PROBLEMS,
            MODEL_TYPE,
            ONE_FORMAT,
            ("speculators", f"reads the layer ids of speculators one layer late; {HF}"),
            NAMES_RAISE,
            VANILLA,
            ("embedding id", "never captures the embedding, target layer {}"),
            IN_ORDER,
            ("window in mlx only", "windows all layers; make sliding_window null"),
            ("window not in mlx", "has no window without sliding_window and dflash_config"),
            ("causality unsaid for mlx", "takes sliding layers for non-causal; say causal"),
            ("yarn without projector_type", "has no YaRN without dflash_config.projector_type"),
        ),
        warnings=(*COMMON_WARNINGS, ("other vocabulary", "reads vocab_size {}"), BEFORE_NORM),
    ),
    Engine(
        name=TRT,
        defaults={"num_anchors": None},
        problems=(
            *COMMON_PROBLEMS,
            ARCHITECTURE,
            NAMES_RAISE,
            FROM_ANCHOR,
            WHOLE_VOCABULARY,
            ("scaled rope", "has no RoPE scaling, found {}"),
            ("window", "has no sliding window"),
            ("attention bias", "has no attention bias"),
        ),
        warnings=(
            *COMMON_WARNINGS,
            INHERITED_ROPE,
            ("other vocabulary", "reads vocab_size {}"),
            *((x, UNKNOWN_CAPTURE) for x in ("unordered ids", "embedding id", "last id")),
        ),
    ),
)
