"""The one check of a run: every rule that needs no weights, before anything is loaded."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dspark_megatron.config import Config
from dspark_megatron.errors import require
from dspark_megatron.model.layer_specs import chosen_layer_spec
from dspark_megatron.ops.attention.block_attention import FLEX_HEAD_DIMS, chosen_backend
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.logit_transform import LogitTransform
from dspark_megatron.shape import DraftShape, check_special_tokens, draft_shape
from dspark_megatron.shape.layout import (
    check_batch_size,
    check_layout,
    padded_vocab_size,
    target_shards,
)
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer, stop_token_ids
from dspark_megatron.storage.target_weights import weights_fingerprint
from dspark_megatron.targets.family import (
    check_attention,
    check_decoding,
    check_pieces,
)
from dspark_megatron.targets.folder_check import check_weights_described
from dspark_megatron.targets.huggingface.quantization import check_quantization
from dspark_megatron.targets.huggingface.split import TargetSplit, check_target_split
from dspark_megatron.targets.logits import check_logits, logit_transform
from dspark_megatron.targets.megatron.source import check_gpt_target
from dspark_megatron.targets.shared_pass import PassSize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Use = Literal["train", "plan", "store_states", "evaluate"]


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed every check that needs no weights."""

    config: Config
    target_config: PretrainedConfig
    shape: DraftShape
    dp_size: int
    found_tokenizer: PreTrainedTokenizerBase | None = None
    """None: its folder has none, and the run is only planned."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.found_tokenizer is not None, "a run that is only planned reads no texts"
        return self.found_tokenizer

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
    def target_transform(self) -> LogitTransform:
        """What the target does to the product of its head."""
        return logit_transform(self.target_config)

    @property
    def target_split(self) -> TargetSplit:
        return TargetSplit.of(self.config, self.dp_size)

    @property
    def pass_size(self) -> PassSize:
        """What goes through the target together in training."""
        return PassSize.of(self.config, self.shape, self.target_dtype, dp_size=self.dp_size)

    @property
    def samples_outside_training(self) -> int:
        """Of a pass whose states no micro-batch waits for: as many as in training where the target
        is gathered for it, else a micro-batch."""
        return self.pass_size.samples if self.shards_target else self.config.train.micro_batch_size

    @property
    def shards_target(self) -> bool:
        """Whether data-parallel ranks hold parts of one copy of the target."""
        return not self.config.target.is_stored and self.target_split.lockstep

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.train.dtype]


def check(config: Config, world_size: int, *, use: Use | None = None) -> RunPlan:
    """What all uses of a target and its draft need of the settings, the target's config and its
    tokenizer, and what this use needs; ConfigError where it does not hold. A use that only plans
    does without a tokenizer where the target's folder has none."""
    target_config = load_target_config(config.target.path)
    check_family(config, target_config)
    shape = draft_shape(config.model, target_config)
    if not config.target.checkpoint:
        check_weights_described(config.target.path, target_config)
    plan = planned_layout(config, target_config, shape, world_size)
    if config.target.provider == "megatron":
        check_gpt_target(config, target_config, world_size // config.parallel.pipeline_parallel)
    _check_memory_budget(plan)
    if use != "plan" or list(Path(config.target.path).glob("tokenizer*")):
        tokenizer = load_tokenizer(config.target.path)
        stops = stop_token_ids(config.target.path, tokenizer)
        require(
            stops[-1] < shape.vocab_size,
            f"a token that ends an answer ({stops[-1]}, of config.json, generation_config.json or "
            f"the tokenizer in {config.target.path}) must be in the target's vocabulary of "
            f"{shape.vocab_size}; copy these files again",
        )
        special = {"pad": tokenizer.pad_token_id, "eos": stops}
        check_special_tokens(shape.mask_token_id, special)
        plan = replace(plan, found_tokenizer=tokenizer)
    for rule in _RULES[use] if use else ():
        rule(plan)
    return plan


def check_family(config: Config, target_config: PretrainedConfig) -> None:
    """ConfigError for a target whose family works otherwise than any use needs."""
    target = config.target
    logit_transform(target_config)
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


def planned_layout(
    config: Config, target_config: PretrainedConfig, shape: DraftShape, world_size: int
) -> RunPlan:
    """The plan without a tokenizer; ConfigError unless draft and target can be split so."""
    dp_size = check_layout(config, shape, target_config, world_size)
    plan = RunPlan(config, target_config, shape, dp_size)
    if config.target.provider == "huggingface":
        check_target_split(target_config, plan.target_split)
    return plan


def _check_memory_budget(plan: RunPlan) -> None:
    """The head loss must be able to hold a row of logits."""
    config, tp_size = plan.config, plan.config.parallel.tensor_parallel
    vocab_local = padded_vocab_size(plan.shape.vocab_size, tp_size) // tp_size
    chunk_rows(
        config.loss,
        vocab_local,
        plan.dtype,
        with_target=config.needs_target_logits,
        capped=plan.shape.logit_softcapping is not None,
    )


def _check_batch_size(plan: RunPlan) -> None:
    check_batch_size(plan.config.train, plan.dp_size)


def _check_training_device(plan: RunPlan) -> None:
    """This machine must be able to train so; other uses may still work on it."""
    config = plan.config
    has_gpu, extension = torch.cuda.is_available(), "fused_weight_gradient_mlp_cuda"
    require(
        not config.optimizer.gradient_accumulation_fusion
        or (has_gpu and importlib.util.find_spec(extension) is not None),
        f"optimizer.gradient_accumulation_fusion needs a GPU (found: {has_gpu}) and Apex's "
        f"extension {extension}; install both or set optimizer.gradient_accumulation_fusion=false",
    )
    chosen_layer_spec(config.model)
    flex, head_dim = config.model.attention_backend == "flex", plan.shape.head_dim
    require(
        has_gpu or not flex,
        "model.attention_backend 'flex' needs CUDA to train, and torch sees no GPU here: "
        "FlexAttention has no backward pass on CPUs; set model.attention_backend=sdpa",
    )
    require(
        not flex or head_dim >= FLEX_HEAD_DIMS.start,
        f"model.attention_backend 'flex' needs a head width of {FLEX_HEAD_DIMS.start} or more, and "
        f"the draft's is {head_dim}; set model.attention_backend=sdpa",
    )
    _check_compiler(config, "cuda" if has_gpu else "cpu", head_dim)


def _check_compiler(config: Config, device_type: str, head_dim: int) -> None:
    """What is compiled while a run trains needs a compiler of the machine."""
    backend = chosen_backend(config.model.attention_backend, device_type, head_dim)
    if backend != "flex" and not config.loss.is_compiled(device_type):
        return
    name, variable, default = ("C", "CC", "gcc") if device_type == "cuda" else ("C++", "CXX", "g++")
    compilers = [os.environ.get(variable, default), "clang" if name == "C" else "clang++"]
    require(
        any(map(shutil.which, compilers)),
        f"FlexAttention and loss.compile need a {name} compiler on this machine "
        f"({' or '.join(compilers)}), and there is none on the path; install one, or set "
        "model.attention_backend=sdpa and loss.compile=false",
    )


def _check_quantization(plan: RunPlan) -> None:
    """This machine must be able to run the target as it is saved, unless its states are stored."""
    if not plan.config.target.is_stored:
        check_quantization(plan.target_config, plan.target_split)


def _check_decoding(plan: RunPlan) -> None:
    """The target must make states of sequences that go on, and take drafts of so many of them
    back."""
    config = plan.config
    if config.target.check_logits and not config.needs_target_logits:
        check_logits(plan.target_config)
    if config.target.provider == "huggingface":
        check_decoding(plan.target_config, config.evaluate.batch_size)
    stages = config.parallel.pipeline_parallel
    require(
        stages == 1,
        f"parallel.pipeline_parallel ({stages}) must be 1 to decode: stages would wait for each "
        "other at every token; set parallel.pipeline_parallel=1 with more tensor parallelism, or "
        "target.provider=huggingface. Estimates in training (evaluate.every) do run in stages",
    )


def _check_own_target(plan: RunPlan) -> None:
    """A data-parallel rank must decode without the others."""
    config, parallel = plan.config, plan.config.parallel
    require(
        target_shards(config.target, plan.dp_size) == 1,
        "evaluation decodes other prompts on each data-parallel rank, so these cannot share a copy "
        "of the target; set target.shard_across_data_parallel=1, with more tensor parallelism "
        "where the target does not fit",
    )
    tp, ep = parallel.tensor_parallel, parallel.expert_parallel
    require(
        config.target.provider != "megatron" or ep <= tp,
        "evaluation decodes other prompts on each data-parallel rank, so these cannot share "
        f"experts: parallel.expert_parallel ({ep}) must be at most parallel.tensor_parallel ({tp})",
    )


_RULES: dict[Use, tuple[Callable[[RunPlan], None], ...]] = {
    "train": (_check_batch_size, _check_training_device, _check_quantization),
    "plan": (_check_batch_size,),
    "store_states": (_check_quantization,),
    "evaluate": (_check_decoding, _check_quantization, _check_own_target),
}
"""What a use needs beyond the rest, in the order of the checks."""
