"""Hours, GPU-hours and price of a run, from the seconds of a step."""

import math
from dataclasses import dataclass

from dspark_megatron.config import TrainConfig
from dspark_megatron.config.rules import shown
from dspark_megatron.errors import require
from dspark_megatron.planning.cost.rates import check_rate
from dspark_megatron.planning.cost.step_time import StepTime
from dspark_megatron.run.check import RunPlan

HOUR = 3600.0
MOST_SAMPLES = 10**12


@dataclass(frozen=True)
class Bill:
    """What the user says of the run's length and price."""

    samples: int | None = None
    """Of the training data."""
    price: float | None = None
    """Of a GPU in an hour, in any currency."""

    def validate(self) -> None:
        require(
            self.samples is None or 1 <= self.samples <= MOST_SAMPLES,
            f"samples ({shown(self.samples)}) must be >= 1 and at most {MOST_SAMPLES:,}; leave it "
            "out where the data are not known",
        )
        if self.price is not None:
            check_rate("price_per_gpu_hour", self.price)


def step_tokens(plan: RunPlan) -> int:
    """Of samples of full length."""
    return plan.config.train.global_batch_size * plan.config.data.max_length


def run_steps(train: TrainConfig, samples: int | None) -> int | None:
    """Optimizer steps; None where epochs are asked for and the samples are not known."""
    if train.iterations is not None:
        return train.iterations
    if samples is None or train.epochs is None:
        return None
    return math.ceil(train.epochs * samples / train.global_batch_size)


@dataclass(frozen=True)
class RunCost:
    steps: int
    hours: float
    gpu_hours: float
    price: float | None
    """In the currency of the bill; None without a price of a GPU-hour."""


def run_cost(plan: RunPlan, time: StepTime, bill: Bill, gpus: int) -> RunCost | None:
    """None where the number of steps is not known."""
    steps = run_steps(plan.config.train, bill.samples)
    if steps is None:
        return None
    hours = steps * time.total / HOUR
    price = None if bill.price is None else hours * gpus * bill.price
    return RunCost(steps, hours, hours * gpus, price)


def cost_lines(plan: RunPlan, time: StepTime, bill: Bill, gpus: int) -> list[str]:
    train, rate = plan.config.train, step_tokens(plan) / time.total
    lines = [f"tokens a second: {rate:,.0f}, {rate / gpus:,.0f} a GPU (samples of full length)"]
    cost = run_cost(plan, time, bill, gpus)
    if cost is None:
        epoch = 1e6 / train.global_batch_size * time.total / HOUR
        return [
            *lines,
            f"hours of the run: not known without its samples; {epoch:,.1f} for a million of them "
            f"once, {epoch * gpus:,.0f} GPU-hours{_price(epoch * gpus, bill)}",
        ]
    return [
        *lines,
        f"hours of the run: {cost.hours:,.1f} for {cost.steps:,} steps, {cost.gpu_hours:,.0f} "
        f"GPU-hours{_price(cost.gpu_hours, bill)}",
    ]


def _price(gpu_hours: float, bill: Bill) -> str:
    if bill.price is None:
        return ""
    return f", {gpu_hours * bill.price:,.0f} at {bill.price:g} a GPU-hour"
