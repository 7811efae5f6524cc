"""A draft's RoPE out of `config.json`, which has two spellings: `rope_parameters` (Transformers 5),
and before it `rope_theta` with `rope_scaling`. Engines differ in the one that they read, so where
both are there they must say the same.

A share of the head that is turned (`partial_rotary_factor`) is nearly always left over from the
target's config, of a draft that was trained with the whole head. So it counts only where the config
also says how many widths are turned (`rope_dim`, as our exports have it), or where the user does.
"""

import json
import math
from typing import Any

from dspark_megatron.errors import require
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.rope import (
    NOT_APPLIED,
    PARTIAL,
    ROPE_DIM,
    ROPE_KEYS,
    ROPE_TYPES,
    SCALED_FROM,
    check_rope_width,
    computable,
    unread_keys,
)

Config = dict[str, Any]

SPELLINGS = ("rope_parameters", "rope_scaling")
MODELOPT_THETA = 10000
"""What ModelOpt 0.47 trains with on Transformers 5, where a target's config has no rope_theta at
its top level: without dflash_architecture_config.rope_parameters the default of Qwen3's class."""


def rope_spellings(rope: Config, head_dim: int) -> Config:
    """A draft's complete RoPE as engines read it: `rope_parameters` and what came before it."""
    if PARTIAL in rope:
        rope = {**rope, ROPE_DIM: int(head_dim * rope[PARTIAL])}
    spelled = {"rope_theta": rope["rope_theta"], "rope_parameters": rope}
    if rope["rope_type"] != "default":
        spelled["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return spelled


def chosen_rope(shape: DraftShape, chosen: Config) -> Config:
    """The complete RoPE of a draft, with keys that the user says otherwise. ConfigError."""
    rope = {**shape.rope_parameters, **chosen}
    theta = rope["rope_theta"]
    require(0 < theta < math.inf, f"--rope-theta ({theta}) must be a number > 0")
    rope = computable(rope, "with the chosen values the draft has")
    check_rope_width(rope, shape.head_dim)
    return rope


def doubts(config: Config, layout: str) -> list[str]:
    """What a draft's config says of its RoPE and may not be so, one line each. config: of any
    layout, with any junk."""
    nested = config.get("transformer_layer_config")
    config = nested if isinstance(nested, dict) else config
    places = [x for x in (config, *map(config.get, SPELLINGS)) if isinstance(x, dict)]
    lines = []
    share = next((x[PARTIAL] for x in places if x.get(PARTIAL) not in (None, 1)), None)
    if share is not None and not any(ROPE_DIM in x for x in places):
        lines.append(
            f"{PARTIAL} {share} in config.json is taken for a leftover of the target's, as in "
            "nearly all drafts, so the whole head is turned; if this draft was trained with it, "
            f"import it with --partial-rotary-factor {share}"
        )
    thetas = {x["rope_theta"] for x in places if type(x.get("rope_theta")) in (int, float)}
    if layout == "modelopt" and thetas - {MODELOPT_THETA}:
        lines.append(
            f"config.json says rope_theta {thetas.pop():g}; a draft that ModelOpt trained on "
            "Transformers 5 has 10000 whatever it says (logits were 3.8 to 7.8 off when read by "
            "the config): import such a one with --rope-theta 10000"
        )
    return lines


def way_back_to_modelopt(rope: Config) -> str:
    """What ModelOpt must be told to train on with a draft's RoPE."""
    if PARTIAL in rope:
        return "ModelOpt cannot train it on: its drafts turn whole heads, and this one a part"
    return (
        "to train it on in ModelOpt, set dflash_architecture_config.rope_parameters to "
        f"{json.dumps(rope)}: ModelOpt 0.47 makes the draft's RoPE from that alone on Transformers "
        "5, and without it from theta 10000; it does not read this config.json"
    )


def rope_of_config(config: Config) -> Config:
    """Complete `rope_parameters`. ConfigError where the spellings differ and for a RoPE that is not
    this draft's or cannot be computed."""
    for key in SPELLINGS:
        value = config.get(key)
        require(value is None or isinstance(value, dict), f"{key} must be an object, is {value!r}")
    differences = rope_differences(config)
    require(
        not differences,
        f"config.json says its RoPE twice and differently: {'; '.join(differences)}; engines read "
        "either, so correct one or delete it",
    )
    theta: Any = next(iter(_thetas(config).values()), None)
    require(
        type(theta) in (int, float) and 0 < theta < math.inf,
        f"rope_theta must be a number > 0, is {theta!r}; put in what the draft was trained with",
    )
    rope = _scaling(config, next((key for key in SPELLINGS if config.get(key)), ""))
    require(
        rope["rope_type"] in ROPE_TYPES,
        f"rope_type ({rope['rope_type']!r}) must be one of {', '.join(ROPE_TYPES)}; others are not "
        "this project's draft",
    )
    unknown = [key for key, value in rope.items() if key not in ROPE_KEYS and value is not None]
    require(
        not unknown,
        f"the RoPE of config.json has keys of which it is not known what they do ({unknown}); "
        "delete them if the draft was trained without",
    )
    read = {key: value for key, value in rope.items() if key not in unread_keys(rope)}
    rope = computable({**read, "rope_theta": theta}, "config.json has")
    if type(config.get("head_dim")) is int:
        check_rope_width(rope, config["head_dim"])
    return rope


def rope_differences(config: Config) -> list[str]:
    """Where the spellings contradict each other, with both values; for a config with any junk."""
    lines, thetas = [], _thetas(config)
    if any(theta != other for theta in thetas.values() for other in thetas.values()):
        said = " and ".join(f"{theta!r} {place}" for place, theta in thetas.items())
        lines.append(f"rope_theta is {said}")
    found = [_scaling(config, key) for key in SPELLINGS if config.get(key)]
    parts = [{k: v for k, v in rope.items() if k != "rope_theta"} for rope in found]
    if len(parts) == 2 and parts[0] != parts[1]:
        lines.append(f"{SPELLINGS[0]} has {parts[0]} and {SPELLINGS[1]} {parts[1]}")
    return lines


def _thetas(config: Config) -> dict[str, Any]:
    """Every rope_theta by where it stands."""
    places = {"at the top level": config} | {f"in {key}": config.get(key) for key in SPELLINGS}
    return {
        where: place["rope_theta"]
        for where, place in places.items()
        if isinstance(place, dict) and place.get("rope_theta") is not None
    }


def _scaling(config: Config, key: str) -> Config:
    """One spelling under the newer names, without what is not applied."""
    given = config.get(key)
    given = given if isinstance(given, dict) else {}
    left_out = (*NOT_APPLIED, ROPE_DIM, "type", "finetuned")
    rope = {k: v for k, v in given.items() if k not in left_out}
    rope.setdefault("rope_type", given.get("type", "default"))
    width: Any = given.get(ROPE_DIM, config.get(ROPE_DIM))
    whole: Any = config.get("head_dim")
    if width is not None and width != whole:
        require(
            type(width) is int and type(whole) is int and 0 < width < whole,
            f"{ROPE_DIM} ({width!r}) must be at most the head_dim ({whole!r})",
        )
        share = given.get(PARTIAL, config.get(PARTIAL))
        same = type(share) in (int, float) and int(whole * share) == width
        rope[PARTIAL] = share if same else width / whole
    if rope["rope_type"] in SCALED_FROM:  # as Transformers completes them
        if (length := config.get("max_position_embeddings")) is not None:
            rope.setdefault("original_max_position_embeddings", length)
    return rope
