"""Variants of drafts, and the layouts that cannot say them, with the reason: a row each."""

from collections.abc import Callable
from dataclasses import dataclass, field

from dspark_megatron.shape import DraftShape

_SLOT_ONLY = (
    "its programs measure a window from the slot, so slot j would see j + 1 of the window's "
    "context positions fewer than in training; use --layout speculators"
)
_QWEN3_ONLY = "what reads it has Qwen3-style layers only; use --layout hf"
_NO_SINK = "what reads it has no attention sinks"
_ALL_SLOTS = "what reads it drafts from all slots"
_NO_CAUSAL_FULL = "its full layers always see the whole block"
_NO_SCALE = "it has no key for that"
_NO_CAP = "no program caps the logits of a Qwen3-style draft"


@dataclass(frozen=True)
class Variant:
    name: str
    has: Callable[[DraftShape], bool]
    cannot: dict[str, str] = field(default_factory=dict)
    """Why not, by layout; the others can."""


def _layers(shape: DraftShape) -> tuple[int, ...]:
    return tuple(range(shape.num_layers))


def _window(shape: DraftShape, origin: str) -> bool:
    return shape.attention.window is not None and shape.attention.window_origin == origin


VARIANTS = (
    Variant(
        "a window from the slot",
        lambda shape: _window(shape, "slot"),
        {
            "speculators": "it measures a window from the anchor, so slot j would see j + 1 "
            "context positions more than in training; train with "
            "model.attention.window_origin=anchor, or use --layout hf"
        },
    ),
    Variant(
        "a window from the anchor",
        lambda shape: _window(shape, "anchor"),
        dict.fromkeys(("hf", "modelopt", "specforge"), _SLOT_ONLY),
    ),
    Variant(
        "a window on some layers",
        lambda shape: shape.attention.sliding_layers not in ((), _layers(shape)),
        {"modelopt": "its windows are those of all layers (dflash_swa_window_size)"},
    ),
    Variant(
        "sliding layers that are not causal within a block",
        lambda shape: bool(shape.attention.sliding_layers) and not shape.attention.causal_layers,
        {"specforge": "its sliding layers are causal"},
    ),
    Variant(
        "full layers that are causal within a block",
        lambda shape: bool({*shape.attention.causal_layers} - {*shape.attention.sliding_layers}),
        dict.fromkeys(("speculators", "specforge"), _NO_CAUSAL_FULL),
    ),
    Variant(
        "attention sinks",
        lambda shape: shape.attention.sink,
        dict.fromkeys(("speculators", "specforge"), _NO_SINK),
    ),
    Variant("attention biases", lambda shape: shape.attention.biases),
    Variant(
        "a slot 0 that drafts nothing (sample_from_anchor false)",
        lambda shape: not shape.sample_from_anchor,
        dict.fromkeys(("modelopt", "specforge"), _ALL_SLOTS),
    ),
    Variant(
        "scaled logits (logit_scale)",
        lambda shape: shape.logit_scale != 1,
        dict.fromkeys(("speculators", "modelopt", "specforge"), _NO_SCALE),
    ),
    Variant(
        "capped logits without Gemma-4 layers",
        lambda shape: shape.logit_softcapping is not None and shape.architecture == "qwen3",
        dict.fromkeys(("hf", "speculators", "modelopt", "specforge"), _NO_CAP),
    ),
    Variant(
        "Gemma-4 layers",
        lambda shape: shape.architecture == "gemma4",
        dict.fromkeys(("speculators", "modelopt", "specforge"), _QWEN3_ONLY),
    ),
    Variant(
        "no Markov head",
        lambda shape: not shape.markov_rank,
        {"modelopt": "its drafts have a Markov rank above 0"},
    ),
    Variant(
        "a confidence head that does not see the Markov embedding",
        lambda shape: shape.enable_confidence_head and not shape.confidence_head_with_markov,
        {"modelopt": "ModelOpt's confidence head always sees it"},
    ),
)


def unsayable(layout: str, shape: DraftShape) -> list[str]:
    """A line for each variant of this draft that a layout cannot say."""
    return [
        f"{variant.name}: layout {layout} cannot say it: {variant.cannot[layout]}"
        for variant in VARIANTS
        if layout in variant.cannot and variant.has(shape)
    ]


def layout_notes(layout: str, shape: DraftShape) -> list[str]:
    """What a layout's own program asks of a draft beyond what its folder says."""
    if layout != "modelopt" or len(shape.target_layer_ids) == shape.num_layers:
        return []
    return [
        "ModelOpt wants one tap for each layer of a draft and refuses to start from this one: it "
        f"has {len(shape.target_layer_ids)} taps and {shape.num_layers} layers"
    ]
