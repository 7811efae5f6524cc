"""Facts of a folder's attention, RoPE, anchors and logits, for the rules of `variant_rules.py`."""

import math
from typing import Any

from dspark_megatron.conversion.engines.attention import SAYS, lookup, read_attention
from dspark_megatron.conversion.engines.reading import Reading, first_place, some
from dspark_megatron.conversion.layouts.rope_config import rope_differences
from dspark_megatron.shape.rope import PARTIAL, ROPE_DIM

LOGIT_SCALES = ("logit_scale", "dflash_config.output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "dflash_config.final_logit_softcapping")


def variant_facts(r: Reading) -> dict[str, Any]:
    return _attention_facts(r) | _anchor_facts(r) | _rope_facts(r) | _logit_facts(r)


def _attention_facts(r: Reading) -> dict[str, Any]:
    says = read_attention(SAYS, r.config, r.values["num_hidden_layers"])
    reads, types = r.attention, r.get("layer_types")
    slides = isinstance(types, list) and "sliding_attention" in types
    window, windows = some_window(says.windows), set(says.windows)
    swa_width = r.get("dflash_config.swa_window_size")
    widths = {x for x in (r.get("sliding_window"), swa_width) if type(x) is int}
    from_anchor = "anchor" in (r.get("window_origin"), r.get("dflash_config.window_origin"))
    said = first_place(r.config, tuple(f"{p}causal" for p in ("dspark_config.", "dflash_config.")))
    return {
        "window": bool(window),
        "other windows": reads.windows != says.windows
        and f"{reads.windows_words}; trained with {says.windows_words}",
        "other causality": reads.causal != says.causal
        and f"{reads.causal_words}; trained with {says.causal_words}",
        "sliding layers without a width": slides and not window,
        "two widths": len(widths) > 1
        and window
        and " and ".join(map(str, sorted(widths, key=str))),
        "mixed windows": len(windows) > 1,
        "window without causality": bool(window) and not any(says.causal),
        "window from the anchor": bool(window) and (r.speculators or from_anchor),
        "causal said": said and lookup(r.config, said) is True,
        "causal": any(says.causal),
        "unread sink": says.sink and not reads.sink and not r.engine.by_tensors,
        "sink": says.sink,
        "biases": bool(r.get("attention_bias")),
        "unread biases": bool(r.get("attention_bias")) and not r.engine.biases,
        "value scale": r.get("dflash_config.attention_value_scale"),
    }


def some_window(windows: tuple[Any, ...]) -> Any:
    return next((x for x in windows if x is not None), None)


def _anchor_facts(r: Reading) -> dict[str, Any]:
    said = (r.get("sample_from_anchor"), r.get("dflash_config.sample_from_anchor"))
    anchor = next((x for x in said if x is not None), None)
    bonus, no_anchor = r.get("dspark_bonus_anchor"), anchor is False
    tokens, size = r.get("num_speculative_tokens"), r.values["block_size"]
    of_drafts = no_anchor and tokens is not None and tokens == size
    of_slots = no_anchor and not of_drafts
    return {
        "no anchor": no_anchor,
        "block_size counts drafts": of_drafts,
        "block_size counts slots": of_slots,
        "block_size counts slots, not speculators": of_slots and not r.speculators,
        "block_size counts slots, unsaid": of_slots and bonus is not True,
        "contradicting anchors": isinstance(bonus, bool) and bonus is (anchor is not False),
        "speculators without sample_from_anchor": r.speculators and anchor is None,
    }


def _rope_facts(r: Reading) -> dict[str, Any]:
    both = (r.get("rope_scaling"), r.get("rope_parameters"))
    rope = {key: value for x in both if isinstance(x, dict) for key, value in x.items()}
    rope = {PARTIAL: r.get(PARTIAL), **rope}  # Transformers puts it into rope_parameters
    partial = [x for x in rope if x.startswith(("partial_rotary", "mrope"))]
    turned = some([f"{x} {rope[x]}" for x in partial if rope[x] not in (None, 1)])
    chosen = rope.get(ROPE_DIM) not in (None, r.values["head_dim"])
    kind = rope.get("rope_type") or rope.get("type") or "default"
    projector = r.get("dflash_config.projector_type")
    yarn = kind == "yarn" and not r.gemma
    return {
        "partial rotary": turned if chosen and not r.gemma else "",
        "leftover rotary": "" if chosen or r.gemma else turned,
        "differing ropes": "; ".join(rope_differences(r.config)),
        "neither plain nor yarn": kind not in ("default", "yarn") and not r.gemma and str(kind),
        "yarn without projector_type": yarn and projector != "dspark",
        "mscale": yarn and _mscale(rope),
        "attention_factor": yarn and _own_factor(rope),
        "no rope_parameters": not isinstance(r.get("rope_parameters"), dict),
    }


def _mscale(rope: dict[str, Any]) -> str:
    """Where mscale keys give YaRN another attention factor than its formula."""
    one, two, factor = (_positive(rope, key) for key in ("mscale", "mscale_all_dim", "factor"))
    if not (one and two and factor > 1) or rope.get("attention_factor") is not None:
        return ""
    found = (0.1 * one * math.log(factor) + 1) / (0.1 * two * math.log(factor) + 1)
    usual = 0.1 * math.log(factor) + 1
    return "" if math.isclose(found, usual) else f"mscale {one} and mscale_all_dim {two}"


def _own_factor(rope: dict[str, Any]) -> str:
    found, factor = _positive(rope, "attention_factor"), _positive(rope, "factor")
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return "" if not found or math.isclose(found, usual, rel_tol=1e-6) else str(found)


def _positive(rope: dict[str, Any], key: str) -> float:
    """0 for any junk."""
    value: Any = rope.get(key)
    return float(value) if type(value) in (int, float) and 0 < value < math.inf else 0.0


def _logit_facts(r: Reading) -> dict[str, Any]:
    scale, cap = _number(r, LOGIT_SCALES, 1.0), _number(r, SOFTCAPS, None)
    return {
        "other scale": _other_scale(r, scale),
        "scale": scale != 1.0,
        "unread cap": cap is not None and cap != _number(r, r.engine.softcap, None) and f"{cap}",
        "cap": cap is not None,
        "gemma": r.gemma,
        "own values": r.gemma and r.get("attention_k_eq_v") is False,
    }


def _other_scale(r: Reading, trained: float) -> str:
    """Where an engine multiplies base logits by another number than the draft was trained with."""
    found = _number(r, r.engine.logit_scale, 1.0)
    divisor: Any = getattr(r.target, r.engine.target_divisor, None)
    if type(divisor) in (int, float) and 0 < divisor < math.inf:
        found /= divisor
        if not math.isclose(found, trained):
            return (
                f"multiplies logits by {found:.6g} (the target's {r.engine.target_divisor}), "
                f"logit_scale is {trained:.6g}"
            )
        return ""
    return "" if found == trained else f"does not scale logits, logit_scale is {trained}"


def _number(r: Reading, places: tuple[str, ...], default: Any) -> Any:
    place = first_place(r.config, places)
    value = lookup(r.config, place) if place else None
    return float(value) if type(value) in (int, float) and value else default
