"""The one check of a run: every rule that needs no weights, before anything is loaded."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dspark_megatron.config import Config
from dspark_megatron.errors import require
from dspark_megatron.model.layer_specs import chosen_layer_spec
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.shape import DraftShape, check_special_tokens, draft_shape
from dspark_megatron.shape.layout import check_layout, padded_vocab_size
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer, stop_token_ids
from dspark_megatron.storage.target_weights import weights_fingerprint
from dspark_megatron.targets.family import (
    check_attention,
    check_decoding,
    check_logits,
    check_pieces,
)
from dspark_megatron.targets.huggingface.split import TargetSplit, check_target_split
from dspark_megatron.targets.megatron.source import check_gpt_target

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
    elif not config.target.is_stored:
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
    chunk_rows(config.loss, vocab_local, dtype, with_target=config.needs_target_logits)


def check_training_device(config: Config) -> None:
    """ConfigError if the settings cannot train on this machine; other commands may still use it."""
    has_gpu, extension = torch.cuda.is_available(), "fused_weight_gradient_mlp_cuda"
    require(
        not config.optimizer.gradient_accumulation_fusion
        or (has_gpu and importlib.util.find_spec(extension) is not None),
        f"optimizer.gradient_accumulation_fusion needs a GPU (found: {has_gpu}) and Apex's "
        f"extension {extension}; install both or set optimizer.gradient_accumulation_fusion=false",
    )
    chosen_layer_spec(config.model)
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
    if config.needs_target_logits and target.check_logits:
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
    if config.target.check_logits and not config.needs_target_logits:
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
