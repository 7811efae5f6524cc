"""What the slots of a block see in each layer of a draft: as its folder says, and as an engine
reads that."""

from dataclasses import dataclass
from typing import Any

from dspark_megatron.conversion.engines.table import AttentionKeys

SAYS = AttentionKeys(
    width=("dflash_config.swa_window_size", "sliding_window"),
    use_swa=True,
    causal=("is_causal", "dflash_config.causal", "dflash_query_causal"),
    sliding_is_causal=True,
    sink=("dflash_config.attention_sink_bias", "attention_sink_bias")
    + ("add_swa_attention_sink_bias",),
)
"""How a folder says it. A sliding layer is causal where nothing else is said, as SpecForge and
speculators train it."""
MAX_LAYERS = 1000
"""More are no draft, only a number in a bad config."""


@dataclass(frozen=True)
class Attention:
    """By layer."""

    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    sink: bool

    @property
    def windows_words(self) -> str:
        return _words(self.windows, "{} of {} positions", "no window")

    @property
    def causal_words(self) -> str:
        return _words(tuple(x or None for x in self.causal), "{} causal", "no causal layer")


def lookup(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def read_attention(keys: AttentionKeys, config: dict[str, Any], num_layers: Any) -> Attention:
    """For a config with any junk. num_layers: of the draft, if that is known."""
    layers = range(num_layers if type(num_layers) is int and num_layers <= MAX_LAYERS else 0)
    types = config.get("layer_types")
    types = types if isinstance(types, list) else []
    by_type = [i < len(types) and types[i] == "sliding_attention" for i in layers]
    windows, width = list(by_type), _width(keys, config)
    if not keys.per_layer or (keys.use_swa and _swa(config) and not any(by_type)):
        windows = [True for _ in layers]
    return Attention(
        tuple(width if width and slides else None for slides in windows),
        tuple(_causal(keys, config, slides) for slides in by_type),
        any(lookup(config, key) is True for key in keys.sink),
    )


def _swa(config: dict[str, Any]) -> bool:
    return lookup(config, "dflash_config.use_swa") is True


def _width(keys: AttentionKeys, config: dict[str, Any]) -> int | None:
    if keys.switches and not any(config.get(key) for key in keys.switches):
        return None
    hidden = any(config.get(key) is False for key in keys.off)
    for place in keys.width:
        value = lookup(config, place)
        top = "." not in place
        if type(value) is int and value > 0 and (top or _swa(config)) and not (top and hidden):
            return value
    return None


def _causal(keys: AttentionKeys, config: dict[str, Any], slides: bool) -> bool:
    values = [lookup(config, place) for place in keys.causal]
    said = [value for value in values if isinstance(value, bool)]
    if keys.any_causal:
        return any(said)
    if said:
        return said[0]
    if config.get("sliding_window_non_causal") is True and keys is SAYS:
        return False
    hidden = any(config.get(key) is False for key in keys.off)
    known = not keys.off or (type(config.get("sliding_window")) is int and not hidden)
    return keys.sliding_is_causal and slides and known


def _words(values: tuple[Any, ...], some: str, none: str) -> str:
    layers = [str(i) for i, value in enumerate(values) if value is not None]
    if not layers:
        return none
    which = "all layers" if len(layers) == len(values) else f"layers {', '.join(layers)}"
    return some.format(which, next(value for value in values if value is not None))
