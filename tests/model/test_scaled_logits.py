"""A draft whose base logits are scaled and capped: its step is the plain twin's, and it drafts from
the logits that it was trained with."""

from dataclasses import replace

import pytest
import torch

from support.draft_steps import assert_plain_step, step_gradients
from support.shapes import SHAPE
from support.tiny_draft import build_tiny_draft, make_samples, sample_logits

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


def drafted_and_trained(runtime, shape):
    """Logits [n, k, v] of blocks, and those that drafting picks from when it picks their tokens."""
    from dspark_megatron.model.drafting import Drafter
    from dspark_megatron.ops.vocab_parallel import gather_vocab

    draft, samples = build_tiny_draft(runtime, shape).eval(), make_samples(shape)
    ids, taps, anchors = samples.input_ids[0], samples.taps[0], torch.tensor([4, 9, 15])
    _, trained, _ = sample_logits(draft, taps, ids, anchors)
    drafter, seen = Drafter(draft), []
    for anchor in anchors:
        drafter.add(taps[:anchor])

    def pick(logits):
        seen.append(logits)
        return ids[anchors + len(seen)], logits.softmax(dim=-1)

    drafter.propose(ids[anchors], pick)
    whole = gather_vocab(trained, shape.vocab_size, tp_group=runtime.tp_group)
    return whole, torch.stack(seen, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [1, 2])
def test_drafts_come_from_the_trained_logits(pool, kind, tp):
    plain = pool.run(drafted_and_trained, world=tp, tp=tp, shape=SHAPE)[0][0]
    for trained, drafted in pool.run(drafted_and_trained, world=tp, tp=tp, shape=KINDS[kind]):
        torch.testing.assert_close(drafted, trained, rtol=1e-4, atol=1e-5)
        assert (trained - plain).abs().max() > 0.1
