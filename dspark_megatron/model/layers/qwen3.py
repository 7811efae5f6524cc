"""One decoder layer of the draft (Qwen3 style): pre-norm attention and SwiGLU with residuals. The
attention is context-injected (Eq. 3): queries of a block over the target's context and the block.

Shapes: n blocks, k slots, t context tokens, a/tp query heads, g/tp key/value heads, d head width,
w <= d widths that RoPE turns,
R slots that a rank has between the linears: n*k, or with sequence parallelism 1/tp of them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, is_grad_enabled
from torch.nn import Parameter

from dspark_megatron.model.key_value_heads import KeyValueHeads
from dspark_megatron.model.token_split import TokenSplit, without_sequence_parallel
from dspark_megatron.model.transformer_config import DraftTransformerConfig
from dspark_megatron.ops.attention.block_attention import BlockAttention
from dspark_megatron.ops.rope import apply_rope


@dataclass
class ContextInjectionAttentionSubmodules:
    """Classes or specs; `linear_q` and `linear_kv` leave rows and their gradients to the caller."""

    linear_q: Any
    linear_kv: Any
    linear_proj: Any
    q_layernorm: Any
    k_layernorm: Any


class ContextInjectionAttention(MegatronModule):
    """Queries from the block; keys and values from context and block with the same weights.

    `linear_kv` holds, for each key/value head, its key rows and then its value rows (as
    Megatron-Core's CrossAttention), so a tensor-parallel split is a split of heads; with the
    config's `shared_key_value` key rows alone, whose product is the values, too. All linears have
    biases where the config has `add_qkv_bias`; the output's is added once, behind the sum over
    ranks. With the `softmax_type` learnable each query head has a sink.
    """

    def __init__(
        self,
        config: DraftTransformerConfig,
        submodules: ContextInjectionAttentionSubmodules,
        *,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.split = TokenSplit(config, tp_group=tp_group)
        self.kv_heads = KeyValueHeads(config.num_query_groups, tp_group=tp_group)
        self.head_dim = config.kv_channels
        self.shared_key_value = config.shared_key_value
        self.scale: float | None = config.softmax_scale
        hidden, width = config.hidden_size, config.kv_channels
        column = dict(
            config=without_sequence_parallel(config),
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            gather_output=False,
            skip_bias_add=False,
            disable_grad_reduce=True,
            tp_group=tp_group,
        )
        self.linear_q = build_module(
            submodules.linear_q, hidden, config.num_attention_heads * width, **column
        )
        rows = config.num_query_groups * width * (1 if config.shared_key_value else 2)
        self.linear_kv = build_module(submodules.linear_kv, hidden, rows, **column)
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.num_attention_heads * width,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_qkv_bias,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=tp_group,
        )
        norm = dict(config=config, hidden_size=width, eps=config.layernorm_epsilon)
        self.q_layernorm = build_module(submodules.q_layernorm, **norm)
        self.k_layernorm = build_module(submodules.k_layernorm, **norm)
        self.attention_sink_bias: Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // tp_group.size()
            self.attention_sink_bias = Parameter(torch.empty(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.attention_sink_bias, True, 0, 1)

    def key_value(self, states: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys (normed, rotated) and values of [..., h] states at rope's positions, each
        [..., g/tp, d], or with fewer heads than ranks [..., 1, d]. Collectives: those of
        `KeyValueHeads.own`. The caller has already made `states` the input of linears
        (`TokenSplit.to_linears`), once for all users of it."""
        key, value = self.projected_key_value(states)
        return apply_rope(self.k_layernorm(key), *rope), value

    def projected_key_value(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [..., h] states before norm and RoPE."""
        mixed, _ = self.linear_kv(states)
        heads = self.kv_heads.own(mixed)
        if self.shared_key_value:
            return heads, heads
        key, value = heads.chunk(2, dim=-1)
        return key, value

    def forward(
        self,
        hidden: Tensor,
        context_kv: tuple[Tensor, Tensor],
        attend: BlockAttention,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """hidden [R, h], context_kv each [t, g/tp, d], rope cos/sin [n, k, w] -> [R, h].

        Forward: one all-reduce of [n*k, h]. Backward: one of the same size. With sequence
        parallelism an all-gather and a reduce-scatter in place of each.
        """
        n, k, _ = rope[0].shape
        hidden = self.split.to_linears(hidden, n * k).view(n, k, -1)
        query, _ = self.linear_q(hidden)
        query = query.unflatten(-1, (-1, self.head_dim))  # [n, k, a/tp, d]
        query = apply_rope(self.q_layernorm(query), *rope)
        block_kv = self.key_value(hidden, rope)
        out = attend(query, context_kv, block_kv, self.attention_sink_bias, scale=self.scale)
        out = out.flatten(-2).flatten(0, 1)  # [n*k, a*d/tp]
        out, _ = self.linear_proj(self.split.padded(out))
        return out

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.attention_sink_bias is not None:  # Megatron-Core takes it for whole
            state |= make_sharded_tensors_for_checkpoint(
                {"attention_sink_bias": self.attention_sink_bias},
                prefix,
                {"attention_sink_bias": 0},
                sharded_offsets,
                tp_group=self.split.tp_group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        return state


@dataclass
class DraftLayerSubmodules:
    input_layernorm: Any
    self_attention: Any
    pre_mlp_layernorm: Any
    mlp: Any


class DraftLayer(MegatronModule):
    """Forward: two all-reduces of [n*k, h] (attention, MLP). Backward: the same, and those of the
    forward pass again when activations are recomputed: then only the inputs are kept. With sequence
    parallelism an all-gather and a reduce-scatter in place of each all-reduce, and one all-gather
    more in backward: the MLP keeps its input split."""

    def __init__(
        self,
        config: DraftTransformerConfig,
        submodules: DraftLayerSubmodules,
        *,
        tp_group: dist.ProcessGroup,
        recompute_activations: bool,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.recompute_activations = recompute_activations
        norm = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.input_layernorm = build_module(submodules.input_layernorm, **norm)
        self.self_attention = build_module(
            submodules.self_attention, config=config, tp_group=tp_group
        )
        self.pre_mlp_layernorm = build_module(submodules.pre_mlp_layernorm, **norm)
        self.mlp = build_module(
            submodules.mlp,
            config=config,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=tp_group,
        )

    def forward(
        self,
        hidden: Tensor,
        context_kv: tuple[Tensor, Tensor],
        attend: BlockAttention,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """[R, h] -> [R, h]; the other arguments as in ContextInjectionAttention."""
        # A checkpoint passes on tensors only; what needs no gradient is bound here.
        run = partial(self._forward, attend, rope)
        if self.recompute_activations and is_grad_enabled():
            return checkpoint(run, False, hidden, *context_kv)
        return run(hidden, *context_kv)

    def _forward(
        self,
        attend: BlockAttention,
        rope: tuple[Tensor, Tensor],
        hidden: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attention(normed, (key, value), attend, rope)
        out, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + out
