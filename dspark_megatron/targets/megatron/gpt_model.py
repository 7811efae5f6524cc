"""The frozen target as Megatron-Core's GPTModel, its attention by PyTorch's own kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import get_pg_rank
from torch import Tensor

from dspark_megatron.mcore import transformer_engine
from dspark_megatron.mcore.rms_norm import RMSNorm
from dspark_megatron.shape.layout import padded_vocab_size, stage_layers
from dspark_megatron.targets.megatron.gpt_shape import GPTShape


class CausalAttention(MegatronModule):
    """In place of Megatron-Core's `DotProductAttention`, which keeps all [s, s] scores."""

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        """config: a TransformerConfig. The rest of what specs pass does not matter here."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [s, b, heads/tp, d], key and value [s, b, groups/tp, d] -> [s, b, heads/tp * d]"""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3).flatten(2)


def build_gpt_model(
    shape: GPTShape,
    pg_collection: ProcessGroupCollection,
    *,
    params_dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    pre_process: bool = True,
    post_process: bool = True,
) -> GPTModel:
    """This rank's part of the model, frozen, its weights not set. pre_process, post_process:
    whether the stage has the embedding, and the final norm with the output layer. The vocabulary
    is padded to a multiple of the tensor-parallel size, as the draft's."""
    config = transformer_config(
        shape, pg_collection, params_dtype=params_dtype, sequence_parallel=sequence_parallel
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, get_pg_rank(pg_collection.pp)),
        vocab_size=padded_vocab_size(shape.vocab_size, pg_collection.tp.size()),
        max_sequence_length=0,  # RoPE needs none
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        pg_collection=pg_collection,
    )
    return model.to(device=device, dtype=params_dtype).eval().requires_grad_(False)


def transformer_config(
    shape: GPTShape,
    pg_collection: ProcessGroupCollection,
    *,
    params_dtype: torch.dtype,
    sequence_parallel: bool = False,
) -> TransformerConfig:
    stages = stage_layers(shape.num_layers, pg_collection.pp.size())
    experts: dict[str, Any] = {}
    if shape.num_experts is not None:
        experts = dict(
            num_moe_experts=shape.num_experts,
            moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
            moe_router_topk=shape.moe_router_topk,
            moe_router_pre_softmax=shape.moe_router_pre_softmax,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="allgather",
            moe_grouped_gemm=transformer_engine.is_usable(),
            moe_layer_freq=list(shape.moe_layer_freq) if shape.moe_layer_freq else 1,
            expert_model_parallel_size=pg_collection.ep.size(),
            expert_tensor_parallel_size=pg_collection.expt_tp.size(),
        )
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        qk_layernorm=shape.qk_layernorm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=pg_collection.tp.size(),
        pipeline_model_parallel_size=pg_collection.pp.size(),
        sequence_parallel=sequence_parallel and pg_collection.tp.size() > 1,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        num_layers_in_last_pipeline_stage=stages[-1] if len(set(stages)) > 1 else None,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        **experts,
    )


def _block_spec(config: TransformerConfig, pp_rank: int) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm."""
    with_engine = transformer_engine.is_usable()
    spec = get_gpt_decoder_block_spec(
        config=config,
        use_transformer_engine=with_engine,
        normalization="RMSNorm",
        pp_rank=pp_rank,
    )
    if not with_engine:
        if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 asks whether it is None
            moe_utils.te_general_gemm = None
        for layer in spec.layer_specs:
            _use_pytorch(layer, qk_layernorm=config.qk_layernorm)
        spec.layer_norm = RMSNorm
    return spec


def _use_pytorch(layer: ModuleSpec, *, qk_layernorm: bool) -> None:
    """Norms that know sequence parallelism, and attention that keeps no scores."""
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
