"""Where the kept samples come from, for messages: 8 bytes a sample."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy


class Origins:
    """File and line by sample."""

    def __init__(self, files: Sequence[Path], starts: Sequence[int], lines: numpy.ndarray) -> None:
        """starts: the first sample of each file. lines: [n] int64, each sample's line, or its
        document in an indexed dataset."""
        self._files, self._starts, self._lines = files, starts, lines

    def __getitem__(self, sample: int) -> tuple[Path, int]:
        """IndexError for a sample that is not there."""
        line = int(self._lines[sample])
        return self._files[bisect_right(self._starts, sample) - 1], line
