"""Who did not come, when ranks have waited too long for each other."""

import json
from dataclasses import asdict, dataclass

from dspark_megatron.run.ranks.agreement import ranks_text

_SHOWN = 8


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself every second or two."""

    rank: int
    host: str
    beat: int
    """One more each time."""
    place: str
    marks: int
    """How many places it has been at."""
    line: str
    """Of our code, where its main thread is."""
    collective: str
    """That it waits in, if any."""
    seconds: float
    """How long its main thread has been inside the same call."""
    limit: float
    """How long that may take at its place."""

    @classmethod
    def read(cls, text: bytes) -> "Sign":
        return cls(**json.loads(text))

    def written(self) -> str:
        return json.dumps(asdict(self))

    @property
    def where(self) -> str:
        """What it does, in words."""
        inside = ", ".join(filter(None, (self.collective, self.line)))
        return f"{self.place} ({inside})" if inside else self.place

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host})"


def goes_on(before: dict[int, Sign], after: dict[int, Sign]) -> bool:
    """Whether some rank that is alive has done something lately, so that the others may wait."""
    return any(
        sign.seconds < 0.9 * sign.limit
        for rank, sign in after.items()
        if rank not in silent(before, after)
    )


def silent(before: dict[int, Sign], after: dict[int, Sign]) -> set[int]:
    """The ranks that gave no sign of life in between."""
    return {r for r, sign in after.items() if r in before and before[r].beat == sign.beat}


def absence(before: dict[int, Sign], after: dict[int, Sign], world_size: int, waited: float) -> str:
    """One sentence that names the ranks that did not come, and one of what the others wait in."""
    never = [rank for rank in range(world_size) if rank not in after]
    quiet = silent(before, after)
    alive = [sign for rank, sign in sorted(after.items()) if rank not in quiet]
    told = [f"{ranks_text(never)} never gave a sign of life"] if never else []
    told += [
        f"{after[rank].who} gives no sign of life; it was last heard of at {after[rank].where}"
        for rank in sorted(quiet)
    ]
    if not told:
        late, alive = _late(alive)
        told = [f"{sign.who} is still at {sign.where}" for sign in late]
    more = [f"{len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
    first = "; ".join(told[:_SHOWN] + more) or "all are alive, and wait for each other"
    return (
        f"ranks waited {_minutes(waited)} for each other (train.timeout_minutes): {first}. "
        f"{_waiting(alive)}Start the run again to continue it from its newest checkpoint; where "
        "ranks need longer, raise train.timeout_minutes"
    )


def _late(alive: list[Sign]) -> tuple[list[Sign], list[Sign]]:
    """Of ranks that are all alive: those that are behind, or in no collective while others are; and
    the rest."""
    newest = max((sign.marks for sign in alive), default=0)
    late = [sign for sign in alive if sign.marks < newest]
    if not late and any(sign.collective for sign in alive):
        late = [sign for sign in alive if not sign.collective]
    return late, [sign for sign in alive if sign not in late]


def _waiting(alive: list[Sign]) -> str:
    """Ranks by where they are."""
    places: dict[str, list[int]] = {}
    for sign in alive:
        places.setdefault(sign.where, []).append(sign.rank)
    told = [f"{ranks_text(ranks)} at {where}" for where, ranks in places.items()]
    return f"Waiting: {'; '.join(told[:_SHOWN])}. " if told else ""


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
