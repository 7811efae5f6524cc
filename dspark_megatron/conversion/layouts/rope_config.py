"""A draft's RoPE out of `config.json`, which has two spellings: `rope_parameters` (Transformers 5),
and before it `rope_theta` with `rope_scaling`. Engines differ in the one that they read, so where
both are there they must say the same.
"""

import math
from typing import Any

from dspark_megatron.errors import require
from dspark_megatron.shape.rope import NOT_APPLIED, ROPE_TYPES, SCALED_FROM, computable

Config = dict[str, Any]

SPELLINGS = ("rope_parameters", "rope_scaling")


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
    return computable({**rope, "rope_theta": theta}, "config.json has")


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
    rope = {k: v for k, v in given.items() if k not in (*NOT_APPLIED, "type")}
    rope.setdefault("rope_type", given.get("type", "default"))
    if rope["rope_type"] in SCALED_FROM:  # as Transformers completes them
        if (length := config.get("max_position_embeddings")) is not None:
            rope.setdefault("original_max_position_embeddings", length)
    return rope
