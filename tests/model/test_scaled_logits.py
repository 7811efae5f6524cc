"""A draft whose base logits are scaled and capped: its step is the plain twin's, and it drafts from
the logits that it was trained with."""

from dataclasses import replace

import pytest
import torch

from support.draft_passes import drafted_and_trained
from support.draft_steps import assert_plain_step, step_gradients
from support.shapes import SHAPE

KINDS = {
    "scaled": replace(SHAPE, logit_scale=0.5),
    "capped": replace(SHAPE, logit_softcapping=2.0),
    "both, rnn": replace(SHAPE, logit_scale=2.0, logit_softcapping=3.0, markov_head_type="rnn"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_step_equals_the_plain_twin(pool, kind, tp):
    arguments = dict(shape=KINDS[kind], micro_batch_size=2, sequence_parallel=tp == 2)
    assert_plain_step(pool.run(step_gradients, world=tp, tp=tp, **arguments), KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [1, 2])
def test_drafts_come_from_the_trained_logits(pool, kind, tp):
    plain = pool.run(drafted_and_trained, world=tp, tp=tp, shape=SHAPE)[0][1]
    for drafted, trained, _ in pool.run(drafted_and_trained, world=tp, tp=tp, shape=KINDS[kind]):
        torch.testing.assert_close(drafted, trained, rtol=1e-4, atol=1e-5)
        assert (trained - plain).abs().max() > 0.1
