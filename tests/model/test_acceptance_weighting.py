"""A step whose slots weigh by acceptance equals its plain twin, and the options of the confidence
head's loss do what they say."""

from dataclasses import replace

import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.config.objective.terms import LossTerms, LossWeighting
from support.draft_steps import (
    assert_same_gradients,
    gradients,
    plain_terms,
    step_gradients,
    whole,
)
from support.shapes import BEHIND_ANCHOR, SHAPE

LONG = replace(SHAPE, block_size=5)
"""Blocks longer than a chunk of 4 rows."""
GAPS = dict(anchor_rule="token", supervised_slots="all")
CASES = {
    "dpace": (LONG, dict(weighting=LossWeighting(name="dpace", alpha=0.3)), "count"),
    "dpard": (
        LONG,
        dict(
            weighting=LossWeighting(name="dpard"),
            confidence_weights="reach",
            normalization="global_samples",
            **GAPS,
        ),
        "samples",
    ),
    "dpace, target's labels": (
        BEHIND_ANCHOR["rnn"],
        dict(weighting=LossWeighting(name="dpace"), ce_labels="target_argmax", **GAPS),
        "count",
    ),
    "reach": (BEHIND_ANCHOR["gated"], dict(confidence_weights="reach", **GAPS), "weight"),
}


LAYOUTS = [(1, 1, 4), (2, 1, 1), (4, 2, 2), (4, 4, 4)]
"""Ranks, tensor-parallel size and micro-batch."""


@pytest.mark.parametrize("world, tp, micro_batch_size", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_plain_twin(pool, case, world, tp, micro_batch_size):
    shape, keys, divisor = CASES[case]
    loss = LossConfig(chunk_rows=4, **keys)
    arguments = dict(shape=shape, micro_batch_size=micro_batch_size, loss=loss)
    ranks = pool.run(step_gradients, world=world, tp=tp, **arguments)
    twin, terms = plain_terms(shape, whole(ranks, "weights", shape), loss)
    total = {name: sum(t[name] for t in terms) for name in ("loss_sum", "ce_sum", "l1_sum")}
    total |= {name: sum(t[name] for t in terms) for name in ("weight", "count", "confidence_sum")}
    expected = total["loss_sum"] / {**total, "samples": len(terms)}[divisor]
    expected.backward()
    assert_same_gradients(whole(ranks, "grads", shape), gradients(twin))
    metrics = ranks[0]["metrics"]
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name in ("ce", "l1", "confidence"):
        mean = total[f"{name}_sum"] / total["weight"]
        assert metrics[f"{name}_loss"] == pytest.approx(mean.item(), rel=1e-5), name


def test_terms_without_weight_are_logged(pool):
    loss = LossConfig(chunk_rows=4, terms=LossTerms(kl=1.0))
    rank = pool.run(step_gradients, world=1, tp=1, shape=SHAPE, micro_batch_size=4, loss=loss)[0]
    assert all(rank["metrics"][f"{name}_loss"] > 0 for name in ("ce", "l1", "kl"))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_stopped_confidence_gradient_trains_its_head_alone(pool, sequence_parallel):
    """The others have the gradients that they have without the head's loss."""
    place = dict(world=2, tp=2, shape=SHAPE, micro_batch_size=2)
    place["sequence_parallel"] = sequence_parallel
    stopped, through, without = (
        pool.run(step_gradients, **place, loss=LossConfig(chunk_rows=4, **keys))[0]["grads"]
        for keys in (
            {"confidence_stop_gradient": True},
            {},
            {"confidence_head_alpha": 0.0},
        )
    )
    for name, gradient in stopped.items():
        expected = through if name.startswith("confidence_head") else without
        assert gradient.any() and torch.equal(gradient, expected[name]), name
    w1 = "markov_head.markov_w1.weight"
    assert not torch.equal(stopped[w1], through[w1])
