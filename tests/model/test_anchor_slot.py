"""Drafts whose slot 0 only carries the anchor (`model.sample_from_anchor: false`): the split draft
equals its plain twin, which is written slot by slot from the layout's own table."""

from dataclasses import replace

import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.shape.attention import DraftAttention
from support.draft_steps import (
    assert_plain_step,
    assert_same_gradients,
    gradients,
    plain_terms,
    step_gradients,
    whole,
)
from support.shapes import BEHIND_ANCHOR

# World size, tensor-parallel size, micro-batch size, sequence parallel.
LAYOUTS = [(1, 1, 4, False), (2, 2, 1, True), (4, 4, 2, True), (4, 2, 1, False)]


@pytest.mark.parametrize("world, tp, micro_batch_size, sequence_parallel", LAYOUTS)
@pytest.mark.parametrize("kind", BEHIND_ANCHOR)
def test_a_step_equals_the_plain_twin(pool, kind, world, tp, micro_batch_size, sequence_parallel):
    shape = BEHIND_ANCHOR[kind]
    ranks = pool.run(
        step_gradients,
        world=world,
        tp=tp,
        shape=shape,
        micro_batch_size=micro_batch_size,
        sequence_parallel=sequence_parallel,
    )
    assert_plain_step(ranks, shape)
    assert len(ranks[0]["metrics"]["accept_rate"]) == shape.num_draft_tokens == 3


@pytest.mark.parametrize("tp", [1, 2])
def test_windows_causal_blocks_and_capped_logits_equal_the_plain_twin(pool, tp):
    """A window counts from a slot's own position, that of slot 0 included."""
    attention = DraftAttention(window=5, sliding_layers=(0, 1), causal_layers=(0,), sink=True)
    changes = dict(attention=attention, logit_scale=0.7, logit_softcapping=3.0)
    shape = replace(BEHIND_ANCHOR["gated"], **changes)
    arguments = dict(shape=shape, micro_batch_size=2)
    assert_plain_step(pool.run(step_gradients, world=tp, tp=tp, **arguments), shape)


@pytest.mark.parametrize(
    "rules",
    [
        dict(anchor_rule="token", supervised_slots="all"),
        dict(anchor_rule="token", supervised_slots="prefix"),
        dict(anchor_rule="label", supervised_slots="all", ce_labels="target_argmax"),
    ],
)
def test_every_rule_of_anchors_and_slots_equals_the_plain_twin(pool, rules):
    loss, shape = LossConfig(chunk_rows=4, **rules), BEHIND_ANCHOR["rnn"]
    ranks = pool.run(step_gradients, world=1, tp=1, shape=shape, micro_batch_size=4, loss=loss)
    twin, terms = plain_terms(shape, whole(ranks, "weights", shape), loss)
    (sum(t["loss_sum"] for t in terms) / sum(t["weight"] for t in terms)).backward()
    assert_same_gradients(whole(ranks, "grads", shape), gradients(twin))


def test_metrics_by_position_are_those_of_the_drafting_slots(pool):
    """Accept rates of the twin's slots 1 to 3; its slot 0 counts nowhere."""
    shape, loss = BEHIND_ANCHOR["vanilla"], LossConfig(chunk_rows=4)
    ranks = pool.run(step_gradients, world=1, tp=1, shape=shape, micro_batch_size=4)
    _, terms = plain_terms(shape, whole(ranks, "weights", shape), loss)
    mask = torch.cat([t["eval_mask"] for t in terms])
    rates = torch.cat([t["accept_rate"] for t in terms]) * mask
    counts = mask.sum(0)
    assert counts[0] == 0
    expected = rates.sum(0)[1:] / counts[1:]
    assert ranks[0]["metrics"]["accept_rate"] == pytest.approx(expected.tolist(), rel=1e-5)
    tau = 1 + rates[mask.any(1), 1:].cumprod(1).sum(1)
    assert ranks[0]["metrics"]["tau"] == pytest.approx(tau.mean().item(), rel=1e-5)
