"""The draft's RoPE: the target's, where the draft's layers can have it, or one of its own."""

import math
from typing import Any

from dspark_megatron.errors import ConfigError, require

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those that every engine makes for a Qwen3-style draft, and that stay the same for any length."""
SCALED_FROM = ("llama3", "yarn")
"""Those that need the length that they are scaled from."""
NOT_APPLIED = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""What comes over from targets' configs, and the draft's RoPE does not do."""
_WHY_NOT = {
    "dynamic": "it changes with the length of the text",
    "longrope": "it changes with the length of the text",
    "proportional": "it turns a part of each head only, by frequencies of the whole one",
}
_KEYS = (
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor"),
)


def draft_rope(own: dict[str, Any] | None, text: Any) -> dict[str, Any]:
    """`model.rope_parameters` if given, else what the target's text config says, complete. Raises
    ConfigError for a RoPE that the draft cannot have."""
    return _own_rope(own, text) if own is not None else _targets_rope(text)


def _targets_rope(text: Any) -> dict[str, Any]:
    """As a plain dict, without what the Qwen3-style draft does not apply."""
    rope = dict(getattr(text, "rope_parameters", None) or {})
    # Where layers of several kinds have their own, the draft, whose attention is full, takes that.
    rope = dict(rope.get("full_attention", rope))
    require(
        type(rope.get("rope_theta")) in (int, float),
        f"the target's config ({text.model_type}) has no rope_parameters with a rope_theta that "
        f"the draft could take over (found keys {sorted(rope)}); {_way_out(10000.0)}",
    )
    for key in ("type", *NOT_APPLIED):
        rope.pop(key, None)
    kind = rope.setdefault("rope_type", "default")
    why = f" ({_WHY_NOT[kind]})" if kind in _WHY_NOT else ""
    require(
        kind in ROPE_TYPES,
        f"the target's rope_type {kind!r}{why} is none of those that a draft can have "
        f"({', '.join(ROPE_TYPES)}); {_way_out(rope['rope_theta'])}",
    )
    return computable(rope, f"the target's config ({text.model_type}) says")


def _way_out(theta: float) -> str:
    return (
        "the draft's need not be the target's: give it its own, for example "
        f"model.rope_parameters='{{rope_theta: {theta}}}'"
    )


def _own_rope(own: dict[str, Any], text: Any) -> dict[str, Any]:
    unknown = [key for key in own if key not in _KEYS]
    require(
        not unknown,
        f"model.rope_parameters has keys that a draft's RoPE does not have ({unknown}); those that "
        f"it can have: {', '.join(_KEYS)}",
    )
    rope = {"rope_type": "default", **{key: _number(value) for key, value in own.items()}}
    theta: Any = rope.get("rope_theta")
    kind = rope["rope_type"]
    require(
        type(theta) in (int, float) and 0 < theta < math.inf,
        f"model.rope_parameters must have a rope_theta > 0, and has {theta!r}; 10000.0 is usual, "
        "more for long texts",
    )
    require(
        kind in ROPE_TYPES,
        f"rope_type {kind!r} of model.rope_parameters must be one of {', '.join(ROPE_TYPES)}",
    )
    if kind in SCALED_FROM:  # as Transformers completes them
        rope.setdefault("original_max_position_embeddings", text.max_position_embeddings)
    return computable(rope, "model.rope_parameters is")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e6 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def computable(rope: dict[str, Any], where: str) -> dict[str, Any]:
    """The same; ConfigError if Transformers' Qwen3, which every engine follows, cannot make it."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    try:
        config = Qwen3Config(
            hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=dict(rope)
        )
        finite = bool(Qwen3RotaryEmbedding(config).inv_freq.isfinite().all())
    except Exception as error:  # whatever a value of a wrong kind leads to
        raise ConfigError(f"{where} a RoPE that cannot be computed: {rope} ({error})") from error
    require(finite, f"{where} a RoPE without finite frequencies: {rope}")
    return rope
