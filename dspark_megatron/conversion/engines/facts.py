"""What the rules of `table.py` may ask of a folder: true where the fact holds, and worth reading in
the rule's line."""

from typing import Any

from dspark_megatron.conversion.engines.reading import FOREIGN, KEYS, Reading, first_place, some
from dspark_megatron.conversion.engines.table import MLX
from dspark_megatron.conversion.layouts.names import LM_HEAD
from dspark_megatron.conversion.layouts.rope_config import rope_differences

BUNDLED = (
    *("dspark_block_size", "dspark_markov_rank", "dspark_markov_head_type"),
    *("dspark_noise_token_id", "dspark_target_layer_ids"),
)
INHERITED = ("text_config", "num_nextn_predict_layers", "auto_map", "num_experts")
VLLM_METHODS = ("eagle-", "eagle3", "dflash")


def facts(r: Reading) -> dict[str, Any]:
    return _format_facts(r) | _target_facts(r) | _head_facts(r) | _window_facts(r) | _rope_facts(r)


def _format_facts(r: Reading) -> dict[str, Any]:
    found, model_type = r.get("architectures"), r.get("model_type")
    first = found[0] if isinstance(found, list) and found else None
    fits = model_type == "qwen3" or (r.engine.name == MLX and "qwen3" in str(model_type))
    scaled, dense = r.quantized(read=True), r.quantized(read=False)
    copies = {key: (r.get(key), r.get(f"dflash_config.{key}")) for key in KEYS}
    return {
        "architectures": first not in r.engine.architectures and repr(found),
        "DSparkDraftModel": first == "DSparkDraftModel",
        "model_type": not fits and repr(model_type),
        "speculators": r.speculators,
        "two formats": r.get("speculators_config") is not None and not r.speculators,
        "foreign names": some(r.names(FOREIGN)),
        "method in path": some([x for x in VLLM_METHODS if x in r.folder_name.lower()]),
        "bundled keys": some([key for key in BUNDLED if r.get(key) is not None]),
        "inherited keys": some([x for x in INHERITED if r.get(x) and not r.speculators]),
        "differing copies": some([k for k, x in copies.items() if None not in x and x[0] != x[1]]),
        "not quantized": bool(r.get("quantization_config")) and not scaled + dense,
        "wrongly quantized": some(dense),
    }


def _target_facts(r: Reading) -> dict[str, Any]:
    v, ids = r.values, r.values["target_layer_ids"] or []
    own_depth = r.get("num_target_layers") or r.get("dflash_config.num_target_layers")
    depth = getattr(r.target, "num_hidden_layers", own_depth)
    last = depth - 1 if type(depth) is int else float("inf")
    vocab, mask, target_vocab = v["vocab_size"], v["mask_token_id"], _of_target(r, "vocab_size")
    reduced = f"draft_vocab_size {r.vocab_rows}" if r.vocab_rows != vocab else ""
    other_vocab = target_vocab not in (None, r.vocab_rows)
    return {
        "unordered ids": sorted(set(ids)) != ids and ids,
        "embedding id": [i for i in ids if i == -1],
        "last id": [i for i in ids if i == last],
        "impossible ids": [i for i in ids if not -1 <= i <= last],
        "other depth": _differ(own_depth, _of_target(r, "num_hidden_layers")),
        "other width": _differ(v["hidden_size"], _of_target(r, "hidden_size")),
        "other vocabulary": _differ(vocab, target_vocab),
        "mask token": None not in (mask, vocab) and mask >= vocab and f"{mask} of {vocab}",
        "reduced vocabulary": reduced or some(r.names("(d2t|t2d)$")),
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
        "latent head": next((x for x in kinds if x in ("gated", "rnn")), some(latent)),
        "rank 0": r.values["markov_rank"] == 0,
        "unused confidence": bool(confidence) and flag is False,
        "half a confidence head": len(confidence) < 2,
        "no anchor": no_anchor,
        "no anchor, not speculators": no_anchor and not r.speculators,
        "speculators without sample_from_anchor": r.speculators and anchor is None,
        "no block_size": first_place(r.config, ("block_size", *block)) is None,
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
        "partial rotary": some([f"{x} {rope[x]}" for x in partial if rope[x] not in (None, 1)]),
        "differing ropes": "; ".join(rope_differences(r.config)),
        "scaled rope": kind != "default" and str(kind),
        "yarn without projector_type": kind == "yarn" and projector != "dspark",
        "attention bias": bool(r.get("attention_bias")),
    }
