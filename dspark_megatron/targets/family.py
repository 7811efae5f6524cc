"""What a target's family does otherwise than a run can use: its attention, and what it keeps of a
sequence from token to token. Known from its config and class alone, before any weight is read.
"""

import contextlib

from transformers import MODEL_MAPPING, DynamicCache, PretrainedConfig, PreTrainedModel

from dspark_megatron.errors import ConfigError, require

_MOVED = {"DynamicLayer", "DynamicSlidingWindowLayer"}
"""Layers of Transformers' caches in which sequences can be moved. By name: versions lack some."""
_CUT = _MOVED | {"DynamicIndexedLayer", "DummyLayer"}
"""And those that the last tokens can be cut from."""
_FLAGS = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""Of a class that has the attention."""
RECURRENT = (
    "falcon_h1",
    "granitemoehybrid",
    "lfm2",
    "lfm2_moe",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)
"""Families with recurrent layers that go on from their states when several tokens come at once, as
the tests see. Others (Mamba, Jamba, Bamba, RecurrentGemma, ...) start again from zero there."""


def keeps_states(target_config: PretrainedConfig) -> bool:
    """Whether a layer keeps more of a sequence than keys and values."""
    return not _kinds(target_config) <= _CUT


def check_pieces(target_config: PretrainedConfig, way_out: str) -> None:
    """ConfigError unless the family makes the same states of a sequence that comes in pieces."""
    family = target_config.get_text_config().model_type
    stateful = model_class(target_config)._is_stateful or keeps_states(target_config)
    require(
        not stateful or family in RECURRENT,
        f"the target's family ({family}) keeps recurrent states that Transformers does not carry "
        "on when a text comes in pieces of several tokens, so its states would be wrong; "
        f"{way_out}",
    )


def check_decoding(target_config: PretrainedConfig, batch_size: int) -> None:
    """ConfigError unless drafts can be taken back from so many sequences at once."""
    check_pieces(
        target_config,
        "such a target can be trained for, but not decoded with: evaluate in a serving engine, "
        "and use evaluate.every for estimates while training",
    )
    other = _kinds(target_config) - _MOVED
    require(
        batch_size == 1 or not other,
        f"the target keeps {', '.join(sorted(other))} of a sequence beside keys and values, which "
        f"are not cut for several sequences at once, and {batch_size} are asked for; "
        "set evaluate.batch_size=1",
    )


def _kinds(target_config: PretrainedConfig) -> set[str]:
    try:
        return {type(layer).__name__ for layer in DynamicCache(config=target_config).layers}
    except Exception as error:  # a kind of layer that Transformers' caches do not know
        raise ConfigError(
            f"Transformers has no cache for a target of model_type {target_config.model_type!r} "
            f"({error}); such a target cannot be decoded with"
        ) from error


def model_class(target_config: PretrainedConfig) -> type[PreTrainedModel]:
    """The family's base model. ConfigError where Transformers has none."""
    kind = type(target_config)
    require(
        kind in MODEL_MAPPING,
        f"Transformers has no base model for a target of model_type {target_config.model_type!r}; "
        "take a causal language model",
    )
    found = MODEL_MAPPING[kind]
    return found[0] if isinstance(found, tuple) else found


def check_attention(target_config: PretrainedConfig, attention: str) -> None:
    """ConfigError unless the family has this implementation of attention."""
    flag = "_supports_flash_attn" if "flash" in attention else _FLAGS.get(attention)
    require(
        flag is None or getattr(model_class(target_config), flag),
        f"the target's family ({target_config.model_type}) has no attention of the kind "
        f"{attention!r} in Transformers; set target.attention=eager",
    )


def without_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, changed to have no decoder layer and no quantization."""
    text = config.get_text_config()
    for part in (config, text):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        with contextlib.suppress(AttributeError):  # computed from other keys
            text.layer_types = []
    return config
