"""How draft and target are split over ranks, and every rule of it."""

import math
from typing import Any

from dspark_megatron.config import Config, TargetConfig, TrainConfig
from dspark_megatron.config.rules import MOST
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape import DraftShape, has_latent_attention, layer_values


def check_layout(config: Config, shape: DraftShape, target_config: Any, world_size: int) -> int:
    """Check the splits of draft and target; returns the draft's data-parallel size."""
    tp, text = config.parallel.tensor_parallel, target_config.get_text_config()
    _check_stages(text.num_hidden_layers, config.parallel.pipeline_parallel, world_size, tp)
    require(
        world_size % tp == 0,
        f"world size ({world_size}) must be divisible by parallel.tensor_parallel ({tp}); "
        f"launch a multiple of {tp} processes",
    )
    splits = _draft_splits(shape)
    if not config.target.is_stored:  # else no rank has the target
        splits |= _target_splits(config.target, text)
        target_shards(config.target, world_size // tp)
    _check_splits(splits, tp, world_size, shape.num_key_value_heads)
    _check_vocabulary(shape, tp)
    return world_size // tp


def _target_splits(target: TargetConfig, text: Any) -> dict[str, int]:
    heads = layer_values(text, "num_attention_heads")
    splits = {"the target's query heads": math.gcd(*heads)} if heads else {}
    # Megatron-Core splits a key/value head where there are more ranks.
    if heads and not has_latent_attention(text) and target.provider != "megatron":
        kv_heads = layer_values(text, "num_key_value_heads") or heads
        splits["the target's key/value heads"] = math.gcd(*kv_heads)
    return splits


def _check_stages(num_layers: int, stages: int, world_size: int, tp: int) -> None:
    if stages == 1:
        return
    good = [n for n in range(1, num_layers + 1) if stage_layers(num_layers, n)[-1] > 0]
    require(
        stages in good,
        f"parallel.pipeline_parallel ({stages}) leaves the last stage without any of the target's "
        f"{num_layers} layers, {-(-num_layers // stages)} in each stage before; sizes that work "
        f"here: {good}",
    )
    require(
        world_size % (tp * stages) == 0,
        f"world size ({world_size}) must be divisible by parallel.tensor_parallel ({tp}) x "
        f"parallel.pipeline_parallel ({stages}); launch a multiple of {tp * stages} processes",
    )


def stage_layers(num_layers: int, stages: int) -> list[int]:
    """Consecutive layers of each pipeline stage: equally many, but for the last, which has what is
    left."""
    most = -(-num_layers // stages)
    return [most] * (stages - 1) + [num_layers - most * (stages - 1)]


def target_shards(target: TargetConfig, dp_size: int) -> int:
    """Data-parallel ranks that share a copy of the target; ConfigError if they cannot."""
    shards = target.shard_across_data_parallel or dp_size
    good = [n for n in range(1, dp_size + 1) if dp_size % n == 0]
    require(
        shards in good,
        f"target.shard_across_data_parallel ({shards}) must divide the data-parallel size "
        f"({dp_size}); sizes that work here: {good}",
    )
    return shards


def check_draft_split(shape: DraftShape, tp: int) -> None:
    """Check that a draft alone can be split over tp ranks."""
    most = MOST["parallel.tensor_parallel"]
    require(1 <= tp <= most, f"the tensor-parallel size ({tp}) must be from 1 to {most:,}")
    _check_splits(_draft_splits(shape), tp, max(tp, 64), shape.num_key_value_heads)
    _check_vocabulary(shape, tp)


def _draft_splits(shape: DraftShape) -> dict[str, int]:
    return {
        "query heads": shape.num_attention_heads,
        "key/value heads": shape.num_key_value_heads,
        "rows of keys": shape.num_key_value_heads * shape.head_dim,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "hidden_size": shape.hidden_size,
    }


def _check_splits(splits: dict[str, int], tp: int, most: int, kv_heads: int) -> None:
    """kv_heads: of the draft. Where there are fewer of them than ranks, ranks share them."""
    shared = "key/value heads"

    def bad(n: int) -> list[str]:
        uneven = [name for name, size in splits.items() if size % n]
        return [name for name in uneven if name != shared or n % kv_heads]

    if names := bad(tp):
        numbers = ", ".join(f"{name} ({splits[name]})" for name in names)
        good = [n for n in range(1, most + 1) if not bad(n)]
        raise ConfigError(
            f"{numbers} must be divisible by parallel.tensor_parallel ({tp})"
            f"{', or key/value heads divide it' * (shared in names)}; "
            f"sizes that work here: {good}"
        )


def _check_vocabulary(shape: DraftShape, tp: int) -> None:
    per_rank = padded_vocab_size(shape.vocab_size, tp) // tp
    require(
        per_rank * (tp - 1) < shape.vocab_size,
        f"the vocabulary ({shape.vocab_size}) leaves a rank without an entry at "
        f"parallel.tensor_parallel ({tp}), {per_rank} entries a rank; use fewer ranks",
    )


def check_batch_size(train: TrainConfig, dp_size: int) -> None:
    """A step must split evenly into micro-batches of all data-parallel ranks."""
    step = train.micro_batch_size * dp_size
    near = max(1, round(train.global_batch_size / step)) * step
    require(
        train.global_batch_size % step == 0,
        f"train.global_batch_size ({train.global_batch_size}) must be divisible by "
        f"train.micro_batch_size ({train.micro_batch_size}) x data-parallel size ({dp_size}) "
        f"= {step}; the nearest that works is {near}",
    )


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Smallest multiple of `tp_size` that holds the vocabulary; the padding is masked out."""
    return -(-vocab_size // tp_size) * tp_size
