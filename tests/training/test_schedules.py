"""Learning rates of each schedule, step by step, against plain formulas."""

import math
from types import SimpleNamespace

import pytest

from dspark_megatron.config import OptimizerConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.mcore.optimizer import build_scheduler

PEAK, LOW, WARMUP, STEPS = 2e-3, 2e-4, 5, 50


def plain_share(schedule, ratio, shape, step):
    """Of the way from the minimum to the peak, after the warm-up."""
    done = (step - WARMUP) / (STEPS - WARMUP)
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * done)
    if schedule == "linear":
        return 1 - done
    falling = (step - (1 - ratio) * STEPS) / (ratio * STEPS)
    if schedule == "constant" or falling <= 0:
        return 1
    return {
        "linear": 1 - falling,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * falling),
        "exponential": 2 * 0.5**falling - 1,
        "minus_sqrt": 1 - math.sqrt(falling),
    }[shape]


def rates(config, *, unit=1, start=0):
    group = {}
    scheduler = build_scheduler(config, SimpleNamespace(param_groups=[group]), STEPS, unit=unit)
    scheduler.step(start * unit)
    found = []
    for _ in range(start, STEPS):
        scheduler.step(unit)
        found.append(group["lr"])
    return found


@pytest.mark.parametrize(
    "schedule, ratio, shape",
    [
        ("cosine", None, None),
        ("linear", None, None),
        ("constant", None, None),
        ("wsd", None, "minus_sqrt"),
        ("wsd", 0.5, "linear"),
        ("wsd", 0.3, "cosine"),
        ("wsd", 0.9, "exponential"),
    ],
)
def test_rates_are_those_of_the_formula(schedule, ratio, shape):
    config = OptimizerConfig(
        lr=PEAK,
        min_lr_ratio=0 if schedule == "constant" else LOW / PEAK,
        warmup_ratio=WARMUP / STEPS,
        schedule=schedule,
        decay_ratio=ratio,
        decay_shape=shape or "minus_sqrt",
    )
    config.validate()
    expected = [PEAK * step / WARMUP for step in range(1, WARMUP + 1)]
    for step in range(WARMUP + 1, STEPS + 1):
        share = plain_share(schedule, ratio or 0.2, shape, step)
        low = PEAK if schedule == "constant" else LOW
        expected.append(low + share * (PEAK - low))
    assert rates(config) == pytest.approx(expected)
    assert rates(config, unit=8) == pytest.approx(expected)  # a run by samples
    assert rates(config, start=37) == pytest.approx(expected[37:])  # a continued one


def test_wsd_of_two_steps_ends_at_the_minimum():
    config = OptimizerConfig(lr=PEAK, warmup_ratio=0.5, schedule="wsd")
    group = {}
    scheduler = build_scheduler(config, SimpleNamespace(param_groups=[group]), 2)
    scheduler.step(2)
    assert group["lr"] == 0


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["decay_ratio=0.1"], "is of the schedule wsd, and optimizer.schedule is 'cosine'"),
        (["schedule=wsd", "decay_ratio=0"], "must be > 0"),
        (["schedule=wsd", "decay_ratio=0.9", "warmup_ratio=0.2"], "at most 1; lower either"),
        (["schedule=constant", "min_lr_ratio=0.1"], "it does not fall; leave it out"),
        (["schedule=constnat"], "did you mean 'constant'?"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(overrides, words):
    overrides = ["target.path=T", *(f"optimizer.{text}" for text in overrides)]
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides, trains=False)
    assert words in str(error.value)
