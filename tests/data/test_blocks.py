"""Anchors, blocks and attention follow the reference semantics, slot by slot."""

import math
from itertools import product

import pytest
import torch

from dspark_megatron.config import LossConfig, ModelConfig
from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.data.batch import MicroBatch
from dspark_megatron.data.blocks import (
    anchor_candidates,
    anchor_seed,
    draft_blocks,
    sample_anchors,
    slot_weights,
)
from dspark_megatron.ops.acceptance import tau
from dspark_megatron.ops.attention.block_attention import block_attention
from dspark_megatron.ops.transfer import ContextRanges
from support.reference import plain_blocks, plain_candidates, plain_tau

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


RULES = list(product(("label", "token"), ("prefix", "all"), ("label", "input")))


@pytest.mark.parametrize("anchor_rule, supervised_slots, slot_mask", RULES)
def test_blocks_equal_the_plain_ones(anchor_rule, supervised_slots, slot_mask):
    """Three samples of unequal length; few tokens in the mask, so that blocks have gaps."""
    loss = LossConfig(
        anchor_rule=anchor_rule, supervised_slots=supervised_slots, slot_mask=slot_mask
    )
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 50, (s,), generator=generator) for s in (30, 17, 24)]
    masks = [torch.rand(len(row), generator=generator) > 0.4 for row in ids]
    anchors = [sample_anchors(row, 8, i, loss) for i, row in enumerate(masks)]
    blocks, slots = draft_blocks(ids, masks, anchors, 5, loss), slot_weights(5, 4.0)
    for i, positions in enumerate(anchors):
        assert set(positions.tolist()) <= set(plain_candidates(masks[i], anchor_rule))
        expected = plain_blocks(ids[i], masks[i], positions, 5, supervised_slots, slot_mask)
        keep = expected.eval_mask.any(dim=1)
        mine = blocks.sample_index == i
        assert torch.equal(blocks.positions[mine, 0], positions[keep])
        assert torch.equal(blocks.eval_mask[mine], expected.eval_mask[keep])
        assert torch.equal(blocks.tokens[mine, 1:], expected.labels[keep])
        at = blocks.target_samples == i
        assert torch.equal(blocks.labels[at], expected.labels[expected.eval_mask])
        assert torch.equal(blocks.weights[at], slots.expand(len(positions), 5)[expected.eval_mask])
        assert torch.equal(blocks.prev_token_ids[mine], expected.prev_token_ids[keep])
        if slot_mask == "label":
            behind = plain_blocks(
                ids[i], masks[i], positions, 6, supervised_slots, sample_from_anchor=False
            )
            for same, with_anchor in zip(expected, behind, strict=True):
                assert torch.equal(with_anchor[:, 1:], same), "slot 1 drafts what slot 0 did"
    assert blocks.candidates == sum(len(plain_candidates(m, anchor_rule)) for m in masks)
    assert torch.equal(blocks.positions, blocks.positions[:, :1] + torch.arange(5))
    assert blocks.weight == pytest.approx(blocks.weights.double().sum().item())
    assert torch.equal(blocks.supervised(blocks.positions), blocks.target_positions)
    assert torch.equal(blocks.by_slot(blocks.labels), blocks.tokens[:, 1:] * blocks.eval_mask)


PRESET_BLOCKS = {
    "deepspec": {1: "100", 4: "111", 5: "110", 6: "100"},
    "modelopt": {1: "101", 2: "011", 4: "111", 5: "110", 6: "101", 7: "010"},
    "speculators": {1: "110", 2: "101", 4: "111", 5: "111", 6: "110", 7: "100"},
}
"""By preset: anchor and supervised slots of every block of MASK, with three slots."""


BEHIND_ANCHOR = PRESET_BLOCKS | {"speculators": PRESET_BLOCKS["modelopt"]}
"""With four slots, of which the first drafts nothing. Speculators asks for a slot's own position,
as always, and there stands its label."""


@pytest.mark.parametrize("preset", PRESET_BLOCKS)
@pytest.mark.parametrize("sample_from_anchor", [True, False])
def test_the_blocks_of_a_preset(preset, sample_from_anchor):
    """Beside a longer sample, so that slot 2 of anchor 7 would have its label in the padding."""
    model = {"block_size": 3 if sample_from_anchor else 4, "sample_from_anchor": sample_from_anchor}
    config = config_from_dict({"loss": {"preset": preset}, "model": model})
    loss = config.loss
    masks = [MASK, torch.ones(14, dtype=torch.bool)]
    anchors = [sample_anchors(mask, 100, 0, loss) for mask in masks]
    ids = [torch.arange(len(mask)) for mask in masks]
    blocks = draft_blocks(ids, masks, anchors, config.model.num_draft_tokens, loss)
    mine = blocks.sample_index == 0
    slots = ["".join("01"[flag] for flag in row) for row in blocks.eval_mask[mine].tolist()]
    got = dict(zip(blocks.positions[mine, 0].tolist(), slots, strict=True))
    assert got == (PRESET_BLOCKS if sample_from_anchor else BEHIND_ANCHOR)[preset]


def test_slots_behind_the_anchor_by_hand():
    """Anchor 2, four slots, the first of them for the anchor alone. Slot 1 predicts token 3 from
    the target's state at 2, slot 2 token 4 from that at 3, and token 5 lies past the answer."""
    model = ModelConfig(block_size=4, sample_from_anchor=False)
    mask = torch.tensor([0, 1, 1, 1, 1, 0], dtype=torch.bool)
    anchors = [torch.tensor([2])]
    blocks = draft_blocks([torch.arange(6) * 10], [mask], anchors, model.num_draft_tokens)
    assert blocks.prev_token_ids.tolist() == [[20, 30, 40]]
    assert blocks.labels.tolist() == [30, 40]
    assert blocks.target_positions.tolist() == [2, 3]
    assert blocks.weights.tolist() == pytest.approx([1.0, math.exp(-1 / 4)])
    assert blocks.context_positions.tolist() == [0, 1]


def test_a_block_without_a_supervised_slot_is_a_candidate_but_no_block():
    """The last token of each answer, under a rule that looks at the token alone."""
    loss = LossConfig(anchor_rule="token", supervised_slots="all")
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    anchors = sample_anchors(mask, 100, 0, loss)
    assert anchors.tolist() == [1, 2, 5]
    blocks = draft_blocks([torch.arange(8)], [mask], [anchors], 2, loss)
    assert blocks.positions[:, 0].tolist() == [1]
    assert blocks.candidates == 3
    assert blocks.labels.tolist() == [2] and blocks.tokens.tolist() == [[1, 2, 3]]
    assert blocks.eval_mask.tolist() == [[True, False]]


def test_the_visible_context_is_packed_up_to_the_last_anchor():
    """Of four samples in rows of 10, the second has no block and the third sees nothing."""
    ids = torch.arange(40).view(4, 10)
    masks = torch.ones(4, 10, dtype=torch.bool)
    anchors = [torch.tensor(a, dtype=torch.long) for a in ([0, 2, 3], [], [0], [0, 4])]
    blocks = draft_blocks(ids, masks, anchors, 2)
    assert blocks.context_samples.tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert blocks.context_positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    ranges = blocks.context_ranges
    assert ranges.on_host == [(0, 0), (0, 2), (0, 3), (3, 3), (4, 4), (4, 8)]
    assert ranges.on_device.tolist() == list(map(list, ranges.on_host))


def test_context_outside_of_all_windows_is_left_out():
    """What each block reads by its range is what stands before its anchor, at most 3 tokens; of
    four samples, the second has no block and the third sees nothing."""
    ids = torch.arange(80).view(4, 20)
    masks = torch.ones(4, 20, dtype=torch.bool)
    anchors = [torch.tensor(a, dtype=torch.long) for a in ([0, 2, 9, 11], [], [0], [1, 18])]
    blocks = draft_blocks(ids, masks, anchors, 2, reach=3)
    assert blocks.context_samples.tolist() == [0] * 7 + [2] + [3] * 4
    assert blocks.context_positions.tolist() == [0, 1, 6, 7, 8, 9, 10, 0, 0, 15, 16, 17]
    seen = [blocks.context_positions[start:end].tolist() for start, end in blocks.bounds_on_host]
    assert seen == [[], [0, 1], [6, 7, 8], [8, 9, 10], [], [0], [15, 16, 17]]
    part = blocks.part(slice(2, 4))
    assert part.context_positions.tolist() == [6, 7, 8, 9, 10]
    wide = draft_blocks(ids, masks, anchors, 2, reach=100)
    full = draft_blocks(ids, masks, anchors, 2)
    assert all(torch.equal(tensor, full.tensors[name]) for name, tensor in wide.tensors.items())
    none = draft_blocks(ids, masks, anchors, 2, reach=0)
    assert none.context_positions.tolist() == [11, 0, 18]
    assert none.bounds_on_host == [(0, 0)] * 4 + [(1, 1)] + [(2, 2)] * 2


@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_attention_to_the_packed_context_is_that_to_all_of_it(group_size):
    """Also where two samples' ranges start at one token, the first of them being empty."""
    torch.manual_seed(0)
    anchors = [torch.tensor(a) for a in ([0, 2, 3], [0], [0, 4])]
    masks = torch.ones(3, 10, dtype=torch.bool)
    blocks = draft_blocks(masks.long(), masks, anchors, 2)
    query, key, value = (torch.randn(6, 2, 2, 4) for _ in range(3))
    context = torch.randn(2, 30, 2, 4)

    def attend(ranges, index):
        kv = context[:, index]
        ranges = ContextRanges.of(ranges, query.device)
        sizes = dict(head_dim=4, group_size=group_size)
        attention = block_attention("sdpa", ranges, 2, len(index), **sizes)
        return attention(query, (kv[0], kv[1]), (key, value))

    everything = [(0, 0), (0, 2), (0, 3), (10, 10), (20, 20), (20, 24)]
    expected = attend(everything, list(range(30)))
    index = (blocks.context_samples * 10 + blocks.context_positions).tolist()
    torch.testing.assert_close(attend(blocks.bounds_on_host, index), expected)
    alike = [(0, 0), (0, 2), (0, 3), (3, 3), (3, 3), (3, 7)]
    torch.testing.assert_close(attend(alike, [0, 1, 2, 20, 21, 22, 23]), expected)


def test_a_sample_without_candidates_makes_no_block():
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    anchors = [sample_anchors(row, 4, 0) for row in mask]
    blocks = draft_blocks(ids, mask, anchors, num_draft_tokens=3)
    assert blocks.sample_index.tolist() == [1, 1]
    assert blocks.eval_mask.tolist() == [[True, True, False], [True, False, False]]


def test_blocks_on_the_device_are_the_same_in_one_piece_of_memory():
    ids, mask = torch.arange(9), torch.ones(9, dtype=torch.bool)
    blocks = draft_blocks([ids], [mask], [torch.tensor([0, 3])], 3)
    batch = MicroBatch.of([ids], blocks, (7,))
    moved = batch.to(ids.device)
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.sample_indices == (7,)
    for name, tensor in batch.blocks.tensors.items():
        assert torch.equal(getattr(moved.blocks, name), tensor), name
    memory = {tensor.untyped_storage().data_ptr() for tensor in moved.blocks.tensors.values()}
    assert memory == {moved.input_ids.untyped_storage().data_ptr()}


def test_some_of_the_blocks_read_what_they_read_among_all():
    ids, mask = torch.arange(9), torch.ones(9, dtype=torch.bool)
    blocks = draft_blocks([ids, ids + 9], [mask] * 2, [torch.tensor([0, 3])] * 2, 3)
    part = blocks.part(slice(1, 3))
    assert part.sample_index.tolist() == [0, 1] and part.candidates == blocks.candidates
    assert part.labels.tolist() == [4, 5, 6, 10, 11, 12]
    assert part.bounds_on_host == [(0, 3), (3, 3)]
    assert not blocks.part(slice(0)).weight


def test_slot_weights():
    expected = torch.tensor([1.0, 0.7788, 0.6065])
    torch.testing.assert_close(slot_weights(3, 4.0), expected, rtol=1e-3, atol=0)
    assert slot_weights(3, None).tolist() == [1, 1, 1]


def test_tau_counts_the_bonus_token():
    rates = torch.tensor([[0.5, 0.5, 0.9], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(tau(rates, mask), plain_tau(rates, mask))
    torch.testing.assert_close(tau(rates, mask), torch.tensor([1.75, 4.0]))
