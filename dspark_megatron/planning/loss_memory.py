"""What the head loss takes at its highest, by formula: bytes of a rank.

Shapes: n supervised slots, h hidden, r Markov rank, v/tp vocabulary entries of this rank.
"""

from dataclasses import dataclass

import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.ops.chunk_budget import chunk_rows, row_bytes, tile_rows

FP32 = 4
TILES = 3
"""p, q and one more, of each tile of logits that `logit_terms` goes through."""
FUSED = 2
"""p and q of a whole chunk, which the compiled passes keep: measured on a GPU."""


@dataclass(frozen=True)
class HeadLossSize:
    """What one call of the head loss depends on."""

    rows: int
    hidden_size: int
    markov_rank: int
    vocab_local: int
    dtype: torch.dtype
    device: torch.device


def head_loss_parts(loss: LossConfig, size: HeadLossSize, *, with_target: bool) -> dict[str, int]:
    """What `HeadLoss` holds above its inputs at the highest moment of its two passes, by part."""
    e, columns, entries = size.dtype.itemsize, size.vocab_local, size.vocab_local * size.markov_rank
    features = 2 * e * size.rows * (size.hidden_size + size.markov_rank)
    rows = min(chunk_rows(loss, columns, size.dtype, with_target=with_target), size.rows)
    logits = rows * row_bytes(columns, size.dtype, with_target=with_target)
    elementwise = TILES * min(tile_rows(columns, size.device), rows)
    if loss.is_compiled(size.device.type):
        elementwise = FUSED * rows
    moments = [
        {
            "logits of the head loss": logits,
            "p and q in the head loss": FP32 * elementwise * columns,
        },
        {
            "logits of the head loss": logits,
            "a chunk's share of markov_w2's gradient": 0 if e == FP32 else e * entries,
        },
        {  # scaled in fp32, then cast to the weight's type
            "scaled gradient of markov_w2": FP32 * entries + (e * entries if e != FP32 else 0),
            "scaled gradient of its rows": features // 2,
        },
    ]
    return {
        "rows of the loss and their gradients": features + size.rows * (5 * FP32 + 2 * 8),
        "gradient of markov_w2 in the loss (fp32)": FP32 * entries,
        **max(moments, key=lambda parts: sum(parts.values())),
    }
