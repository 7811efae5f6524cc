"""What a family keeps of a sequence from token to token, by its config alone: keys and values, from
which tokens can be cut, or states, from which they cannot."""

from transformers import DynamicCache, PretrainedConfig

from dspark_megatron.config import ConfigError, require
from dspark_megatron.targets.family import model_class

_MOVED = {"DynamicLayer", "DynamicSlidingWindowLayer"}
"""Layers of Transformers' caches in which sequences can be moved. By name: versions lack some."""
_CUT = _MOVED | {"DynamicIndexedLayer", "DummyLayer"}
"""And those that the last tokens can be cut from."""
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
