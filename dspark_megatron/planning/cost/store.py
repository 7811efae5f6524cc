"""A run that computes the target's states in every step against one that reads them from disk."""

import math
from dataclasses import dataclass

from dspark_megatron.planning.cost.rates import Rates
from dspark_megatron.planning.cost.run_cost import HOUR
from dspark_megatron.planning.cost.step_time import StepTime, stored_sample_bytes
from dspark_megatron.run.check import RunPlan


@dataclass(frozen=True)
class StoreCost:
    """Of one epoch over all samples, on the same GPUs."""

    nbytes: int
    passes: float
    """Seconds of the target's passes over the data, once."""
    disk: float
    """Seconds of writing what they make, when they are through."""
    online: float
    """Seconds of an epoch with the target in every step."""
    reading: float
    """Seconds of an epoch on the store."""

    @property
    def writing(self) -> float:
        return self.passes + self.disk

    @property
    def break_even(self) -> int | None:
        """The first number of epochs from which writing and reading take less time than computing;
        None if they never do."""
        gained = self.online - self.reading
        return math.floor(self.writing / gained) + 1 if gained > 0 else None


def store_cost(
    plan: RunPlan, online: StepTime, stored: StepTime, samples: int, rates: Rates
) -> StoreCost:
    """plan: of the run with the target. online, stored: a step of either."""
    steps = samples / plan.config.train.global_batch_size
    nbytes = samples * stored_sample_bytes(plan)
    return StoreCost(
        nbytes=nbytes,
        passes=steps * online.parts["target"].total,
        disk=nbytes / (1e9 * rates.disk),
        online=steps * online.total,
        reading=steps * stored.total,
    )


def store_lines(cost: StoreCost, samples: int, layout: str, rates: Rates) -> list[str]:
    """layout: of the run that reads, in words."""
    online, reading = cost.online / HOUR, cost.reading / HOUR
    even = cost.break_even
    verdict = (
        "a store never pays: an epoch on it takes no less"
        if even is None
        else f"from {even:,} epoch{'s' * (even > 1)} on a store costs less GPU time"
    )
    return [
        f"a store of the states instead, {samples:,} samples of full length, bf16, disk "
        f"{rates.disk:g} GB/s for all ranks together:",
        f"  written once: {cost.nbytes / 2**30:,.3f} GiB in {cost.writing / HOUR:,.2f} hours "
        f"({cost.passes / HOUR:,.2f} of target passes, {cost.disk / HOUR:,.2f} of disk)",
        f"  an epoch that reads it ({layout}): {reading:,.2f} hours; one that runs the target: "
        f"{online:,.2f}",
        f"  {verdict}",
    ]
