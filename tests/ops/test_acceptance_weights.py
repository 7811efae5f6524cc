"""Weights by acceptance equal a plain loop over blocks, alone and within the fused head loss."""

import pytest
import torch
import torch.nn.functional as F

from dspark_megatron.ops.head_loss import HeadLoss, HeadWeights, Objective
from dspark_megatron.ops.objective.acceptance_weights import (
    AcceptanceWeights,
    BlockSlots,
    acceptance_weights,
    reach,
)
from support.head_loss_inputs import ROWS, make_inputs, shard_of
from support.reference import plain_acceptance_weights, plain_reach

MASK = torch.tensor(
    [[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.bool
)
"""A whole block, gaps before, between and behind supervised slots, and short blocks."""
assert MASK.sum() == ROWS


def slots_of(mask):
    return BlockSlots(mask.sum(1).tolist(), mask.flatten().nonzero().squeeze(1), mask.shape[1])


def by_block(values):
    """[r] -> [n, d], NaN where nothing may be read."""
    out = torch.full(MASK.shape, torch.nan, dtype=values.dtype)
    out[MASK] = values
    return out


def test_weights_equal_a_loop_over_blocks():
    chances = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    for function, plain in (
        (acceptance_weights, plain_acceptance_weights),
        (reach, plain_reach),
    ):
        expected = plain(by_block(chances), MASK)
        torch.testing.assert_close(function(chances, slots_of(MASK)), expected[MASK])


def test_with_alpha_1_a_slot_weighs_the_slots_from_it_on():
    weights = AcceptanceWeights("dpace", 1.0, slots_of(torch.ones(2, 4, dtype=torch.bool)))
    assert weights.of(torch.rand(8), torch.rand(8)).tolist() == [4, 3, 2, 1] * 2


@pytest.mark.parametrize("most", range(1, ROWS + 2))
def test_chunks_end_with_blocks(most):
    slots, seen = slots_of(MASK), []
    for rows, own in slots.chunks(most):
        assert sum(own.counts) == rows.stop - rows.start
        assert len(own.counts) == 1 or rows.stop - rows.start <= most
        first = len(seen)
        seen += own.counts
        mask = torch.zeros(len(own.counts) * own.width, dtype=torch.bool)
        mask[own.index] = True
        assert torch.equal(mask.view(-1, own.width), MASK[first : len(seen)])
    assert seen == list(slots.counts)


def plain(inputs, objective, name, alpha):
    """Loss and gradients on whole matrices by autograd."""
    names = ("hidden", "latent", "markov_w2")
    leaves = {x: inputs[x].clone().requires_grad_() for x in names}
    logits = leaves["hidden"] @ inputs["lm_head"].t() + leaves["latent"] @ leaves["markov_w2"].t()
    target = inputs["target_hidden"] @ inputs["lm_head"].t()
    labels = target.argmax(1) if objective.labels_from_target else inputs["labels"]
    ce = F.cross_entropy(logits, labels, reduction="none")
    l1 = (logits.softmax(1) - target.softmax(1)).abs().sum(1)
    likely = (-ce).exp() if name == "dpace" else 1 - l1 / 2
    chances = ((1 - alpha) * likely + alpha).detach()
    weights = plain_acceptance_weights(by_block(chances), MASK)[MASK]
    loss = (weights * (objective.ce * ce + objective.l1 * l1)).sum()
    loss.backward()
    return {"loss": loss.detach(), **{x: leaf.grad for x, leaf in leaves.items()}}


def fused(runtime, inputs, objective, name, alpha, chunk_rows):
    """For each size of the chunks, one rank's part."""
    shard, lm_head, markov_w2 = shard_of(inputs, runtime.tp_group)
    found = []
    for rows in chunk_rows:
        names = ("hidden", "latent")
        leaves = {x: inputs[x].clone().requires_grad_() for x in names}
        leaves["markov_w2"] = w2 = markov_w2.clone().requires_grad_()
        head = HeadWeights(torch.cat([lm_head, torch.zeros_like(w2)], dim=1), w2, shard)
        head_loss = HeadLoss(head, objective, rows, tp_group=runtime.tp_group)
        weights = AcceptanceWeights(name, alpha, slots_of(MASK))
        rest = inputs["target_hidden"], inputs["labels"], weights
        loss = head_loss(leaves["hidden"], leaves["latent"], *rest).loss
        loss.backward()
        found.append({"loss": loss.detach(), **{x: leaf.grad for x, leaf in leaves.items()}})
    return found


OBJECTIVES = {
    "paper": Objective(ce=0.1, l1=0.9),
    "CE": Objective(ce=1.0),
    "target's labels": Objective(ce=0.5, l1=0.5, labels_from_target=True),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_fused_loss_equals_the_plain_one_at_every_chunking(pool, tp):
    inputs, sizes = make_inputs(61, torch.float64), [*range(1, ROWS + 1), 100]
    for name, objective in zip(("dpard", "dpace", "dpace"), OBJECTIVES.values(), strict=True):
        arguments = dict(inputs=inputs, objective=objective, name=name, alpha=0.3)
        expected = plain(**arguments)
        ranks = pool.run(fused, world=tp, tp=tp, chunk_rows=sizes, **arguments)
        for of_size in zip(*ranks, strict=True):
            whole = torch.cat([rank["markov_w2"] for rank in of_size])[:61]
            for rank in of_size:
                for key, value in {**rank, "markov_w2": whole}.items():
                    torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11)


def test_accept_rates_need_the_target():
    head_loss = HeadLoss(None, Objective(ce=1.0), 4, tp_group=None)
    weights = AcceptanceWeights("dpard", 0.5, slots_of(MASK))
    with pytest.raises(ValueError, match="target_hidden is missing"):
        head_loss(None, None, None, None, weights)
