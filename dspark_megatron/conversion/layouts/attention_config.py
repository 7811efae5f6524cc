"""What the slots of a block see, as keys of `config.json` and back.

Readers look in different places for the same thing, so ours are all written; of a foreign config
those that are there must agree. Where none says whether a sliding layer is causal within a block,
it is, as vLLM, SGLang, SpecForge and speculators have it.
"""

from typing import Any, NamedTuple

from dspark_megatron.config.attention import AttentionConfig
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.attention import DraftAttention

Config = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"
CAUSAL = ("is_causal", "dflash_query_causal", "dflash_config.causal")
"""Of all layers."""
NON_CAUSAL = "sliding_window_non_causal"
"""Of the sliding layers, in speculators."""
WIDTHS = ("dflash_config.swa_window_size", "sliding_window")
SINKS = (
    *("attention_sink_bias", "add_swa_attention_sink_bias"),
    *("dflash_config.attention_sink_bias", "dflash_config.add_swa_attention_sink_bias"),
)


class Meaning(NamedTuple):
    """What a layout's programs take for granted."""

    window_origin: str = "slot"
    absent_causal: str | None = "sliding"
    """Layers that are causal where no key says it; None: with a window, one must."""


PLAIN = Meaning()


def attention_keys(shape: DraftShape) -> tuple[Config, Config]:
    """Keys at the top level and in `dflash_config`."""
    attention, everyone = shape.attention, tuple(range(shape.num_layers))
    top: Config = {
        "attention_bias": attention.biases,
        "layer_types": [SLIDING if i in attention.sliding_layers else FULL for i in everyone],
        # Null, not absent: a window together with dflash_config makes mlx-dspark use it.
        "sliding_window": attention.window,
        "use_sliding_window": attention.window is not None,
        "max_window_layers": shape.num_layers,
    }
    nested: Config = {}
    if attention.window is not None:
        nested |= {"use_swa": True, "swa_window_size": attention.window}
    is_all = attention.causal_layers == everyone
    if is_all or (attention.window is not None and not attention.causal_layers):
        top |= {"is_causal": is_all, "dflash_query_causal": is_all}
        nested["causal"] = is_all
    if attention.sink:
        top["attention_sink_bias"] = nested["attention_sink_bias"] = True
    return top, nested


def attention_of_config(config: Config, num_layers: int, block_size: int, meaning: Meaning) -> Any:
    """The DraftAttention of a config with `dflash_config`. ConfigError for contradictions, values
    of another kind, and for what no draft of ours has."""
    sliding, width = _sliding_layers(config, num_layers), None
    if sliding:
        width = _agreed(config, WIDTHS, "the window")
        require(
            type(width) is int and width >= block_size,
            f"sliding_window ({width!r}) must be a number of positions, at least the block's "
            f"{block_size}: config.json says that layers {list(sliding)} have a window",
        )
    causal = _causal_layers(config, sliding, num_layers, meaning)
    found = DraftAttention(
        window=width,
        window_origin=meaning.window_origin if sliding else AttentionConfig.window_origin,
        sliding_layers=sliding,
        causal_layers=causal,
        sink=bool(_agreed(config, SINKS, "the attention sink", switch=True)),
        biases=bool(_agreed(config, ("attention_bias",), "biases", switch=True)),
    )
    require(
        found.config(num_layers) is not None,
        f"layers {list(causal)} are causal within a block and layers {list(sliding)} have a "
        "window; causal must be none, those with the window, or all",
    )
    return found


def _sliding_layers(config: Config, num_layers: int) -> tuple[int, ...]:
    kinds: Any = config.get("layer_types")
    declared = _agreed(config, ("use_sliding_window",), "sliding windows", switch=True)
    everywhere = _agreed(config, ("dflash_config.use_swa",), "sliding windows", switch=True)
    if kinds is None:
        kinds = [FULL] * num_layers
    require(
        isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds),
        f"layer_types must list the kind of each layer, is {kinds!r}",
    )
    strange = sorted(set(kinds) - {FULL, SLIDING})
    require(
        not strange,
        f"attention layers {strange} (layer_types) are not this project's: only {FULL} and "
        f"{SLIDING} are",
    )
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)
    require(
        not sliding or len(kinds) == num_layers,
        f"layer_types must have an entry for each of the {num_layers} draft layers, has "
        f"{len(kinds)}; correct it",
    )
    require(
        not sliding or declared is not False or everywhere is True,
        "layer_types has sliding layers and use_sliding_window is false; correct one",
    )
    if not sliding and everywhere:
        return tuple(range(num_layers))
    require(
        bool(sliding) or not declared,
        "use_sliding_window is true and no layer has a window; set it to false, or name the "
        f"sliding layers in layer_types ({SLIDING})",
    )
    return sliding


def _causal_layers(
    config: Config, sliding: tuple[int, ...], num_layers: int, meaning: Meaning
) -> tuple[int, ...]:
    said = _agreed(config, CAUSAL, "whether layers are causal within a block", switch=True)
    freed = _agreed(config, (NON_CAUSAL,), "causal sliding layers", switch=True)
    everyone = tuple(range(num_layers))
    require(
        not (said and freed and sliding),
        f"{NON_CAUSAL} is true, and {_places(config, CAUSAL)} says that layers are causal; correct "
        "one",
    )
    if said is not None:
        return everyone if said else ()
    if not sliding or freed:
        return ()
    require(
        meaning.absent_causal is not None or freed is not None,
        "config.json has a window and does not say whether slots of a block see later ones; add "
        "dflash_config.causal (true or false) as the draft was trained",
    )
    return sliding


def _agreed(config: Config, places: tuple[str, ...], what: str, *, switch: bool = False) -> Any:
    """The one value that these places have; None where none has any. ConfigError where they differ
    or, for a switch, are not true or false."""
    found = {place: lookup(config, place) for place in places}
    values = [value for value in found.values() if value is not None]
    if switch and (bad := [value for value in values if type(value) is not bool]):
        raise ConfigError(f"{_places(config, places)} must be true or false, is {bad[0]!r}")
    require(
        all(value == values[0] for value in values),
        f"config.json says {what} differently: {_places(config, places)}; correct it",
    )
    return values[0] if values else None


def _places(config: Config, places: tuple[str, ...]) -> str:
    found = {place: lookup(config, place) for place in places}
    return ", ".join(f"{place} {value!r}" for place, value in found.items() if value is not None)


def lookup(config: Config, place: str) -> Any:
    """A value by `key` or `object.key`; None where it is not there."""
    value: Any = config
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
