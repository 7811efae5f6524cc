"""Decoding with drafts whose slot 0 only carries the anchor (`model.sample_from_anchor: false`)."""

from dataclasses import replace

import pytest
import torch

from support.decoded import PROMPTS, decode
from support.shapes import BEHIND_ANCHOR, SHAPE
from support.tiny_draft import build_tiny_draft, make_samples, sample_logits
from support.tiny_target import tiny_config


def drafted_and_trained(runtime, shape, anchor):
    """Whole logits and confidence of a block by drafting, fed with the sample's own tokens, and
    those of the training pass. Rank 0's."""
    from dspark_megatron.model.drafting import Drafter
    from dspark_megatron.ops.vocab_parallel import gather_vocab

    samples, draft = make_samples(shape, (20,)), build_tiny_draft(runtime, shape).eval()
    ids, taps = samples.input_ids[0], samples.taps[0]
    _, logits, confidence = sample_logits(draft, taps, ids, torch.tensor([2, anchor]))
    trained = gather_vocab(logits[1], shape.vocab_size, tp_group=runtime.tp_group)
    drafter, found, following = Drafter(draft), [], iter(ids[anchor + 1 :])

    def pick(row):
        found.append(row[0])
        return next(following)[None], row.softmax(-1)

    drafter.add(taps[:anchor])
    proposal = drafter.propose(ids[anchor][None], pick)
    return torch.stack(found), trained, proposal, None if confidence is None else confidence[1]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", BEHIND_ANCHOR)
def test_drafting_gives_the_logits_of_training(pool, kind, tp):
    shape = BEHIND_ANCHOR[kind]
    run = pool.run(drafted_and_trained, world=tp, tp=tp, shape=shape, anchor=7)
    drafted, trained, proposal, confidence = run[0]
    assert drafted.shape == (3, shape.vocab_size) and proposal.tokens.shape == (1, 3)
    torch.testing.assert_close(drafted, trained, rtol=1e-4, atol=1e-5)
    if shape.enable_confidence_head:
        torch.testing.assert_close(proposal.confidence_logits[0], confidence, rtol=1e-4, atol=1e-5)


PERIOD = 5


class Counting:
    """A target that goes on counting modulo PERIOD. Its taps say nothing of the tokens, so that
    only the anchor's own slot tells the draft where it stands."""

    lockstep = False

    def __init__(self, shape):
        self.width, self.hidden = len(shape.target_layer_ids) * shape.hidden_size, shape.hidden_size

    def states(self, ids):
        from dspark_megatron.targets.base import TargetStates

        hidden = torch.nn.functional.one_hot((ids + 1) % PERIOD, self.hidden).float()
        return TargetStates(torch.ones(*ids.shape, self.width), hidden)

    def add_sequence(self, input_ids, cache):
        return self.states(input_ids)

    def extend(self, input_ids, cache):
        return self.states(input_ids)

    def new_cache(self):
        return None

    def forget(self, cache, tokens):
        pass

    def keep(self, cache, sequences):
        pass


def taught_to_count(runtime, shape):
    """Answers of two prompts and their rounds, by a draft that was taught on a few counts."""
    from dspark_megatron.data.blocks import draft_blocks
    from dspark_megatron.evaluation.decoding import Decoder, Sampling
    from dspark_megatron.ops.logit_transform import TargetHead

    draft, target = build_tiny_draft(runtime, shape), Counting(shape)
    ids = torch.arange(30) % PERIOD
    blocks = draft_blocks(
        [ids], [torch.ones(30, dtype=torch.bool)], [torch.arange(4, 20)], shape.num_draft_tokens
    )
    taps = target.states(ids[None]).taps
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        logits = blocks.supervised(draft(taps, blocks).hidden) @ draft.lm_head.t()
        loss = torch.nn.functional.cross_entropy(logits, blocks.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head = torch.zeros(shape.vocab_size, shape.hidden_size)
    head[:PERIOD, :PERIOD] = torch.eye(PERIOD)
    sampling = Sampling(0.0, 21, frozenset())
    decoder = Decoder(target, draft.eval(), TargetHead(head), sampling, batch_size=2)
    prompts, seeds = [[0, 1, 2], [3, 4, 0, 1]], [0, 1]
    fast, slow = decoder.speculative(prompts, seeds), decoder.plain(prompts, seeds)
    return (
        [g.token_ids for g in fast.generations],
        [g.token_ids for g in slow.generations],
        [(r.proposed, r.accepted) for g in fast.generations for r in g.rounds],
    )


@pytest.mark.parametrize("sample_from_anchor", [True, False])
def test_a_draft_that_has_learnt_to_count_is_kept_whole(pool, sample_from_anchor):
    """Without a Markov head, so that a slot drafts by its place in the block alone: read one slot
    away from where it was taught, every draft would be wrong. Both layouts draft three tokens."""
    shape = replace(
        SHAPE,
        markov_rank=0,
        enable_confidence_head=False,
        confidence_head_with_markov=False,
        block_size=3 if sample_from_anchor else 4,
        sample_from_anchor=sample_from_anchor,
    )
    fast, slow, rounds = pool.run(taught_to_count, world=1, tp=1, shape=shape)[0]
    assert fast == slow == [[(start + i) % PERIOD for i in range(21)] for start in (3, 2)]
    assert set(rounds) == {(3, 3)}, "three tokens a round, and all are kept"


def one_more_of_each(logits):
    """Lengths to verify: 1 of the first sequence, 2 of the second and so on."""
    return (torch.arange(len(logits)) + 1).clamp(max=logits.shape[1])


@pytest.mark.parametrize("tp, cut", [(1, None), (2, one_more_of_each)])
def test_greedy_output_is_the_targets_own(pool, tiny_run, tp, cut):
    config = tiny_config(
        tiny_run,
        parallel={"tensor_parallel": tp},
        model={"markov_head_type": "rnn", "block_size": 4, "sample_from_anchor": False},
        evaluate={"batch_size": 3},
    )
    ranks = pool.run(decode, world=tp, tp=tp, config=config, prompts=PROMPTS, cut=cut)
    assert all(fast == slow for _, fast, slow, _ in ranks[0])
    proposed = {p for *_, rounds in ranks[0] for p, _, _ in rounds}
    assert max(proposed) == 3 and (cut is None or proposed == {1, 2, 3})
