"""Which checkpoint a result is of, said so that it still holds when the run is moved or renamed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_megatron.storage.checksums import CHECKSUMS

_TAIL = 3
"""Last parts of a path that are compared without digests: run, `checkpoints` and checkpoint."""


@dataclass(frozen=True)
class NamedCheckpoint:
    """An `iter_*` folder, here or where it was when a result was written."""

    path: str
    digest: str | None
    """Of the checksums of all its files. None where an older version wrote the folder or the
    result."""

    @classmethod
    def at(cls, folder: Path) -> "NamedCheckpoint":
        file = folder / CHECKSUMS
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None
        return cls(str(folder), digest)

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> "NamedCheckpoint | None":
        """What a result says of itself; None where it names none."""
        path, digest = facts.get("checkpoint"), facts.get("checkpoint_digest")
        if path is None:
            return None
        return cls(str(path), digest if isinstance(digest, str) else None)

    def facts(self) -> dict[str, Any]:
        return {"checkpoint": self.path, "checkpoint_digest": self.digest}

    def is_same(self, other: "NamedCheckpoint") -> bool:
        """By the digests, or by the names of run and checkpoint where one has none."""
        if self.digest and other.digest:
            return self.digest == other.digest
        first, second = Path(self.path).parts, Path(other.path).parts
        tail = min(_TAIL, len(first), len(second))
        return first[-tail:] == second[-tail:]


def is_same_checkpoint(first: NamedCheckpoint | None, second: NamedCheckpoint | None) -> bool:
    """Also where neither names one: both are of the untrained draft."""
    if first is None or second is None:
        return first is second
    return first.is_same(second)
