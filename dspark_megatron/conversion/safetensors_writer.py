"""A stream of tensors as safetensors: one file, or shards with an index; one shard in memory."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark_megatron.config import require


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    sizes: dict[str, int],
    max_shard_size: int,
) -> None:
    """Write a stream of tensors as one file, or as shards of at most max_shard_size bytes (more
    only for a single larger tensor) with an index. sizes: bytes of each tensor, in the order they
    will come."""
    shard_of = _plan_shards(sizes, max_shard_size)
    count = max(shard_of.values()) + 1
    file_names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    expected = Counter(shard_of.values())
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        # A copy of its own: safetensors refuses tensors that share memory.
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        if len(shard) == expected[shard_of[name]]:
            save_file(shard, folder / file_names[shard_of[name]], metadata={"format": "pt"})
            shard = {}
    if count > 1:
        weight_map = {name: file_names[shard_of[name]] for name in sorted(shard_of)}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Bytes of `5GB` (decimal), `5GiB` (binary) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(size).strip().upper())
    require(
        match is not None and float(match[1]) > 0,
        f"max_shard_size ({size!r}) must be a positive size such as 5GB or 500MB",
    )
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def _plan_shards(sizes: dict[str, int], max_shard_size: int) -> dict[str, int]:
    shard, used, plan = 0, 0, {}
    for name, size in sizes.items():
        if used and used + size > max_shard_size:
            shard, used = shard + 1, 0
        plan[name] = shard
        used += size
    return plan
