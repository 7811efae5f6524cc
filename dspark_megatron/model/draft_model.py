"""DSparkDraftModel: the parallel backbone and its heads, split over tensor-parallel ranks.

Shapes: t context tokens (all samples of the micro-batch flattened), n blocks, k slots, d of them
that draft a token, m target layers, h hidden, r Markov rank, v padded vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from dspark_megatron.config.attention import LayerAttention
from dspark_megatron.data.blocks import DraftBlocks
from dspark_megatron.mcore.rms_norm import RMSNorm
from dspark_megatron.mcore.split_matrix import SplitMatrix
from dspark_megatron.model.heads import MARKOV_HEADS, ConfidenceHead, MarkovHead
from dspark_megatron.model.layer_specs import local_layer_spec
from dspark_megatron.model.parameter_init import init_parameters
from dspark_megatron.model.split_matrices import split_matrices
from dspark_megatron.model.token_split import TokenSplit, without_sequence_parallel
from dspark_megatron.model.transformer_config import transformer_config
from dspark_megatron.model.vocab_parallel_weight import VocabParallelWeight
from dspark_megatron.ops.attention.block_attention import (
    BlockAttention,
    block_attention,
    by_layer,
)
from dspark_megatron.ops.head_loss import HeadWeights
from dspark_megatron.ops.logit_transform import LogitTransform
from dspark_megatron.ops.rope import RotaryTable
from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.layout import padded_vocab_size

BACKEND_DETAILS = ("_extra_state", "linear_fc1.layer_norm_weight")
"""Ends of names that depend on the classes a layer is built from: the state of fp8 kernels, and a
weight that goes by its name of the local backend, too."""

ContextKV = list[tuple[Tensor, Tensor]]
"""Keys and values of the context for each layer, each [t, g/tp, d]."""

FROZEN_REPLICAS = ("embed_tokens", "output_head")
"""The target's own matrices, its LM head within the output weight: needed to run, never trained,
not in training checkpoints."""


@dataclass(frozen=True)
class DraftOutput:
    """What the loss needs, of the slots that draft. The vocabulary has not been touched yet."""

    hidden: Tensor
    """[n, d, h] after the final norm."""
    latents: Tensor | None
    """[n, d, r] z of the Markov bias W2 z; None without a Markov head."""
    confidence_logits: Tensor | None
    """[n, d] fp32; None without a confidence head."""


class DSparkDraftModel(MegatronModule):
    """A drafter for one target. Its weights are undefined until `init_weights` or a checkpoint
    fills them, and the frozen replicas until `load_frozen_replicas` does."""

    def __init__(
        self,
        shape: DraftShape,
        *,
        tp_group: dist.ProcessGroup,
        params_dtype: torch.dtype,
        device: torch.device,
        attention_backend: str = "auto",
        attention_group_size: int = 16,
        recompute_activations: bool = False,
        sequence_parallel: bool = False,
        gradient_accumulation_fusion: bool = False,
        spec: ModuleSpec | None = None,
    ) -> None:
        tp_size = tp_group.size()
        config = transformer_config(
            shape,
            tp_size=tp_size,
            params_dtype=params_dtype,
            sequence_parallel=sequence_parallel,
            gradient_accumulation_fusion=gradient_accumulation_fusion,
        )
        super().__init__(config)
        self.shape = shape
        self.tp_group = tp_group
        self.split = TokenSplit(config, tp_group=tp_group)
        self.attention_backend = attention_backend
        self.attention_group_size = attention_group_size
        vocab = padded_vocab_size(shape.vocab_size, tp_size)
        self.vocab_shard = VocabShard.of_group(shape.vocab_size, vocab, tp_group)
        self.logit_transform = LogitTransform(shape.logit_scale, shape.logit_softcapping)
        self.rotary = RotaryTable(
            shape.rope_parameters, shape.head_dim, shape.max_position_embeddings
        )
        norm: dict[str, Any] = dict(
            config=config, hidden_size=shape.hidden_size, eps=shape.rms_norm_eps
        )
        self.embed_tokens = VocabParallelEmbedding(
            vocab,
            shape.hidden_size,
            init_method=config.init_method,
            config=config,
            tp_group=tp_group,
        )
        self.fc = ColumnParallelLinear(
            len(shape.target_layer_ids) * shape.hidden_size,
            shape.hidden_size,
            config=without_sequence_parallel(config),
            init_method=config.init_method,
            bias=False,
            gather_output=not self.split.is_split,
            disable_grad_reduce=True,  # the target's states take no gradient
            tp_group=tp_group,
        )
        self.hidden_norm = RMSNorm(**norm)
        spec = spec or local_layer_spec(shape.architecture)
        build = dict(config=config, tp_group=tp_group, recompute_activations=recompute_activations)
        self.layers = torch.nn.ModuleList(
            build_module(spec, **build) for _ in range(shape.num_layers)
        )
        self.final_layernorm = RMSNorm(**norm)
        # The target's LM head, and columns for markov_w2: see HeadWeights.output_weight.
        width = shape.hidden_size + shape.markov_rank
        self.output_head = VocabParallelWeight(config, vocab, width, tp_group=tp_group)
        self.markov_head: MarkovHead | None = None
        if shape.markov_rank:
            head = MARKOV_HEADS[shape.markov_head_type]
            self.markov_head = head(config, vocab, shape.markov_rank, tp_group=tp_group)
        self.confidence_head: ConfidenceHead | None = None
        if shape.enable_confidence_head:
            rank = shape.markov_rank if shape.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(config, rank)
        for name in FROZEN_REPLICAS:
            getattr(self, name).requires_grad_(False)
        self.register_load_state_dict_post_hook(_miss_no_replicas)
        self.to(device=device, dtype=params_dtype)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules hand every model the output of the stage before it; a draft is one
        stage, and there is none."""

    def init_weights(self, *, seed: int, std: float) -> None:
        """Fill the trained parameters from (seed, name); the same at every layout."""
        init_parameters(
            self,
            seed=seed,
            std=std,
            tp_rank=self.tp_group.rank(),
            tp_size=self.tp_group.size(),
            shard=self.vocab_shard,
        )

    def split_matrices(self) -> dict[str, SplitMatrix]:
        """Those that Muon may train, by name of their parameter."""
        return split_matrices(self, self.config)

    @torch.no_grad()
    def load_frozen_replicas(self, embed_tokens: Tensor, lm_head: Tensor) -> None:
        """This rank's [v/tp, h] rows of the target's embedding and LM head, padding zero."""
        self.embed_tokens.weight.copy_(embed_tokens)
        self.lm_head.copy_(lm_head)

    def head_weights(self) -> HeadWeights:
        """The vocabulary matrices for the head loss."""
        w2 = None if self.markov_head is None else self.markov_head.markov_w2.weight
        return HeadWeights(self.output_head.weight, w2, self.vocab_shard, self.logit_transform)

    @property
    def lm_head(self) -> Tensor:
        """This rank's [v/tp, h] rows of the target's LM head."""
        return self.head_weights().lm_head

    @property
    def layer_rules(self) -> list[LayerAttention]:
        """What the slots of a block see, for each layer."""
        return [self.shape.attention.of_layer(i) for i in range(self.shape.num_layers)]

    def base_logits(self, hidden: Tensor) -> Tensor:
        """`cap(scale * lm_head hidden)` of a few slots, outside the loss: [n, h] -> this rank's
        [n, v/tp], padding included. No collective."""
        return self.logit_transform.product(hidden, self.lm_head)

    def draft_logits(self, hidden: Tensor, latents: Tensor | None) -> Tensor:
        """Base logits and the Markov bias W2 z, which is neither scaled nor capped: [n, h] and
        [n, r], or None without a Markov head -> [n, v/tp]. No collective."""
        logits = self.base_logits(hidden)
        if self.markov_head is not None and latents is not None:
            logits.addmm_(latents, self.markov_head.markov_w2.weight.t())
        return logits

    def encode_context(self, taps: Tensor, positions: Tensor) -> ContextKV:
        """Keys and values that every layer draws from the target's states (Eq. 2, 3).

        taps [t, m*h], positions [t] -> for each layer key and value [t, g/tp, d]. Forward: one
        all-gather of [t, h]. Backward: one all-reduce of [t, h] for all layers together. With
        sequence parallelism the norm sees 1/tp of the rows, between an all-to-all and an all-gather
        of [t, h] and, in backward, a reduce-scatter and an all-to-all.
        """
        context, _ = self.fc(taps.to(self.config.params_dtype))
        context = self.hidden_norm(self.split.from_columns(context))
        context = self.split.to_linears(context, len(taps))
        rope = self.rotary(positions, context.dtype)
        layers: Any = self.layers
        return [layer.self_attention.key_value(context, rope) for layer in layers]

    def attention_of(self, blocks: DraftBlocks) -> list[BlockAttention]:
        """Of each layer over the context of the blocks."""
        make = partial(
            block_attention,
            self.attention_backend,
            blocks.context_ranges,
            self.shape.block_size,
            len(blocks.context_positions),
            head_dim=self.shape.head_dim,
            group_size=self.attention_group_size,
        )
        return by_layer(self.layer_rules, make)

    def backbone(
        self,
        anchor_token_ids: Tensor,
        anchor_positions: Tensor,
        context_kv: ContextKV,
        attention: Sequence[BlockAttention],
    ) -> Tensor:
        """Hidden states of the slots that draft: all k of a block, or all but the first.
        anchor_token_ids, anchor_positions [n], attention: of each layer over the context that each
        block sees -> [n, d, h].

        Forward: one all-reduce of [n + 1, h] for the embedding, those of the layers, and with
        sequence parallelism an all-gather of [n*k, h].
        """
        n, k = len(anchor_token_ids), self.shape.block_size
        positions = anchor_positions[:, None] + torch.arange(k, device=anchor_positions.device)
        mask_token = anchor_token_ids.new_full((1,), self.shape.mask_token_id)
        embedded = self.embed_tokens(torch.cat([anchor_token_ids, mask_token]))  # [n + 1, h]
        if self.shape.architecture == "gemma4":  # whose scale is rounded to the weights' type
            embedded = embedded * embedded.new_full((), self.shape.hidden_size**0.5)
        source = torch.full_like(positions, n)  # a slot's row of `embedded`
        source[:, 0] = torch.arange(n, device=positions.device)
        own = self.split.local(source.flatten())  # [R], n*k slots or this rank's part
        hidden = embedded[own]  # [R, h]
        rope = self.rotary(positions, hidden.dtype)
        for layer, layer_kv, attend in zip(self.layers, context_kv, attention, strict=True):
            hidden = layer(hidden, layer_kv, attend, rope)
        hidden = self.final_layernorm(hidden)
        whole = self.split.whole(hidden, n * k).view(n, k, -1)
        return whole[:, k - self.shape.num_draft_tokens :]

    def forward(
        self, taps: Tensor, blocks: DraftBlocks, *, confidence_stop_gradient: bool = False
    ) -> DraftOutput:
        """Training pass over the n blocks of a micro-batch. taps [b, s, m*h].
        confidence_stop_gradient: the confidence logits' gradient ends in their head."""
        context = blocks.context_of(taps)  # [t, m*h]
        context_kv = self.encode_context(context, blocks.context_positions)
        anchors = blocks.prev_token_ids[:, 0], blocks.positions[:, 0]
        hidden = self.backbone(*anchors, context_kv, self.attention_of(blocks))
        embeddings = latents = confidence_logits = None
        if self.markov_head is not None:
            embeddings = self.markov_head.embed(blocks.prev_token_ids)
            latents = self.markov_head.latents(embeddings, hidden)
        if self.confidence_head is not None:
            confidence_logits = self.confidence_head(
                hidden, embeddings, stop_gradient=confidence_stop_gradient
            )
        return DraftOutput(hidden, latents, confidence_logits)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Everything but the frozen replicas and what a backend adds; loads at any tensor-parallel
        size and with any backend."""
        named = [(n, m) for n, m in self.named_children() if n not in ("layers", *FROZEN_REPLICAS)]
        for i, layer in enumerate(self.layers):
            named += [(f"layers.{i}.{name}", module) for name, module in layer.named_children()]
        state: dict[str, Any] = {}
        for name, module in named:
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return {key: value for key, value in state.items() if not key.endswith(BACKEND_DETAILS)}


def _miss_no_replicas(module: DSparkDraftModel, keys: Any) -> None:
    """Let a strict load of a checkpoint go without what it does not hold."""
    keys.missing_keys[:] = [
        name
        for name in keys.missing_keys
        if not name.startswith(FROZEN_REPLICAS) and not name.endswith(BACKEND_DETAILS)
    ]
