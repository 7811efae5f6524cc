"""From a config to the parts of a run; shared by training and evaluation.

`check_run` comes first and costs nothing: every rule that needs no weights is tried there.
"""

import contextlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dspark_megatron import transformer_engine
from dspark_megatron.config import Config, ModelConfig, require
from dspark_megatron.conversion.draft_tensors import check_draft_tensors
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.model.layer_specs import layer_spec
from dspark_megatron.model.user_layer_spec import user_code, user_layer_spec
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.shape import (
    DraftShape,
    check_layout,
    check_special_tokens,
    draft_shape,
    padded_vocab_size,
)
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer, stop_token_ids
from dspark_megatron.storage.target_weights import shared_matrices, weights_fingerprint
from dspark_megatron.targets.base import Target
from dspark_megatron.targets.cache_layers import check_decoding, check_pieces
from dspark_megatron.targets.family import check_attention, check_logits
from dspark_megatron.targets.huggingface import HuggingFaceTarget
from dspark_megatron.targets.megatron.groups import TargetGroups
from dspark_megatron.targets.megatron.pipeline import PipelineTarget
from dspark_megatron.targets.megatron.source import GPTSource, check_gpt_target
from dspark_megatron.targets.megatron.target import MegatronTarget
from dspark_megatron.targets.split import TargetSplit, check_target_split
from dspark_megatron.training.runtime import Runtime

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed every check that needs no weights."""

    config: Config
    target_config: PretrainedConfig
    shape: DraftShape
    tokenizer: PreTrainedTokenizerBase | None
    """None: its folder has none, and the plan is only to be looked at."""
    dp_size: int

    @cached_property
    def target_fingerprint(self) -> str:
        target = self.config.target
        return weights_fingerprint(target.path, target.checkpoint)

    @property
    def target_dtype(self) -> torch.dtype:
        """The type that the target is loaded in; `auto` takes the one it was saved in."""
        target = self.config.target
        if target.dtype != "auto":
            return getattr(torch, target.dtype)
        if target.checkpoint:
            return GPTCheckpoint(target.checkpoint).dtype
        return self.target_config.dtype or torch.float32

    @property
    def target_split(self) -> TargetSplit:
        return TargetSplit.of(self.config, self.dp_size)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.train.dtype]


def check_run(config: Config, world_size: int, *, needs_tokenizer: bool = True) -> RunPlan:
    """Settings against the target's config and tokenizer; ConfigError if they cannot work.
    needs_tokenizer: false passes over a folder that has none."""
    target_config = load_target_config(config.target.path)
    check_family(config, target_config)
    shape = draft_shape(config.model, target_config)
    dp_size = check_layout(config, shape, target_config, world_size)
    if config.target.provider == "megatron":
        check_gpt_target(config, target_config, world_size // config.parallel.pipeline_parallel)
    elif not config.target.is_cached:
        check_target_split(target_config, TargetSplit.of(config, dp_size))
    _check_memory_budget(config, shape)
    if not needs_tokenizer and not list(Path(config.target.path).glob("tokenizer*")):
        return RunPlan(config, target_config, shape, None, dp_size)
    tokenizer = load_tokenizer(config.target.path)
    stops = stop_token_ids(config.target.path, tokenizer)
    special = {"pad": tokenizer.pad_token_id, "eos": stops}
    check_special_tokens(shape.mask_token_id, special)
    return RunPlan(config, target_config, shape, tokenizer, dp_size)


def _check_memory_budget(config: Config, shape: DraftShape) -> None:
    """ConfigError unless the head loss may hold a row of logits."""
    tp_size = config.parallel.tensor_parallel
    vocab_local = padded_vocab_size(shape.vocab_size, tp_size) // tp_size
    dtype = DTYPES[config.train.dtype]
    chunk_rows(config.loss, vocab_local, dtype, with_teacher=config.needs_teacher)


def check_training_device(config: Config) -> None:
    """ConfigError if the settings cannot train on this machine; other commands may still use it."""
    has_gpu, extension = torch.cuda.is_available(), "fused_weight_gradient_mlp_cuda"
    require(
        not config.optimizer.gradient_accumulation_fusion
        or (has_gpu and importlib.util.find_spec(extension) is not None),
        f"optimizer.gradient_accumulation_fusion needs a GPU (found: {has_gpu}) and Apex's "
        f"extension {extension}; install both or set optimizer.gradient_accumulation_fusion=false",
    )
    _layer_spec(config.model)
    if has_gpu:
        return
    require(
        config.model.attention_backend != "flex",
        "model.attention_backend 'flex' needs CUDA to train, and torch sees no GPU here: "
        "FlexAttention has no backward pass on CPUs; set model.attention_backend=sdpa",
    )
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    require(
        not config.loss.compile or any(map(shutil.which, compilers)),
        f"loss.compile needs a C++ compiler on a CPU ({' or '.join(compilers)}), and there is "
        "none on the path; install one or set loss.compile=false",
    )


def check_family(config: Config, target_config: PretrainedConfig) -> None:
    """ConfigError for a target whose family works otherwise than the run needs."""
    target = config.target
    if config.needs_teacher and target.check_teacher_logits:
        check_logits(target_config)
    if target.provider != "huggingface":
        return
    check_attention(target_config, target.attention)
    most, longest = target.max_tokens_per_forward, config.data.max_length
    if most is not None and most < longest:
        check_pieces(
            target_config,
            f"set target.max_tokens_per_forward (now {most}) to null or at least to "
            f"data.max_length ({longest})",
        )


def check_decodes(plan: RunPlan, batch_size: int) -> None:
    """ConfigError if the target makes states of whole samples only, or cannot take drafts of so
    many sequences back."""
    config = plan.config
    if config.target.check_teacher_logits and not config.needs_teacher:
        check_logits(plan.target_config)
    if config.target.provider == "huggingface":
        check_decoding(plan.target_config, batch_size)
    stages = config.parallel.pipeline_parallel
    require(
        stages == 1,
        f"parallel.pipeline_parallel ({stages}) must be 1 to decode: stages would wait for each "
        "other at every token; set parallel.pipeline_parallel=1 with more tensor parallelism, or "
        "target.provider=huggingface. Estimates in training (evaluate.every) do run in stages",
    )


def draft_identity(plan: RunPlan) -> dict[str, Any]:
    """What a checkpoint must share with every use of it."""
    return {
        "shape": plan.shape.to_dict(),
        "target_fingerprint": plan.target_fingerprint,
    }


def build_draft(plan: RunPlan, runtime: Runtime) -> DSparkDraftModel:
    """The draft with weights from train.seed and the target's embedding and head. ConfigError
    where the user's own layers do not build, or do not have the parameters of a draft."""
    backend, override = plan.config.model.backend, plan.config.model.layer_spec
    if runtime.is_main and backend == "auto":
        used = "transformer_engine" if transformer_engine.is_usable() else "local"
        print(f"model.backend auto: {used}", flush=True)
    spec = _layer_spec(plan.config.model)
    with user_code(override) if override else contextlib.nullcontext():
        model = DSparkDraftModel(
            plan.shape,
            tp_group=runtime.tp_group,
            params_dtype=plan.dtype,
            device=runtime.device,
            attention_backend=plan.config.model.attention_backend,
            attention_group_size=plan.config.model.attention_group_size,
            recompute_activations=plan.config.train.recompute_activations,
            sequence_parallel=plan.config.parallel.sequence_parallel,
            gradient_accumulation_fusion=plan.config.optimizer.gradient_accumulation_fusion,
            spec=spec,
        )
    if override:
        check_draft_tensors(model, f"the draft of model.layer_spec {override}")
    model.init_weights(seed=plan.config.train.seed, std=plan.config.model.initializer_range)
    model.load_frozen_replicas(*frozen_rows(plan, model.vocab_shard))
    return model


def _layer_spec(model: ModelConfig) -> ModuleSpec:
    return user_layer_spec(model.layer_spec) if model.layer_spec else layer_spec(model.backend)


def load_target_head(plan: RunPlan, draft: DSparkDraftModel, target: Target) -> Tensor:
    """This rank's [v/tp, h] rows of the target's LM head in the target's own dtype; the draft's
    replica when that is the same."""
    if draft.lm_head.dtype == target.dtype:
        return draft.lm_head
    return _head_rows(plan, draft.vocab_shard, target)


def read_target_head(
    plan: RunPlan, target: Target, *, tp_group: dist.ProcessGroup
) -> tuple[Tensor, VocabShard]:
    """This rank's [v/tp, h] rows of the target's LM head in the target's own dtype, and which they
    are; for uses without a draft."""
    vocab_size = plan.shape.vocab_size
    padded = padded_vocab_size(vocab_size, tp_group.size())
    shard = VocabShard.of_group(vocab_size, padded, tp_group)
    return _head_rows(plan, shard, target), shard


def _head_rows(plan: RunPlan, shard: VocabShard, target: Target) -> Tensor:
    _, head = frozen_rows(plan, shard)
    return head.to(device=target.device, dtype=target.dtype)


def frozen_rows(plan: RunPlan, shard: VocabShard) -> list[Tensor]:
    """This rank's rows of the target's embedding and LM head, as they are saved."""
    target, found = plan.config.target, []
    for matrix in shared_matrices(target.path, target.checkpoint):
        rows = matrix.rows(shard.vocab_start_index, shard.vocab_end_index)
        require(
            rows.is_floating_point() and rows.dtype.itemsize > 1,
            f"{matrix.name} in {target.checkpoint or target.path} is quantized ({rows.dtype}), and "
            "the draft reads it as it is; save the target with its embedding and LM head in "
            "bfloat16 or float32",
        )
        found.append(rows)
    return found


def build_target(
    plan: RunPlan, runtime: Runtime, *, with_last_hidden: bool = True
) -> Target | PipelineTarget:
    """The frozen target, this rank's part of it; without its last hidden states, only as much of it
    as the taps need."""
    require(
        not plan.config.target.is_cached,
        "this needs the target itself, not states of some samples; set target.provider=huggingface",
    )
    if plan.config.target.provider == "megatron":
        return _build_megatron_target(plan, runtime, with_last_hidden=with_last_hidden)
    if not runtime.is_main:
        transformers.utils.logging.disable_progress_bar()
    return HuggingFaceTarget(
        plan.config.target,
        plan.shape.target_layer_ids,
        split=plan.target_split,
        dp_group=runtime.dp_group,
        device=runtime.device,
        with_last_hidden=with_last_hidden,
    )


def _build_megatron_target(
    plan: RunPlan, runtime: Runtime, *, with_last_hidden: bool
) -> MegatronTarget | PipelineTarget:
    target, parallel = plan.config.target, plan.config.parallel
    stages = parallel.pipeline_parallel
    groups = TargetGroups.make(
        tp_group=runtime.tp_group, pp_size=stages, ep_size=parallel.expert_parallel
    )
    stage = groups.collection.pp.rank()
    model = GPTSource.open(target, plan.target_config).model(
        groups,
        device=runtime.device,
        sequence_parallel=parallel.sequence_parallel,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
    )
    kept = dict(with_last_hidden=with_last_hidden, with_output_layer=target.check_teacher_logits)
    layer_ids = plan.shape.target_layer_ids
    if stages > 1:
        per_run = parallel.pipeline_micro_batches
        return PipelineTarget(model, layer_ids, micro_batches_per_run=per_run, **kept)
    most = target.max_tokens_per_forward
    return MegatronTarget(model, layer_ids, max_tokens_per_forward=most, **kept)
