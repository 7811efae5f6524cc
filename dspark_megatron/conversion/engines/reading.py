"""What an engine would make of a draft folder: its settings where the engine looks for them, the
tensors it expects, and the facts that the rules of `engines.py` speak of.

Layer ids are canonical inside: k is the output of target layer k, -1 the embedding.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dspark_megatron.conversion.layouts.names import LATENT, LM_HEAD, hugging_face_shapes
from dspark_megatron.conversion.layouts.rope_config import rope_differences
from dspark_megatron.shape import DraftShape

DEEPSPEC, VLLM, SGLANG, MLX, TRT = "DeepSpec", "vLLM", "SGLang", "mlx-dspark", "TensorRT-LLM"
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "target_layer_ids", "markov_rank"),
)
FLAGS = ("enable_confidence_head", "confidence_head_with_markov")
KEYS = (
    *(*SIZES, "head_dim", "block_size", "mask_token_id", "markov_head_type", *FLAGS),
    "num_anchors",
)
AUX = "eagle_aux_hidden_state_layer_ids"
"""vLLM's first place for layer ids; it counts the embedding as 0."""
FOREIGN = r"(model|logit_head|markov_w[12]|gate_proj|joint_proj|confidence_proj)\."
"""Names of a wrapped model, of older SpecForge (`logit_head.`) and of ModelOpt (flat heads)."""
BUNDLED = (
    *("dspark_block_size", "dspark_markov_rank", "dspark_markov_head_type"),
    *("dspark_noise_token_id", "dspark_target_layer_ids"),
)
INHERITED = ("text_config", "num_nextn_predict_layers", "auto_map", "num_experts")
VLLM_METHODS = ("eagle-", "eagle3", "dflash")
HF = "export with --layout hf"

Rules = tuple[tuple[str, str], ...]
"""A fact of `facts`, and the line to write where it holds; {} in the line is what was found."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    name: str
    architectures: tuple[str, ...] = ("Qwen3DSparkModel",)
    defaults: dict[str, Any]
    """For the KEYS it can do without; it requires the others."""
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where it looks for a key, first found wins; a key that is not here: at the top level."""
    speculators_ids: str | None = None
    """The key that aux_hidden_state_layer_ids becomes; None: it does not read that format."""
    missing: str = "needs {}, which the file lacks"
    # Regular expressions of tensor names; those it skips are left alone, or a rule speaks of them.
    optional: str = r"(embed_tokens|lm_head)\."
    skips: str = r"(embed_tokens|lm_head)\.|d2t$|t2d$"
    silent: str = "$^"  # unknown to it and passed over; it raises on the others
    quantized: str = "$^"
    problems: Rules
    warnings: Rules


@dataclass(frozen=True)
class Reading:
    """A folder as one engine sees it. values: the KEYS it finds, None for the others."""

    engine: Engine
    config: dict[str, Any]
    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    folder_name: str
    target: Any
    speculators: bool

    def get(self, path: str) -> Any:
        return _lookup(self.config, path)

    def names(self, pattern: str) -> list[str]:
        return [name for name in self.tensors if re.match(pattern, name)]


# The config, as an engine reads it.


def _lookup(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _first(config: dict[str, Any], places: tuple[str, ...]) -> str | None:
    return next((place for place in places if _lookup(config, place) is not None), None)


def unfolded(engine: Engine, config: dict[str, Any], speculators: bool) -> dict[str, Any]:
    """The config after the engine has lifted nested keys to the top level, if it does."""
    layers: Any = config.get("transformer_layer_config")
    nested: Any = config.get("dflash_config")
    if speculators:
        aux = {engine.speculators_ids: config.get("aux_hidden_state_layer_ids")}
        known = {"architectures": ["Qwen3DSparkModel"]}
        return {**(layers if isinstance(layers, dict) else {}), **config, **known, **aux}
    projector = _lookup(nested, "projector_type")
    dspark = projector == "dspark" or "DSpark" in str(config.get("architectures"))
    lifts = engine.name == MLX and dspark and isinstance(nested, dict)
    return {**nested, **config} if lifts else config


def resolve(engine: Engine, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of KEYS, and a line for each that is missing or malformed. A value that stands
    where this engine does not look is used on, so that the tensors can be judged as well."""
    values: dict[str, Any] = {}
    lines: list[str] = []
    for key in KEYS:
        place = _first(config, engine.places.get(key, (key,)))
        value = _lookup(config, place) if place else engine.defaults.get(key)
        if value is None and key not in engine.defaults and not _unused(key, values):
            nested = _first(config, (f"dflash_config.{key}", f"transformer_layer_config.{key}"))
            value = _lookup(config, nested) if nested else None
            where = f"at the top level, reads no {nested}; {HF}" if nested else "in config.json"
            lines.append(f"needs {key} {where}")
        if value is not None and not _well_formed(key, value):
            lines.append(f"needs a valid {key} in config.json, found {value!r}")
            value = None
        if value is not None and place == AUX:
            value = [i - 1 for i in value]
        values[key] = value
    return values, lines


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


# The tensors, as an engine compares them.


def _expected_tensors(r: Reading) -> dict[str, tuple[int, ...]] | None:
    """What the engine builds from its reading of the config; None: the config does not say."""
    v = r.values
    if any(v[key] is None for key in SIZES):
        return None
    keys = {"ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers"}
    sizes: dict[str, Any] = {
        f.name: v.get(keys.get(f.name, f.name)) for f in dataclasses.fields(DraftShape)
    }
    sizes |= {
        "head_dim": v["head_dim"] or v["hidden_size"] // v["num_attention_heads"],
        "target_layer_ids": tuple(v["target_layer_ids"]),
        "markov_head_type": v["markov_head_type"] or "vanilla",
        "enable_confidence_head": _builds_confidence(r),
        "confidence_head_with_markov": v["confidence_head_with_markov"] is not False,
    }
    shape = DraftShape(**sizes)  # None where the tensors do not depend on it
    expected = hugging_face_shapes(shape)
    if r.get("attention_bias"):
        weights = [name for name in expected if re.search(r"\.[qkvo]_proj\.weight$", name)]
        expected |= {f"{n.removesuffix('weight')}bias": expected[n][:1] for n in weights}
    if r.engine.name in (VLLM, MLX) and (rows := _draft_vocab(r)) != shape.vocab_size:
        expected |= {LM_HEAD: (rows, shape.hidden_size), "d2t": (rows,)}
        expected["markov_head.markov_w2.weight"] = (rows, shape.markov_rank)
    return expected


def _draft_vocab(r: Reading) -> int:
    size = r.get("draft_vocab_size")
    return size if type(size) is int else r.values["vocab_size"]


def _builds_confidence(r: Reading) -> bool:
    flag, present = r.values["enable_confidence_head"], bool(r.names(r"confidence_head\."))
    if r.engine.name == SGLANG or flag is None:  # SGLang: a server option decides, not the flag
        return present
    return flag and (present or r.engine.name != VLLM)


def tensor_problems(r: Reading) -> Iterator[str]:
    expected, engine = _expected_tensors(r), r.engine
    if expected is None:
        return
    skips = [engine.skips, FOREIGN, *(rf"{re.escape(x)}\." for x in _quantized(r, read=True))]
    if engine.name == VLLM and not _builds_confidence(r):
        skips.append(r"confidence_head\.")
    skipped = r.names("|".join(skips))
    extra = [name for name in r.tensors if name not in expected and name not in skipped]
    silent = [name for name in extra if re.match(engine.silent, name)]
    raised = [name for name in extra if name not in silent]
    missing = [n for n in expected if n not in r.tensors and not re.match(engine.optional, n)]
    if missing:
        yield engine.missing.format(_some(missing))
    if silent:
        yield f"passes over {_some(silent)} in silence: its config has no such part"
    if raised:
        yield f"raises on {_some(raised)}: its config has no such part"
    for name in [name for name in expected if name in r.tensors and name not in skipped]:
        wanted, found = expected[name], tuple(r.tensors[name])
        padded = wanted[:1] == (_draft_vocab(r),) < found[:1] and wanted[1:] == found[1:]
        if wanted != found:
            hint = "; strip the padding of the vocabulary" if padded else ""
            yield f"needs {name} {list(wanted)}, found {list(found)}{hint}"


def _quantized(r: Reading, read: bool) -> list[str]:
    """Quantized modules: those that the engine reads as such, or the others."""
    found = [name.removesuffix(".weight_scale") for name in r.names(r".*\.weight_scale$")]
    known = bool(r.get("quantization_config"))
    return [name for name in found if (known and bool(re.match(r.engine.quantized, name))) == read]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# What rules may ask: something true where the fact holds, and worth reading in their lines.


def facts(r: Reading) -> dict[str, Any]:
    return _format_facts(r) | _target_facts(r) | _head_facts(r) | _window_facts(r) | _rope_facts(r)


def _format_facts(r: Reading) -> dict[str, Any]:
    found, model_type = r.get("architectures"), r.get("model_type")
    first = found[0] if isinstance(found, list) and found else None
    fits = model_type == "qwen3" or (r.engine.name == MLX and "qwen3" in str(model_type))
    scaled, dense = _quantized(r, read=True), _quantized(r, read=False)
    copies = {key: (r.get(key), r.get(f"dflash_config.{key}")) for key in KEYS}
    return {
        "architectures": first not in r.engine.architectures and repr(found),
        "DSparkDraftModel": first == "DSparkDraftModel",
        "model_type": not fits and repr(model_type),
        "speculators": r.speculators,
        "two formats": r.get("speculators_config") is not None and not r.speculators,
        "foreign names": _some(r.names(FOREIGN)),
        "method in path": _some([x for x in VLLM_METHODS if x in r.folder_name.lower()]),
        "bundled keys": _some([key for key in BUNDLED if r.get(key) is not None]),
        "inherited keys": _some([x for x in INHERITED if r.get(x) and not r.speculators]),
        "differing copies": _some([k for k, x in copies.items() if None not in x and x[0] != x[1]]),
        "not quantized": bool(r.get("quantization_config")) and not scaled + dense,
        "wrongly quantized": _some(dense),
    }


def _target_facts(r: Reading) -> dict[str, Any]:
    v, ids = r.values, r.values["target_layer_ids"] or []
    own_depth = r.get("num_target_layers") or r.get("dflash_config.num_target_layers")
    depth = getattr(r.target, "num_hidden_layers", own_depth)
    last = depth - 1 if type(depth) is int else float("inf")
    vocab, mask, target_vocab = v["vocab_size"], v["mask_token_id"], _of_target(r, "vocab_size")
    reduced = f"draft_vocab_size {_draft_vocab(r)}" if _draft_vocab(r) != vocab else ""
    other_vocab = target_vocab not in (None, _draft_vocab(r))
    return {
        "unordered ids": sorted(set(ids)) != ids and ids,
        "embedding id": [i for i in ids if i == -1],
        "last id": [i for i in ids if i == last],
        "impossible ids": [i for i in ids if not -1 <= i <= last],
        "other depth": _differ(own_depth, _of_target(r, "num_hidden_layers")),
        "other width": _differ(v["hidden_size"], _of_target(r, "hidden_size")),
        "other vocabulary": _differ(vocab, target_vocab),
        "mask token": None not in (mask, vocab) and mask >= vocab and f"{mask} of {vocab}",
        "reduced vocabulary": reduced or _some(r.names("(d2t|t2d)$")),
        "no d2t": bool(reduced or other_vocab) and not {"d2t", LM_HEAD} <= set(r.tensors),
    }


def _of_target(r: Reading, key: str) -> Any:
    return getattr(r.target, key, None)


def _differ(own: Any, theirs: Any) -> str:
    return f"{own}, the target has {theirs}" if None not in (own, theirs) and own != theirs else ""


def _head_facts(r: Reading) -> dict[str, Any]:
    kinds = [r.get("markov_head_type"), r.get("dflash_config.markov_head_type")]
    latent = r.names(r"markov_head\.(gate|joint)_proj\.")
    confidence = r.names(r"confidence_head\.")
    flag, block = r.values["enable_confidence_head"], r.engine.places.get("block_size", ())
    anchor, no_anchor = r.get("sample_from_anchor"), r.get("sample_from_anchor") is False
    return {
        "latent head": next((x for x in kinds if x in ("gated", "rnn")), _some(latent)),
        "rank 0": r.values["markov_rank"] == 0,
        "unused confidence": bool(confidence) and flag is False,
        "half a confidence head": len(confidence) < 2,
        "no anchor": no_anchor,
        "no anchor, not speculators": no_anchor and not r.speculators,
        "speculators without sample_from_anchor": r.speculators and anchor is None,
        "no block_size": _first(r.config, ("block_size", *block)) is None,
    }


def _window_facts(r: Reading) -> dict[str, Any]:
    types, nested = r.get("layer_types"), r.get("dflash_config")
    sliding = isinstance(types, list) and "sliding_attention" in types
    use_swa, causal = r.get("dflash_config.use_swa"), r.get("dflash_config.causal")
    mlx_causal, causal_allowed = r.get("dflash_query_causal"), r.get("is_causal") is not False
    window = sliding or bool(use_swa)
    in_mlx = bool(r.get("sliding_window")) and (isinstance(nested, dict) or mlx_causal is not None)
    silent = causal is None and mlx_causal is None
    not_vllm = r.get("sliding_window_non_causal") and causal_allowed and causal is not False
    return {
        "window": window,
        "window by use_swa only": window and not sliding,
        "window in mlx only": in_mlx and not window,
        "window not in mlx": window and not in_mlx,
        "causality unsaid for mlx": sliding and silent and causal_allowed,
        "non-causal in dflash_config only": sliding and causal is False and causal_allowed,
        "non-causal for speculators only": bool(not_vllm),
    }


def _rope_facts(r: Reading) -> dict[str, Any]:
    both = (r.get("rope_scaling"), r.get("rope_parameters"))
    rope = {key: value for x in both if isinstance(x, dict) for key, value in x.items()}
    partial = [x for x in rope if x.startswith(("partial_rotary", "mrope"))]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    projector = r.get("dflash_config.projector_type")
    return {
        "partial rotary": _some([f"{x} {rope[x]}" for x in partial if rope[x] not in (None, 1)]),
        "differing ropes": "; ".join(rope_differences(r.config)),
        "scaled rope": kind != "default" and str(kind),
        "yarn without projector_type": kind == "yarn" and projector != "dspark",
        "attention bias": bool(r.get("attention_bias")),
    }
