"""What the rules may ask of a folder: true where the fact holds, and worth reading in the rule's
line. Those of attention, RoPE, anchors and logits are in `variant_facts.py`."""

from typing import Any

from dspark_megatron.conversion.engines.reading import KEYS, Reading, first_place, some
from dspark_megatron.conversion.engines.variant_facts import variant_facts
from dspark_megatron.conversion.layouts.names import EMBEDDING, LM_HEAD

BUNDLED = (
    *("dspark_block_size", "dspark_markov_rank", "dspark_markov_head_type"),
    *("dspark_noise_token_id", "dspark_target_layer_ids"),
)
INHERITED = ("text_config", "num_nextn_predict_layers", "auto_map", "num_experts")
VLLM_METHODS = ("eagle-", "eagle3", "dflash")
QWEN35 = "qwen3_5"


def facts(r: Reading) -> dict[str, Any]:
    return _format_facts(r) | _target_facts(r) | _head_facts(r) | variant_facts(r)


def _format_facts(r: Reading) -> dict[str, Any]:
    found, model_type, engine = r.get("architectures"), r.get("model_type"), r.engine
    first = found[0] if isinstance(found, list) and found else None
    knows = not engine.architectures or first in engine.architectures
    exact = not engine.lifts  # mlx-dspark takes a part of the name
    fits = not engine.model_types or any(
        model_type == x or (x in str(model_type) and (r.gemma or not exact))
        for x in engine.model_types
    )
    scaled, dense = r.quantized(read=True), r.quantized(read=False)
    copies = {key: (r.get(key), r.get(f"dflash_config.{key}")) for key in KEYS}
    return {
        "architectures": not knows and repr(found),
        "DSparkDraftModel": first == "DSparkDraftModel",
        "model_type": not fits and repr(model_type),
        "no model_type": model_type is None,
        "speculators": r.speculators,
        "two formats": r.get("speculators_config") is not None and not r.speculators,
        "no dflash_config": not isinstance(r.get("dflash_config"), dict) and not r.gemma,
        "foreign names": some(r.names(engine.foreign)),
        "method in path": some([x for x in VLLM_METHODS if x in r.folder_name.lower()]),
        "bundled keys": some([key for key in BUNDLED if r.get(key) is not None]),
        "inherited keys": some([x for x in INHERITED if r.get(x) and not r.speculators]),
        "differing copies": some([k for k, x in copies.items() if None not in x and x[0] != x[1]]),
        "not quantized": bool(r.get("quantization_config")) and not scaled + dense,
        "wrongly quantized": some(dense),
        "own lm_head": LM_HEAD in r.tensors and not r.gemma,
        "no own matrices": some([x for x in (EMBEDDING, LM_HEAD) if x not in r.tensors]),
    }


def _target_facts(r: Reading) -> dict[str, Any]:
    v, ids = r.values, r.values["target_layer_ids"] or []
    own_depth = r.get("num_target_layers") or r.get("dflash_config.num_target_layers")
    depth = getattr(r.target, "num_hidden_layers", own_depth)
    last = depth - 1 if type(depth) is int else float("inf")
    vocab, mask, target_vocab = v["vocab_size"], v["mask_token_id"], _of_target(r, "vocab_size")
    reduced = f"draft_vocab_size {r.vocab_rows}" if r.vocab_rows != vocab else ""
    other_vocab = target_vocab not in (None, r.vocab_rows)
    layers, family = v["num_hidden_layers"], str(_of_target(r, "model_type") or QWEN35)
    return {
        "unordered ids": sorted(set(ids)) != ids and ids,
        "embedding id": [i for i in ids if i == -1],
        "last id": [i for i in ids if i == last],
        "impossible ids": [i for i in ids if not -1 <= i <= last],
        "other taps": bool(ids) and len(ids) != layers and f"{len(ids)} for {layers}",
        "other depth": _differ(own_depth, _of_target(r, "num_hidden_layers")),
        "other width": _differ(v["hidden_size"], _of_target(r, "hidden_size")),
        "other vocabulary": _differ(vocab, target_vocab),
        "not a Qwen3.5 target": not family.startswith(QWEN35) and family,
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
    return {
        "latent head": next((x for x in kinds if x in ("gated", "rnn")), some(latent)),
        "rank 0": r.values["markov_rank"] == 0,
        "rank 0 with a Markov head": not r.values["markov_rank"] and r.names(r"markov_head\."),
        "unused confidence": bool(confidence) and flag is False,
        "half a confidence head": len(confidence) < 2,
        "no block_size": first_place(r.config, ("block_size", *block)) is None,
    }
