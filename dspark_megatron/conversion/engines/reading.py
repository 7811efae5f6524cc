"""A draft folder as one engine reads it: the settings it finds, the tensors it builds.

Layer ids are canonical inside: k is the output of target layer k, -1 the embedding.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dspark_megatron.conversion.engines.attention import Attention, lookup, read_attention
from dspark_megatron.conversion.engines.table import AUX, FLAGS, HF, Engine
from dspark_megatron.conversion.layouts.hf_config import SHAPE_KEYS
from dspark_megatron.conversion.layouts.names import LATENT, LM_HEAD, hugging_face_shapes
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.attention import DraftAttention

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "target_layer_ids", "markov_rank"),
)
KEYS = (
    *(*SIZES, "head_dim", "block_size", "mask_token_id", "markov_head_type", *FLAGS),
    "num_anchors",
)


@dataclass(frozen=True)
class Reading:
    """values: the KEYS that the engine finds, None for the others."""

    engine: Engine
    config: dict[str, Any]
    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    folder_name: str
    target: Any
    speculators: bool
    gemma: bool = False

    def get(self, path: str) -> Any:
        return lookup(self.config, path)

    def names(self, pattern: str) -> list[str]:
        return [name for name in self.tensors if re.match(pattern, name)]

    @property
    def attention(self) -> Attention:
        """As the engine reads it."""
        keys = self.engine.attention
        return read_attention(keys, self.config, self.values["num_hidden_layers"])

    @property
    def vocab_rows(self) -> int:
        """Of the draft's LM head."""
        size = self.get("draft_vocab_size")
        return size if type(size) is int else self.values["vocab_size"]

    def quantized(self, *, read: bool) -> list[str]:
        """Quantized modules: those that the engine reads as such, or the others."""
        known = bool(self.get("quantization_config"))
        found = [name.removesuffix(".weight_scale") for name in self.names(r".*\.weight_scale$")]
        return [x for x in found if (known and bool(re.match(self.engine.quantized, x))) == read]


def unfolded(engine: Engine, config: dict[str, Any], speculators: bool) -> dict[str, Any]:
    """The config after the engine has lifted nested keys to the top level, if it does."""
    layers: Any = config.get("transformer_layer_config")
    nested: Any = config.get("dflash_config")
    if speculators:
        aux = {engine.speculators_ids: config.get("aux_hidden_state_layer_ids")}
        known = {"architectures": ["Qwen3DSparkModel"]}
        return {**(layers if isinstance(layers, dict) else {}), **config, **known, **aux}
    projector = lookup(nested, "projector_type")
    dspark = projector == "dspark" or "DSpark" in str(config.get("architectures"))
    if not (dspark and isinstance(nested, dict)):
        return config
    return {**{key: nested[key] for key in engine.lifts if key in nested}, **config}


def renamed(engine: Engine, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors under the names that the engine's own code gives them."""
    found = {}
    for name, size in tensors.items():
        for old, new in engine.renames.items():
            name = re.sub(old, new, name)
        found[name] = size
    return found


def resolve(
    engine: Engine, config: dict[str, Any], tensors: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Any], list[str]]:
    """The values of KEYS, and a line for each that is missing or malformed. A value that stands
    where this engine does not look is used on, so that the tensors can be judged as well."""
    values: dict[str, Any] = {}
    lines: list[str] = []
    by_tensors = _heads_of(tensors) if engine.by_tensors else {}
    for key in KEYS:
        if key in by_tensors:
            values[key] = by_tensors[key]
            continue
        place = first_place(config, engine.places.get(key, (key,)))
        value = lookup(config, place) if place else engine.defaults.get(key)
        if value is None and key not in engine.defaults and not _unused(key, values):
            nested = first_place(
                config, (f"dflash_config.{key}", f"transformer_layer_config.{key}")
            )
            value = lookup(config, nested) if nested else None
            where = f"at the top level, reads no {nested}; {HF}" if nested else "in config.json"
            lines.append(f"needs {key} {where}")
        if value is not None and not _well_formed(key, value):
            lines.append(f"needs a valid {key} in config.json, found {value!r}")
            value = None
        if value is not None and place == AUX:
            value = [i - 1 for i in value]
        values[key] = value
    return values, lines


def first_place(config: dict[str, Any], places: tuple[str, ...]) -> str | None:
    """The first of some places where the config has a value."""
    return next((place for place in places if lookup(config, place) is not None), None)


def _heads_of(tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    size = tensors.get("markov_head.markov_w1.weight", ())
    latent = [kind for kind, head in (("gated", "gate"), ("rnn", "joint")) if _has(tensors, head)]
    return {
        "markov_rank": size[1] if len(size) == 2 else 0,
        "markov_head_type": latent[0] if latent else "vanilla",
        "enable_confidence_head": any(name.startswith("confidence_head.") for name in tensors),
        "confidence_head_with_markov": True,
    }


def _has(tensors: dict[str, Any], head: str) -> bool:
    return any(name.startswith(f"markov_head.{head}_proj.") for name in tensors)


def _unused(key: str, values: dict[str, Any]) -> bool:
    return (key == "markov_head_type" and values["markov_rank"] == 0) or (
        key == "confidence_head_with_markov" and values["enable_confidence_head"] is False
    )


def _well_formed(key: str, value: Any) -> bool:
    if key == "target_layer_ids":
        return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
    if key == "markov_head_type":
        return isinstance(value, str) and value in LATENT
    if key in FLAGS:
        return isinstance(value, bool)
    return type(value) is int and value >= (0 if key in ("markov_rank", "mask_token_id") else 1)


def tensor_problems(r: Reading) -> Iterator[str]:
    """Where the tensors are not those that the engine builds."""
    expected, engine = _expected_tensors(r), r.engine
    if expected is None:
        return
    skips = [engine.skips, engine.foreign, *(rf"{re.escape(x)}\." for x in r.quantized(read=True))]
    if engine.confidence == "both" and not _builds_confidence(r):
        skips.append(r"confidence_head\.")
    skipped = r.names("|".join(skips))
    extra = [name for name in r.tensors if name not in expected and name not in skipped]
    silent = [name for name in extra if re.match(engine.silent, name)]
    raised = [name for name in extra if name not in silent]
    missing = [n for n in expected if n not in r.tensors and not re.match(engine.optional, n)]
    if missing:
        yield engine.missing.format(some(missing))
    if silent:
        yield f"passes over {some(silent)} in silence: its config has no such part"
    if raised:
        yield f"raises on {some(raised)}: its config has no such part"
    for name in [name for name in expected if name in r.tensors and name not in skipped]:
        wanted, found = expected[name], tuple(r.tensors[name])
        padded = wanted[:1] == (r.vocab_rows,) < found[:1] and wanted[1:] == found[1:]
        if wanted != found:
            hint = "; strip the padding of the vocabulary" if padded else ""
            yield f"needs {name} {list(wanted)}, found {list(found)}{hint}"


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _expected_tensors(r: Reading) -> dict[str, tuple[int, ...]] | None:
    """What the engine builds from its reading of the config; None: the config does not say."""
    v = r.values
    if any(v[key] is None for key in SIZES):
        return None
    sizes: dict[str, Any] = {name: v.get(key) for name, (key, _) in SHAPE_KEYS.items()} | {
        "head_dim": v["head_dim"] or v["hidden_size"] // v["num_attention_heads"],
        "target_layer_ids": tuple(v["target_layer_ids"]),
        "markov_head_type": v["markov_head_type"] or "vanilla",
        "enable_confidence_head": _builds_confidence(r),
        "confidence_head_with_markov": v["confidence_head_with_markov"] is not False,
        "attention": DraftAttention(sink=_builds_sinks(r), biases=_builds_biases(r)),
        **(_gemma_sizes(r) if r.gemma else {}),
    }
    shape = DraftShape(**sizes)  # None where the tensors do not depend on it
    expected = hugging_face_shapes(shape)
    if r.engine.reduced_vocabulary and (rows := r.vocab_rows) != shape.vocab_size:
        expected |= {LM_HEAD: (rows, shape.hidden_size), "d2t": (rows,)}
        expected["markov_head.markov_w2.weight"] = (rows, shape.markov_rank)
    return expected


def _gemma_sizes(r: Reading) -> dict[str, Any]:
    """What Gemma 4 calls otherwise."""
    shared = r.get("attention_k_eq_v") is not False
    width, heads = r.get("global_head_dim"), r.get("num_global_key_value_heads")
    sizes: dict[str, Any] = {"architecture": "gemma4", "shared_key_value": shared}
    if type(width) is int:
        sizes["head_dim"] = width
    if shared and type(heads) is int:
        sizes["num_key_value_heads"] = heads
    return sizes


def _builds_sinks(r: Reading) -> bool:
    return bool(r.names(r".*attention_sink_bias$")) if r.engine.by_tensors else r.attention.sink


def _builds_biases(r: Reading) -> bool:
    return r.engine.biases and bool(r.get("attention_bias"))


def _builds_confidence(r: Reading) -> bool:
    flag, present = r.values["enable_confidence_head"], bool(r.names(r"confidence_head\."))
    if r.engine.confidence == "tensors" or flag is None:
        return present
    return flag and (present or r.engine.confidence != "both")
