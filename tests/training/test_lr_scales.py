"""Learning rates by part of the draft."""

import pytest
import torch

from dspark_megatron.config import OptimizerConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.config.lr_scale import LearningRateScales
from dspark_megatron.errors import ConfigError
from support.shapes import SHAPE
from support.tiny_draft import build_tiny_draft
from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, run_training

SCALES = {"context": 3.0, "markov_head": 2.0, "confidence_head": 0.5}
LR = 1e-3
GIVEN = ["target.path=there", "model.target_layer_ids=[1]", "model.mask_token_id=3"]


def first_updates(runtime, scales, **optimizer):
    """What the first step takes off each weight where every gradient is the same number."""
    from dspark_megatron.mcore.optimizer import build_optimizer, build_scheduler, wrap_data_parallel

    config = OptimizerConfig(
        lr=LR, warmup_ratio=0.0, clip_grad=0.0, lr_scale=LearningRateScales(**scales), **optimizer
    )
    draft = build_tiny_draft(runtime, SHAPE, torch.float32)
    model = wrap_data_parallel(draft, config)
    built = build_optimizer(config, model, torch.float32)
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    scheduler = build_scheduler(config, built, steps=10**6)
    scheduler.step(1)
    for parameter in trained.values():
        parameter.main_grad.fill_(0.5)
    built.step()
    assert scheduler.get_lr({}) == pytest.approx(LR)
    return {name: before[name] - p.detach() for name, p in trained.items()}


def scale_of_part(name):
    part = {"fc": "context", "hidden_norm": "context"}.get(name.split(".")[0], name.split(".")[0])
    return SCALES.get(part, 1.0)


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("distributed", [True, False])
def test_the_first_step_of_adamw_is_the_rate_of_each_part(pool, world, tp, distributed):
    layout = dict(world=world, tp=tp, use_distributed_optimizer=distributed)
    for rank in pool.run(first_updates, scales=SCALES, **layout):
        for name, update in rank.items():
            expected = torch.full_like(update, LR * scale_of_part(name))
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=0, msg=name)


def test_muon_takes_the_scale_of_the_part_too(pool):
    layout = dict(world=4, tp=2, name="muon")
    scaled = pool.run(first_updates, scales=SCALES, **layout)
    for mine, theirs in zip(scaled, pool.run(first_updates, scales={}, **layout), strict=True):
        assert "fc.weight" in mine
        for name, update in mine.items():
            expected = scale_of_part(name) * theirs[name]
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_scaled_run_that_goes_on_at_another_layout_keeps_its_curve(
    pool, tiny_run, tmp_path, name
):
    optimizer = {"lr_scale": SCALES, "name": name, "schedule": "constant"}

    def train(output, iterations, world, tp):
        values = {"output_dir": str(tmp_path / output), "iterations": iterations, "log_every": 1}
        config = tiny_config(tiny_run, train=values, optimizer=optimizer)
        pool.run(run_training, world=world, tp=tp, config=config)
        return curve(tmp_path / output)

    expected = train("whole", 4, 1, 1)
    train("parts", 2, 4, 2)
    # Muon's iterations are in bf16, 8 bits, and each CPU rounds their products in its own order.
    assert_same_curve(train("parts", 4, 2, 1), expected, rel=1e-3 if name == "adamw" else 5e-3)
    other = tiny_config(tiny_run, train={"output_dir": str(tmp_path / "parts"), "iterations": 6})
    if name == "adamw":
        with pytest.raises(Exception, match="lr_scale.markov_head: 2.0 there, 1.0 here"):
            pool.run(run_training, world=1, tp=1, config=other)


@pytest.mark.parametrize(
    "wrong",
    [
        ["optimizer.lr_scale.markov_head=0"],
        ["optimizer.lr_scale.context=-1"],
        ["optimizer.lr_scale.markov_heads=2"],
        ["optimizer.lr_scale.confidence_head=2", "model.enable_confidence_head=false"],
        [
            "optimizer.lr_scale.markov_head=2",
            "model.markov_rank=0",
            "model.confidence_head_with_markov=false",
        ],
    ],
)
def test_a_scale_that_is_not_positive_or_of_no_part_is_refused(wrong):
    with pytest.raises(ConfigError, match="optimizer.lr_scale"):
        load_config(None, [*GIVEN, *wrong], trains=False)
