"""The draft's RoPE: the target's, where the draft's layers can have it, or one of its own."""

import math
from collections.abc import Callable
from typing import Any

from dspark_megatron.errors import ConfigError, require

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those that every engine makes for a Qwen3-style draft, and that stay the same for any length."""
SCALED_FROM = ("llama3", "yarn")
"""Those that need the length that they are scaled from."""
_ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
"""Share of a head's widths, from the first on, that a RoPE turns. Only a draft that was given one
has it: configs inherit it from targets, and drafts are trained as if it were not there."""
ROPE_DIM = "rope_dim"
"""What says in a draft's config how many widths are really turned (a key that SGLang reads)."""
NOT_APPLIED = (PARTIAL, "mrope_section", "mrope_interleaved")
"""What comes over from targets' configs, and the draft's RoPE does not do."""
_WHY_NOT = {
    "dynamic": "it changes with the length of the text",
    "longrope": "it changes with the length of the text",
    "proportional": "it turns a part of each head only, by frequencies of the whole one",
}
KEYS_OF: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
"""What each type reads beside ALL_READ."""
ALL_READ = ("rope_type", "rope_theta", PARTIAL)
ROPE_KEYS = (*ALL_READ, *dict.fromkeys(key for keys in KEYS_OF.values() for key in keys))
_ORDERED = {
    "llama3": (("high_freq_factor", 4.0), ("low_freq_factor", 1.0)),
    "yarn": (("beta_fast", 32.0), ("beta_slow", 1.0)),
}
"""Of two keys with their defaults, the first must be the larger."""
_SENSE: dict[str, tuple[Callable[[float], bool], str]] = {
    "factor": (lambda x: x >= 1, "at least 1"),
    _ORIGINAL: (lambda x: x >= 1 and x == int(x), "a number of positions"),
    "attention_factor": (lambda x: x > 0, "> 0"),
    PARTIAL: (lambda x: 0 < x <= 1, "in (0, 1]"),
}
"""What numbers of a RoPE must be."""


def draft_rope(
    own: dict[str, Any] | None, text: Any, max_position_embeddings: int | None = None
) -> dict[str, Any]:
    """`model.rope_parameters` if given, else what the target's text config says, complete. Raises
    ConfigError for a RoPE that the draft cannot have. max_position_embeddings: of the draft; None:
    the target's."""
    if own is None:
        return _targets_rope(text)
    return _own_rope(own, text, max_position_embeddings)


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


def _own_rope(own: dict[str, Any], text: Any, longest: int | None) -> dict[str, Any]:
    unknown = [key for key in own if key not in ROPE_KEYS]
    require(
        not unknown,
        f"model.rope_parameters has keys that a draft's RoPE does not have ({unknown}); those that "
        f"it can have: {', '.join(ROPE_KEYS)}",
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
    unread = unread_keys(rope)
    require(
        not unread,
        f"model.rope_parameters has keys that rope_type {kind!r} does not read ({unread}); leave "
        "them out, or set the rope_type that they belong to",
    )
    if kind in SCALED_FROM and rope.get(_ORIGINAL) is None:
        rope[_ORIGINAL] = _scaled_from(rope, text.max_position_embeddings, longest)
    return computable(rope, "model.rope_parameters is")


def unread_keys(rope: dict[str, Any]) -> list[str]:
    """Keys with a value that a RoPE of this type, one of ROPE_TYPES, does not read."""
    read = (*ALL_READ, *KEYS_OF[rope["rope_type"]])
    return [key for key, value in rope.items() if key not in read and value is not None]


def _scaled_from(rope: dict[str, Any], of_target: int, longest: int | None) -> int:
    """The length that a RoPE is scaled from: the target's, as Transformers completes it, unless the
    draft says how long it gets by scaling."""
    factor: Any = rope.get("factor")
    if longest is None or type(factor) not in (int, float) or not factor > 0:
        return of_target
    length = longest / float(factor)
    require(
        length == int(length) and length > 0,
        f"model.max_position_embeddings ({longest}) must be a multiple of the factor ({factor}) of "
        f"model.rope_parameters, or that must say its {_ORIGINAL}",
    )
    return int(length)


def check_rope_width(rope: dict[str, Any], head_dim: int) -> None:
    """ConfigError for a RoPE that turns no even number of a head's widths."""
    if rope["rope_type"] not in ROPE_TYPES:  # one that always turns the whole head
        return
    width = int(head_dim * rope.get(PARTIAL, 1))
    require(
        width > 0 and width % 2 == 0,
        f"{PARTIAL} ({rope.get(PARTIAL)}) of the RoPE must turn an even number of a head's "
        f"{head_dim} widths, and turns {width}; {2 / head_dim} turns 2",
    )


def beyond_yarn(rope: dict[str, Any], max_position_embeddings: int) -> str:
    """A line on positions that YaRN is not scaled to; empty where there are none."""
    if rope["rope_type"] != "yarn":
        return ""
    reach = rope[_ORIGINAL] * rope["factor"]
    if max_position_embeddings <= reach:
        return ""
    return (
        f"the draft's YaRN reaches {reach:g} positions ({rope['factor']:g} x {rope[_ORIGINAL]}), "
        f"and the draft is said to be made for {max_position_embeddings}: raise its factor, or set "
        "model.max_position_embeddings"
    )


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e6 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def computable(rope: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, in its shortest form; ConfigError if Transformers' Qwen3, which every engine
    follows, cannot make it, and for numbers that make no sense."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    turned = {key: value for key, value in rope.items() if key != PARTIAL}
    reach: dict[str, Any] = {}
    numbers: Any = (rope.get(_ORIGINAL), rope.get("factor"))
    if all(type(x) in (int, float) and 1 <= x < 1e9 for x in numbers):
        # Else Transformers compares the factor with its own default length, and warns.
        reach = {"max_position_embeddings": int(math.prod(numbers))}
    try:
        config = Qwen3Config(
            hidden_size=64,
            num_attention_heads=1,
            head_dim=64,
            rope_parameters=dict(turned),
            **reach,
        )
        rotary = Qwen3RotaryEmbedding(config)
        finite = bool(rotary.inv_freq.isfinite().all())
    except Exception as error:  # whatever a value of a wrong kind leads to
        raise ConfigError(f"{where} a RoPE that cannot be computed: {rope} ({error})") from error
    require(finite, f"{where} a RoPE without finite frequencies: {rope}")
    _check_sense(rope, where)
    scale = rotary.attention_scaling
    require(
        0 < scale < math.inf,
        f"{where} a RoPE that multiplies cos and sin by {scale}, which must be > 0: {rope}",
    )
    return turned if rope.get(PARTIAL) in (None, 1) else rope


def _check_sense(rope: dict[str, Any], where: str) -> None:
    for key, (holds, what) in _SENSE.items():
        value: Any = rope.get(key)
        good = type(value) in (int, float) and math.isfinite(value) and holds(value)
        require(
            value is None or good, f"{where} a RoPE whose {key} ({value!r}) must be {what}: {rope}"
        )
    if rope["rope_type"] in _ORDERED:
        (upper, most), (lower, least) = _ORDERED[rope["rope_type"]]
        high, low = rope.get(upper) or most, rope.get(lower) or least
        require(
            high > low,
            f"{where} a RoPE whose {upper} ({high}) must be above its {lower} ({low}): {rope}",
        )
