"""Whether two nodes have the same large files, without reading terabytes on each."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from dspark_megatron.data.files.opening import file_errors

_PIECE = 2**16
_OF_A_FILE, _OF_ALL = 2**26, 2**30


def pieces_text(files: list[Path]) -> str:
    """Name, size and digest of each. Of large files pieces are read, evenly spread from the first
    byte to the last: 64 MiB of each and 1 GiB of all, at most. Smaller ones are read in full.
    ConfigError for one that cannot be read."""
    budget = min(_OF_A_FILE, _OF_ALL // max(1, len(files)))
    return ", ".join(f"{file.name} {file.stat().st_size} {_digest(file, budget)}" for file in files)


def _digest(file: Path, budget: int) -> str:
    found = hashlib.sha256()
    with file_errors(file), file.open("rb") as opened:
        for start in _starts(file.stat().st_size, budget):
            opened.seek(start)
            found.update(opened.read(_PIECE))
    return found.hexdigest()[:12]


def _starts(size: int, budget: int) -> Iterator[int]:
    """Where pieces begin."""
    if size <= budget:
        yield from range(0, size, _PIECE)
        return
    count, last = max(2, budget // _PIECE), size - _PIECE
    yield from (last * i // (count - 1) for i in range(count))
