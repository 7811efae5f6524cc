"""Learning rates by step and by part of the draft."""

import math
from types import SimpleNamespace

import pytest

from dspark_megatron.config import OptimizerConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError

STEPS, PEAK, FLOOR = 40, 6e-4, 0.1


def fallen(share, shape):
    """Of the way from peak to floor, what is left after this share of the decay."""
    return {
        "linear": 1 - share,
        "cosine": (1 + math.cos(math.pi * share)) / 2,
        "exponential": 2 * 0.5**share - 1,
        "minus_sqrt": 1 - math.sqrt(share),
    }[shape]


def plain_rate(step, schedule, shape=None, decay=0):
    warmup = 4
    if step <= warmup:
        return PEAK * step / warmup
    if schedule == "constant":
        return PEAK
    floor = FLOOR * PEAK
    start = STEPS - decay if schedule == "wsd" else warmup
    if step <= start:
        return PEAK
    share = (step - start) / (STEPS - start)
    return floor + (PEAK - floor) * fallen(share, shape or schedule)


def schedule_of(unit=1, **values):
    from dspark_megatron.mcore.optimizer import build_scheduler

    group = {"lr": 0.0, "weight_decay": 0.0}
    floor = 0.0 if values.get("schedule") == "constant" else FLOOR
    config = OptimizerConfig(lr=PEAK, min_lr_ratio=floor, warmup_ratio=0.1, **values)
    config.validate()
    return build_scheduler(config, SimpleNamespace(param_groups=[group]), STEPS, unit=unit), group


CASES = [
    ({"schedule": "cosine"}, ("cosine",)),
    ({"schedule": "linear"}, ("linear",)),
    ({"schedule": "constant"}, ("constant",)),
    ({"schedule": "wsd"}, ("wsd", "linear", 8)),
    *(
        ({"schedule": "wsd", "decay_shape": shape, "decay_ratio": 0.25}, ("wsd", shape, 10))
        for shape in ("cosine", "exponential", "minus_sqrt")
    ),
]


@pytest.mark.parametrize(("values", "plain"), CASES)
@pytest.mark.parametrize("unit", [1, 8])
def test_each_step_has_the_rate_of_the_plain_formula_also_after_a_resume(values, plain, unit):
    scheduler, group = schedule_of(unit, **values)
    for step in range(1, STEPS + 1):
        scheduler.step(unit)
        assert group["lr"] == pytest.approx(plain_rate(step, *plain), rel=1e-12, abs=1e-15), step
        resumed, again = schedule_of(unit, **values)
        resumed.step(unit * step)
        assert again["lr"] == group["lr"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["optimizer.decay_ratio=0.1"],
        ["optimizer.decay_shape=cosine"],
        ["optimizer.schedule=constant", "optimizer.min_lr_ratio=0.1"],
        ["optimizer.schedule=wsd", "optimizer.decay_ratio=0"],
        ["optimizer.schedule=wsd", "optimizer.decay_ratio=0.9", "optimizer.warmup_ratio=0.2"],
        ["optimizer.lr_scale.markov_head=0"],
        ["optimizer.lr_scale.context=-1"],
        ["optimizer.lr_scale.markov_heads=2"],
        ["optimizer.lr_scale.confidence_head=2", "model.enable_confidence_head=false"],
    ],
)
def test_settings_that_nothing_uses_and_wrong_ones_are_refused(wrong):
    with pytest.raises(ConfigError) as error:
        load_config(None, wrong, trains=False)
    assert "optimizer." in str(error.value)
