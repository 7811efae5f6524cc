"""The draft's attention as part of its shape: one form for each mathematics, whoever said it."""

from dataclasses import asdict, dataclass
from typing import Any

from dspark_megatron.config.attention import AttentionConfig, LayerAttention


@dataclass(frozen=True, kw_only=True)
class DraftAttention:
    """Equal where two drafts attend alike: layers are listed, and what means nothing has its
    default."""

    window: int | None = None
    """Positions that a slot of a sliding layer sees at most, its own included."""
    window_origin: str = "slot"
    """`slot` or `anchor`: where the window is measured from."""
    sliding_layers: tuple[int, ...] = ()
    """Layers with the window."""
    causal_layers: tuple[int, ...] = ()
    """Layers in which a slot does not see later slots of its block."""
    sink: bool = False
    """Whether each query head has a learnt logit without a value."""
    biases: bool = False
    """Whether the projections of queries, keys, values and outputs have biases."""

    @classmethod
    def of(cls, config: AttentionConfig, num_layers: int) -> "DraftAttention":
        everyone = tuple(range(num_layers))
        sliding = () if config.window is None else tuple(config.sliding_layers) or everyone
        causal = {"none": (), "sliding": sliding, "all": everyone}[config.causal]
        return cls(
            window=config.window,
            window_origin=config.window_origin,
            sliding_layers=sliding,
            causal_layers=causal,
            sink=config.sink,
            biases=config.biases,
        )

    def config(self, num_layers: int) -> AttentionConfig | None:
        """The section that says this; None where no section can."""
        everyone = tuple(range(num_layers))
        causal = "none"
        if self.causal_layers:
            causal = "all" if self.causal_layers == everyone else "sliding"
        found = AttentionConfig(
            window=self.window,
            sliding_layers=[] if self.sliding_layers in ((), everyone) else [*self.sliding_layers],
            window_origin=self.window_origin,  # type: ignore[arg-type]
            causal=causal,  # type: ignore[arg-type]
            sink=self.sink,
            biases=self.biases,
        )
        return found if DraftAttention.of(found, num_layers) == self else None

    def of_layer(self, layer: int) -> LayerAttention:
        causal = layer in self.causal_layers
        if layer not in self.sliding_layers:
            return LayerAttention(causal=causal)
        return LayerAttention(self.window, self.window_origin, causal)

    def reach(self, num_layers: int) -> int | None:
        """Tokens before an anchor that some layer sees at most; None: all."""
        slides = len(self.sliding_layers) == num_layers
        return self.of_layer(0).reach if slides else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "DraftAttention":
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)
