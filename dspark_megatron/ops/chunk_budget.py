"""How many rows of logits fit a memory budget, and how a run of chunks is cut."""

import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.errors import require


def lanes_of(tp_size: int, chunk_rows: int) -> int:
    """Chunks under way at a time, which share `chunk_rows`: two when there are other ranks to wait
    for."""
    return 2 if tp_size > 1 and chunk_rows > 1 else 1


def row_bytes(vocab_local: int, dtype: torch.dtype, *, with_target: bool) -> int:
    """Bytes of logits for each row: the draft's and the target's."""
    return vocab_local * dtype.itemsize * (1 + with_target)


def chunk_rows(loss: LossConfig, vocab_local: int, dtype: torch.dtype, *, with_target: bool) -> int:
    """`loss.chunk_rows`, or what `loss.memory_budget_mb` holds: a multiple of 128 where that many
    fit, as matrix products like it, also of half of them. Raises ConfigError when it does not hold
    one row."""
    if loss.chunk_rows is not None:
        return loss.chunk_rows
    one = row_bytes(vocab_local, dtype, with_target=with_target)
    rows = loss.memory_budget_mb * 2**20 // one
    require(
        rows >= 1,
        f"loss.memory_budget_mb ({loss.memory_budget_mb}) must hold the logits of one row: "
        f"{one / 2**20:.1f} MiB for {vocab_local} vocabulary entries a rank",
    )
    return rows if rows < 128 else rows // 128 * 128


def bucket(rows: int, chunk_rows: int) -> int:
    """Rows that a chunk of compiled passes is padded to: `chunk_rows`, or a power of two below it.
    Code is made for each size it meets, so there are six at most, and torch's limit is eight."""
    smallest = max(64, chunk_rows // 32)
    return min(1 << (max(rows, smallest) - 1).bit_length(), chunk_rows)


def tile_rows(columns: int, device: torch.device) -> int:
    """Rows that elementwise passes take at a time: on a CPU as many as stay in a core's cache, on
    a GPU, where each step is a kernel, as many as make it worth launching."""
    tile_bytes = 2**21 if device.type == "cpu" else 2**24
    return max(1, tile_bytes // (4 * columns))
