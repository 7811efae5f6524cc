"""What a confidence threshold would have verified: each draft is cut at the first slot whose
confidence is below it (paper Figure 5).

Shapes: n rounds, k slots.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dspark_megatron.evaluation.confidence.temperature_scaling import confidence
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.serving.verify_policies import threshold_lengths

THRESHOLDS = tuple(i / 20 for i in range(21))


def threshold_sweep(
    records: DraftRecords,
    temperatures: Sequence[float],
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, list[Any]]:
    """Sums over all rounds by threshold. A figure with nothing to count is null.

    `verified_tokens`: draft tokens that the target judges; the anchor, one more token of every
    round, is not counted. `acceptance`: share of them that it keeps. `tau`: tokens gained in a
    round, the target's own included.

    The rounds are those of whole drafts. Shorter drafts would have their rounds at other places.
    """
    per_slot = confidence(records.confidence_logits, temperatures)
    rows = [_row(records, per_slot, threshold) for threshold in thresholds]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _row(records: DraftRecords, per_slot: Tensor, threshold: float) -> dict[str, Any]:
    """per_slot [n, k]: confidence."""
    length = threshold_lengths(per_slot, threshold)  # [n]
    verified = length.minimum(records.proposed)
    accepted = length.minimum(records.accepted)
    # The target adds no token where an accepted stop token, the last that was judged, ends it.
    stops = (records.accepted == records.proposed) & (records.proposed < records.num_draft_tokens)
    gained = accepted + ~(stops & (length >= records.proposed))
    total = int(verified.sum())
    return {
        "threshold": threshold,
        "verified_tokens": total,
        "accepted_tokens": int(accepted.sum()),
        "rejected_tokens": total - int(accepted.sum()),
        "acceptance": int(accepted.sum()) / total if total else None,
        "tau": int(gained.sum()) / len(records),
    }
