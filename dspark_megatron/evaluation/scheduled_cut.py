"""The prefix scheduler in real decoding: how much of each draft the decoder verifies.

Shapes: b sequences under way, k slots.
"""

from collections import deque

import torch
from torch import Tensor

from dspark_megatron.evaluation.sps_table import SpsTable, sps_of_step
from dspark_megatron.ops.prefix_scheduler import (
    early_stopping_lengths,
    global_budget,
    lengths_for_budget,
)

LAG = 2
"""Steps by which the confidences that decide a budget are older than its drafts, as in SGLang."""


class ScheduledCut:
    """A `Cut` of the decoder; both schedulers keep decoding lossless (ops/prefix_scheduler.py)."""

    def __init__(
        self, scheduler: str, table: SpsTable, block_size: int, temperatures: list[float] | None
    ) -> None:
        """scheduler: `early_stopping` or `lagged_budget`. temperatures: of the confidence head by
        slot; None takes the confidence as it is."""
        self._early = scheduler == "early_stopping"
        self._table, self._block_size = table, block_size
        self._temperatures = torch.tensor(temperatures or [1.0] * block_size)
        self._earlier: deque[Tensor] = deque(maxlen=LAG)
        self._sps: dict[int, Tensor] = {}

    def __call__(self, confidence_logits: Tensor) -> Tensor:
        """[b, k] -> [b] int64 in 0..k; called once a step."""
        confidence = (confidence_logits.cpu() / self._temperatures).sigmoid()
        if self._early:
            lengths = early_stopping_lengths(confidence, self._of(len(confidence)))
        else:
            lengths = lengths_for_budget(confidence, self._budget(confidence))
        return lengths.to(confidence_logits.device)

    def _budget(self, confidence: Tensor) -> Tensor:
        """Slots of this step by an earlier step's confidences; the first steps count every slot as
        certain. The number of sequences may have changed since: each gets its share."""
        full = len(self._earlier) == LAG
        known = self._earlier[0] if full else torch.ones_like(confidence)
        self._earlier.append(confidence)
        budget = global_budget(known, self._of(len(known)))
        return budget * len(confidence) // len(known)

    def _of(self, sequences: int) -> Tensor:
        """Steps per second [b*k + 1] of a step of so many sequences."""
        if sequences not in self._sps:
            self._sps[sequences] = sps_of_step(self._table, sequences, self._block_size)
        return self._sps[sequences]
