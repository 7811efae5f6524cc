"""Lines that cannot be used, by reason, and whether a run may continue without them."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dspark_megatron.data.files.jsonl import errors_at
from dspark_megatron.errors import ConfigError

VALUES = r"""(?<!\w)'[^']*'|(?<=: )"[^"]*"|\([^)]*\)|\d+"""
"""The parts in which errors of one kind differ: quoted texts, brackets and numbers."""
MOST_WITHOUT_SKIPPING = 1000
"""After so many bad lines a file is not read to its end, if none may be left out."""
SHOWN_PLACES = 4
"""How many lines of one reason are named."""
SHOWN_REASONS = 20


class NoFurther(Exception):
    """What no other line would pass either, or not in bounded time: it is not left out like a bad
    line, but ends the reading."""


@dataclass
class Reason:
    example: str
    """The error of the first line, with its place."""
    count: int = 0
    places: list[str] = field(default_factory=list)
    """The first few lines."""

    def add(self, place: str) -> None:
        self.count += 1
        if self.count <= SHOWN_PLACES:
            self.places.append(place)

    def describe(self) -> str:
        also, more = ", ".join(self.places[1:]), ", ..." if self.count > SHOWN_PLACES else ""
        others = f" (also {also}{more})" if also else ""
        return f"{self.count:,} x {self.example}{others}"


class BadLines:
    """What was wrong with lines. Errors that differ only in values have one reason."""

    def __init__(self) -> None:
        self._reasons: dict[str, Reason] = {}

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return {kind: asdict(reason) for kind, reason in self._reasons.items()}

    @classmethod
    def of(cls, content: dict[str, Any]) -> "BadLines":
        """From its JSON. TypeError for anything else."""
        found = cls()
        found._reasons = {kind: Reason(**reason) for kind, reason in content.items()}
        return found

    def __len__(self) -> int:
        return sum(reason.count for reason in self._reasons.values())

    @contextmanager
    def at(self, path: str | Path, number: int) -> Iterator[None]:
        """Keeps a ConfigError that is raised inside, with its place."""
        try:
            with errors_at(path, number):
                yield
        except NoFurther as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        except ConfigError as error:
            kind = re.sub(VALUES, "", str(error.__cause__))[:60]
            self._reasons.setdefault(kind, Reason(str(error))).add(f"{path}:{number}")

    def describe(self) -> str:
        """A line for each reason, the most frequent first."""
        ordered = sorted(self._reasons.values(), key=lambda reason: -reason.count)
        lines = [reason.describe() for reason in ordered[:SHOWN_REASONS]]
        if rest := ordered[SHOWN_REASONS:]:
            count = sum(reason.count for reason in rest)
            lines.append(f"{count:,} x for {len(rest):,} further reasons")
        return "\n".join(lines)

    def check_early(self, lines: int, allowed: float) -> None:
        """`check`, but only once there are so many that the rest of the data does not matter."""
        if allowed == 0 and len(self) >= MOST_WITHOUT_SKIPPING:
            self.check(lines, allowed)

    def check(self, lines: int, allowed: float | None) -> None:
        """ConfigError, with every reason, if more than the allowed share of the lines is bad. None:
        no line may be bad, and there is no setting that would allow it."""
        if len(self) <= (allowed or 0) * lines:
            return
        way_out = "mend or remove them"
        if allowed is not None:
            needed = math.ceil(1e4 * len(self) / lines) / 1e4
            way_out += (
                f", or raise data.skip_bad_lines ({allowed:g}), the share of lines that may be "
                f"left out, to {needed:g}"
            )
        if len(self) == 1:
            [reason] = self._reasons.values()
            raise ConfigError(f"{reason.example}; {way_out}")
        raise ConfigError(
            f"{len(self):,} of {lines:,} lines cannot be used; {way_out}:\n{self.describe()}"
        )
