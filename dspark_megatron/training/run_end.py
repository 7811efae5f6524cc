"""Where a run ends, in what was asked for: iterations, or passes over the samples."""

import math
from dataclasses import dataclass

from dspark_megatron.config import TrainConfig
from dspark_megatron.training.checkpointing import RunState


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

    def is_reached(self, state: RunState) -> bool:
        if self.iterations is not None:
            return state.iteration >= self.iterations
        return state.consumed_samples >= self.samples

    def last_iteration(self, state: RunState) -> int:
        """The iteration that a run in this state ends with; its own when it has ended."""
        if self.iterations is not None:
            return max(state.iteration, self.iterations)
        left = max(0, self.samples - state.consumed_samples)
        return state.iteration + math.ceil(left / self.global_batch_size)

    @property
    def steps(self) -> int:
        """Of a run that has this batch size from its start to its end."""
        return self.iterations or math.ceil(self.samples / self.global_batch_size)

    @property
    def progress_of_a_step(self) -> int:
        """In the unit of `progress`."""
        return 1 if self.iterations is not None else self.global_batch_size

    def progress(self, state: RunState) -> int:
        """Iterations or samples so far, whichever the end is in. The learning rate goes by it."""
        return state.iteration if self.iterations is not None else state.consumed_samples

    def describe(self, state: RunState) -> str:
        """Where a run in this state stands."""
        if self.iterations is not None:
            return f"iteration {state.iteration:,} of {self.iterations:,}"
        return (
            f"iteration {state.iteration:,}, {state.consumed_samples:,} of {self.samples:,} samples"
        )
