"""Where the target's GPTModel comes from: a Megatron-LM checkpoint, or the Hugging Face folder."""

from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from dspark_megatron.config import Config, TargetConfig
from dspark_megatron.errors import require
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import shared_weights
from dspark_megatron.targets.megatron import checkpoint
from dspark_megatron.targets.megatron.gpt_model import build_gpt_model
from dspark_megatron.targets.megatron.gpt_shape import GPTShape, gpt_shape_of
from dspark_megatron.targets.megatron.groups import check_expert_parallel
from dspark_megatron.targets.megatron.hf_weights import load_hf_weights


@dataclass(frozen=True)
class GPTSource:
    """A model's shape, and weights that fit it."""

    shape: GPTShape
    dtype: torch.dtype
    weights: GPTCheckpoint | SafetensorsFolder

    @classmethod
    def open(cls, config: TargetConfig, target_config: PretrainedConfig) -> "GPTSource":
        """Reads no weights. ConfigError for a model that is not supported, and for a checkpoint of
        another model than the Hugging Face config describes."""
        shape = gpt_shape_of(target_config)
        weights: GPTCheckpoint | SafetensorsFolder
        if config.checkpoint:
            weights = saved = GPTCheckpoint(config.checkpoint)
            own = checkpoint.shape_of_checkpoint(saved, shape.vocab_size)
            own.require_same(shape, f"target.checkpoint {saved.path}", "config.json")
            dtype = saved.dtype
        else:
            weights = folder = SafetensorsFolder(config.path)
            embedding, head = shared_weights(config.path)
            shape = replace(shape, share_embeddings_and_output_weights=embedding == head)
            dtype = target_config.dtype or folder.dtypes[embedding]
        if config.dtype != "auto":
            dtype = getattr(torch, config.dtype)
        return cls(shape, dtype, weights)

    def model(
        self,
        pg_collection: ProcessGroupCollection,
        *,
        device: torch.device,
        sequence_parallel: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> GPTModel:
        """This rank's part of the model with its weights. Collective over the world. Where
        there are experts, tokens are spread over the tensor-parallel ranks in any case: else each
        rank would send all of them."""
        model = build_gpt_model(
            self.shape,
            pg_collection,
            params_dtype=self.dtype,
            device=device,
            sequence_parallel=sequence_parallel or self.shape.num_experts is not None,
            pre_process=pre_process,
            post_process=post_process,
        )
        if isinstance(self.weights, GPTCheckpoint):
            checkpoint.load_checkpoint_weights(model, self.weights)
        else:
            load_hf_weights(model, self.shape, self.weights)
        return model


def check_gpt_target(config: Config, target_config: PretrainedConfig, stage_size: int) -> None:
    """ConfigError unless the target is a GPTModel that can be split so. stage_size: ranks that hold
    a layer. Reads a checkpoint's arguments and no weights, which need not be there."""
    target, tp, ep = config.target, config.parallel.tensor_parallel, config.parallel.expert_parallel
    shape = gpt_shape_of(target_config)
    if target.checkpoint:
        shape = GPTSource.open(target, target_config).shape
    check_expert_parallel(ep, shape.num_experts, stage_size, tp_size=tp)
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    require(
        groups % tp == 0 or (tp % groups == 0 and heads % tp == 0),
        f"parallel.tensor_parallel ({tp}) must divide the target's key/value heads ({groups}), or "
        f"be a multiple of them that divides its query heads ({heads})",
    )
    widths = {"FFN layers": shape.ffn_hidden_size}
    if shape.num_experts is not None and ep == 1:
        widths["experts"] = shape.moe_ffn_hidden_size
    for name, width in widths.items():
        require(
            width % tp == 0,
            f"parallel.tensor_parallel ({tp}) must divide the width of the target's {name} "
            f"({width})",
        )
