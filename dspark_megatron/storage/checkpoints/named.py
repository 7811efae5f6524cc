"""Which checkpoint a result is of, said so that it still holds when the run is moved or renamed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_megatron.config.evaluate import Weights
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
    weights: Weights = "trained"
    """Which of its weights the result is of."""

    @classmethod
    def at(cls, folder: Path, weights: Weights = "trained") -> "NamedCheckpoint":
        file = folder / CHECKSUMS
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None
        return cls(str(folder), digest, weights)

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> "NamedCheckpoint | None":
        """What a result says of itself; None where it names none."""
        path, digest = facts.get("checkpoint"), facts.get("checkpoint_digest")
        if path is None:
            return None
        weights: Weights = "ema" if facts.get("weights") == "ema" else "trained"
        return cls(str(path), digest if isinstance(digest, str) else None, weights)

    def facts(self) -> dict[str, Any]:
        """What `of_facts` reads. Trained weights are not named, as in older results."""
        facts = {"checkpoint": self.path, "checkpoint_digest": self.digest}
        return facts if self.weights == "trained" else {**facts, "weights": self.weights}

    def describe(self) -> str:
        return self.path if self.weights == "trained" else f"the moving average in {self.path}"

    def is_same(self, other: "NamedCheckpoint") -> bool:
        """The same weights, by the digests, or by the names of run and checkpoint where one has
        none."""
        if self.weights != other.weights:
            return False
        if self.digest and other.digest:
            return self.digest == other.digest
        first, second = Path(self.path).parts, Path(other.path).parts
        tail = min(_TAIL, len(first), len(second))
        return first[-tail:] == second[-tail:]


def checkpoint_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its checkpoint, for another that is made of it."""
    named = NamedCheckpoint.of_facts(facts)
    return named.facts() if named else {"checkpoint": None, "checkpoint_digest": None}


def is_same_checkpoint(first: NamedCheckpoint | None, second: NamedCheckpoint | None) -> bool:
    """Also where neither names one: both are of the untrained draft."""
    if first is None or second is None:
        return first is second
    return first.is_same(second)
