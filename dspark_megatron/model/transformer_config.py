"""The draft's dimensions as Megatron-Core's `TransformerConfig`."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from dspark_megatron.shape import DraftShape


@dataclass
class DraftTransformerConfig(TransformerConfig):
    """And what Megatron-Core has no word for."""

    shared_key_value: bool = False
    """Whether values are the keys before norm and RoPE."""


def transformer_config(
    shape: DraftShape,
    *,
    tp_size: int,
    params_dtype: torch.dtype,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> DraftTransformerConfig:
    """A Qwen3-style decoder: RMSNorm, SwiGLU, grouped-query attention, q/k norm, no biases but for
    attention's. Gemma 4's has a gate of GELU, and scores that are not scaled. `add_qkv_bias` stands
    for the bias of attention's output projection, too, and `softmax_type` for a sink.

    Megatron-Core allocates the weights and leaves them as they are: `parameter_init` fills them by
    name, so that they do not depend on the layout. `calculate_per_token_loss` makes Megatron's
    data-parallel reduction a plain sum, since the loss is already divided by the weight of the
    whole step. On one rank there is no row to split, so `sequence_parallel` means nothing there.
    """
    gemma = shape.architecture == "gemma4"
    return DraftTransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=partial(F.gelu, approximate="tanh") if gemma else F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.attention.biases,
        softmax_scale=1.0 if gemma else None,
        shared_key_value=shape.shared_key_value,
        softmax_type="learnable" if shape.attention.sink else "vanilla",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel and tp_size > 1,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        init_method=_leave,
        output_layer_init_method=_leave,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight
