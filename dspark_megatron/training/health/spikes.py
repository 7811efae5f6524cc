"""Jumps of the loss and of the gradient norm, marked and nothing more."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

NAMES = ("loss", "grad_norm")
WINDOW, LEAST = 20, 10
"""Logged values that a new one is compared with; fewer than the second tell nothing, and in more of
them the fall of the loss at the start of a run would hide jumps."""
_DEVIATIONS, _SHARE = 6.0, 0.2


class Spikes:
    """Compares with the median of the values logged before, which a spike hardly moves."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        """rows: those logged before this start."""
        self._values: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in NAMES}
        for row in rows:
            self.found(row)

    def found(self, row: dict[str, Any]) -> list[str]:
        """Which of NAMES are spikes in this row, which is the next to be compared with."""
        shown = {name: row.get(name) for name in NAMES}
        values = {k: v for k, v in shown.items() if v is not None and math.isfinite(v)}
        spikes = [name for name, value in values.items() if self._is_spike(name, value)]
        for name, value in values.items():
            self._values[name].append(value)
        return spikes

    def _is_spike(self, name: str, value: float) -> bool:
        """Whether it is 6 standard deviations, by the median deviation, and a fifth above the
        median."""
        known = self._values[name]
        if len(known) < LEAST:
            return False
        middle = median(known)
        deviation = 1.4826 * median(abs(one - middle) for one in known)
        return value > middle + max(_DEVIATIONS * deviation, _SHARE * middle)
