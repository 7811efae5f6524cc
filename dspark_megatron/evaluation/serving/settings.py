"""What a measurement of steps and a simulation of serving are told. Its imports are light, since
the help of the commands shows the defaults."""

import math
from dataclasses import dataclass

from dspark_megatron.errors import require

LAG = 2
"""Steps by which the confidences that decide a budget are older than its drafts, as in SGLang."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Which verification steps are timed, and how often."""

    batch_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Tokens of one request that are verified in a step; 1 and larger numbers."""
    requests: tuple[int, ...] = ()
    """Requests of one token each, to measure the cost by request as well."""
    context_length: int = 512
    """Tokens before those of the step."""
    rounds: int = 10
    """Turns, of which the median counts."""

    def check(self) -> None:
        tokens = self.batch_tokens
        require(
            len(set(tokens)) > 1 and min(tokens) == 1,
            f"--batch-tokens must hold 1 and larger numbers, is {list(tokens)}",
        )
        require(
            all(1 <= n <= max(tokens) for n in self.requests),
            f"--requests must lie in the range of --batch-tokens, 1 to {max(tokens)}, is "
            f"{list(self.requests)}",
        )
        require(self.rounds >= 1, f"--rounds ({self.rounds}) must be >= 1")
        require(self.context_length >= 1, f"--context-length ({self.context_length}) must be >= 1")

    def check_positions(self, longest: int) -> None:
        """ConfigError when the target has no position for some token."""
        most = max(self.batch_tokens)
        require(
            self.context_length + most <= longest,
            f"--context-length ({self.context_length}) and {most} tokens more must be at most the "
            f"target's {longest} positions",
        )


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """What is simulated beside the number of requests."""

    temperatures: list[float] | None = None
    """Of the confidence head by slot, k positive numbers; none: the confidence as it is."""
    thresholds: tuple[float, ...] = (0.5,)
    """Of the static policies."""
    lag: int = LAG
    """Steps by which the confidences that decide a budget are older than those it is spent on."""
    draft_seconds: float = 0.0
    """Time of the drafts of a step; decoding without drafts does not take it."""
    rounds: int = 4096
    """Rounds replayed by every policy, about; each takes at least 64 steps."""
    interpolate: bool = False
    """The scheduler, too, reads straight lines between the points of a table with floor look-up;
    false: it reads the table as SGLang does."""
    seed: int = 0

    def check(self, num_draft_tokens: int) -> None:
        temperatures = self.temperatures or [1.0] * num_draft_tokens
        require(
            len(temperatures) == num_draft_tokens and all(0 < t < math.inf for t in temperatures),
            f"temperatures must be {num_draft_tokens} positive numbers, one for each slot of the "
            f"records, are {temperatures}",
        )
        require(
            all(0 < t < 1 for t in self.thresholds),
            f"thresholds must lie between 0 and 1, are {list(self.thresholds)}",
        )
        require(self.lag >= 1, f"lag ({self.lag}) must be >= 1: a budget is of an earlier step")
        require(
            0 <= self.draft_seconds < math.inf,
            f"draft_seconds ({self.draft_seconds}) must be finite and >= 0",
        )
        require(self.rounds >= 1, f"rounds ({self.rounds}) must be >= 1")
