"""Where the kept samples come from, for messages: 8 bytes a sample."""

from array import array
from bisect import bisect_right
from pathlib import Path


class Origins:
    """File and line by sample."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._starts: list[int] = []
        """The first sample of each file."""
        self._lines = array("q")

    def start_file(self, path: Path) -> None:
        self._files.append(path)
        self._starts.append(len(self._lines))

    def add(self, line: int) -> None:
        """The next sample's line, or its document in an indexed dataset."""
        self._lines.append(line)

    def __getitem__(self, sample: int) -> tuple[Path, int]:
        """IndexError for a sample that is not there."""
        line = self._lines[sample]
        return self._files[bisect_right(self._starts, sample) - 1], line
