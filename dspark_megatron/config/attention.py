"""The part `attention` of the section `model`: what the slots of a block see."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dspark_megatron.config.rules import positive
from dspark_megatron.errors import require


class LayerAttention(NamedTuple):
    """What the slots of a block see in one layer of the draft."""

    window: int | None = None
    """Positions that a slot sees at most, its own included; None: all before the anchor."""
    window_origin: str = "slot"
    """`slot` or `anchor`, as `AttentionConfig.window_origin`."""
    causal: bool = False
    """Whether a slot sees only itself and the slots before it, instead of its whole block."""

    @property
    def reach(self) -> int | None:
        """Tokens before the anchor that slot 0 sees at most, and it sees the most; None: all."""
        if self.window is None:
            return None
        return self.window if self.window_origin == "anchor" else self.window - 1


FULL = LayerAttention()
"""All context before the anchor and the whole block: the default."""


@dataclass(kw_only=True)
class AttentionConfig:
    """Attention of the draft's layers. By default a slot sees all of the context before its anchor
    and its whole block, in both directions (DeepSpec's rule)."""

    window: int | None = None
    """Positions that a slot sees at most, its own included, as Transformers' `sliding_window`. It
    must be at least `model.block_size`. Null means no window."""
    sliding_layers: list[int] = field(default_factory=list)
    """Draft layers (counted from 0, strictly increasing) that have the window. Empty means all of
    them, if there is a window. Transformers calls them `sliding_attention`."""
    window_origin: Literal["slot", "anchor"] = "slot"
    """Where the window is measured from. `slot`: slot j of an anchor at position a sees the context
    from a + j - window + 1 on, as engines serve it. `anchor`: every slot sees the context from
    a - window on, as the speculators library trains it."""
    causal: Literal["none", "sliding", "all"] = "none"
    """Layers in which a slot does not see the later slots of its own block: `none` of them, those
    with the window (`sliding`), or `all`."""
    sink: bool = False
    """Give each query head a learnt logit that takes part in the softmax and has no value (an
    attention sink)."""
    biases: bool = False
    """Give the query, key, value and output projections biases."""

    def reach(self, num_layers: int) -> int | None:
        """Tokens before an anchor that some layer sees at most; None: all."""
        slides = self.window is not None and len(self.sliding_layers) in (0, num_layers)
        return LayerAttention(self.window, self.window_origin).reach if slides else None

    def validate(self, num_layers: int, block_size: int) -> None:
        positive("model.attention", self, "window")
        layers, last = self.sliding_layers, num_layers - 1
        require(
            layers == sorted(set(layers)) and all(0 <= i <= last for i in layers),
            f"model.attention.sliding_layers ({layers}) must be strictly increasing layers of the "
            f"draft, in [0, {last}]",
        )
        if self.window is None:
            for name in ("sliding_layers", "window_origin", "causal"):
                value = getattr(self, name)
                require(
                    value in ([], "slot", "none", "all"),
                    f"model.attention.{name} ({value!r}) speaks of a window, and "
                    "model.attention.window is null; set it to a number of positions, for example "
                    "2048, or leave this key out",
                )
            return
        require(
            self.window >= block_size,
            f"model.attention.window ({self.window}) must be at least model.block_size "
            f"({block_size}), so that every slot sees its block; raise it",
        )
