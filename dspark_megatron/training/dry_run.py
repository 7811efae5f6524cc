"""What a run would be: resolved config, layout, parameters and memory of a rank."""

import math
from pathlib import Path

import torch

from dspark_megatron.config import Config
from dspark_megatron.conversion.megatron_checkpoint import latest_iteration
from dspark_megatron.conversion.names import hugging_face_shapes, megatron_shapes, name_table
from dspark_megatron.ops.chunk_budget import chunk_rows, row_bytes
from dspark_megatron.shape import (
    DraftShape,
    check_batch_size,
    padded_vocab_size,
)
from dspark_megatron.targets.footprint import target_bytes
from dspark_megatron.targets.quantization import quantization_method
from dspark_megatron.training.initial_weights import InitialWeights
from dspark_megatron.training.setup import DTYPES, RunPlan, check_run


def describe_run(config: Config, world_size: int) -> str:
    """The text of `--dry-run`. Raises ConfigError where the run would, as far as that needs
    neither weights nor data nor the run's machine."""
    plan = check_run(config, world_size, needs_tokenizer=False)
    check_batch_size(config.train, plan.dp_size)
    checkpoints = Path(config.train.output_dir) / "checkpoints"
    if not config.train.resume or latest_iteration(checkpoints) is None:
        InitialWeights.open(plan)
    tp = config.parallel.tensor_parallel
    trained = hugging_face_shapes(plan.shape, shared_weights=False)
    total = sum(math.prod(size) for size in trained.values())
    lines = [
        config.to_yaml(),
        f"layout: {world_size} ranks = {tp} tensor-parallel x {plan.dp_size} data-parallel",
        f"draft: {total:,} trained parameters, {_local_parameters(plan.shape, tp):,} on a rank",
        "memory of a rank, GiB (weights and states; activations of the backbone come on top):",
    ]
    saved = plan.target_config.dtype or torch.float32  # what `auto` takes
    target_dtype = saved if config.target.dtype == "auto" else getattr(torch, config.target.dtype)
    memory = rank_memory(plan, target_dtype)
    lines += [f"  {part:<34}{size / 2**30:9.3f}" for part, size in memory.items()]
    lines.append(f"  {'sum':<34}{sum(memory.values()) / 2**30:9.3f}")
    lines += _quantization_note(plan, target_dtype, counted="frozen target" in memory)
    if plan.tokenizer is None:
        lines.append(f"not checked: the tokenizer, since {config.target.path} has none")
    return "\n".join(lines)


def rank_memory(plan: RunPlan, target_dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a rank by part; without the target where its quantized size is not known."""
    config, shape, dp_size = plan.config, plan.shape, plan.dp_size
    tp = config.parallel.tensor_parallel
    size = DTYPES[config.train.dtype].itemsize
    local = _local_parameters(shape, tp)
    vocab = padded_vocab_size(shape.vocab_size, tp) // tp
    tokens = config.train.micro_batch_size * config.data.max_length
    features = (len(shape.target_layer_ids) + 1) * shape.hidden_size
    target_size = target_dtype.itemsize
    shards = dp_size if config.optimizer.use_distributed_optimizer else 1
    states = 3 if size == 2 else 2  # fp32 main weights, where the weights are not fp32 themselves
    target = _target_bytes(plan, target_dtype)
    return {
        **({} if target is None else {"frozen target": target}),
        "frozen embedding and head": vocab * (2 * shape.hidden_size + shape.markov_rank) * size,
        "draft weights": local * size,
        "draft gradients (fp32)": local * 4,
        "optimizer state (fp32)": states * local * 4 // shards,
        "target states of a micro-batch": tokens * features * target_size,
        "logits of the head loss": _logits(config, vocab),
        "gradient of markov_w2 in the loss": 2 * vocab * shape.markov_rank * 4,
    }


def _logits(config: Config, vocab_local: int) -> int:
    """Bytes of the logits that exist at one time."""
    dtype, with_teacher = DTYPES[config.train.dtype], config.needs_teacher
    rows = chunk_rows(config.loss, vocab_local, dtype, with_teacher=with_teacher)
    return rows * row_bytes(vocab_local, dtype, with_teacher=with_teacher)


def _target_bytes(plan: RunPlan, dtype: torch.dtype, *, dequantized: bool = False) -> int | None:
    last_tap = max(plan.shape.target_layer_ids)
    return target_bytes(
        plan.target_config,
        dtype,
        plan.target_split,
        last_layer=None if plan.config.needs_teacher else last_tap,
        dequantized=dequantized,
    )


def _quantization_note(plan: RunPlan, dtype: torch.dtype, *, counted: bool) -> list[str]:
    method = quantization_method(plan.target_config)
    if method is None:
        return []
    how = "counted as it is saved" if counted else "not counted"
    whole = _target_bytes(plan, dtype, dequantized=True) / 2**30
    return [
        f"the target is quantized ({method}), and {how}; where Transformers dequantizes it, for "
        f"want of a GPU or a kernel, it takes {whole:.3f} GiB"
    ]


def _local_parameters(shape: DraftShape, tp: int) -> int:
    """Trained parameters of one tensor-parallel rank, vocabulary padding included."""
    sizes = megatron_shapes(shape, padded_vocab_size(shape.vocab_size, tp))
    return sum(
        math.prod(sizes[row.megatron]) // (1 if row.split is None else tp)
        for row in name_table(shape)
    )
