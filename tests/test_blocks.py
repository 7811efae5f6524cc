"""Anchors, blocks and attention follow the reference semantics, slot by slot."""

import pytest
import torch
from reference import context_mask, plain_blocks, plain_tau

from dspark_megatron.ops.acceptance import tau
from dspark_megatron.ops.anchors import (
    anchor_candidates,
    anchor_seed,
    draft_blocks,
    sample_anchors,
    slot_weights,
)
from dspark_megatron.ops.block_attention import block_attention

MASK = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)


def test_a_candidate_and_its_first_label_are_supervised():
    assert anchor_candidates(MASK).tolist() == [1, 4, 5, 6]


def test_the_last_token_is_no_anchor():
    assert anchor_candidates(torch.ones(5, dtype=torch.bool)).tolist() == [0, 1, 2, 3]
    assert anchor_candidates(torch.ones(1, dtype=torch.bool)).tolist() == []


def test_anchors_are_sorted_unique_candidates_and_depend_on_the_seed_alone():
    mask = torch.rand(200, generator=torch.Generator().manual_seed(0)) > 0.3
    candidates = set(anchor_candidates(mask).tolist())
    torch.manual_seed(1)
    first = sample_anchors(mask, 20, anchor_seed(5, 0, 3))
    torch.manual_seed(2)
    assert first.tolist() == sample_anchors(mask, 20, anchor_seed(5, 0, 3)).tolist()
    assert first.tolist() == sorted(set(first.tolist())) and set(first.tolist()) <= candidates
    assert first.tolist() != sample_anchors(mask, 20, anchor_seed(5, 1, 3)).tolist()
    assert sample_anchors(mask, 10_000, 0).tolist() == sorted(candidates)


def test_every_candidate_is_drawn_alike():
    mask = torch.ones(21, dtype=torch.bool)
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[sample_anchors(mask, 5, seed)] += 1
    # 2000 draws of probability 1/4: standard deviation 19; five of them.
    assert (counts - 500).abs().max() < 97


def test_blocks_equal_the_plain_ones():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (3, 30), generator=generator)
    mask = torch.rand(3, 30, generator=generator) > 0.25
    anchors = [sample_anchors(row, 8, i) for i, row in enumerate(mask)]
    blocks = draft_blocks(ids, mask, anchors, block_size=5)
    for i, positions in enumerate(anchors):
        expected = plain_blocks(ids[i], mask[i], positions, 5)
        mine = blocks.sample_index == i
        assert torch.equal(blocks.anchor_positions[mine], positions)
        assert torch.equal(blocks.eval_mask[mine], expected.eval_mask)
        assert torch.equal(blocks.labels[mine], expected.labels)
        assert torch.equal(blocks.prev_token_ids[mine], expected.prev_token_ids)
    assert torch.equal(blocks.position_ids()[:, 0], blocks.anchor_positions)
    starts_ends = torch.tensor(blocks.context_ranges(30))
    assert torch.equal(starts_ends[:, 1] - starts_ends[:, 0], blocks.anchor_positions)


def test_a_sample_without_candidates_makes_no_block():
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    anchors = [sample_anchors(row, 4, 0) for row in mask]
    blocks = draft_blocks(ids, mask, anchors, block_size=3)
    assert blocks.sample_index.tolist() == [1, 1]
    assert blocks.eval_mask.tolist() == [[True, True, False], [True, False, False]]


def test_slot_weights():
    expected = torch.tensor([1.0, 0.7788, 0.6065])
    torch.testing.assert_close(slot_weights(3, 4.0), expected, rtol=1e-3, atol=0)
    assert slot_weights(3, None).tolist() == [1, 1, 1]


def test_tau_counts_the_bonus_token():
    rates = torch.tensor([[0.5, 0.5, 0.9], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(tau(rates, mask), plain_tau(rates, mask))
    torch.testing.assert_close(tau(rates, mask), torch.tensor([1.75, 4.0]))


@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_attention_equals_the_dense_mask(group_size):
    """Two samples flattened into one context; anchors at 0 see no context at all."""
    torch.manual_seed(0)
    length, slots, heads, kv_heads, width = 12, 3, 4, 2, 8
    anchors = [torch.tensor([0, 2, 5, 9]), torch.tensor([1, 11])]
    n = sum(map(len, anchors))
    query = torch.randn(n, slots, heads, width, requires_grad=True)
    context = [torch.randn(2 * length, kv_heads, width, requires_grad=True) for _ in range(2)]
    block = [torch.randn(n, slots, kv_heads, width, requires_grad=True) for _ in range(2)]
    ranges = [(i * length, i * length + a) for i, row in enumerate(anchors) for a in row.tolist()]
    got = block_attention(query, tuple(context), tuple(block), ranges, group_size)
    upstream = torch.randn_like(got)
    leaves = [query, *context, *block]
    got_grads = torch.autograd.grad(got, leaves, upstream)

    expected, start = [], 0
    for i, positions in enumerate(anchors):
        rows = slice(start, start + len(positions))
        part = slice(i * length, (i + 1) * length)
        keys, values = (
            torch.cat([c[part], b[rows].flatten(0, 1)]).repeat_interleave(heads // kv_heads, 1)
            for c, b in zip(context, block, strict=True)
        )
        scores = torch.einsum("qad,lad->aql", query[rows].flatten(0, 1), keys) / width**0.5
        mask = context_mask(positions, length, slots)
        probs = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        expected.append(torch.einsum("aql,lad->qad", probs, values).view_as(query[rows]))
        start += len(positions)
    expected = torch.cat(expected)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        got_grads, torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
