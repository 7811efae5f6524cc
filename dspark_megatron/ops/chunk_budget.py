"""How many rows of logits fit a memory budget, and how a run of chunks is cut."""

import torch

from dspark_megatron.config import LossConfig, require


def lanes_of(tp_size: int) -> int:
    """Chunks under way at a time: two when there are other ranks to wait for."""
    return 2 if tp_size > 1 else 1


def row_bytes(vocab_local: int, dtype: torch.dtype, *, with_teacher: bool) -> int:
    """Bytes of logits for each row: the draft's and the target's."""
    return vocab_local * dtype.itemsize * (1 + with_teacher)


def chunk_rows(
    loss: LossConfig, vocab_local: int, dtype: torch.dtype, *, with_teacher: bool
) -> int:
    """`loss.chunk_rows`, or what `loss.memory_budget_mb` holds: a multiple of 64 where that many
    fit, as matrix products like it. Raises ConfigError when it does not hold one row."""
    if loss.chunk_rows is not None:
        return loss.chunk_rows
    one = row_bytes(vocab_local, dtype, with_teacher=with_teacher)
    rows = loss.memory_budget_mb * 2**20 // one
    require(
        rows >= 1,
        f"loss.memory_budget_mb ({loss.memory_budget_mb}) must hold the logits of one row: "
        f"{one / 2**20:.1f} MiB for {vocab_local} vocabulary entries a rank",
    )
    return rows if rows < 64 else rows // 64 * 64


def tail_padding(rows: int, chunk_rows: int) -> int:
    """Rows that the last chunk is short of a power of two, or of a whole chunk: compiled code is
    made for each shape, and so there are few."""
    tail = rows % chunk_rows
    if not tail:
        return 0
    return min(1 << (tail - 1).bit_length(), chunk_rows) - tail


def tile_rows(columns: int, device: torch.device) -> int:
    """Rows that elementwise passes take at a time: on a CPU as many as stay in a core's cache, on
    a GPU, where each step is a kernel, as many as make it worth launching."""
    tile_bytes = 2**20 if device.type == "cpu" else 2**24
    return max(1, tile_bytes // (4 * columns))
