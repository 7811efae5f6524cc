"""Samples that go through target and draft together, and the blocks drawn of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dspark_megatron.config import Config
from dspark_megatron.data.collate import collate
from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.sampler import SampleRef
from dspark_megatron.ops.anchors import (
    BlockRules,
    DraftBlocks,
    anchor_seed,
    draft_blocks,
    sample_anchors,
)


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded samples and their blocks, on the CPU."""

    input_ids: Tensor
    """[b, s]"""
    lengths: list[int]
    blocks: DraftBlocks
    samples: tuple[int, ...] = ()
    """Their indices in the data; what a cache of states goes by."""

    def weight(self, slots: Tensor) -> float:
        """Sum of the loss weights of all supervised slots. slots [k]."""
        return float((self.blocks.eval_mask.double() * slots).sum())

    @classmethod
    def of(cls, refs: Sequence[SampleRef], data: Sequence[Sample], config: Config) -> "MicroBatch":
        """These samples of the data; anchors follow from the seed and a sample's epoch and index
        alone."""
        samples = [data[ref.sample_index] for ref in refs]
        ids = [sample.input_ids for sample in samples]
        masks = [sample.loss_mask for sample in samples]
        model, rules = config.model, BlockRules.of(config.loss)
        seeds = (anchor_seed(config.train.seed, r.epoch, r.sample_index) for r in refs)
        anchors = [
            sample_anchors(mask, model.num_anchors, seed, rules)
            for mask, seed in zip(masks, seeds, strict=True)
        ]
        blocks = draft_blocks(ids, masks, anchors, model.block_size, rules)
        input_ids, _ = collate(samples)
        indices = tuple(ref.sample_index for ref in refs)
        return cls(input_ids, [len(row) for row in ids], blocks, indices)
