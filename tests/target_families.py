"""Tiny random targets of other families, with the tiny tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from tiny_target import VOCAB_SIZE

SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    initializer_range=0.2,
    max_position_embeddings=256,
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=1,
)
MLA = dict(
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": dict(head_dim=8, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "gpt_oss": dict(head_dim=8, num_local_experts=8, num_experts_per_tok=2, sliding_window=6),
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": MLA,
}
"""What each family's config has beside or instead of SIZES."""


def make_family(folder: Path, model_type: str, **overrides: Any) -> Path:
    """Save a random causal language model of 4 layers and the tokenizer; returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type], **overrides})
    torch.manual_seed(0)
    return save_target(folder, AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def save_target(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    return folder
