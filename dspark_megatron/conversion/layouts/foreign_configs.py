"""`config.json` of the other layouts, from the canonical one and back.

Facts of each layout: ModelOpt 0.47 and SpecForge 0.2 nest the DSpark keys in `dflash_config`;
speculators 0.9 nests the backbone in `transformer_layer_config`, counts layer ids from the
embedding (one more than ours), and must not have a top-level `model_type`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dspark_megatron.conversion.layouts.anchor_slot import (
    TOKENS,
    judged_by_tokens,
    samples_from_anchor,
)
from dspark_megatron.conversion.layouts.attention_config import FULL, lookup
from dspark_megatron.conversion.layouts.known_keys import ALIASES, USED
from dspark_megatron.conversion.layouts.rope_config import rope_of_config
from dspark_megatron.errors import ConfigError, require

Config = dict[str, Any]

HEAD_KEYS = (
    *("markov_rank", "markov_head_type"),
    *("enable_confidence_head", "confidence_head_with_markov"),
)
DSPARK_KEYS = ("mask_token_id", "target_layer_ids", *HEAD_KEYS)
BACKBONE_KEYS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act rms_norm_eps attention_bias attention_dropout
    initializer_range max_position_embeddings layer_types sliding_window use_sliding_window
    max_window_layers tie_word_embeddings rope_theta rope_parameters rope_scaling bos_token_id
    eos_token_id pad_token_id dtype torch_dtype
""".split()
SPECULATORS_VERSION = "0.9.0"
AUX = "eagle_aux_hidden_state_layer_ids"
"""vLLM's first place for layer ids; it counts the embedding as 0."""


@dataclass(frozen=True)
class TargetFacts:
    """What layouts say of the target."""

    name: str
    """As users find it: a hub id, or the folder's name."""
    architectures: tuple[str, ...]
    num_layers: int
    max_position_embeddings: int

    @classmethod
    def of(cls, target_config: Any, name: str) -> "TargetFacts":
        text = target_config.get_text_config()
        return cls(
            name=name,
            architectures=tuple(target_config.architectures or ()),
            num_layers=text.num_hidden_layers,
            max_position_embeddings=text.max_position_embeddings,
        )


def same(canonical: Config, target: TargetFacts) -> Config:
    return canonical


def to_specforge(canonical: Config, target: TargetFacts) -> Config:
    """The canonical keys under SpecForge's class: it reads the nested ones, engines the others."""
    return {**canonical, "architectures": ["DSparkDraftModel"]}


def to_modelopt(canonical: Config, target: TargetFacts) -> Config:
    backbone = _some(canonical, BACKBONE_KEYS)
    if canonical["use_sliding_window"]:  # its windows are all layers', by dflash_config.use_swa
        backbone["layer_types"] = [FULL] * canonical["num_hidden_layers"]
        del backbone["use_sliding_window"]
    nested = {
        "projector_type": "dspark",
        "shift_label": True,
        **_some(canonical, DSPARK_KEYS[:4]),
        "use_confidence_head": canonical["enable_confidence_head"],
        "causal": bool(canonical.get("is_causal")),
        **_some(canonical["dflash_config"], ("use_swa", "swa_window_size", "attention_sink_bias")),
    }
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **backbone,
        **_some(canonical, ("attention_sink_bias",)),
        "block_size": canonical["block_size"],
        "num_target_layers": canonical["num_target_layers"],
        "dflash_config": nested,
    }


def from_modelopt(config: Config, target: TargetFacts | None) -> Config:
    nested = dict(config.get("dflash_config") or {})
    enabled = nested.pop("use_confidence_head", None)
    if enabled is not None:
        nested |= {"enable_confidence_head": enabled, "confidence_head_with_markov": enabled}
    return lifted({**config, "dflash_config": nested}, target)


def to_speculators(canonical: Config, target: TargetFacts) -> Config:
    backbone = {"model_type": "qwen3", **_some(canonical, BACKBONE_KEYS)}
    from_anchor = canonical["sample_from_anchor"]
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": canonical["block_size"],
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": SPECULATORS_VERSION,
        "dtype": canonical["dtype"],
        "aux_hidden_state_layer_ids": [i + 1 for i in canonical["target_layer_ids"]],
        "block_size": canonical["block_size"] + (not from_anchor),
        "draft_vocab_size": canonical["vocab_size"],
        "target_hidden_size": canonical["hidden_size"],
        "mask_token_id": canonical["mask_token_id"],
        # Readers differ in what its absence means.
        "sample_from_anchor": from_anchor,
        "sliding_window_non_causal": canonical.get("is_causal") is False,
        **_some(canonical, HEAD_KEYS),
        "tie_word_embeddings": False,
        "transformer_layer_config": backbone,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": target.name,
                "architectures": list(target.architectures),
            },
        },
    }


def from_speculators(config: Config, target: TargetFacts | None) -> Config:
    backbone = dict(config.get("transformer_layer_config") or {})
    require(bool(backbone), "config.json of a speculators draft lacks transformer_layer_config")
    own = {k: v for k, v in config.items() if k not in ("architectures", "speculators_config")}
    twice = [
        key
        for key in USED & own.keys() & backbone.keys() - {"dtype", "torch_dtype"}
        if None not in (own[key], backbone[key]) and own[key] != backbone[key]
    ]
    require(
        not twice,
        "config.json and its transformer_layer_config differ in "
        + ", ".join(f"{key} ({own[key]} and {backbone[key]})" for key in sorted(twice))
        + "; correct one",
    )
    ids = config.get("aux_hidden_state_layer_ids")
    if ids is not None:
        own["target_layer_ids"] = [i - 1 for i in ids]
    found = lifted({**backbone, **own}, target)
    if lookup(found, "sample_from_anchor") is None and lookup(found, "dspark_bonus_anchor") is None:
        methods = lookup(config, "speculators_config.proposal_methods")
        found["sample_from_anchor"] = judged_by_tokens(
            found.get("block_size"), methods[0] if isinstance(methods, list) and methods else None
        )
    if not samples_from_anchor(found)[0] and type(found.get("block_size")) is int:
        found["block_size"] -= 1  # it counts the anchor's slot
        found[TOKENS[0]] = found["block_size"]
    return found


def lifted(config: Config, target: TargetFacts | None) -> Config:
    """A config whose DSpark keys stand at the top, in `dflash_config`, or in both alike; with the
    defaults that its backbone's class (Qwen3) and the target give."""
    nested = config.get("dflash_config") or {}
    wanted = (*DSPARK_KEYS, "block_size", "num_target_layers", "num_anchors", "sample_from_anchor")
    twice = [key for key in wanted if key in nested and config.get(key, nested[key]) != nested[key]]
    if twice:
        listed = ", ".join(f"{key} ({config[key]} and {nested[key]})" for key in twice)
        raise ConfigError(f"config.json and its dflash_config differ in {listed}; correct one")
    found = _with_aliases({**_some(nested, wanted), **config})
    heads = found.get("num_attention_heads")
    defaults = {"num_key_value_heads": heads, "rms_norm_eps": 1e-6}
    if target is not None:
        defaults["num_target_layers"] = target.num_layers
        defaults["max_position_embeddings"] = target.max_position_embeddings
    if heads and found.get("hidden_size"):
        defaults["head_dim"] = found["hidden_size"] // heads
    if not found.get("markov_rank", 1):
        defaults["markov_head_type"] = "vanilla"
    if found.get("enable_confidence_head") is False:
        defaults["confidence_head_with_markov"] = False
    missing = {key: value for key, value in defaults.items() if found.get(key) is None}
    complete = {**found, **missing}
    return {**complete, "rope_parameters": rope_of_config(complete)}


def _with_aliases(config: Config) -> Config:
    """A config whose keys are there under the names that we use; ConfigError where another name
    says otherwise."""
    found = dict(config)
    said = {alias: (key, lookup(config, alias)) for alias, key in ALIASES.items()}
    for place in (AUX, f"eagle_config.{AUX}"):
        if (ids := lookup(config, place)) is not None:  # it counts the embedding
            said[place] = ("target_layer_ids", [i - 1 for i in ids])
    for alias, (key, value) in said.items():
        if value is None:
            continue
        if found.get(key) is None:
            found[key] = value
        ours, theirs = found[key], lookup(config, alias)
        if key == "target_layer_ids" and ours != value:
            raise ConfigError(
                f"two sets of target layers: {alias} {theirs}"
                + (" counts the embedding, so it" if theirs != value else "")
                + f" is not target_layer_ids {ours}; correct one"
            )
        require(
            ours == value, f"config.json has {key} {ours!r} and {alias} {theirs!r}; correct one"
        )
    return found


def _some(config: Config, keys: Iterable[str]) -> Config:
    return {key: config[key] for key in keys if key in config}
