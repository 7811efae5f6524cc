"""Where a run ends, in what was asked for, and what is said of one that has ended. Imports nothing
heavy, since a command asks before it starts any rank.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

from dspark_megatron.config import Config, TrainConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError, require


class Progress(Protocol):
    """How far a run is."""

    @property
    def iteration(self) -> int: ...

    @property
    def consumed_samples(self) -> int: ...


@dataclass(frozen=True)
class RunEnd:
    """Stays what it is when the batch size changes on the way."""

    iterations: int | None
    """Null where samples were asked for."""
    samples: int | None
    """Null where iterations were asked for."""
    global_batch_size: int

    @classmethod
    def of(cls, train: TrainConfig, num_samples: int) -> "RunEnd":
        """num_samples: of one epoch."""
        samples = None
        if train.epochs is not None:
            samples = max(1, math.ceil(train.epochs * num_samples))
        return cls(train.iterations, samples, train.global_batch_size)

    def is_reached(self, state: Progress) -> bool:
        if self.iterations is not None:
            return state.iteration >= self.iterations
        return state.consumed_samples >= (self.samples or 0)

    def last_iteration(self, state: Progress) -> int:
        """The iteration that a run in this state ends with; its own when it has ended."""
        if self.iterations is not None:
            return max(state.iteration, self.iterations)
        left = max(0, (self.samples or 0) - state.consumed_samples)
        return state.iteration + math.ceil(left / self.global_batch_size)

    @property
    def steps(self) -> int:
        """Of a run that has this batch size from its start to its end."""
        return self.iterations or math.ceil((self.samples or 0) / self.global_batch_size)

    @property
    def progress_of_a_step(self) -> int:
        """In the unit of `progress`."""
        return 1 if self.iterations is not None else self.global_batch_size

    def progress(self, state: Progress) -> int:
        """Iterations or samples so far, whichever the end is in. The learning rate goes by it."""
        return state.iteration if self.iterations is not None else state.consumed_samples

    def describe(self, state: Progress) -> str:
        """Where a run in this state stands."""
        if self.iterations is not None:
            return f"iteration {state.iteration:,} of {self.iterations:,}"
        samples, consumed = self.samples or 0, state.consumed_samples
        more = f", {consumed - samples:,} more in the last batch" if consumed > samples else ""
        done = min(consumed, samples)
        return f"iteration {state.iteration:,}, {done:,} of {samples:,} samples{more}"


def completed_text(config: Config) -> str | None:
    """What is said of a run that these very settings have completed: known from its folder alone,
    so before any rank is started. None for any other, of which the ranks say more."""
    folder = Path(config.train.output_dir)
    try:
        before = load_config(folder / "config.yaml")
        if config.data.template_date is None:  # the run has been given one
            before.data.template_date = None
        status = (folder / "run_status").read_text(encoding="utf-8").strip()
        if not config.train.resume or status != "completed" or before != config:
            return None
        checkpoints = folder / "checkpoints"
        newest = (checkpoints / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8")
        file = checkpoints / f"iter_{int(newest):07d}" / "dspark.json"
        state = SimpleNamespace(**json.loads(file.read_text(encoding="utf-8")))
        end = RunEnd.of(config.train, state.num_samples)
        return finished_text(end.describe(state), config.train) if end.is_reached(state) else None
    except (ConfigError, OSError, ValueError, TypeError, AttributeError):  # the ranks say it
        return None


def check_length(train: TrainConfig, num_samples: int) -> None:
    """ConfigError where a single step takes more samples than were asked for in all."""
    if train.epochs is None:
        return
    samples, size = RunEnd.of(train, num_samples).samples or 0, train.global_batch_size
    least = math.ceil(100 * size / num_samples) / 100
    require(
        size <= samples,
        f"train.epochs ({train.epochs:g}) of {num_samples:,} samples are {samples:,} samples, and "
        f"one step of train.global_batch_size ({size:,}) takes more; lower train.global_batch_size "
        f"to at most {samples:,}, or set train.epochs={least:g} or train.iterations",
    )


def finished_text(state: str, train: TrainConfig) -> str:
    """What is said of a run that had reached its end before it was started."""
    key = "train.iterations" if train.iterations is not None else "train.epochs"
    return (
        f"nothing is left to do: the run is at {state}; {key} must ask for more to continue it. "
        f"To see what it has learnt: dspark evaluate {train.output_dir}"
    )
