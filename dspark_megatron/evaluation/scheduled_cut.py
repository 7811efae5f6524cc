"""The prefix scheduler in real decoding: how much of each draft the decoder verifies.

Shapes: b sequences under way, k slots.
"""

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from dspark_megatron.evaluation.confidence.temperature_scaling import confidence
from dspark_megatron.evaluation.serving.settings import LAG
from dspark_megatron.evaluation.serving.sps_table import SpsTable, sps_of_step
from dspark_megatron.evaluation.serving.verify_policies import LaggedBudget
from dspark_megatron.ops.prefix_scheduler import early_stopping_lengths


class ScheduledCut:
    """A `Cut` of the decoder; both schedulers keep decoding lossless (ops/prefix_scheduler.py)."""

    def __init__(
        self,
        scheduler: str,
        table: SpsTable,
        num_draft_tokens: int,
        temperatures: list[float] | None,
    ) -> None:
        """scheduler: `early_stopping` or `lagged_budget`. temperatures: of the confidence head by
        slot; None takes the confidence as it is."""
        self._temperatures = temperatures or [1.0] * num_draft_tokens
        self._sps_of = lru_cache(lambda sequences: sps_of_step(table, sequences, num_draft_tokens))
        self._lengths: Callable[[Tensor], Tensor] = self._early_stopping
        if scheduler == "lagged_budget":
            self._lengths = LaggedBudget(self._sps_of, LAG)

    def __call__(self, confidence_logits: Tensor) -> Tensor:
        """[b, k] -> [b] int64 in 0..k; called once a step."""
        lengths = self._lengths(confidence(confidence_logits.cpu(), self._temperatures))
        return lengths.to(confidence_logits.device)

    def _early_stopping(self, confidences: Tensor) -> Tensor:
        return early_stopping_lengths(confidences, self._sps_of(len(confidences)))
