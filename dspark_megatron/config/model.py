"""The section `model`."""

from dataclasses import dataclass, field
from typing import Any

from dspark_megatron.config.rules import one_of, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class ModelConfig:
    """The draft model. Widths left at null are the target's."""

    num_layers: int = 5
    """Draft decoder layers."""
    block_size: int = 7
    """Draft positions of one anchor (k); the anchor's own token is the first input."""
    num_anchors: int = 512
    """Anchors sampled per sample, at most."""
    target_layer_ids: list[int] = field(default_factory=list)
    """Target layers whose outputs feed the draft: 0-based decoder layers, strictly increasing,
    in [0, N-2]. Layer i is Transformers' `hidden_states[i + 1]`."""
    mask_token_id: int | None = None
    """Token id fed at the positions after the anchor. Required; neither pad nor eos."""
    markov_rank: int = 256
    """Width of the Markov head (r); 0 means no Markov head."""
    markov_head_type: str = "vanilla"
    """`vanilla`, `gated` or `rnn`."""
    enable_confidence_head: bool = True
    """Train a head that predicts the chance that a draft token is kept."""
    confidence_head_with_markov: bool = True
    """Give the confidence head the previous token's Markov embedding as well."""
    ffn_hidden_size: int | None = None
    """Width of the draft's SwiGLU layers."""
    num_attention_heads: int | None = None
    """Query heads of the draft."""
    num_key_value_heads: int | None = None
    """Key/value heads of the draft."""
    head_dim: int | None = None
    """Width of one attention head of the draft."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; biases start at zero, norms at one."""
    rope_parameters: dict[str, Any] | None = None
    """RoPE of the draft, in Transformers' words, for example `{rope_theta: 10000.0}`: `rope_type`
    is `default`, `linear`, `llama3` or `yarn`. Null: the target's, if it is one of these."""
    initialize_from_target_layers: list[int] = field(default_factory=list)
    """For each draft layer the target's layer (0-based) whose attention, MLP and norms it starts
    from, where the shapes agree; empty: all weights are random. Not looked at when the run
    continues."""
    backend: str = "local"
    """Classes of the draft's layers: `local` (Megatron-Core's own and PyTorch's RMSNorm, any
    device), `transformer_engine` (needs the package and a GPU) or `auto` (the latter where it can
    run). The same parameters and checkpoints."""
    layer_spec: list[str] = field(default_factory=list)
    """Code of yours for the draft's layers, as Megatron's `--spec`: [module, name] of a ModuleSpec
    or of a function that returns one. A run imports it; reading a config does not. Empty: the
    classes of `backend`."""
    attention_backend: str = "auto"
    """Attention of the draft in training: `sdpa` (grouped, any device), `flex` (FlexAttention with
    a block mask; GPUs only) or `auto` (the faster one of the device: today `sdpa` everywhere, since
    no GPU has compared them yet)."""
    attention_group_size: int = 16
    """Blocks that share one attention call of `sdpa`; bounds the mask to
    [group * k, context + group * k]."""

    def validate(self) -> None:
        for name in ("num_layers", "block_size", "num_anchors", "attention_group_size"):
            positive(f"model.{name}", getattr(self, name))
        one_of("model.markov_head_type", self.markov_head_type, ("vanilla", "gated", "rnn"))
        one_of("model.backend", self.backend, ("local", "transformer_engine", "auto"))
        require(
            len(self.layer_spec) in (0, 2) and all(self.layer_spec),
            f"model.layer_spec ({self.layer_spec}) must be two words, a module and a name in it "
            "(as for Megatron's --spec), or []",
        )
        require(
            not self.layer_spec or self.backend == "local",
            f"model.layer_spec ({self.layer_spec}) takes the place of model.backend "
            f"({self.backend!r}); leave that at local",
        )
        one_of("model.attention_backend", self.attention_backend, ("auto", "sdpa", "flex"))
        require(self.markov_rank >= 0, f"model.markov_rank ({self.markov_rank}) must be >= 0")
        require(
            not (self.enable_confidence_head and self.confidence_head_with_markov)
            or self.markov_rank > 0,
            "model.confidence_head_with_markov needs a Markov head: set model.markov_rank > 0 "
            "or model.confidence_head_with_markov=false",
        )
        positive("model.initializer_range", self.initializer_range)
        for name in ("ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None:
                positive(f"model.{name}", getattr(self, name))
