"""The section `model`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dspark_megatron.config.attention import AttentionConfig
from dspark_megatron.config.rules import not_negative, positive
from dspark_megatron.errors import require


def num_draft_tokens(block_size: int, sample_from_anchor: bool) -> int:
    """Tokens that a block drafts: one for each slot, or for each but the anchor's."""
    return block_size if sample_from_anchor else block_size - 1


@dataclass(kw_only=True)
class ModelConfig:
    """The draft model. A width that is null is the target's."""

    num_layers: int = 5
    """Decoder layers of the draft."""
    block_size: int = 7
    """Slots of one anchor's block (k). The first input is the anchor's own token."""
    sample_from_anchor: bool = True
    """Whether slot 0, whose input is the anchor, drafts a token: then a block drafts `block_size`
    tokens. With `false` slot 0 only carries the anchor, each later slot predicts the token at its
    own position, and a block drafts one token less (the layout of DFlash)."""
    num_anchors: int = 512
    """The most anchors that are drawn from one sample."""
    target_layer_ids: list[int] = field(default_factory=list)
    """The target's layers whose outputs feed the draft: decoder layers counted from 0, strictly
    increasing, in [0, N-2]. Layer i is Transformers' `hidden_states[i + 1]`."""
    mask_token_id: int | None = None
    """The token id that is fed at the positions after the anchor. It is required, and must be
    neither the pad token nor the eos token."""
    markov_rank: int = 256
    """Width of the Markov head (r). With 0 there is no Markov head."""
    markov_head_type: Literal["vanilla", "gated", "rnn"] = "vanilla"
    """The kind of Markov head: `vanilla`, `gated` or `rnn`."""
    enable_confidence_head: bool = True
    """Train a head that predicts the chance that a draft token is accepted."""
    confidence_head_with_markov: bool = True
    """Let the confidence head read the Markov embedding of the previous token as well."""
    ffn_hidden_size: int | None = None
    """Width of the draft's SwiGLU layers."""
    num_attention_heads: int | None = None
    """Query heads of the draft."""
    num_key_value_heads: int | None = None
    """Key/value heads of the draft."""
    head_dim: int | None = None
    """Width of one attention head of the draft."""
    architecture: Literal["qwen3", "gemma4"] = "qwen3"
    """Decoder layers of the draft: `qwen3` for a target of any family, or `gemma4`, as DeepSpec
    gives Gemma-4 targets."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """What the slots of a block see: the keys of `model.attention`."""
    logit_scale: float = 1.0
    """What the draft's base logits are multiplied by, for a target whose engine serves the draft
    with a scaled head. The target's own scale is always applied to the target's logits."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights. Biases start at zero, norms at one."""
    rope_parameters: dict[str, Any] | None = None
    """RoPE of the draft in Transformers' format, for example `{rope_theta: 10000.0}`. `rope_type`
    may be `default`, `linear`, `llama3` or `yarn`. With `partial_rotary_factor` the first
    `int(head_dim * factor)` widths of each head are turned. Null takes the target's, if it is of
    one of these types, without a partial factor of the target."""
    max_position_embeddings: int | None = None
    """Positions that the export says the draft is made for. Null takes the target's. If it is set,
    a scaled RoPE without `original_max_position_embeddings` is scaled from it divided by the
    factor."""
    initialize_from_target_layers: list[int] = field(default_factory=list)
    """The target's layer (counted from 0) that each draft layer starts from. Attention, MLP and
    norms are copied where the shapes agree. Empty means random weights. A run that continues
    ignores this."""
    backend: Literal["local", "transformer_engine", "auto"] = "local"
    """Classes of the draft's layers. `local` uses Megatron-Core's own and PyTorch's RMSNorm, on any
    device. `transformer_engine` needs that package and a GPU. `auto` takes Transformer Engine where
    it can run. Parameters and checkpoints are the same."""
    layer_spec: list[str] = field(default_factory=list)
    """Your own code for the draft's layers, as Megatron's `--spec` names it: [module, name] of a
    ModuleSpec or of a function that returns one. It is imported when the run starts, not when the
    config is read. Empty means the classes of `backend`."""
    attention_backend: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention of the draft in training. `sdpa` works on groups of blocks, on any device. `flex`
    is FlexAttention with a block mask and needs a GPU. `auto` takes the faster one for the device:
    `flex` on a GPU for heads of 64 to 128, where it was measured, and `sdpa` elsewhere."""
    attention_group_size: int = 16
    """Blocks that share one attention call of `sdpa`. This bounds the mask to the
    shape [group * k, context + group * k]."""

    @property
    def num_draft_tokens(self) -> int:
        return num_draft_tokens(self.block_size, self.sample_from_anchor)

    def validate(self) -> None:
        positive("model", self, "num_layers", "block_size", "num_anchors", "attention_group_size")
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
        self.attention.validate(self.num_layers, self.block_size)
        require(
            self.sample_from_anchor or self.block_size > 1,
            f"model.block_size ({self.block_size}) must be at least 2 with "
            "model.sample_from_anchor=false: slot 0 drafts no token then",
        )
        not_negative("model", self, "markov_rank")
        require(
            not (self.enable_confidence_head and self.confidence_head_with_markov)
            or self.markov_rank > 0,
            "model.confidence_head_with_markov needs a Markov head: set model.markov_rank > 0 "
            "or model.confidence_head_with_markov=false",
        )
        positive("model", self, "initializer_range", "ffn_hidden_size", "num_attention_heads")
        positive("model", self, "num_key_value_heads", "head_dim", "max_position_embeddings")
        positive("model", self, "logit_scale")
