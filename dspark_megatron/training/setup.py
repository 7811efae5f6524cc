"""From a config to the parts of a run; shared by training and evaluation.

`check_run` comes first and costs nothing: every rule that needs no weights is tried there.
"""

from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from dspark_megatron.config import Config, ConfigError
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.shape import DraftShape, check_layout, check_special_tokens, draft_shape
from dspark_megatron.targets.huggingface import HuggingFaceTarget, load_target_config
from dspark_megatron.targets.weights import TargetWeights
from dspark_megatron.training.runtime import Runtime

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed every check that needs no weights."""

    config: Config
    target_config: PretrainedConfig
    shape: DraftShape
    tokenizer: PreTrainedTokenizerBase
    dp_size: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.train.dtype]


def check_run(config: Config, world_size: int) -> RunPlan:
    """Settings against the target's config and tokenizer; ConfigError if they cannot work."""
    target_config = load_target_config(config.target.path)
    shape = draft_shape(config.model, target_config)
    dp_size = check_layout(config, shape, world_size)
    tokenizer = _load_tokenizer(config.target.path)
    special = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id}
    check_special_tokens(shape.mask_token_id, special)
    return RunPlan(config, target_config, shape, tokenizer, dp_size)


def build_draft(plan: RunPlan, runtime: Runtime) -> DSparkDraftModel:
    """The draft with weights from train.seed and the target's embedding and head."""
    model = DSparkDraftModel(
        plan.shape,
        tp_group=runtime.tp_group,
        params_dtype=plan.dtype,
        device=runtime.device,
        attention_group_size=plan.config.model.attention_group_size,
    )
    model.init_weights(seed=plan.config.train.seed, std=plan.config.model.initializer_range)
    weights = TargetWeights(plan.config.target.path)
    rows = model.vocab_shard.vocab_start_index, model.vocab_shard.vocab_end_index
    tied = plan.target_config.get_text_config().tie_word_embeddings
    model.load_frozen_replicas(
        weights.rows(weights.embedding_name(), *rows), weights.rows(weights.head_name(tied), *rows)
    )
    return model


def build_target(plan: RunPlan, runtime: Runtime) -> HuggingFaceTarget:
    """The frozen target, this rank's tensor-parallel slice of it."""
    return HuggingFaceTarget(
        plan.config.target,
        plan.shape.target_layer_ids,
        tp_size=runtime.tp_group.size(),
        dp_size=runtime.dp_group.size(),
        device=runtime.device,
    )


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        message = f"target.path {path} must hold the target's tokenizer: {error}"
        raise ConfigError(message) from error
