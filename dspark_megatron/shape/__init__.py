"""The draft's dimensions, derived from the target's own config, and every rule between the two."""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from dspark_megatron.config import ModelConfig
from dspark_megatron.config.model import num_draft_tokens
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape.attention import DraftAttention
from dspark_megatron.shape.gemma4 import (
    check_gemma4,
    gemma4_heads,
    gemma4_rope,
    gemma4_softcapping,
)
from dspark_megatron.shape.rope import check_rope_width, draft_rope

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What families call the number of their experts."""


@dataclass(frozen=True, kw_only=True)
class DraftShape:
    """All that fixes the draft's tensors and its mathematics; part of every checkpoint."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int
    markov_rank: int
    markov_head_type: str
    enable_confidence_head: bool
    confidence_head_with_markov: bool
    # What follows is younger than the first checkpoints, which mean the defaults.
    architecture: str = "qwen3"
    """Of the decoder layers: `qwen3` or `gemma4`."""
    attention: DraftAttention = DraftAttention()
    sample_from_anchor: bool = True
    """Whether slot 0 drafts a token. If not, it only carries the anchor, and slot j predicts the
    token at its own position."""
    shared_key_value: bool = False
    """Whether values are the keys before norm and RoPE (Gemma 4's `attention_k_eq_v`)."""
    logit_scale: float = 1.0
    """What the LM head's product is multiplied by."""
    logit_softcapping: float | None = None
    """c of c * tanh(x / c), which base logits pass before the Markov bias is added."""

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that a block drafts."""
        return num_draft_tokens(self.block_size, self.sample_from_anchor)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        changed = {
            "target_layer_ids": list(self.target_layer_ids),
            "attention": self.attention.to_dict(),
        }
        return {**asdict(self), **changed}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "DraftShape":
        changed: dict[str, Any] = {"target_layer_ids": tuple(raw["target_layer_ids"])}
        if "attention" in raw:
            changed["attention"] = DraftAttention.from_dict(raw["attention"])
        return cls(**{**raw, **changed})

    @classmethod
    def young_defaults(cls) -> dict[str, Any]:
        """What a checkpoint means, as JSON has it, by the keys that are younger than it."""
        young = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
        return {**young, "attention": DraftAttention().to_dict()}


def draft_shape(model: ModelConfig, target_config: Any) -> DraftShape:
    """The draft for a target. `target_config`: a Transformers `PretrainedConfig`.

    Raises ConfigError when a rule between the config and the target does not hold.
    """
    text = target_config.get_text_config()
    _check_facts(text)
    gemma = model.architecture == "gemma4"
    if gemma:
        check_gemma4(model, text)
    _check_layer_ids(model.target_layer_ids, text.num_hidden_layers)
    mask_token_id = _checked_mask_token(model.mask_token_id, text)
    heads, kv_heads, head_dim = _draft_heads(model, text)
    with_markov = model.enable_confidence_head and model.confidence_head_with_markov
    rope = shape_rope(model, text)
    check_rope_width(rope, head_dim)
    return DraftShape(
        hidden_size=text.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size or _dense_width(text),
        num_layers=model.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope_parameters=rope,
        max_position_embeddings=model.max_position_embeddings or text.max_position_embeddings,
        num_target_layers=text.num_hidden_layers,
        target_layer_ids=tuple(model.target_layer_ids),
        mask_token_id=mask_token_id,
        block_size=model.block_size,
        markov_rank=model.markov_rank,
        markov_head_type=model.markov_head_type if model.markov_rank else "vanilla",
        enable_confidence_head=model.enable_confidence_head,
        confidence_head_with_markov=with_markov,
        architecture=model.architecture,
        attention=DraftAttention.of(model.attention, model.num_layers),
        sample_from_anchor=model.sample_from_anchor,
        shared_key_value=gemma and text.attention_k_eq_v,
        logit_scale=model.logit_scale,
        logit_softcapping=gemma4_softcapping(text) if gemma else None,
    )


def shape_rope(model: ModelConfig, text: Any) -> dict[str, Any]:
    """RoPE of the draft of this architecture. Raises ConfigError for one that it cannot have."""
    rope = gemma4_rope if model.architecture == "gemma4" else draft_rope
    return rope(model.rope_parameters, text, model.max_position_embeddings)


def _draft_heads(model: ModelConfig, text: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and head width of the draft: the target's own where it has
    such heads."""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    chosen = [getattr(model, name) for name in names]
    if model.architecture == "gemma4":
        own = (text.num_attention_heads, *gemma4_heads(text))
        return _divided(*(mine or theirs for mine, theirs in zip(chosen, own, strict=True)))
    several = [name for name in names if len(layer_values(text, name)) > 1]
    why = ""
    if has_latent_attention(text):
        why = "the target's latent attention (MLA) has no key/value heads"
    elif not layer_values(text, "num_attention_heads"):
        why = "the target has no attention heads"
    elif several:
        why = f"the target's layers differ in {' and '.join(several)}, so it has no heads"
    require(
        not why or None not in chosen,
        f"{why} that the draft could take over; set model.{', model.'.join(names)}, for example to "
        f"{max(1, text.hidden_size // 128)}, 8 and 128",
    )
    if why:
        return _divided(*chosen)
    heads = chosen[0] or text.num_attention_heads
    kv_heads = chosen[1] or getattr(text, "num_key_value_heads", None) or heads
    head_dim = chosen[2] or getattr(text, "head_dim", None) or text.hidden_size // heads
    return _divided(heads, kv_heads, head_dim)


def _divided(heads: int, kv_heads: int, head_dim: int) -> tuple[int, int, int]:
    require(
        heads % kv_heads == 0,
        f"query heads ({heads}) must be divisible by key/value heads ({kv_heads})",
    )
    require(head_dim % 2 == 0, f"the width of a head ({head_dim}) must be even, for RoPE")
    return heads, kv_heads, head_dim


def layer_values(text: Any, name: str) -> set[Any]:
    """What a text config says of a key: nothing, one value, or several where layers differ."""
    try:
        found = {getattr(text, name, None)}
    except RuntimeError:  # Transformers': asked of the whole, it is said of each layer
        found = {getattr(layer, name, None) for layer in text.per_layer_config}
    return found - {None}


def _check_facts(text: Any) -> None:
    """What every target's config must say."""
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    missing = [name for name in names if len(layer_values(text, name)) != 1]
    require(
        not missing,
        f"the target's config ({text.model_type}) must say its {' and '.join(missing)}; put "
        f"{'them' if len(missing) > 1 else 'it'} into its config.json",
    )


def has_latent_attention(text: Any) -> bool:
    return getattr(text, "kv_lora_rank", None) is not None


def _dense_width(text: Any) -> int:
    """Width of the target's dense FFN layers."""
    width: Any = getattr(text, "intermediate_size", None)
    hidden_size = text.hidden_size
    plans = (getattr(text, f"base_model_{kind}_plan", None) or {} for kind in ("tp", "ep"))
    has_experts = any("experts" in name for plan in plans for name in plan) and _may_have(text)
    of_experts = has_experts and getattr(text, "moe_intermediate_size", None) is None
    require(
        isinstance(width, int) and not of_experts,
        f"the target's intermediate_size ({width}) must be the width of a dense layer for the "
        f"draft to take it over{', and is that of one expert' if of_experts else ''}; set "
        f"model.ffn_hidden_size, for example to 3 x hidden_size = {3 * hidden_size}",
    )
    return width


def _may_have(text: Any) -> bool:
    """False where a family may have experts, and this config says that it has none (Gemma 4)."""
    said = text.to_dict()
    counts = [said[name] for name in EXPERTS if name in said]
    return not counts or any(counts)


def check_special_tokens(mask_token_id: int, special: dict[str, int | list[int] | None]) -> None:
    """Refuse a mask token that is one of the given `{name: id or ids}` (pad, eos)."""
    for name, ids in special.items():
        require(
            mask_token_id not in (ids if isinstance(ids, list) else [ids]),
            f"model.mask_token_id ({mask_token_id}) must not be the {name} token; "
            "choose an id that never occurs in the data, such as a reserved token",
        )


def _check_layer_ids(ids: list[int], num_layers: int) -> None:
    last = num_layers - 2
    require(
        bool(ids),
        "model.target_layer_ids is empty; name decoder layers of the target, "
        f"strictly increasing, in [0, {last}]",
    )
    require(
        all(0 <= i <= last for i in ids),
        f"model.target_layer_ids {ids} must lie in [0, {last}]: the target has {num_layers} "
        "layers (0-based), and the output of the last one cannot be captured by serving engines",
    )
    require(
        all(a < b for a, b in zip(ids, ids[1:], strict=False)),
        f"model.target_layer_ids {ids} must be strictly increasing (sorted, no duplicates)",
    )


def _checked_mask_token(mask_token_id: int | None, text: Any) -> int:
    if mask_token_id is None:
        raise ConfigError(
            "model.mask_token_id is missing; choose a token id that never occurs in the data"
        )
    require(
        0 <= mask_token_id < text.vocab_size,
        f"model.mask_token_id ({mask_token_id}) must be in the target's vocabulary "
        f"[0, {text.vocab_size})",
    )
    special = {"pad": text.pad_token_id, "eos": text.eos_token_id}
    check_special_tokens(mask_token_id, special)
    return mask_token_id
