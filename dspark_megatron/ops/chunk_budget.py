"""How many rows of logits exist at a time: chunks within a budget of memory, and tiles of a chunk
for what is done to each logit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.errors import require


def row_bytes(
    vocab_local: int, dtype: torch.dtype, *, with_target: bool, capped: bool = False
) -> int:
    """Bytes of logits for each row: the draft's, the target's, and the draft's before the Markov
    bias where these are capped."""
    return vocab_local * dtype.itemsize * (1 + with_target + capped)


def chunk_rows(
    loss: LossConfig,
    vocab_local: int,
    dtype: torch.dtype,
    *,
    with_target: bool,
    capped: bool = False,
) -> int:
    """`loss.chunk_rows`, or what `loss.memory_budget_mb` holds: a multiple of 128 where that many
    fit, as matrix products like it. capped: whether the draft's logits are. Raises ConfigError when
    it does not hold one row."""
    if loss.chunk_rows is not None:
        return loss.chunk_rows
    one = row_bytes(vocab_local, dtype, with_target=with_target, capped=capped)
    rows = loss.memory_budget_mb * 2**20 // one
    require(
        rows >= 1,
        f"loss.memory_budget_mb ({loss.memory_budget_mb}) must hold the logits of one row: "
        f"{one / 2**20:.1f} MiB for {vocab_local} vocabulary entries a rank",
    )
    return rows if rows < 128 else rows // 128 * 128


def tile_rows(columns: int, device: torch.device) -> int:
    """Rows that elementwise passes take at a time: on a CPU as many as stay in a core's cache, on
    a GPU, where each step is a kernel, as many as make it worth launching."""
    tile_bytes = 2**21 if device.type == "cpu" else 2**27
    return max(1, tile_bytes // (4 * columns))


def in_tiles(function: Callable) -> Callable:
    """`function` on a few rows of its tensors at a time, its results [..., c] put together: bounds
    what it takes, and keeps that in the cache. Its first argument: logits [c, v/tp]."""

    def run(logits: Tensor, *rest: Any) -> Any:
        parts = []
        tile = tile_rows(logits.shape[1], logits.device)
        for start in range(0, len(logits), tile):
            rows = slice(start, start + tile)
            own = (x[rows] if isinstance(x, Tensor) else x for x in rest)
            parts.append(function(logits[rows], *own))
        return None if parts[0] is None else torch.cat(parts, dim=-1)

    return run
