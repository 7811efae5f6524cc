"""Tiny random targets of other families, with the tiny tokenizer."""

from pathlib import Path
from typing import Any

import torch

from support.tiny_target import VOCAB_SIZE
from support.tiny_tokenizer import tiny_tokenizer

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
LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=8,
)
MLA = dict(
    **LATENT,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(head_dim=8),
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "qwen3_moe": dict(head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": dict(head_dim=8, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "gpt_oss": dict(head_dim=8, num_local_experts=8, num_experts_per_tok=2, sliding_window=6),
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": MLA,
}
"""What each family's config has beside or instead of SIZES."""
GEMMA = dict(head_dim=8, sliding_window=64, final_logit_softcapping=3.0)
SCALED_LOGITS: dict[str, tuple[dict[str, Any], tuple[float, float | None]]] = {
    "granite": (dict(logits_scaling=4.0), (0.25, None)),
    "granitemoe": (dict(logits_scaling=4.0), (0.25, None)),
    "cohere": (dict(logit_scale=0.25), (0.25, None)),
    "cohere2": (dict(logit_scale=0.25), (0.25, None)),
    "gemma2": (GEMMA, (1.0, 3.0)),
    "gemma3_text": (GEMMA, (1.0, 3.0)),
    "gemma4_text": ({**GEMMA, "hidden_size_per_layer_input": 0}, (1.0, 3.0)),
    "vaultgemma": (GEMMA, (1.0, 3.0)),
    "recurrent_gemma": (dict(logits_soft_cap=3.0), (1.0, 3.0)),
    "nanochat": (dict(final_logit_softcapping=3.0), (1.0, 3.0)),
    "falcon_h1": (dict(lm_head_multiplier=0.5), (0.5, None)),
    "minicpm3": ({**LATENT, "dim_model_base": 16}, (0.5, None)),
    "hyperclovax": (dict(logits_scaling=0.5), (0.5, None)),
    "inkling_text": (dict(logits_mup_width_multiplier=2.0), (0.5, None)),
}
"""Families whose logits are scaled or capped: what their config has beside SIZES, and the scale and
the soft cap that it means."""


def make_family(folder: Path, model_type: str, **overrides: Any) -> Path:
    """Save a random causal language model of 4 layers and the tokenizer; returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, **{**SIZES, **FAMILIES.get(model_type, {}), **overrides}
    )
    torch.manual_seed(0)
    return save_target(folder, AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def save_target(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    return folder


def make_multimodal(folder: Path, model_type: str) -> Path:
    """Save a random model of images and text, whose vision tower has as many layers as its text
    model; returns the folder."""
    import transformers as t

    text: dict[str, Any] = {**SIZES, "head_dim": 8}
    tower = dict(num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    tower.update(image_size=16, patch_size=8)
    qwen_tower = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4)
    qwen_tower.update(out_hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=16)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    kinds: dict[str, Any] = {
        "qwen3_vl": (t.Qwen3VLConfig, {"rope_parameters": rope}, qwen_tower, {}),
        "qwen3_vl_moe": (
            t.Qwen3VLMoeConfig,
            {**FAMILIES["qwen3_moe"], "moe_intermediate_size": 24, "rope_parameters": rope},
            qwen_tower,
            {},
        ),
        "gemma3": (t.Gemma3Config, {"sliding_window": 6}, tower, {"mm_tokens_per_image": 4}),
        "llava": (
            t.LlavaConfig,
            {"model_type": "llama"},
            {**tower, "model_type": "clip_vision_model"},
            {"image_token_index": 300},
        ),
    }
    config_class, own, vision, rest = kinds[model_type]
    config = config_class(text_config={**text, **own}, vision_config=vision, **rest)
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    save_target(folder, model)
    if model_type == "qwen3_vl_moe":
        _store_as_published(folder / "model.safetensors")
    return folder


def _store_as_published(path: Path) -> None:
    """Qwen3-VL-MoE's own files have its experts' matrices the other way round."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
